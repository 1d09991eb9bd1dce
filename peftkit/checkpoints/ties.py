"""Weights that a model ties to one another, of which its files hold one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peftkit import ledger
from peftkit.also_train import TokenRows
from peftkit.checkpoints.files import Checkpoint
from peftkit.method import Adapter, NotMergeable

_WITH_HEAD = re.compile(r".*(ForCausalLM|LMHeadModel|ForMaskedLM|ForConditionalGeneration|ForPreTraining)")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "shared", "embed_in")
_HEADS = re.compile(r"(^|\.)(lm_head|embed_out|proj_out|output_projection|output|decoder|vocab_projector)\.weight")
_UNTIED = (
    "; give the head a weight of its own in the base first, and have its config.json say tie_word_embeddings: false"
)


def check_ties(
    checkpoint: Checkpoint, root: nn.Module, keys: Mapping[str, str], added: Mapping[str, tuple[Any, Sequence[int]]]
) -> None:
    """Refuse to change an embedding that is the output head as well, or to add a head that the model would tie away.

    Rows of a vocabulary alone are right for both, since a model that ties them trains them in both.

    Raises:
        NotMergeable: naming the weight.
    """
    for name, (_, shape) in added.items():
        tables = [k for k, (_, e) in checkpoint.places.items() if len(e.shape) == 2 and list(e.shape) == list(shape)]
        if name.endswith("lm_head.weight") and any(_tied(checkpoint, key) for key in tables):
            raise NotMergeable(
                f"{checkpoint.path} ties its head to its embedding, and the adapter has one of its own{_UNTIED}"
            )
    for name, adapter in _changed(root):
        module = root.get_submodule(name.rpartition(".")[0])
        last = name.rpartition(".")[0].rpartition(".")[2]
        if name not in keys or isinstance(adapter, TokenRows):
            continue
        if (isinstance(module, nn.Embedding) or last in _EMBEDDINGS) and _tied(checkpoint, keys[name]):
            raise NotMergeable(
                f"{checkpoint.path} ties its head to {keys[name]}, so merging would change both{_UNTIED}"
            )


def _changed(root: nn.Module) -> Iterator[tuple[str, Adapter]]:
    for attachment in ledger.require(root)[1].attachments.values():
        for where, adapter in attachment.adapters.items():
            for name in adapter.merges:
                yield attachment.sites[where].full_name(name), adapter


def _tied(checkpoint: Checkpoint, key: str) -> bool:
    """Whether this embedding is the head as well: as the config says, else by the class's name and a head's own weight."""
    kinds = checkpoint.config.get("architectures") or []
    with_head = any(isinstance(kind, str) and _WITH_HEAD.fullmatch(kind) for kind in kinds)
    for config in (checkpoint.config, checkpoint.config.get("text_config")):
        if isinstance(config, dict) and isinstance(config.get("tie_word_embeddings"), bool):
            return config["tie_word_embeddings"] and (with_head or not kinds)
    heads = [
        k for k in checkpoint.places if k != key and _HEADS.search(k) and checkpoint.shape(k) == checkpoint.shape(key)
    ]
    # a head that is the embedding, number by number, was written twice
    return with_head and not any(not torch.equal(checkpoint.tensor(k), checkpoint.tensor(key)) for k in heads)
