"""transformers: a Trainer whose checkpoints hold adapters, schedules as a callback, and directories for `from_pretrained`.

Checkpoints are a mixin and not a callback, because no event can do it. `Trainer` writes the model in `_save`, before
`on_save`, so a callback could only delete the base that was just written. It reads the model in `_load_from_checkpoint`
before the first event of a run, and in `_load_best_model` without one; both look for a whole model unless it is a
`PeftModel`, fail where there is none, and would read adapters without being strict. These three methods are what
transformers means subclasses to override; nothing else is.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftkit import api, ledger
from peftkit.integrations.base_weights import base_state, check_base_frozen, of_adapter
from peftkit.integrations.runs import Runs
from peftkit.schedules.schedule import Schedule
from peftkit.storage import StorageError, layout

try:
    from transformers import PreTrainedModel, Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(
        "peftkit.integrations.transformers needs transformers and accelerate: pip install 'peftkit[transformers]'"
    ) from error

__all__ = ["AdapterCheckpoints", "AdapterTrainer", "ScheduleCallback", "save_pretrained"]

_DEFAULT = "default"  # lies in the directory itself, as in peft; others in one of their name inside
_ADAPTERS = "peftkit_adapters.json"  # the names of those in a checkpoint; what else lies there may be older
_TRAINING_ARGS = "training_args.bin"
_SCHEDULE = "peftkit_schedule"  # in `trainer_state.json`

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class AdapterCheckpoints(_Base):
    """Put before a Trainer class: its checkpoints hold the adapters, as `peftkit.save` writes them, and not the base.

    All attached adapters are written, whether they act or not: `"default"` into the checkpoint itself, another into a
    directory of its name. Resuming, and `load_best_model_at_end`, read them into the attached ones, as `peftkit.restore`
    does. Attach the same adapters before resuming. `save_model` writes the same.

    Raises:
        ValueError: FSDP or DeepSpeed, which write checkpoints of their own; no adapter is attached; the base is trained.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                f"{type(self).__name__} cannot write checkpoints of adapters under "
                f"{'FSDP' if self.is_fsdp_enabled else 'DeepSpeed'}, which writes sharded ones of its own; use the plain "
                "Trainer there, and peftkit.save after training"
            )
        check_base_frozen(self._adapted())
        self.add_callback(_Check())

    def _adapted(self) -> nn.Module:
        return self.model  # type: ignore[return-value]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = str(self.args.output_dir if output_dir is None else output_dir)
        model = self._adapted()
        check_base_frozen(model)
        _save_all(model, folder)
        # as in `Trainer._save`, what else a directory of a model holds
        processing: Any = self.processing_class
        if processing is None:
            processing = getattr(self.data_collator, "tokenizer", None)
        if processing is not None:
            processing.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, _TRAINING_ARGS))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        _restore_all(self._adapted() if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None  # else the Trainer does not ask
        _restore_all(self._adapted(), best)


class AdapterTrainer(AdapterCheckpoints, Trainer):
    """`transformers.Trainer` with `AdapterCheckpoints`."""


class _Check(TrainerCallback):
    """Refuses, before anything is trained, what no checkpoint of adapters would hold."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        api.parameters(kwargs["model"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check_base_frozen(kwargs["model"])


def _save_all(model: nn.Module, folder: str) -> None:
    """Write every attached adapter, and which those are.

    File by file: `folder` may be a mount point, and holds older checkpoints where it is the run's own.
    """
    names = list(api.adapters(model))
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".adapters-", dir=folder) as fresh:
        for name in names:
            written, place = Path(fresh) / name, Path(_place(folder, name))
            api.save(model, written, name=name)
            place.mkdir(exist_ok=True)
            for file in written.iterdir():
                os.replace(file, place / file.name)
    Path(folder, _ADAPTERS).write_text(json.dumps(names))


def _restore_all(model: nn.Module, folder: str) -> None:
    """Read every attached adapter, or none; what is in the directory and what is attached must have the same names.

    Raises:
        StorageError: they have not, or as `peftkit.restore`; the model is as it was.
    """
    file = Path(folder, _ADAPTERS)
    if not file.exists():
        raise StorageError(f"{folder} is no checkpoint of adapters: {_ADAPTERS} is missing")
    attached, stored = set(api.adapters(model)), set(json.loads(file.read_text()))
    if attached != stored:
        raise StorageError(
            f"{folder} holds {_names(stored)}; attached: {_names(attached)}. Attach what was trained, under the same names, "
            "before resuming"
        )
    before = {key: t.clone() for key, t in model.state_dict().items() if of_adapter(key)}
    try:
        for name in sorted(attached):
            api.restore(model, Path(_place(folder, name)), name=name)
    except BaseException:
        now = model.state_dict()
        for key, t in before.items():
            now[key].copy_(t)
        raise


def _place(folder: str, name: str) -> str:
    return folder if name == _DEFAULT else os.path.join(folder, name)


def _names(names: set[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "no adapter"


# -- schedules ------------------------------------------------------------------------------------------------------------


class ScheduleCallback(TrainerCallback):
    """A schedule over a run of the Trainer: made when training begins, stepped after each optimizer step, closed at the end.

    Its state is in every checkpoint, and a resumed run goes on exactly. With the plain Trainer, whose checkpoints hold the
    base that a schedule trains, not with `AdapterCheckpoints`. Each `train()` with `HalfFineTuning` is a round. No
    callback is told of an exception: after one, the next Trainer with this callback begins as it should, and for anything
    else `schedule.close()` gives the model back.

    Args:
        schedule: its class, such as `LISA`.
        settings: what it takes beside the model and the optimizer.

    Attributes:
        schedule: the schedule of the run, from its beginning on.
    """

    def __init__(self, schedule: type[Schedule], **settings: Any):
        self._runs = Runs(schedule, settings)

    @property
    def schedule(self) -> Schedule | None:
        return self._runs.schedule

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._runs.end()  # before a new Trainer makes its optimizer of what is on

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = state.stateful_callbacks.get(_SCHEDULE)
        self._runs.begin(kwargs["model"], kwargs["optimizer"], kept)
        if kept is None and state.global_step:
            logger.warning(
                f"The run goes on from step {state.global_step} of a checkpoint without a schedule: "
                f"{self._runs.make.__name__} begins anew."
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._runs.step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # not as an ExportableState, which is made anew from JSON on request, and a class is none
        assert self.schedule is not None
        state.stateful_callbacks[_SCHEDULE] = self.schedule.state_dict()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._runs.end()


# -- directories for from_pretrained ------------------------------------------------------------------------------------

# What transformers 5.23 attaches as the same function; it refuses prompts and VeRA, and loses the magnitudes of DoRA.
_ATTACHES = ("lora", "ia3", "loha", "lokr")


def save_pretrained(
    model: PreTrainedModel, path: str | os.PathLike[str], *, merged: bool = False, **kwargs: Any
) -> None:
    """Write a directory that `from_pretrained` makes the same function of.

    Args:
        merged: whole weights that hold the active adapters, which whoever loads them need not know of; the model itself
            stays as it is. Else the base and beside it the one active adapter, which transformers attaches through peft.
        kwargs: for `model.save_pretrained`.

    Raises:
        NotMergeable: with `merged`, for an adapter that no weight can hold.
        ValueError: the model is quantised. Without `merged`: not exactly one adapter is active, it is merged, or
            transformers would not attach it as the same function. With it: the directory holds an adapter, which would be
            added to the weights that hold it already.
    """
    _, record = ledger.require(model)
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "transformers writes a quantised model's tensors itself, adapters' too; write the adapter by peftkit.save, and "
            "load it on the same quantised base"
        )
    acting = api.active(model)
    if merged:
        _save_merged(model, path, [name for name in acting if name not in record.merged], **kwargs)
        return
    if record.merged:
        raise ValueError(
            f"{', '.join(map(repr, record.merged))} is merged, so the base is not there to write; unmerge(model) first, or "
            "pass merged=True"
        )
    if len(acting) != 1:
        raise ValueError(
            f"{len(acting)} adapters are active, and from_pretrained attaches one; activate one, or pass merged=True"
        )
    (attachment,) = record.named(acting)
    if attachment.config.method not in _ATTACHES:
        raise ValueError(
            f"{acting[0]!r} is a {type(attachment.config).__name__}, which from_pretrained does not attach as the same "
            "function; pass merged=True if it can be merged, or write it by peftkit.save and read it by peftkit.load"
        )
    model.save_pretrained(path, state_dict=base_state(model), **kwargs)
    api.save(model, path, name=acting[0])


def _save_merged(model: PreTrainedModel, path: str | os.PathLike[str], beside: list[str], **kwargs: Any) -> None:
    if (Path(path) / layout.CONFIG).exists():
        raise ValueError(
            f"{path} holds an adapter, which from_pretrained would add to the merged weights; give another directory"
        )
    if not beside:
        model.save_pretrained(path, state_dict=base_state(model), **kwargs)
        return
    _, record = ledger.require(model)
    if record.merged:
        raise ValueError(
            f"{', '.join(map(repr, record.merged))} is merged and {', '.join(map(repr, beside))} is not; "
            "unmerge(model) first"
        )
    api.merge(model)
    try:
        model.save_pretrained(path, state_dict=base_state(model), **kwargs)
    finally:
        api.unmerge(model)
