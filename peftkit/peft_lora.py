"""What peft's `adapter_config.json` says of low-rank pairs: `peft_type` LORA, whatever method they belong to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from peftkit import leading
from peftkit.peft_patterns import PeftPatterns, compact, pattern_keys

# peft flags that change what the stored tensors mean, with the values under which they do not
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "target_parameters": (None, []),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}
# initial values that leave the base as it is, and those whose change of it can be computed again
FROM_BASE = leading.INITS
_INITS = ("gaussian", "eva", "orthogonal", *FROM_BASE)


def settings(pairs: Mapping[str, tuple[int, float]], **others: Any) -> dict[str, Any]:
    """The fields for pairs of these ranks and alphas by module path; `others` override."""
    r = Counter(r for r, _ in pairs.values()).most_common(1)[0][0]
    alpha = Counter(alpha for _, alpha in pairs.values()).most_common(1)[0][0]
    ranks = {path: own for path, (own, _) in pairs.items() if own != r}
    alphas = {path: own for path, (_, own) in pairs.items() if own != alpha}
    keys = pattern_keys(pairs) if ranks or alphas else {}
    return {
        "r": r,
        "lora_alpha": _int_if_whole(alpha),
        "rank_pattern": {keys[path]: own for path, own in ranks.items()},
        "alpha_pattern": {keys[path]: _int_if_whole(own) for path, own in alphas.items()},
        "bias": "none",
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "use_dora": False,
        **others,
    }


def check(stored: Mapping[str, Any], who: str) -> None:
    """Refuse flags that change what the stored tensors mean.

    Raises:
        ValueError: naming the flag and its value.
    """
    for flag, plain in _PLAIN.items():
        if stored.get(flag) not in (None, *plain):
            raise ValueError(f"{flag}={stored[flag]!r} is not supported by {who}; expected {plain[0]!r}")
    init = stored.get("init_lora_weights", True)
    if not (init is None or isinstance(init, bool) or init in _INITS):
        raise ValueError(
            f"init_lora_weights={init!r} may have changed the base weights it was trained on, in a way that cannot be "
            "computed again; convert it to plain LoRA with peft's path_initial_model_for_weight_conversion first"
        )


def ranks_and_alphas(stored: Mapping[str, Any], shapes: Mapping[str, Mapping[str, torch.Size]]) -> dict[str, Any]:
    """`r` and `alpha` as a config takes them, for the tensors of these shapes by module path.

    Raises:
        ValueError: a stored A has another rank than the fields say.
    """
    rank = PeftPatterns(stored.get("rank_pattern") or {}, stored.get("r", 8))
    alpha = PeftPatterns(stored.get("alpha_pattern") or {}, stored.get("lora_alpha", 8))
    ranks, alphas = {}, {}
    for path, found in shapes.items():
        # to peft, MultiheadAttention's out_proj is part of its module
        known = path.removesuffix(".base_layer.out_proj")
        ranks[path], alphas[path] = rank.at(known), alpha.at(known)
        for key, shape in found.items():
            if key in ("lora_A.weight", "lora_embedding_A") and tuple(shape[:1]) != (ranks[path],):
                raise ValueError(
                    f"r is {ranks[path]!r} for {path!r}, but {key} there has the shape {tuple(shape)}; the config and the "
                    "tensors are not of one adapter"
                )
    return {"r": compact(ranks), "alpha": compact(alphas)}


def _int_if_whole(x: float) -> float | int:
    return int(x) if float(x).is_integer() else x
