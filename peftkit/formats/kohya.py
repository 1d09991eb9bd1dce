"""The files of kohya-ss's sd-scripts and of LyCORIS (https://github.com/KohakuBlueleaf/LyCORIS).

A key is `<prefix>_<module's name with underscores for dots>.<tensor>`. The name alone does not say where its dots were, so
it is found among the base's. Every module has an `alpha` of its own; its scale is alpha/rank.

    LoRA, LoCon   lora_down.weight (r in *kernel), lora_up.weight (out r *1); with lora_mid.weight (r r *kernel) the kernel
                  is decomposed too, and lora_down is (r in *1)
    LoHa          hada_w1_a, hada_w2_a (out r), hada_w1_b, hada_w2_b (r in·kernel)
    LoKr          lokr_w1 (out₁ in₁) or lokr_w1_a, lokr_w1_b; lokr_w2 (out₂ in₂ *kernel) or lokr_w2_a, lokr_w2_b
    DoRA          dora_scale (out 1 …) beside a LoRA
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkit import peft_lora
from peftkit.formats.source import Source, from_peft_form
from peftkit.methods.lokr import factorization
from peftkit.peft_patterns import most_common, pattern_keys
from peftkit.storage import StorageError
from peftkit.targets import nearest

_PREFIX = re.compile(r"(lora_unet|lora_te\d?|lora_transformer|lycoris)_")
_TEXT_MODEL = "text_model_"  # CLIP's: every file of sd-scripts has it, transformers' CLIPTextModel has none since 5
_KINDS = {
    "LoRA": ("lora_down.weight", "lora_up.weight"),
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "LoKr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
}
_BESIDE = {"LoRA": ("lora_mid.weight", "dora_scale")}
_KNOWN = {name: kind for kind, names in _KINDS.items() for name in (*names, *_BESIDE.get(kind, ()))}
_REFUSED = {
    "diff": "a whole weight's change, of LyCORIS's full",
    "diff_b": "a bias's change",
    "w_norm": "a norm's change",
    "b_norm": "a norm's change",
    "on_input": "LyCORIS's (IA)³",
    "weight": "LyCORIS's (IA)³",
    "oft_blocks": "OFT or BOFT",
    "rescale": "OFT or BOFT",
    "hada_t1": "a LoHa whose kernel is decomposed too",
    "hada_t2": "a LoHa whose kernel is decomposed too",
    "lokr_t1": "a LoKr whose kernel is decomposed too",
    "lokr_t2": "a LoKr whose kernel is decomposed too",
    "scalar": "a scale of its own, not folded in",
    "lambda_layer": "T-LoRA",
    **dict.fromkeys(("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"), "GLoRA"),
}
_LEAST = {"alpha": 0, "dora_scale": 1}  # dimensions; of all others 2
_Module = dict[str, tuple[Tensor, str]]  # tensor's name -> the tensor and its full key


def looks_so(keys: Sequence[str]) -> bool:
    """Whether keys are of this format."""
    return any(_PREFIX.match(key) or key.partition(".")[2] in _KNOWN for key in keys)


def read(
    file: Path,
    tensors: Mapping[str, Tensor],
    weights: Mapping[str, torch.Size],
    prefix: str | None,
    alpha: float | None,
) -> Source:
    """The adapter in `tensors`, for a base whose modules have these weights.

    Args:
        file: where they were read.
        weights: path of each module of the base -> shape of its weight.
        prefix: which part of a file for several models, such as `"lora_unet"`; None where there is one.
        alpha: of the modules that have none; None where that is their rank.

    Raises:
        StorageError: an unknown key, one of a method or form that no adapter here can hold, one for no module of the base.
        ValueError: an alpha that no module lacks.
    """
    modules: dict[str, _Module] = {}
    heads: dict[str, str] = {}
    for (head, at), found in _grouped(file, tensors, prefix).items():
        path = _path(file, head, weights, at)
        if path in modules:
            raise StorageError(f"{file}: {heads[path]} and {head} both mean {path!r}")
        modules[path], heads[path] = found, head
    if alpha is not None:
        _give(file, modules, alpha)
    kinds = {path: _kind(file, path, found) for path, found in modules.items()}
    if len(set(kinds.values())) > 1:
        one = {kind: path for path, kind in kinds.items()}
        raise StorageError(
            f"{file} holds several methods, {', '.join(f'{kind} at {path!r}' for kind, path in sorted(one.items()))}; an "
            "adapter is of one"
        )
    made = {"LoRA": _lora, "DoRA": _lora, "LoHa": _loha, "LoKr": _lokr}[next(iter(kinds.values()))]
    settings, found = made(file, modules, weights)
    return from_peft_form(file, settings, found)


# -- names ---------------------------------------------------------------------------------------------------


def _grouped(file: Path, tensors: Mapping[str, Tensor], prefix: str | None) -> dict[tuple[str, int], _Module]:
    """Name of a module in the file, and where its prefix ends -> its tensors."""
    modules: dict[tuple[str, int], _Module] = {}
    seen: dict[str, str] = {}
    for key, t in tensors.items():
        head, _, name = key.partition(".")
        known = _PREFIX.match(head)
        if prefix is not None and head.startswith(f"{prefix}_"):
            at = len(prefix) + 1
        elif known is None:
            expected = f"{prefix}_" if prefix is not None else "lora_unet_, lora_te_ or lycoris_"
            raise StorageError(f"{file}: unexpected {key}: it does not begin with {expected}")
        elif prefix is not None:
            continue
        else:
            at = known.end()
            seen.setdefault(known[1], key)
        if name in _REFUSED:
            raise StorageError(f"{file}: {key} is of {_REFUSED[name]}, which is not supported")
        if name not in _KNOWN and name != "alpha":
            raise StorageError(f"{file}: unexpected {key}{nearest(name, [*_KNOWN, 'alpha'], has='known are')}")
        if t.dim() < _LEAST.get(name, 2) or not t.numel() or t.is_complex():
            raise StorageError(f"{file}: {key} has the shape {tuple(t.shape)} and {t.dtype}, which no {name} has")
        modules.setdefault((head, at), {})[name] = t, key
    if len(seen) > 1:
        raise StorageError(
            f"{file} holds adapters for several models, such as {' and '.join(sorted(seen.values()))}; convert them one by "
            f"one, with prefix={' or '.join(repr(p) for p in sorted(seen))} and its base"
        )
    if not modules:
        raise StorageError(f"{file}: no key begins with {prefix}_")
    return modules


def _path(file: Path, head: str, weights: Mapping[str, torch.Size], at: int) -> str:
    wanted = head[at:]
    named = {path: path.replace(".", "_") for path in weights}
    found = [path for path, name in named.items() if name == wanted]
    if (
        not found
    ):  # the text encoder that the file was trained on may have had this prefix, and the base not, or vice versa
        bare = wanted.removeprefix(_TEXT_MODEL)
        found = [path for path, name in named.items() if name.removeprefix(_TEXT_MODEL) == bare]
    if len(found) == 1 and (len(weights[found[0]]) < 2 or not weights[found[0]].numel()):
        raise StorageError(
            f"{file}: {head} means {found[0]!r}, whose weight of the shape {tuple(weights[found[0]])} is no matrix"
        )
    if len(found) == 1:
        return found[0]
    if found:
        raise StorageError(
            f"{file}: {head} can mean {' or '.join(map(repr, sorted(found)))}, which the name does not tell"
        )
    near = nearest(wanted, named.values(), has="the base has")
    raise StorageError(f"{file}: unexpected {head}: the base has no module {wanted!r}{near}")


def _kind(file: Path, path: str, found: _Module) -> str:
    kinds = {_KNOWN[name]: key for name, (_, key) in found.items() if name in _KNOWN and name != "dora_scale"}
    if not kinds:
        raise StorageError(f"{file}: {next(iter(found.values()))[1]} is alone; the tensors of {path!r} are missing")
    if len(kinds) > 1:
        raise StorageError(f"{file}: {' and '.join(sorted(kinds.values()))} are of different methods on one module")
    kind = next(iter(kinds))
    if "dora_scale" in found and kind != "LoRA":
        raise StorageError(
            f"{file}: {found['dora_scale'][1]} scales a {kind}; magnitudes are supported beside LoRA alone"
        )
    return "DoRA" if "dora_scale" in found else kind


def _needed(file: Path, found: _Module, name: str) -> Tensor:
    if name not in found:
        key = next(iter(found.values()))[1]
        raise StorageError(f"{file}: missing {key.partition('.')[0]}.{name}; the file is not complete")
    return found[name][0]


def _alpha(file: Path, found: _Module, rank: int) -> float:
    """Of one module; 0 and none mean its rank."""
    if "alpha" not in found:
        return float(rank)
    value, key = found["alpha"]
    if value.numel() != 1:
        raise StorageError(f"{file}: {key} has the shape {tuple(value.shape)}, expected one number")
    return float(value) or float(rank)


def _give(file: Path, modules: Mapping[str, _Module], alpha: float) -> None:
    """Put `alpha` where there is none."""
    lacking = [found for found in modules.values() if "alpha" not in found and not _of_whole_factors(found)]
    if not lacking:
        raise ValueError(f"alpha={alpha!r} has no use: every module of {file} has its own, or needs none")
    for found in lacking:
        key = next(iter(found.values()))[1]
        found["alpha"] = torch.tensor(alpha, dtype=torch.float64), f"{key.partition('.')[0]}.alpha"


def _of_whole_factors(found: _Module) -> bool:
    """Whether it is a LoKr neither of whose factors is decomposed: LyCORIS has no rank there, and the scale is 1."""
    return {"lokr_w1", "lokr_w2"} <= found.keys()


# -- methods -------------------------------------------------------------------------------------------------

_Made = tuple[dict[str, Any], dict[tuple[str, str], tuple[Tensor, str]]]


def _lora(file: Path, modules: Mapping[str, _Module], weights: Mapping[str, torch.Size]) -> _Made:
    pairs, tensors = {}, {}
    for path, found in modules.items():
        a, b = _needed(file, found, "lora_down.weight"), _needed(file, found, "lora_up.weight")
        if "lora_mid.weight" in found:
            a = _with_kernel(file, a, *found["lora_mid.weight"], weights[path])
        a, b = _as_dimensioned(a, weights[path]), _as_dimensioned(b, weights[path])
        pairs[path] = a.shape[0], _alpha(file, found, a.shape[0])
        tensors[path, "lora_A.weight"] = a, found["lora_down.weight"][1]
        tensors[path, "lora_B.weight"] = b, found["lora_up.weight"][1]
        if "dora_scale" in found:
            m, key = found["dora_scale"]
            out = weights[path][0]
            if m.shape[0] != out or m.numel() != out:
                raise StorageError(
                    f"{file}: {key} has the shape {tuple(m.shape)}, expected a magnitude for each of {out} rows; one for "
                    "each input (wd_on_out=False) is not supported"
                )
            m = m.reshape(out) if len(weights[path]) == 2 else m.reshape(1, out, *[1] * (len(weights[path]) - 2))
            tensors[path, "lora_magnitude_vector"] = m, key
    dora = any("dora_scale" in found for found in modules.values())
    return {"peft_type": "LORA", **peft_lora.settings(pairs, use_dora=dora)}, tensors


def _as_dimensioned(t: Tensor, weight: torch.Size) -> Tensor:
    """`t` with as many dimensions as the weight: a 1×1 convolution in one layout of a model is a Linear in another."""
    more = len(weight) - t.dim()
    if more > 0 and weight[t.dim() :].numel() == 1:
        return t.reshape(*t.shape, *[1] * more)
    if more < 0 and t.shape[len(weight) :].numel() == 1:
        return t.reshape(t.shape[: len(weight)])
    return t


def _with_kernel(file: Path, down: Tensor, mid: Tensor, key: str, weight: torch.Size) -> Tensor:
    """A of the plain pair: the kernel of `mid` after `down`. mid: `(r r *kernel)`, down: `(r in *1)`.

    The product is larger than both; what the base's weight has no place for is refused before.
    """
    wide = torch.promote_types(torch.promote_types(down.dtype, mid.dtype), torch.float32)
    fits = mid.shape[2:].numel() == weight[2:].numel() and down.shape[1] <= weight.numel()
    if mid.dim() < 3 or mid.shape[1] != down.shape[0] or down[0].numel() != down.shape[1] or not fits:
        raise StorageError(
            f"{file}: {key} has the shape {tuple(mid.shape)}, which does not fit a lora_down of {tuple(down.shape)} for a "
            f"weight of {tuple(weight)}"
        )
    a = torch.einsum("ij...,jp->ip...", mid.double(), down.flatten(1).double())
    return a.to(wide)


def _loha(file: Path, modules: Mapping[str, _Module], weights: Mapping[str, torch.Size]) -> _Made:
    ranks, alphas, tensors = {}, {}, {}
    for path, found in modules.items():
        for name in _KINDS["LoHa"]:
            tensors[path, name] = _needed(file, found, name), found[name][1]
        ranks[path] = found["hada_w1_b"][0].shape[0]
        alphas[path] = _alpha(file, found, ranks[path])
    return {"peft_type": "LOHA", **_patterns(ranks, alphas)}, tensors


def _patterns(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    keys = pattern_keys(ranks)
    r, rank_pattern = most_common(ranks, keys)
    alpha, alpha_pattern = most_common(alphas, keys)
    return {"r": r, "alpha": alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}


def _lokr(file: Path, modules: Mapping[str, _Module], weights: Mapping[str, torch.Size]) -> _Made:
    ranks, alphas, tensors, sides = {}, {}, {}, {}
    for path, found in modules.items():
        for name in found.keys() & set(_KINDS["LoKr"]):
            t, key = found[name]
            tensors[path, name] = _as_dimensioned(t, weights[path]) if name == "lokr_w2" else t, key
        first, second = (_factor(file, found, name) for name in ("lokr_w1", "lokr_w2"))
        out, cols, *kernel = weights[path]
        inner = second[1] // torch.Size(kernel).numel()
        if (first[0] * second[0], first[1] * inner) != (out, cols):
            key = next(iter(found.values()))[1].partition(".")[0]
            raise StorageError(
                f"{file}: the factors of {key} make {first[0] * second[0]} × {first[1] * inner}, but the weight of "
                f"{path!r} is {tuple(weights[path])}"
            )
        sides[path] = (out, first[0]), (cols, first[1])
        low = next((found[name][0].shape[1] for name in ("lokr_w2_a", "lokr_w1_a") if name in found), None)
        ranks[path] = low if low is not None else max(*first, second[0], inner)
        alphas[path] = float(ranks[path]) if _of_whole_factors(found) else _alpha(file, found, ranks[path])
    return {
        "peft_type": "LOKR",
        **_patterns(ranks, alphas),
        "decompose_both": any("lokr_w1_a" in found for found in modules.values()),
        "decompose_factor": _common_factor(file, sides),
    }, tensors


def _factor(file: Path, found: _Module, name: str) -> tuple[int, int]:
    """Rows and columns of one of the two factors, its kernel among the columns."""
    if name in found:
        whole = found[name][0]
        return whole.shape[0], whole[0].numel()
    return _needed(file, found, f"{name}_a").shape[0], _needed(file, found, f"{name}_b").shape[1]


def _common_factor(file: Path, sides: Mapping[str, Sequence[tuple[int, int]]]) -> int:
    """The `factor` that splits every side as it is split in the file: size -> its first part."""
    split = {pair for pairs in sides.values() for pair in pairs}
    usual = [first for first, _ in Counter(first for _, first in split).most_common()]
    for factor in (-1, *usual):
        if all(factorization(size, factor)[0] == first for size, first in split):
            return factor
    found = ", ".join(f"{size} as {first} · {size // first}" for size, first in sorted(split))
    raise StorageError(f"{file}: no one factor splits {found}, and the modules of a LoKr share one")
