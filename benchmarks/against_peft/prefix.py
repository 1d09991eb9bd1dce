"""What a prefix costs where it is computed, beside peft's, which hands it in as a filled cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
from torch import nn

import peftkit

from .common import Row, Size, against, llama, timed

LENGTH = 20


def measure(size: Size) -> Iterator[Row]:
    """Time of a forward without gradients, and of one with a backward pass to the prefix."""
    models = {name: llama(4, size.width).requires_grad_(False).eval() for name in ("peftkit", "peft")}
    peftkit.inject(models["peftkit"], peftkit.PrefixTuningConfig(length=LENGTH))
    theirs = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    models["peft"] = peft.get_peft_model(models["peft"], theirs).eval()  # type: ignore[arg-type]
    ids = torch.randint(0, 64, (4, size.tokens // 4))

    def timing(call: Callable[[nn.Module], Any]) -> dict[str, float]:
        return timed({name: lambda m=model: call(m) for name, model in models.items()}, 3 * size.rounds)

    with torch.no_grad():
        times = timing(lambda m: m(input_ids=ids, attention_mask=torch.ones_like(ids)))
    what = f"a 4-layer, {size.width}-wide Llama, {size.tokens} tokens, prefix of {LENGTH}"
    yield against(f"forward of {what}", times, size.limit(1.0))
    times = timing(lambda m: m(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward())
    yield against(f"forward and backward of {what}", times, size.limit(1.0))
