"""Whether a stored adapter belongs to a base's files: all that `load` would check, and no model is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from peftkit import ledger, loading, storage
from peftkit.checkpoints.files import Checkpoint, open_checkpoint
from peftkit.checkpoints.fitting import fit
from peftkit.checkpoints.weighting import Folder
from peftkit.storage import StorageError


@dataclass(frozen=True)
class Verified:
    """What was found to fit.

    Attributes:
        adapter, base: the directories.
        method: of the adapter.
        sites: modules of the base that it changes.
        sampled: weights of the base that were compared with those it was trained on; 0 where it says nothing of them.
        sealed: whether the adapter has a checksum, which then is that of its bytes.
    """

    adapter: str
    base: str
    method: str
    sites: Sequence[str]
    sampled: int
    sealed: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        return {**asdict(self), "sites": list(self.sites)}

    def __str__(self) -> str:
        base = (
            f"{self.sampled} of its weights are those it was trained on"
            if self.sampled
            else "whether it was trained on it is not known: it keeps no sample of its base"
        )
        seal = "its checksum is right" if self.sealed else "it has no checksum"
        return f"{self.adapter} ({self.method}) fits {self.base} at {len(self.sites)} modules; {base}; {seal}"


def verify(adapter: Folder, base: Folder) -> Verified:
    """Check a stored adapter against a base's files, as strictly as `load` against the model.

    Adapters of weights need the names and shapes alone. For others, prompts and bottlenecks, the model is made without
    memory (on the meta device), by transformers and the class that `config.json` names.

    Raises:
        StorageError: it does not fit, or files are damaged; the message says what and where.
        ImportError: transformers is needed, and is not there.
    """
    stored = storage.read(adapter)
    checkpoint = open_checkpoint(base)
    if stored.config.mergeable:
        fitted = fit(checkpoint, [stored], check_base=True)
        root, name = fitted.root, fitted.names[0]
    else:
        root, name = _empty_model(checkpoint), "adapter"
        loading.attach(root, stored, name=name, trainable=False, check_base=True)
    (attachment,) = ledger.require(root)[1].named([name])
    sites = [where for where, one in attachment.adapters.items() if not one.beside]
    sampled = len((stored.base or {}).get("names", ()))
    return Verified(str(stored.path), str(checkpoint.path), stored.config.method, sites, sampled, stored.own)


def _empty_model(checkpoint: Checkpoint) -> nn.Module:
    """The model of the checkpoint's class, its weights mapped, and read as far as they are looked at."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "an adapter that is no change of weights is checked against the model's modules, which needs transformers: "
            "pip install 'peftkit[transformers]'"
        ) from error
    kinds = checkpoint.config.get("architectures")
    kind = getattr(transformers, str(kinds[0]), None) if isinstance(kinds, list) and kinds else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise StorageError(
            f"{checkpoint.path / 'config.json'} names {kinds!r} as its architectures; expected a class of transformers, to "
            "know which modules it has"
        )
    try:
        config = kind.config_class.from_dict(dict(checkpoint.config))  # type: ignore[union-attr]
        with torch.device("meta"):
            model = kind(config)
    except Exception as error:  # whatever a model's code raises on a config it does not understand
        raise StorageError(
            f"{checkpoint.path / 'config.json'}: {kind.__name__} cannot be made of it: {error}"
        ) from error
    named = {k: checkpoint.tensor(k) for k in checkpoint.places if k in model.state_dict()}
    model.load_state_dict(named, strict=False, assign=True)
    return model
