"""The measure from which LISA's sampling was derived: how large the weights of each block are while a model trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftkit import ledger, stacks
from peftkit.holder import graft_of
from peftkit.method import NotMergeable
from peftkit.schedules.optimizers import is_quantised
from peftkit.sites import walk


class MeanWeightNorms:
    """The mean over steps of each block's norm, w^(l) = 1/T Σ_t ‖θ_t^(l)‖₂ (Pan et al., arXiv 2403.17919, section 3.1).

    θ^(l) is all weights of block l together, as its forward uses them: W + ΔW where adapters act. From a run with LoRA, w̃,
    and one of full fine-tuning, w, the paper takes the probability of a block, p^(l) = w̃^(l) / w^(l) (section 3.2), and
    then uses γ/L for all of them:

        LISA(model, optimizer, weights=of_lora.ratio(of_full))

    Args:
        blocks: as of `LISA`.

    Raises:
        TargetError: no blocks.
    """

    def __init__(self, model: nn.Module, *, blocks: stacks.Blocks | None = None):
        self._model = stacks.unwrapped(model)
        self.blocks = stacks.find(model, blocks)
        self.steps = 0
        self._sum = torch.zeros(len(self.blocks), dtype=torch.float64)

    @torch.no_grad()
    def update(self) -> None:
        """Count the weights as they are now; call it after each optimizer step.

        Raises:
            NotMergeable: an acting adapter changes no weight. ValueError: a weight is quantised.
        """
        self._sum += torch.stack([_norm(block.module, self._acting()) for block in self.blocks]).cpu()
        self.steps += 1

    def mean(self) -> list[float]:
        """w^(l) of each block.

        Raises:
            ValueError: nothing was counted.
        """
        if not self.steps:
            raise ValueError("no weights were counted; call update() after each step of training")
        return (self._sum / self.steps).tolist()

    def ratio(self, other: MeanWeightNorms) -> list[float]:
        """These norms over `other`'s, block by block: with LoRA's over full fine-tuning's, the paper's p^(l).

        Raises:
            ValueError: the two are of models with other numbers of blocks.
        """
        if len(self.blocks) != len(other.blocks):
            raise ValueError(f"{len(self.blocks)} blocks cannot be compared with {len(other.blocks)}")
        return [mine / theirs for mine, theirs in zip(self.mean(), other.mean(), strict=True)]

    def _acting(self) -> tuple[str, ...]:
        found = ledger.find(self._model)
        return found[1].switch.acting() if found is not None else ()


def _norm(block: nn.Module, acting: tuple[str, ...]) -> Tensor:
    squares: dict[int, Tensor] = {}
    for site in walk(block):
        made = graft_of(site.module) if site.part is None else None
        adapters = [*made.acting(acting), *made.acting_on_parts(acting)] if made is not None else []
        for adapter in adapters:
            if (reason := adapter.why_not_merge()) is not None:
                raise NotMergeable(f"{type(adapter).__name__} at {site.name!r} has no weight to measure: {reason}")
        if site.part is None and is_quantised(site.module, ()):
            raise ValueError(
                f"{site.name!r} is quantised, so the norm of its weight is not known; measure the whole model"
            )
        for key, p in site.module._parameters.items():
            if p is not None and id(p) not in squares:
                changed = [a for a in adapters if key in a.merges]
                value = p
                for adapter in changed:
                    value = adapter.applied(key, value)
                squares[id(p)] = torch.linalg.vector_norm(value, dtype=torch.float64) ** 2
    return torch.stack(list(squares.values())).sum().sqrt()
