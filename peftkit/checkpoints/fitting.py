"""Stored adapters on the checkpoint that they are for: attached to its skeleton, as `load` attaches them to a model."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkit import api, leading, ledger, loading, storage
from peftkit.also_train import InPlace
from peftkit.checkpoints.files import Checkpoint
from peftkit.checkpoints.skeleton import Hints, skeleton
from peftkit.checkpoints.ties import check_ties
from peftkit.sites import Site, walk
from peftkit.storage import StorageError, Stored, layout
from peftkit.storage.fingerprint import differing, fingerprint, joined

_CONV1D = {"c_attn", "c_proj", "c_fc", "q_attn"}  # what transformers' models call their Conv1Ds, all of them
TRANSPOSED = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}  # model types whose blocks are of Conv1D
_PARTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of an `nn.MultiheadAttention`
_PACKED = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv", "SCB", "absmax")


@dataclass(frozen=True)
class Fitted:
    """A skeleton with the adapters attached.

    Attributes:
        root: the skeleton; the adapters are `names`, in the order given, and all of them act.
        keys: parameter or buffer of the skeleton -> its key in the checkpoint.
        added: of modules that an adapter holds whole and the checkpoint lacks -> dtype and shape of each tensor.
    """

    root: nn.Module
    names: Sequence[str]
    keys: Mapping[str, str]
    added: Mapping[str, tuple[torch.dtype, Sequence[int]]]


def fit(checkpoint: Checkpoint, adapters: Sequence[Stored], *, check_base: bool) -> Fitted:
    """Attach `adapters` to the skeleton of `checkpoint`.

    Raises:
        StorageError: the checkpoint lacks a tensor that an adapter changes; and as for `load`.
        ValueError: two of them would take the place of one module.
    """
    named = _aligned(checkpoint, adapters)
    added = _added(checkpoint, adapters, named)
    _check_there(checkpoint, adapters, {**named, **added})
    shapes = {name: (checkpoint.dtype(key), checkpoint.shape(key)) for name, key in named.items()}
    hints = Hints(adapters)
    root = skeleton({**shapes, **added}, hints)
    if _learn(hints, checkpoint, adapters, root):
        root = skeleton({**shapes, **added}, hints)
    _occupy(root)
    for stored in adapters:
        for stem in stored.frozen:  # which is compared whole
            name = f"{layout.path_of(stem)}.weight"
            put(root, name, checkpoint.tensor(named[name]))
    for stored in adapters:
        _look_at_base(checkpoint, stored, root, named, check_base=check_base)
    names = [f"adapter-{i}" for i in range(len(adapters))]
    for name, stored in zip(names, adapters, strict=True):
        loading.attach(root, stored, name=name, trainable=False, check_base=False)
    api.activate(root, *names)
    check_ties(checkpoint, root, named, added)
    return Fitted(root, names, named, added)


# -- names ---------------------------------------------------------------------------------------------------------------


def _paths(stored: Stored) -> set[str]:
    """The modules that the checkpoint must have."""
    found = {re.sub(r"(^|\.)base_layer\.out_proj$", r"\1out_proj", layout.path_of(stem)) for stem in stored.sites}
    return found | set(stored.rows) | set(stored.names or ())


def _modules(names: Iterable[str]) -> set[str]:
    """Paths of the modules that have tensors of these names, and of parts of an attention."""
    names = list(names)
    parts = {n.removesuffix("_weight") for n in names if n.endswith(_PARTS)}
    return {n.rpartition(".")[0] for n in names} | parts


def _aligned(checkpoint: Checkpoint, adapters: Sequence[Stored]) -> dict[str, str]:
    """Tensors by their names in the model that was adapted -> their keys.

    A checkpoint of a body lacks the prefix that its names have under a head, or has one that the adapter's lack;
    transformers' `from_pretrained` bridges that, and so is it here.
    """
    same = {key: key for key in checkpoint.places}
    there = _modules(checkpoint.places)
    wanted = set().union(*map(_paths, adapters))
    lost = next((p for p in sorted(wanted) if p not in there), None)
    if lost is None:
        return same
    more = [lost[: -len(p)] for p in there if p and lost.endswith("." + p)]
    less = [p[: -len(lost)] for p in there if p.endswith("." + lost)]
    found = [
        *({p + key: key for key in same} for p in sorted(set(more)) if all(w.removeprefix(p) in there for w in wanted)),
        *({key.removeprefix(p): key for key in same} for p in sorted(set(less)) if all(p + w in there for w in wanted)),
    ]
    return found[0] if len(found) == 1 and len(found[0]) == len(same) else same


def _added(
    checkpoint: Checkpoint, adapters: Sequence[Stored], named: Mapping[str, str]
) -> dict[str, tuple[torch.dtype, Sequence[int]]]:
    """Tensors of modules that an adapter holds whole, where the checkpoint has none of them: in the dtype of the others."""
    there = {name.rpartition(".")[0] for name in named}
    kinds = Counter(e.dtype for h in checkpoint.files.values() for e in h.entries if e.dtype.is_floating_point)
    dtype = kinds.most_common(1)[0][0] if kinds else torch.get_default_dtype()
    found: dict[str, tuple[torch.dtype, Sequence[int]]] = {}
    for stored in adapters:
        for name, value in of_whole_modules(stored):
            if name.rpartition(".")[0] not in there:
                found[name] = dtype if value.is_floating_point() else value.dtype, value.shape
    return found


def of_whole_modules(stored: Stored) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the tensors of modules that an adapter holds whole."""
    for key, value in stored.tensors.items():
        name = key[len(layout.PREFIX) :]
        if any(name.startswith(f"{w}.") if stored.own else f".{w}." in f".{name}" for w in stored.whole):
            yield name, value


def _check_there(checkpoint: Checkpoint, adapters: Sequence[Stored], names: Mapping[str, Any]) -> None:
    there = _modules(names)
    for stored in adapters:
        for path in sorted(_paths(stored)):
            packed = next((n for n in _PACKED if f"{path}.{n}" in names or f"{path}.weight.{n}" in names), None)
            if path in there and packed is None:
                continue
            if packed is not None:
                why = f"; it is quantised ({packed}): merge into the checkpoint that it was made from"
            elif path.rpartition(".")[2] in ("lm_head", "embed_out") and checkpoint.config.get("tie_word_embeddings"):
                why = "; the model ties it to its embedding, and merging would change both: give it a weight of its own"
            else:
                why = checkpoint.nearest(f"{path}.weight")
            raise StorageError(
                f"{checkpoint.path} has no {path}.weight, which the adapter in {stored.path} changes{why}"
            )


# -- kinds ---------------------------------------------------------------------------------------------------------------


def _learn(hints: Hints, checkpoint: Checkpoint, adapters: Sequence[Stored], root: nn.Module) -> bool:
    """Add to `hints` what follows from stored shapes that do not fit; whether there is anything.

    Where they fit no Linear, the weight is `(in, out)`; a square one goes with the others.
    """
    wrong, square = set(), set()
    everything = walk(root)
    for stored in adapters:
        sites, also = storage.match(stored, everything, check_base=False)
        made = loading.built(stored, "kinds", sites, also, everything, trainable=False)
        for site in (s for s in sites if s.part is None and s.reader is None):
            tensors = stored.sites.get(layout.stem(site), {})
            shapes = made.adapters[site.name].stored_shapes()
            odd = [tensors[k].shape for k in shapes if k in tensors and tensors[k].shape not in shapes[k]]
            if isinstance(site.module, nn.Linear):
                if site.module.in_features == site.module.out_features:
                    square.add(site.name)
                elif odd:
                    wrong.add(site.name)
            elif odd and len(odd[0]) > 2 and odd[0][0] == 1:  # one number for each input channel
                hints.inputs[site.name] = odd[0][1]
    family = str(checkpoint.config.get("model_type")) in TRANSPOSED
    if wrong or family or any(stored.peft.get("fan_in_fan_out") for stored in adapters):
        alike = _CONV1D | {name.rpartition(".")[2] for name in wrong}
        hints.transposed = wrong | {name for name in square if name.rpartition(".")[2] in alike}
    return bool(hints.transposed) or any(site.name in hints.inputs for site in everything)


def _occupy(root: nn.Module) -> None:
    """Let every weight be a stand-in: of its shape, on the CPU, and without memory."""
    for module in root.modules():
        for held in (module._parameters, module._buffers):
            for name, value in list(held.items()):
                if value is not None:
                    put(module, name, stand_in(value.dtype, value.shape))


def stand_in(dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A tensor that takes the memory of one number; NaN where there is one, so that nobody takes it for a weight."""
    one = torch.full((), float("nan"), dtype=dtype) if dtype.is_floating_point else torch.zeros((), dtype=dtype)
    return one.expand(tuple(shape))


def _look_at_base(
    checkpoint: Checkpoint, stored: Stored, root: nn.Module, named: Mapping[str, str], *, check_base: bool
) -> None:
    """Compare the base with the one it was trained on; let it see the weights that its initial values are taken from.

    A site at a time: each tensor that is mapped is an open file, and whole pages come with a few numbers.
    """
    started = stored.base is None and getattr(stored.config, "init", None) in leading.INITS
    compared = check_base and stored.base is not None
    wrong = []
    for site in storage.match(stored, walk(root), check_base=False)[0] if started or compared else ():
        with _weights(checkpoint, root, site, named, kept=started):
            wrong += differing(stored.base, {site.name: site}) if compared and stored.base is not None else []
    storage.refuse_base(stored, wrong)


@contextlib.contextmanager
def _weights(
    checkpoint: Checkpoint, root: nn.Module, site: Site, named: Mapping[str, str], *, kept: bool = False
) -> Iterator[None]:
    """Within the block, or longer if `kept`, the module at a site has its own weights, mapped."""
    own = {site.full_name(n): k for n in site.module._parameters if (k := named.get(site.full_name(n))) is not None}
    for name, key in own.items():
        put(root, name, checkpoint.tensor(key))
    yield
    for name, key in own.items() if not kept else ():
        put(root, name, stand_in(checkpoint.dtype(key), checkpoint.shape(key)))


def sampled(checkpoint: Checkpoint, fitted: Fitted, name: str) -> dict[str, Any]:
    """The fingerprint of the base under the adapter `name`."""
    (attachment,) = ledger.require(fitted.root)[1].named([name])
    prints = []
    for where, site in attachment.sites.items():
        if not (isinstance(adapter := attachment.adapters[where], InPlace) or adapter.beside):
            with _weights(checkpoint, fitted.root, site, fitted.keys):
                prints.append(fingerprint({where: site}))
    return joined(prints)


def put(root: nn.Module, name: str, value: Tensor) -> Tensor:
    """Let a parameter or buffer of the skeleton be `value`; returns it as the module holds it."""
    path, _, last = name.rpartition(".")
    holder = root.get_submodule(path)
    held: Any = holder._parameters if last in holder._parameters else holder._buffers
    held[last] = nn.Parameter(value, requires_grad=False) if held is holder._parameters else value
    return held[last]
