"""A sample of the base weights under an adapter, to tell whether it meets the base it was trained on.

A few numbers of every adapted weight, kept in fp32, with the dtype they had. Within one dtype they must agree exactly;
across dtypes as far as the coarser one tells.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peftkit.graft import graft_of
from peftkit.sites import Site

SAMPLES = 4


def fingerprint(sites: Mapping[str, Site]) -> dict[str, Any]:
    """`{"names": …, "dtypes": …, "samples": …}`; weights that are packed or not there are left out."""
    names, dtypes, picked = [], [], []
    for name, site in sites.items():
        weight = _base_weight(site)
        if weight is not None:
            names.append(name)
            dtypes.append(str(weight.dtype).removeprefix("torch."))
            picked.append(_pick(weight))
    values = torch.stack(picked).float().cpu().numpy() if picked else np.zeros((0, SAMPLES), np.float32)
    return {
        "names": names,
        "dtypes": dtypes[0] if len(set(dtypes)) == 1 else dtypes,
        "samples": base64.b64encode(values.astype("<f4").tobytes()).decode(),
    }


def differing(stored: Mapping[str, Any], sites: Mapping[str, Site]) -> list[str]:
    """Names of sites whose weight is not the one that was stored; what either side could not sample is not compared."""
    names = stored["names"]
    dtypes = stored["dtypes"] if isinstance(stored["dtypes"], list) else [stored["dtypes"]] * len(names)
    values = np.frombuffer(base64.b64decode(stored["samples"]), "<f4").reshape(len(names), SAMPLES)
    mine = fingerprint(sites)
    own = dict(zip(mine["names"], np.frombuffer(base64.b64decode(mine["samples"]), "<f4").reshape(-1, SAMPLES), strict=True))
    own_dtypes = mine["dtypes"] if isinstance(mine["dtypes"], list) else [mine["dtypes"]] * len(own)
    own_dtype = dict(zip(mine["names"], own_dtypes, strict=True))
    wrong = []
    for name, dtype, before in zip(names, dtypes, values, strict=True):
        now = own.get(name)
        if now is None:
            continue
        if dtype == own_dtype[name]:
            same = bool((before == now).all())
        else:
            eps = max(_eps(dtype), _eps(own_dtype[name]))
            same = bool((np.abs(before - now) <= eps * np.maximum(np.abs(before), np.abs(now)) + 1e-7).all())
        if not same:
            wrong.append(name)
    return wrong


def _eps(dtype: str) -> float:
    return torch.finfo(getattr(torch, dtype)).eps


def _base_weight(site: Site) -> Tensor | None:
    graft = graft_of(site.module)
    weight = graft.kept.get(site.weight_name) if graft is not None else None
    if weight is None:
        weight = site.module._parameters.get(site.weight_name)
    if weight is None or type(weight) not in (nn.Parameter, Tensor) or weight.is_meta or weight.numel() == 0:
        return None
    return weight.detach() if weight.dtype.is_floating_point and weight.dtype.itemsize > 1 else None


def _pick(weight: Tensor) -> Tensor:
    """Numbers from evenly spread places of the weight, wherever its strides put them."""
    flat = weight.view(-1) if weight.is_contiguous() else weight.reshape(-1)
    n = flat.numel()
    return flat[torch.tensor([(2 * i + 1) * n // (2 * SAMPLES) for i in range(SAMPLES)], device=flat.device)]
