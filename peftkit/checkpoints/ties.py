"""Weights that a model ties to one another, of which its files hold one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from peftkit.checkpoints.files import Checkpoint
from peftkit.checkpoints.fitting import Fitted
from peftkit.method import Adapter, NotMergeable

_WITH_HEAD = re.compile(r".*(ForCausalLM|LMHeadModel|ForMaskedLM|ForConditionalGeneration|ForPreTraining)")
_UNTIED = (
    "; give the head a weight of its own in the base first, and have its config.json say tie_word_embeddings: false"
)


def check_ties(checkpoint: Checkpoint, fitted: Fitted, changed: Mapping[str, Sequence[Adapter]]) -> None:
    """Refuse to change an embedding that is the output head as well, or to add a head that the model would tie away.

    Only a change that the adapters make of both, as with rows of a vocabulary, is right for both.

    Raises:
        NotMergeable: naming the weight.
    """
    for name in fitted.added:
        rows = fitted.added[name][1][0] if fitted.added[name][1] else 0
        if name.endswith("lm_head.weight") and (_says_tied(checkpoint) or _embedding_of(checkpoint, rows)):
            raise NotMergeable(
                f"{checkpoint.path} ties its head to its embedding, and the adapter has one of its own{_UNTIED}"
            )
    for name, adapters in changed.items():
        module = fitted.root.get_submodule(name.rpartition(".")[0])
        if not isinstance(module, nn.Embedding) and not _is_embedding(name):
            continue
        if name not in fitted.keys or all(a.replaces and a.merges == ("weight",) for a in adapters):
            continue
        if _tied(checkpoint, fitted.keys[name]):
            raise NotMergeable(
                f"{checkpoint.path} ties its head to {fitted.keys[name]}, so merging would change both{_UNTIED}"
            )


def _is_embedding(name: str) -> bool:
    return name.rpartition(".")[0].rpartition(".")[2] in (
        "embed_tokens",
        "wte",
        "word_embeddings",
        "shared",
        "embed_in",
    )


def _says_tied(checkpoint: Checkpoint) -> bool | None:
    for config in (checkpoint.config, checkpoint.config.get("text_config")):
        if isinstance(config, dict) and isinstance(config.get("tie_word_embeddings"), bool):
            return config["tie_word_embeddings"]
    return None


def _tied(checkpoint: Checkpoint, key: str) -> bool:
    said, kinds = _says_tied(checkpoint), checkpoint.config.get("architectures") or []
    with_head = any(isinstance(kind, str) and _WITH_HEAD.fullmatch(kind) for kind in kinds)
    if said is not None:
        return said and (with_head or not kinds)
    rows = checkpoint.shape(key)[0]
    others = (e for k, (_, e) in checkpoint.places.items() if k != key and len(e.shape) == 2)
    return with_head and not any(e.shape[0] == rows for e in others)  # a head, and no weight but this that could be its


def _embedding_of(checkpoint: Checkpoint, rows: int) -> bool:
    kinds = checkpoint.config.get("architectures") or []
    return any(isinstance(k, str) and _WITH_HEAD.fullmatch(k) for k in kinds) and any(
        len(e.shape) == 2 and e.shape[0] == rows for _, e in checkpoint.places.values()
    )
