"""A sample of the base weights under an adapter, to tell whether it meets the base it was trained on.

A few numbers of every adapted weight, kept in fp32, with the dtype they had. Within one dtype they must agree exactly;
across dtypes as far as the coarser one tells.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from peftkit.holder import without_merged
from peftkit.sites import Site, walk

SAMPLES = 4


def fingerprint(sites: Mapping[str, Site]) -> dict[str, Any]:
    """`{"names": …, "dtypes": …, "samples": …}`; weights that are packed or not there are left out."""
    return _written(_sample(sites))


def checked_fingerprint(stored: object) -> dict[str, Any]:
    """A fingerprint as it was read.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(stored, dict):
        raise ValueError(f"its sample of the base's weights is a {type(stored).__name__}")
    try:
        names, dtypes, _ = _parsed(stored)
        for dtype in set(dtypes):
            _eps(dtype)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"its sample of the base's weights cannot be read: {error!r}") from error
    if len(dtypes) != len(names) or not all(isinstance(n, str) for n in names):
        raise ValueError("its sample of the base's weights names other modules than it has dtypes for")
    return stored


def differing(stored: Mapping[str, Any], sites: Mapping[str, Site]) -> list[str]:
    """Names of sites whose weight is not the one that was stored; what either side could not sample is not compared."""
    return _apart(_parsed(stored), _sample(sites))


def disagreeing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of sites that both were taken of, and whose weights were not the same."""
    return _apart(_parsed(one), _parsed(other))


def joined(prints: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One fingerprint of all the sites of several that agree."""
    found: dict[str, tuple[str, Any]] = {}
    for names, dtypes, values in map(_parsed, prints):
        for name, dtype, value in zip(names, dtypes, values, strict=True):
            found.setdefault(name, (dtype, value))
    values = np.array([value for _, value in found.values()], np.float32).reshape(-1, SAMPLES)
    return _written(_Sample(list(found), [dtype for dtype, _ in found.values()], values))


class _Sample(NamedTuple):
    """The sites, the dtypes of their weights, and SAMPLES numbers of each."""

    names: list[str]
    dtypes: list[str]
    values: np.ndarray[Any, Any]


def _written(sample: _Sample) -> dict[str, Any]:
    names, dtypes, values = sample
    return {
        "names": names,
        "dtypes": dtypes[0] if len(set(dtypes)) == 1 else dtypes,
        "samples": base64.b64encode(values.astype("<f4").tobytes()).decode(),
    }


def _parsed(stored: Mapping[str, Any]) -> _Sample:
    names = stored["names"]
    values = np.frombuffer(base64.b64decode(stored["samples"]), "<f4").reshape(len(names), SAMPLES)
    dtypes = stored["dtypes"] if isinstance(stored["dtypes"], list) else [stored["dtypes"]] * len(names)
    return _Sample(names, dtypes, values)


def _apart(one: _Sample, other: _Sample) -> list[str]:
    there, kinds, before = one
    names, dtypes, now = other
    if names != there:
        at = {name: i for i, name in enumerate(there)}
        both = [i for i, name in enumerate(names) if name in at]
        names, dtypes, now = [names[i] for i in both], [dtypes[i] for i in both], now[both]
        rows = [at[name] for name in names]
        before, kinds = before[rows], [kinds[i] for i in rows]
    same = (before == now) | (np.isnan(before) & np.isnan(now))
    if dtypes != kinds:
        eps = np.array([[max(_eps(a), _eps(b)) if a != b else 0.0] for a, b in zip(dtypes, kinds, strict=True)])
        with np.errstate(invalid="ignore"):
            near = np.abs(before - now) <= eps * np.maximum(np.abs(before), np.abs(now)) + 1e-7
        same |= near & (eps > 0)
    return [name for name, good in zip(names, same.all(axis=1), strict=True) if not good]


def _eps(dtype: str) -> float:
    return torch.finfo(getattr(torch, dtype)).eps


@torch.no_grad()
def _sample(sites: Mapping[str, Site]) -> _Sample:
    names: list[str] = []
    dtypes: list[str] = []
    picked: list[Tensor] = []
    for name, site in sites.items():
        weight = _base_weight(site)
        if weight is not None:
            names.append(name)
            dtypes.append(str(weight.dtype).removeprefix("torch."))
            picked.append(_pick(weight))
    return _Sample(names, dtypes, _gathered(picked))


def _gathered(picked: Sequence[Tensor]) -> np.ndarray[Any, Any]:
    if not picked:
        return np.zeros((0, SAMPLES), np.float32)
    first = picked[0]
    if any(p.dtype != first.dtype or p.device != first.device for p in picked):
        picked = [p.float().cpu() for p in picked]
    return torch.cat(list(picked)).float().cpu().numpy().reshape(-1, SAMPLES)


def _base_weight(site: Site) -> Tensor | None:
    """The weight at `site`; where that is a block, the first matrix in it."""
    weight = without_merged(site.module, site.weight_name)
    if weight is None and site.part is None:
        inside = (without_merged(s.module, "weight") for s in walk(site.module) if s.part is None)
        weight = next((w for w in inside if w is not None and w.dim() > 1), None)
    if weight is None or type(weight) not in (nn.Parameter, Tensor) or weight.is_meta or weight.numel() == 0:
        return None
    return weight if weight.dtype.is_floating_point and weight.dtype.itemsize > 1 else None


def _pick(weight: Tensor) -> Tensor:
    """Numbers from evenly spread places of the weight, wherever its strides put them: `(SAMPLES,)`."""
    n = weight.numel()
    if weight.is_contiguous() and n >= SAMPLES:
        return weight.as_strided((SAMPLES,), (n // SAMPLES,), weight.storage_offset() + n // (2 * SAMPLES))
    places = np.arange(SAMPLES) * (n // SAMPLES) + n // (2 * SAMPLES)
    where = np.unravel_index(places, tuple(weight.shape))
    return weight[tuple(torch.from_numpy(i).to(weight.device) for i in where)]
