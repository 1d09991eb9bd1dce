"""Lightning: checkpoints without the base's weights, and schedules, as callbacks.

Lightning lets a callback change a checkpoint that is written, but reads the model before any callback sees the file. So the
checkpoint's `state_dict` says itself what was left out of it, of which adapters and of which base; hooks of
`load_state_dict`, which torch has for this, read that: exactly what was left out counts as given, all else is strict.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from peftkit import api, ledger, storage
from peftkit.integrations.base_weights import of_adapter
from peftkit.integrations.runs import Runs
from peftkit.schedules.schedule import Schedule
from peftkit.storage import StorageError

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback, LightningModule, Trainer
    except ImportError:  # the same package under its other name, whose classes are others
        try:
            from pytorch_lightning import Callback, LightningModule, Trainer
        except ImportError as error:
            raise ImportError(
                "peftkit.integrations.lightning needs lightning (or pytorch_lightning): pip install 'peftkit[lightning]'"
            ) from error

__all__ = ["AdapterCheckpoints", "ScheduleCallback", "without_base"]

Handles = tuple[RemovableHandle, ...]
_KEY = "peftkit_left_out"  # in the `state_dict` of a checkpoint


def without_base(module: nn.Module) -> Handles:
    """Let `module.load_state_dict` read states that `AdapterCheckpoints` wrote, as strictly as any other.

    `AdapterCheckpoints` does it for the Trainer. Call it at the end of a LightningModule's `__init__`, after attaching,
    for `load_from_checkpoint`.
    """
    reading = _Reading()
    return (
        module.register_load_state_dict_pre_hook(reading.before),
        module.register_load_state_dict_post_hook(reading.after),
    )


class _Reading:
    """The two hooks, and what passes from the one to the other: what the state says of itself."""

    def __init__(self) -> None:
        self.about: dict[str, Any] | None = None

    def before(self, module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
        written = state_dict.pop(_KEY, None)
        self.about = None if written is None else json.loads(bytes(written.tolist()))

    def after(self, module: nn.Module, incompatible: Any) -> None:
        """Compare with what is attached, once the base holds what the state has of it.

        Raises:
            StorageError: other adapters, other settings, or another base.
        """
        if self.about is None:
            return  # a state with the base in it
        left_out, kept = set(self.about["left_out"]), self.about["adapters"]
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in left_out]
        _, record = ledger.require(module)
        if kept.keys() != record.attachments.keys():
            raise StorageError(
                f"the checkpoint is of the adapters {sorted(kept)}, and attached are {sorted(record.attachments)}; attach "
                "what was trained, under the same names"
            )
        for name, attachment in record.attachments.items():
            storage.check_identity(kept[name], attachment)
        _trained(module).update(n for n, p in module.named_parameters() if n not in left_out)


def _trained(module: nn.Module) -> set[str]:
    """The names of what has been trained in any fit, or came from a checkpoint: kept with the module, as the weights are."""
    return vars(module).setdefault("_peftkit_trained", set())


class AdapterCheckpoints(Callback):
    """Leave the base's frozen weights out of the checkpoints, and read such checkpoints, strictly, into what is attached.

    A checkpoint then holds the adapters, whatever else has been trained for a step or more, all buffers, and what Lightning
    keeps. Attach the same adapters, in the LightningModule's `__init__` or `configure_model`, before going on from one. For
    a directory that peft reads, call `peftkit.save` on the model.

    Raises:
        ValueError: nothing is attached or trained; a `ModelCheckpoint` with `save_weights_only=True`, in which callbacks
            have no say.
        StorageError: a checkpoint of other adapters or of another base.
    """

    def __init__(self) -> None:
        self._hooks: Handles = ()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for one in trainer.checkpoint_callbacks:
            if getattr(one, "save_weights_only", False):
                raise ValueError(
                    f"{type(one).__name__}(save_weights_only=True) asks no callback, so the base would be written whole; "
                    "leave it False: without the base, optimizer states are what is left"
                )
        self._remove()
        self._hooks = without_base(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        api.parameters(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # before a schedule may switch
        _trained(pl_module).update(name for name, p in pl_module.named_parameters() if p.requires_grad)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        there = ledger.find(pl_module)
        if there is None:
            return  # ejected, or merged for good: what is left is a whole model
        root, record = there
        own = {id(p) for name, p in root.named_parameters() if not of_adapter(name)}
        trained = {id(p) for n, p in pl_module.named_parameters() if p.requires_grad or n in _trained(pl_module)}
        everywhere = pl_module.named_parameters(remove_duplicate=False)  # a model may stand under several names
        left_out = {name for name, p in everywhere if id(p) in own - trained}
        about = {
            "left_out": sorted(left_out),
            "adapters": {name: storage.identity(attachment) for name, attachment in record.attachments.items()},
        }
        kept = {key: t for key, t in checkpoint["state_dict"].items() if key not in left_out}
        kept[_KEY] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
        checkpoint["state_dict"] = kept

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()


class ScheduleCallback(Callback):
    """A schedule over a fit: made from the first optimizer when training begins, stepped after each optimizer step.

    Its state is in every checkpoint, and a resumed fit goes on exactly. Each fit with `HalfFineTuning` is a round.

    Args:
        schedule: its class, such as `LISA`.
        settings: what it takes beside the model and the optimizer.

    Attributes:
        schedule: the schedule of the fit, from its beginning on.

    Raises:
        ValueError: several optimizers; as the schedule.
    """

    def __init__(self, schedule: type[Schedule], **settings: Any):
        self._runs = Runs(schedule, settings)
        self._kept: dict[str, Any] | None = None
        self._steps = 0

    @property
    def schedule(self) -> Schedule | None:
        return self._runs.schedule

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise ValueError(f"a schedule switches what one optimizer trains, and there are {len(trainer.optimizers)}")
        kept, self._kept = self._kept, None
        self._runs.begin(pl_module, trainer.optimizers[0], kept)
        self._steps = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._steps:
            return  # gradients are being accumulated
        self._steps = trainer.global_step
        self._runs.step()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._runs.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._runs.end()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.schedule is None else {"schedule": self.schedule.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._kept = state_dict.get("schedule")
