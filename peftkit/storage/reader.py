"""Reading an adapter, strictly: what does not fit is an error that names it, before the model is touched."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkit.method import Config, method_for
from peftkit.storage import config as configs
from peftkit.storage import layout, tensorfile
from peftkit.storage.errors import StorageError
from peftkit.storage.fingerprint import checked_fingerprint
from peftkit.storage.jsonfile import parsed
from peftkit.storage.tensorfile import TensorFile

_ROWS = "token_adapter.trainable_tokens_delta"
FROZEN = "base_layer.weight"
_EMBEDDINGS = ("embed_tokens", "lm_head")  # what peft saves whole, unasked, where the vocabulary was resized
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Stored:
    """An adapter as read: nothing in it has met a model yet.

    Attributes:
        path: its directory; of another format's, the file.
        config: of its method; its full names are the file's until `match` has found the model's.
        peft: what `adapter_config.json` says.
        tensors: by their key in the file; views of one buffer.
        sites: stem of the keys -> the tensors behind it, for what the method adapts.
        whole: modules that are stored whole; peft's are ends of names, `own` ones full.
        rows: embedding -> the rows of it that are stored, ascending.
        frozen: stem -> a base weight that peft wrote beside an adapted embedding.
        base: the fingerprint of its base; None in files of others.
        means: whether the file's lists mean the module at a path.
        of_all: tensors that belong to no single site, by their full key.
        names: where there are no others, the full names of the sites, if the file says.
    """

    path: Path
    config: Config
    peft: dict[str, Any]
    tensors: dict[str, Tensor]
    sites: dict[str, dict[str, Tensor]]
    whole: list[str]
    rows: dict[str, list[int]]
    frozen: dict[str, Tensor]
    base: dict[str, Any] | None
    means: Any
    of_all: dict[str, Tensor]
    names: list[str] | None

    @property
    def file(self) -> Path:
        return self.path if self.path.is_file() else self.path / layout.TENSORS

    @property
    def own(self) -> bool:
        return self.base is not None


def read(path: str | os.PathLike[str], *, name: str = "default") -> Stored:
    """Read the directory `path`, or `path/name` as peft lays named adapters out.

    Raises:
        StorageError: a file that is missing, truncated or damaged, an unknown method.
    """
    folder = Path(path)
    if not (folder / layout.CONFIG).exists() and (folder / name / layout.CONFIG).exists():
        folder = folder / name
    peft = configs.read(folder)
    found = _read_tensors(folder)
    try:
        own = _own(folder, found, peft)
        _check_values(folder, found)
        return _understood(folder, peft, found, own)
    except StorageError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, re.error) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise StorageError(f"{folder / layout.CONFIG}: {what}") from error


def understood(path: Path, peft: dict[str, Any], tensors: dict[str, Tensor]) -> Stored:
    """An adapter that another format's reader has put into peft's form; `path` is the file that it read.

    Raises:
        StorageError: the settings and the tensors make no adapter.
    """
    try:
        return _understood(path, peft, TensorFile(tensors, [], {}, None), None)
    except StorageError:
        raise
    except ValueError as error:
        raise StorageError(f"{path}: {error}") from error


def _read_tensors(folder: Path) -> TensorFile:
    file = folder / layout.TENSORS
    if not file.exists():
        pickled = folder / "adapter_model.bin"
        also = f"; {pickled.name} is a pickle, which is not read: convert it to safetensors" if pickled.exists() else ""
        raise StorageError(f"{file} is missing{also}")
    found = tensorfile.read(file)
    if not found.tensors:
        raise StorageError(f"{file} holds no tensors")
    return found


def _own(folder: Path, found: TensorFile, peft: Mapping[str, Any]) -> dict[str, Any] | None:
    """What peftkit wrote into the metadata, intact; None in files of others."""
    file, text = folder / layout.TENSORS, found.metadata.get("peftkit")
    if found.sealed is None and text is None:
        return None
    if not found.sealed or text is None:
        wrong = found.not_finite()
        raise StorageError(
            f"{file} is damaged, or was changed by another program: its checksum is not that of its bytes"
            f"{f', and {wrong} has values that are not finite' if wrong else ''}; restore it, or save the adapter again"
        )
    own = parsed(text.encode())
    if own["version"] != 1:
        raise StorageError(
            f"{file} was written by a later peftkit, in version {own['version']} of its format; update peftkit"
        )
    configs.check_unchanged(folder, own["peft"], peft)
    return own


def _check_values(folder: Path, found: TensorFile) -> None:
    for key, t in found.tensors.items():
        if t.is_floating_point() and t.dtype not in FLOATS:
            raise StorageError(f"{folder / layout.TENSORS}: {key} is {t.dtype}; expected a dtype of 16 bits or more")
    if (wrong := found.not_finite()) is not None:
        raise StorageError(f"{folder / layout.TENSORS}: {wrong} has values that are not finite")


def _understood(folder: Path, peft: dict[str, Any], found: TensorFile, own: dict[str, Any] | None) -> Stored:
    method = method_for(peft)
    method.check_peft(peft)
    known = {method.today(key): t for key, t in found.tensors.items()}
    whole_tensors = {key: t for key, t in known.items() if key in method.whole_keys}
    others = {layout.from_file(key, method.key_prefix): t for key, t in known.items() if key not in whole_tensors}
    tensors, sites, rest = _grouped(folder / layout.TENSORS, others, method)
    listed = peft.get("modules_to_save") or []
    if not isinstance(listed, list) or not all(isinstance(m, str) for m in listed):
        raise TypeError(f"modules_to_save is {listed!r}, expected a list of module names")
    rows = _rows(folder, peft.get("trainable_token_indices"), rest, tensors)
    frozen = {k[: -len(FROZEN)]: t for k, t in rest.items() if k.endswith("." + FROZEN) and k[: -len(FROZEN)] in sites}
    for stem in frozen:
        del tensors[stem + FROZEN]
    if own is None:
        paths = {layout.path_of(stem): {k: t.shape for k, t in of.items()} for stem, of in sites.items()}
        config = method.from_peft(peft, paths)
        resized = [k[len(layout.PREFIX) :].rpartition(".")[0] for k in rest if k.endswith(".weight")]
        listed = listed + [p for p in resized if p.endswith(_EMBEDDINGS) and not any(p.endswith(m) for m in listed)]
    else:
        config = configs.from_json(method, own["config"])
    base = checked_fingerprint(own["base"]) if own is not None else None
    names = own.get("sites") if own is not None else None
    if names is not None and not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
        raise TypeError(f"its sites are {names!r}, expected names of modules")
    means = layout.peft_targets(peft)
    return Stored(folder, config, peft, tensors, sites, listed, rows, frozen, base, means, whole_tensors, names)


def _grouped(
    file: Path, found: Mapping[str, Tensor], method: type[Config]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """All tensors; those that end as the method's do, by stem; and the others."""
    sites: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    endings = [(f".{e}", e) for e in method.tensor_endings()]
    for key, t in found.items():
        if not key.startswith(layout.PREFIX):
            raise StorageError(f"{file}: unexpected {key}: keys begin with {layout.PREFIX!r}")
        ending = next((e for dotted, e in endings if key.endswith(dotted)), None)
        if ending is None:
            rest[key] = t
            continue
        if not t.is_floating_point():
            raise StorageError(f"{file}: {key} is {t.dtype}, expected a floating-point dtype")
        sites.setdefault(key[: -len(ending)], {})[ending] = t
    return dict(found), sites, rest


def _rows(folder: Path, listed: Any, rest: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    """Embedding -> its stored rows, ascending; the tensors are brought into that order."""
    if not listed:
        return {}
    keys = [k for k in rest if k.endswith("." + _ROWS)]
    if not isinstance(listed, Mapping | list):
        raise TypeError(f"trainable_token_indices is {listed!r}, expected lists of token ids")
    if not isinstance(listed, Mapping):  # of the input embedding, whatever it is called
        listed = {k[len(layout.PREFIX) : -len(_ROWS) - 1]: listed for k in keys}
    found = {}
    for name, ids in listed.items():
        if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise TypeError(f"trainable_token_indices of {name!r} are {ids!r}, expected a list of token ids")
        order = sorted(range(len(ids)), key=lambda i: ids[i])
        found[name] = [ids[i] for i in order]
        for key in keys:
            path = key[len(layout.PREFIX) : -len(_ROWS) - 1]
            if (path == name or path.endswith("." + name)) and order != list(range(len(ids))):
                if len(tensors[key]) != len(ids):
                    raise StorageError(
                        f"{folder / layout.TENSORS}: {key} has {len(tensors[key])} rows, expected {len(ids)}"
                    )
                tensors[key] = tensors[key][torch.tensor(order)]
    return found
