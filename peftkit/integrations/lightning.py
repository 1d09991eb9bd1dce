"""Lightning: checkpoints without the base's weights, and schedules, as callbacks.

Lightning lets a callback change a checkpoint that is written, but reads the model before any callback sees the file. What
is missing there is therefore answered by a `load_state_dict` post-hook, which torch has for this, on the LightningModule
while the Trainer works with it: frozen weights of the base count as given, all else is as strict as before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from peftkit import ledger, storage
from peftkit.integrations.base_weights import of_adapter
from peftkit.schedules.schedule import Schedule, SteppedSchedule
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

_KEY = "peftkit"  # in the checkpoint: what each adapter is, and the fingerprint of its base


def without_base(module: nn.Module) -> RemovableHandle:
    """Let `module.load_state_dict(strict=True)` accept a state without the frozen weights of the base.

    `AdapterCheckpoints` does it for the Trainer. Call it at the end of a LightningModule's `__init__`, after attaching,
    for `load_from_checkpoint`. Everything else that is missing or unexpected is an error as before.
    """

    def forgive(module: nn.Module, incompatible: Any) -> None:
        # the hook is told names as seen from `module` alone
        known = frozen(module)
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in known]

    return module.register_load_state_dict_post_hook(forgive)


def frozen(module: nn.Module) -> set[str]:
    """The names of the base's parameters that are not trained, in the part of `module` that adapters were attached to.

    Raises:
        ValueError: nothing is attached.
    """
    root, _ = ledger.require(module)
    at = next(name for name, inside in module.named_modules() if inside is root)
    prefix = f"{at}." if at else ""
    found = root.named_parameters(remove_duplicate=False)
    return {prefix + name for name, p in found if not (p.requires_grad or of_adapter(name))}


class AdapterCheckpoints(Callback):
    """Leave the base's frozen weights out of the checkpoints, and read such checkpoints, strictly, into what is attached.

    A checkpoint then holds the adapters, whatever else is trained, all buffers, and what Lightning keeps. Attach the same
    adapters, in the LightningModule's `__init__` or `configure_model`, before going on from one. For a directory that peft
    reads, call `peftkit.save` on the model.

    Raises:
        ValueError: nothing is attached; a `ModelCheckpoint` with `save_weights_only=True`, in which callbacks have no say.
        StorageError: a checkpoint of other adapters or of another base.
    """

    def __init__(self) -> None:
        self._hook: RemovableHandle | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for one in trainer.checkpoint_callbacks:
            if getattr(one, "save_weights_only", False):
                raise ValueError(
                    f"{type(one).__name__}(save_weights_only=True) asks no callback, so the base would be written whole; "
                    "leave it False: without the base, optimizer states are what is left"
                )
        if self._hook is None:
            self._hook = without_base(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ledger.require(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        left_out = frozen(pl_module)
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: t for key, t in state.items() if key not in left_out}
        checkpoint[_KEY] = _identities(pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        kept = checkpoint.get(_KEY)
        if kept is None:
            return  # one with the base in it
        _, record = ledger.require(pl_module)
        if kept.keys() != record.attachments.keys():
            raise StorageError(
                f"the checkpoint is of the adapters {sorted(kept)}, and attached are {sorted(record.attachments)}; attach "
                "what was trained, under the same names"
            )
        for name, attachment in record.attachments.items():
            storage.check_identity(kept[name], attachment)


def _identities(module: nn.Module) -> dict[str, Any]:
    _, record = ledger.require(module)
    return {name: storage.identity(attachment) for name, attachment in record.attachments.items()}


class ScheduleCallback(Callback):
    """A schedule over a fit: made from the first optimizer when training begins, stepped after each optimizer step.

    Its state is in every checkpoint, and a resumed fit goes on exactly.

    Args:
        schedule: its class, such as `LISA`.
        settings: what it takes beside the model and the optimizer.

    Attributes:
        schedule: the schedule of the fit, from its beginning on.

    Raises:
        ValueError: several optimizers; as the schedule.
    """

    schedule: Schedule | None

    def __init__(self, schedule: type[Schedule], **settings: Any):
        self._make, self._settings = schedule, settings
        self.schedule = None
        self._kept: dict[str, Any] | None = None
        self._steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise ValueError(f"a schedule switches what one optimizer trains, and there are {len(trainer.optimizers)}")
        self.schedule = self._make(pl_module, trainer.optimizers[0], **self._settings)
        if self._kept is not None:
            self.schedule.load_state_dict(self._kept)
        self._steps = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._steps:
            return  # gradients are being accumulated
        self._steps = trainer.global_step
        if isinstance(self.schedule, SteppedSchedule):
            self.schedule.step()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.schedule is not None:
            self.schedule.close()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.schedule is None else {"schedule": self.schedule.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._kept = state_dict.get("schedule")
