"""Gradual unfreezing: from the top down, one group of layers more each epoch (ULMFiT, Howard and Ruder, arXiv 1801.06146,
section 3.3).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from peftkit import stacks
from peftkit.schedules.schedule import SteppedSchedule, check_count


class GradualUnfreezing(SteppedSchedule):
    """First what lies above the blocks trains (head, final norm), then the last block too, and so on to the embeddings.

    Call `step` after each epoch, or after each optimizer step with `interval` the steps of an epoch. What is not on yet has
    neither gradient nor optimizer state. Between two stacks (encoder and decoder) what is in neither belongs to the first.
    A tied embedding trains from the start, as the head that it is.

    Args:
        model, optimizer, blocks, check_ranks: as of `LISA`.
        interval: calls of `step` from one group to the next.

    Raises:
        As `LISA`; ValueError: nothing above the blocks is trainable.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        interval: int = 1,
        *,
        blocks: stacks.Blocks | None = None,
        check_ranks: bool = True,
    ):
        super().__init__(model, optimizer, blocks, {"interval": interval}, check_ranks)

    @property
    def done(self) -> bool:
        """Whether all groups train."""
        return self._chosen == self._levels[-1:]

    def _check_settings(self) -> None:
        check_count("interval", self._settings["interval"], 1)

    def _prepare(self, model: nn.Module) -> None:
        self._turns.blocks_of(self.blocks)
        depths = stacks.depths(model, self.blocks)
        self._depth = {name: max(depths[id(m)] for m, _ in held) for name, held in self._turns.places.items()}
        # of groups without a trainable parameter, as below blocks that read features, none is waited for
        self._levels = sorted(set(self._depth.values()), reverse=True)
        if self._levels[0] <= len(self.blocks):
            raise ValueError(
                f"nothing above {self.blocks[-1].name!r} is trainable, and gradual unfreezing begins there; turn the head on"
            )

    def _choose(self, switch: int) -> list[int]:
        return [self._levels[min(switch, len(self._levels) - 1)]]

    def _may_choose(self, chosen: list[int]) -> bool:
        return len(chosen) == 1 and chosen[0] in self._levels

    def _on(self, chosen: Collection[int]) -> Collection[str]:
        return [name for name, depth in self._depth.items() if depth >= min(chosen)]
