"""The model that an adapter is for, as far as converting asks: its config, its weights' names and shapes, its modules."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftkit import ledger, loading
from peftkit.checkpoints.files import Checkpoint, open_checkpoint
from peftkit.checkpoints.fitting import fit, sampled
from peftkit.ledger import Attachment
from peftkit.sites import walk
from peftkit.storage import StorageError, Stored
from peftkit.storage.jsonfile import read_object

_NAME = "converted"
# by class: what transformers takes off the names of its older checkpoints (`conversion_mapping.py`, 5.23)
_FORMER_PREFIX = {"CLIPTextModel": "text_model."}


class Base:
    """A model, or a directory of one, of which no more is read than is asked for."""

    def __init__(self, given: str | os.PathLike[str] | nn.Module):
        self.module = given if isinstance(given, nn.Module) else None
        self.path = None if isinstance(given, nn.Module) else Path(given)

    @functools.cached_property
    def config(self) -> Mapping[str, Any]:
        """What `config.json` says; of a model with parts for several kinds of data, its text part's.

        Raises:
            StorageError: there is none.
        """
        if self.module is not None:
            config: Any = getattr(self.module, "config", None)
            if not hasattr(config, "to_dict"):
                raise StorageError(
                    f"the {type(self.module).__name__} given as base has no config, which is asked for its heads"
                )
            found = config.to_dict()
        else:
            assert self.path is not None
            file = self.path / "config.json"
            if not file.exists():
                raise StorageError(f"{file} is missing; the base's config is asked for its heads")
            found = read_object(file)
        return found.get("text_config") or found

    @functools.cached_property
    def weights(self) -> dict[str, torch.Size]:
        """Path of each module with a weight, as `from_pretrained` names it -> the weight's shape."""
        if self.module is not None:
            named = (
                (site.name, site.module._parameters.get("weight")) for site in walk(self.module) if site.part is None
            )
            return {name: weight.shape for name, weight in named if weight is not None}
        classes = self._checkpoint.config.get("architectures") or []
        former = next((_FORMER_PREFIX[name] for name in classes if name in _FORMER_PREFIX), "")
        shapes = {key.removeprefix(former): self._checkpoint.shape(key) for key in self._checkpoint.places}
        return {key[: -len(".weight")]: shape for key, shape in shapes.items() if key.endswith(".weight")}

    def attached(self, stored: Stored, *, check_base: bool) -> tuple[nn.Module, Attachment, Mapping[str, Any] | None]:
        """What stands for the model, the adapter on it, and where that has not its weights, their fingerprint.

        Raises:
            StorageError: it does not fit.
        """
        if self.module is not None:
            everything = walk(self.module)
            made = loading.made(stored, _NAME, everything, trainable=False, check_base=check_base)
            return self.module, made, None
        fitted = fit(self._checkpoint, [stored], check_base=check_base)
        _, record = ledger.require(fitted.root)
        base = sampled(self._checkpoint, fitted, fitted.names[0])
        return fitted.root, record.named(fitted.names)[0], base

    @functools.cached_property
    def _checkpoint(self) -> Checkpoint:
        assert self.path is not None
        return open_checkpoint(self.path)
