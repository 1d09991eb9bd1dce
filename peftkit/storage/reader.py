"""Reading an adapter, strictly: what does not fit is an error that names it, before the model is touched."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.also_train import TokenRows, WholeModule, named_tensor
from peftkit.ledger import Attachment
from peftkit.method import Config, method_for
from peftkit.peft_patterns import renamed
from peftkit.sites import Site
from peftkit.storage import config as configs
from peftkit.storage import layout, tensorfile
from peftkit.storage.errors import StorageError
from peftkit.storage.fingerprint import differing
from peftkit.storage.tensorfile import TensorFile
from peftkit.targets import TargetError, nearest

_ROWS = "token_adapter.trainable_tokens_delta"
_BASE = "base_layer.weight"
_EMBEDDINGS = ("embed_tokens", "lm_head")  # what peft saves whole, unasked, where the vocabulary was resized
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Stored:
    """An adapter as read: nothing in it has met a model yet.

    Attributes:
        config: of its method; its full names are the file's until `match` has found the model's.
        tensors: by their key in the file; views of one buffer.
        sites: stem of the keys -> the tensors behind it, for what the method adapts.
        whole: modules that are stored whole; peft's are ends of names, `own` ones full.
        rows: embedding -> the rows of it that are stored, ascending.
        frozen: stem -> a base weight that peft wrote beside an adapted embedding.
        base: the fingerprint of its base; None in files of others.
        means: whether the file's lists mean the module at a path.
    """

    path: Path
    config: Config
    tensors: dict[str, Tensor]
    sites: dict[str, dict[str, Tensor]]
    whole: list[str]
    rows: dict[str, list[int]]
    frozen: dict[str, Tensor]
    base: dict[str, Any] | None
    means: Any

    @property
    def file(self) -> Path:
        return self.path / layout.TENSORS

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
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError, re.error) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise StorageError(f"{folder / layout.CONFIG}: {what}") from error


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
    own = json.loads(text)
    if own["version"] != 1:
        raise StorageError(f"{file} was written by a later peftkit, in version {own['version']} of its format; update peftkit")
    configs.check_unchanged(folder, own["peft"], peft)
    return own


def _check_values(folder: Path, found: TensorFile) -> None:
    for key, t in found.tensors.items():
        if t.is_floating_point() and t.dtype not in _FLOATS:
            raise StorageError(f"{folder / layout.TENSORS}: {key} is {t.dtype}; expected a dtype of 16 bits or more")
    if (wrong := found.not_finite()) is not None:
        raise StorageError(f"{folder / layout.TENSORS}: {wrong} has values that are not finite")


def _understood(folder: Path, peft: dict[str, Any], found: TensorFile, own: dict[str, Any] | None) -> Stored:
    method = method_for(peft["peft_type"])
    method.check_peft(peft)
    tensors, sites, rest = _grouped(folder / layout.TENSORS, found.tensors, method)
    listed = peft.get("modules_to_save") or []
    if not isinstance(listed, list) or not all(isinstance(m, str) for m in listed):
        raise TypeError(f"modules_to_save is {listed!r}, expected a list of module names")
    rows = _rows(folder, peft.get("trainable_token_indices"), rest, tensors)
    frozen = {k[: -len(_BASE)]: t for k, t in rest.items() if k.endswith("." + _BASE) and k[: -len(_BASE)] in sites}
    for stem in frozen:
        del tensors[stem + _BASE]
    if own is None:
        paths = {stem[len(layout.PREFIX) : -1]: {k: t.shape for k, t in of.items()} for stem, of in sites.items()}
        config = method.from_peft(peft, paths)
        resized = [k[len(layout.PREFIX) :].rpartition(".")[0] for k in rest if k.endswith(".weight") and k not in frozen]
        listed = listed + [p for p in resized if p.endswith(_EMBEDDINGS) and not any(p.endswith(m) for m in listed)]
    else:
        config = configs.from_json(method, own["config"])
    base = own["base"] if own is not None else None
    return Stored(folder, config, tensors, sites, listed, rows, frozen, base, layout.peft_targets(peft))


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
                    raise StorageError(f"{folder / layout.TENSORS}: {key} has {len(tensors[key])} rows, expected {len(ids)}")
                tensors[key] = tensors[key][torch.tensor(order)]
    return found


# -- meeting the model --------------------------------------------------------------------------------------------------


def match(
    stored: Stored, everything: Sequence[Site], *, check_base: bool
) -> tuple[list[Site], dict[Site, Sequence[int] | None]]:
    """The sites of the model that the file's tensors belong to, and those of `also_train`.

    Raises:
        StorageError: tensors for modules that the model lacks, modules without their tensors, another base.
    """
    by_stem = {layout.stem(s): s for s in everything if stored.config.refuses(s) is None}
    for s in everything:  # the same module under another name
        for alias in s.aliases if s.part is None and s.reader is None else ():
            by_stem.setdefault(f"{layout.PREFIX}{alias}.", s)
    found: dict[int, Site] = {}
    for stem, tensors in stored.sites.items():
        site = by_stem.get(stem)
        if site is None:
            names = [k[len(layout.PREFIX) : -1] for k in by_stem]
            raise StorageError(
                f"{stored.file}: unexpected {stem + next(iter(tensors))}: the model has no module for it to adapt"
                f"{nearest(stem[len(layout.PREFIX) : -1], names)}"
            )
        if id(site) in found:
            raise StorageError(f"{stored.file}: unexpected {stem}: {site.name!r} has tensors under another name too")
        found[id(site)] = site
    _check_complete(stored, list(found.values()), by_stem)
    if check_base:
        _check_base(stored, {s.name: s for s in found.values()})
    _check_frozen(stored, by_stem)
    _take_names(stored, by_stem)
    also = _also(stored, everything)
    return [s for s in everything if id(s) in found], also


def _check_complete(stored: Stored, found: Sequence[Site], by_stem: Mapping[str, Site]) -> None:
    """Each module of the model that the file's lists mean must have its tensors."""
    have = {id(s.module) for s in found}
    # peft always adapts both parts of a MultiheadAttention, we need not
    paths = {layout.module_path(s) for s in found} if stored.own else set()
    for stem, site in by_stem.items():
        if id(site.module) in have or site.name in paths:
            continue
        path = layout.module_path(site)
        if path not in paths and stored.means(path):
            raise StorageError(
                f"{stored.file}: no tensors for {stem[len(layout.PREFIX) : -1]!r}, which target_modules of "
                f"{layout.CONFIG} names; the file is not complete, or for another model"
            )


def _check_base(stored: Stored, sites: Mapping[str, Site]) -> None:
    wrong = differing(stored.base, sites) if stored.base is not None else []
    if wrong:
        raise StorageError(
            f"{stored.path} was saved from another base: the weight of {wrong[0]!r} differs"
            f"{f', and {len(wrong) - 1} more' if len(wrong) > 1 else ''}; load the base it was trained on, or pass "
            "check_base=False if you are sure"
        )


def _check_frozen(stored: Stored, by_stem: Mapping[str, Site]) -> None:
    for stem, value in stored.frozen.items():
        weight = by_stem[stem].module._parameters["weight"]
        assert weight is not None
        if weight.is_meta:
            continue
        if weight.shape != value.shape or not torch.equal(weight.detach().cpu(), value.to(weight.dtype)):
            raise StorageError(
                f"{stored.file}: {stem}{_BASE} is not the weight of {by_stem[stem].name!r} in this model: the embedding "
                "was resized or trained; give the base that weight first"
            )


def _take_names(stored: Stored, by_stem: Mapping[str, Site]) -> None:
    """Put the model's names in place of the file's, where those differ: parts of a MultiheadAttention, aliases."""
    names = {s[len(layout.PREFIX) : -1]: by_stem[s].name for s in stored.sites}
    names = {old: new for old, new in names.items() if old != new}
    if names:
        config = stored.config
        new = {f.name: renamed(getattr(config, f.name), names) for f in dataclasses.fields(config)}
        stored.config = dataclasses.replace(config, **new)


def _also(stored: Stored, everything: Sequence[Site]) -> dict[Site, Sequence[int] | None]:
    also: dict[Site, Sequence[int] | None] = {}
    modules = [s for s in everything if s.part is None]
    for wanted, ids in [*((w, None) for w in stored.whole), *stored.rows.items()]:
        # to peft, `classifier` also means `pre_classifier`
        hits = [s for s in modules if any(n == wanted if stored.own else n.endswith(wanted) for n in s.names)]
        if not hits:
            if ids is None and not any(f"{wanted}." in key for key in stored.tensors):
                continue  # peft lists the customary names of all heads
            raise StorageError(f"{stored.path}: the model has no module {wanted!r}{nearest(wanted, [s.name for s in modules])}")
        for site in hits:
            count = getattr(site.module, "num_embeddings", 0)
            if ids is not None and ids[-1] >= count:
                raise StorageError(f"{stored.path}: token {ids[-1]} lies beyond the {count} rows of {site.name!r}")
        also.update(dict.fromkeys(hits, ids))
    return also


@torch.no_grad()
def fill(stored: Stored, attachment: Attachment) -> None:
    """Give the adapters their tensors.

    Raises:
        StorageError: a tensor that is missing, misshapen, of another kind of dtype, or left over.
    """
    left = set(stored.tensors)
    _untie(stored, attachment)
    for name, adapter in attachment.adapters.items():
        site = attachment.sites[name]
        stems = [layout.stem(site)]
        if site.part is None:
            stems += [f"{layout.PREFIX}{a}." for a in site.aliases]
        whole = isinstance(adapter, WholeModule | TokenRows)
        kinds = adapter.tensors() if whole else {}
        taken = {}
        for key, expected in adapter.stored_shapes().items():
            stem = next((s for s in stems if s + key in stored.tensors), None)
            if stem is None:
                raise StorageError(f"{stored.file}: missing {stems[0]}{key}; the file is not complete, or for another model")
            tensor = stored.tensors[stem + key]
            left.discard(stem + key)
            if tensor.shape not in expected:
                raise StorageError(
                    f"{stored.file}: {stem}{key} has shape {tuple(tensor.shape)}, expected {tuple(expected[0])}; "
                    "the adapter belongs to a model of another size" + (", or one with resized embeddings" if whole else "")
                )
            if whole and tensor.is_floating_point() != kinds[key].is_floating_point():
                raise StorageError(f"{stored.file}: {stem}{key} is {tensor.dtype}, expected {kinds[key].dtype}")
            taken[key] = tensor.clone()  # of the file's buffer, which is not to stay
        try:
            adapter.load_tensors(taken)
        except ValueError as error:
            raise StorageError(f"{stored.path}: {error}") from error
    if left:
        raise StorageError(f"{stored.file}: unexpected {min(left)}{f' and {len(left) - 1} more' if len(left) > 1 else ''}")


def _untie(stored: Stored, attachment: Attachment) -> None:
    """Copies of tied modules that were stored with different values, as peft trains them, are each their own."""
    first: dict[int, Tensor] = {}
    for name, adapter in attachment.adapters.items():
        stem = layout.stem(attachment.sites[name])
        for key in adapter.merges if isinstance(adapter, WholeModule) else ():
            value, own = stored.tensors.get(stem + key), named_tensor(adapter.copy, key)
            if value is None or torch.equal(first.setdefault(id(own), value), value):
                continue
            holder, _, last = key.rpartition(".")
            adapter.copy.get_submodule(holder)._parameters[last] = nn.Parameter(own.detach().clone())
