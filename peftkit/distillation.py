"""Context distillation: an adapter learns to answer without a context as its base answers with it.

Askell et al., arXiv 2112.00861, section 2.3.1; Snell et al., arXiv 2209.15189. Teacher and student are one model: the
teacher with the adapters off and the context c in its input, the student with them on and without c:

    L = τ² · mean over response tokens of KL(softmax(t / τ) ‖ softmax(s / τ))
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkit import api
from peftkit.eval_mode import evaluating
from peftkit.stacks import unwrapped

IGNORED = -100  # the label of a token that is no response


@dataclass(frozen=True, eq=False)
class TeacherLogits:
    """What a teacher says of the response tokens of a batch; computed once, it can be stored and joined anew.

    Attributes:
        tokens: (n,) int64, the response tokens of all rows, one row after the other.
        counts: how many of them each row has.
        log_probs: (n, k) of the k likeliest tokens, at `temperature`; with k the whole vocabulary, in its order.
        rest: (n,) log of the probability of all other tokens together; None where there are none.
        indices: (n, k) int64, which tokens; None for the whole vocabulary.
        temperature: τ.
    """

    tokens: Tensor
    counts: tuple[int, ...]
    log_probs: Tensor
    rest: Tensor | None
    indices: Tensor | None
    temperature: float

    @staticmethod
    def joined(parts: Sequence[TeacherLogits]) -> TeacherLogits:
        """One batch of several: of examples kept one by one, say.

        Raises:
            ValueError: none, or of different temperatures or k.
        """
        if len({(p.temperature, p.log_probs.shape[1:], p.indices is None) for p in parts}) != 1:
            raise ValueError(
                "teacher logits that are joined have one temperature and one top_k, and there is at least one"
            )

        def cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
            there = [t for t in tensors if t is not None]
            return torch.cat(there) if there else None

        return TeacherLogits(
            torch.cat([p.tokens for p in parts]),
            tuple(count for p in parts for count in p.counts),
            torch.cat([p.log_probs for p in parts]),
            cat([p.rest for p in parts]),
            cat([p.indices for p in parts]),
            parts[0].temperature,
        )

    def to(self, device: torch.device | str) -> TeacherLogits:
        """The same on another device."""
        rest = None if self.rest is None else self.rest.to(device)
        indices = None if self.indices is None else self.indices.to(device)
        return TeacherLogits(
            self.tokens.to(device), self.counts, self.log_probs.to(device), rest, indices, self.temperature
        )


def context_distillation(
    model: nn.Module,
    student: Mapping[str, Any],
    teacher: Mapping[str, Any] | TeacherLogits,
    *,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
) -> Tensor:
    """The loss, a scalar in fp32 (fp64 for an fp64 model); its gradient reaches what is trained in `model`.

    Responses are aligned by their tokens, not by position: the i-th response token of a row is the same for both, however
    long the context or the padding before it.

    Args:
        model: a causal language model, or an encoder-decoder, with adapters acting; it returns logits
            `(batch tokens vocabulary)`, as a tensor or as `.logits`.
        student: what the model is called with, without the context; `labels` `(batch tokens)` hold the response tokens
            where they stand and -100 elsewhere, as for the usual loss.
        teacher: the same with the context, padded on its own; or what `teacher_logits` made of it.
        temperature: τ.
        ce_weight: λ, to add λ times the cross-entropy of the response tokens.

    Raises:
        ValueError: no adapter acts, or one is merged; responses that differ or cannot be predicted; a bad setting.
    """
    if not api.active(model):
        raise ValueError("no adapter acts, so teacher and student are one; inject or activate one first")
    if not (0 < temperature < math.inf and 0 <= ce_weight < math.inf):
        raise ValueError(
            f"temperature is positive, and ce_weight is not negative; not {temperature!r} and {ce_weight!r}"
        )
    if isinstance(teacher, TeacherLogits):
        if teacher.temperature != temperature:
            raise ValueError(f"the teacher's logits were kept at temperature {teacher.temperature}, not {temperature}")
    else:
        teacher = teacher_logits(model, teacher, temperature=temperature)
    places, tokens, counts = _response(model, student)
    teacher = teacher.to(tokens.device)
    _check_same(counts, tokens, teacher)
    logits = _logits(model, student)[places]
    found = torch.log_softmax(logits / temperature, -1)
    kl = _kl(teacher, found) * temperature**2
    return kl if not ce_weight else kl + ce_weight * nn.functional.cross_entropy(logits, tokens)


@torch.no_grad()
def teacher_logits(
    model: nn.Module, teacher: Mapping[str, Any], *, temperature: float = 1.0, top_k: int | None = None
) -> TeacherLogits:
    """What the model says with its adapters off, in eval mode, of the response tokens.

    Args:
        teacher: as of `context_distillation`.
        top_k: keep this many likeliest tokens, and what remains as one token more. The divergence over these k + 1 is at
            most the exact one, and the exact one where all is kept.

    Raises:
        ValueError: no adapter is attached, or one is merged; no response; a bad setting.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is positive, not {temperature!r}")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k is a whole number of at least 1, or None for all, not {top_k!r}")
    places, tokens, counts = _response(model, teacher)
    with api.disabled(model), evaluating(model):
        found = torch.log_softmax(_logits(model, teacher)[places] / temperature, -1)
    if top_k is None or top_k >= found.shape[-1]:
        return TeacherLogits(tokens, counts, found, None, None, temperature)
    values, indices = found.topk(top_k, -1)
    return TeacherLogits(tokens, counts, values, _rest(found, indices), indices, temperature)


def _kl(teacher: TeacherLogits, found: Tensor) -> Tensor:
    expected = teacher.log_probs
    if teacher.indices is not None and teacher.rest is not None:
        expected = torch.cat([expected, teacher.rest[:, None]], -1)
        found = torch.cat([found.gather(-1, teacher.indices), _rest(found, teacher.indices)[:, None]], -1)
    elif expected.shape != found.shape:
        raise ValueError(
            f"the teacher's logits are of {expected.shape[-1]} tokens and the model's of {found.shape[-1]}"
        )
    expected = expected.to(found.dtype)
    # what the teacher rules out adds nothing, and would be 0 · ∞
    return torch.where(expected > -math.inf, expected.exp() * (expected - found), 0).sum(-1).mean()


def _rest(log_probs: Tensor, indices: Tensor) -> Tensor:
    """The log of the probability of all tokens but these, without the cancellation of 1 − Σ p."""
    others = log_probs.scatter(-1, indices, -math.inf)
    none = (others == -math.inf).all(-1, keepdim=True)  # of a masked vocabulary: the gradient would be NaN
    return others.masked_fill(none, 0.0).logsumexp(-1).masked_fill(none.squeeze(-1), -math.inf)


def _response(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[tuple[Tensor, Tensor], Tensor, tuple[int, ...]]:
    """Where the logits of the response tokens stand, the tokens, and how many each row has."""
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        raise ValueError("the inputs hold no labels (batch tokens): response tokens where they stand, -100 elsewhere")
    there = labels != IGNORED
    if not there.any():
        raise ValueError("no token of the batch is a response: all labels are -100")
    rows, columns = there.nonzero(as_tuple=True)
    if not _encodes_first(model):
        if there[:, 0].any():
            row = int(there[:, 0].nonzero()[0])
            raise ValueError(
                f"row {row} begins with a response token, and nothing before it predicts it; keep a token before"
            )
        columns_of_logits = columns - 1
    else:
        columns_of_logits = columns
    return (rows, columns_of_logits), labels[rows, columns].long(), tuple(there.sum(1).tolist())


def _check_same(counts: tuple[int, ...], tokens: Tensor, teacher: TeacherLogits) -> None:
    if len(counts) != len(teacher.counts):
        raise ValueError(f"the student has {len(counts)} rows and the teacher {len(teacher.counts)}")
    for row, (ours, theirs) in enumerate(zip(counts, teacher.counts, strict=True)):
        if ours != theirs:
            raise ValueError(f"row {row}: the student's response has {ours} tokens and the teacher's {theirs}")
    differing = (tokens != teacher.tokens).nonzero()
    if len(differing):
        at = int(differing[0])
        raise ValueError(
            f"the responses differ, first in token {int(tokens[at])} of the student's and {int(teacher.tokens[at])} of the "
            "teacher's: both are to be asked about the same response"
        )


def _logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    kept = dict(inputs) if _encodes_first(model) else {k: v for k, v in inputs.items() if k != "labels"}
    out = model(**kept)
    logits = out if isinstance(out, Tensor) else out[0] if isinstance(out, tuple) else out.logits
    if logits.shape[:2] != inputs["labels"].shape:
        raise ValueError(
            f"the model gives logits of {tuple(logits.shape[:2])} tokens for labels of {tuple(inputs['labels'].shape)}; "
            "they are to be of all tokens"
        )
    return logits if logits.dtype == torch.float64 else logits.float()


def _encodes_first(model: nn.Module) -> bool:
    """Whether it is an encoder-decoder: its labels are what its decoder is asked, each at its own position."""
    return bool(getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False))
