"""LISA: of all blocks a few train at a time, drawn anew every so many steps (Pan et al., arXiv 2403.17919, algorithm 1).

The paper's settings: 2 blocks of a 7 B model, 4 of a 70 B one; 20 steps and fewer. Each run of its experiments between two
switches began with a new optimizer; here what stays on (embedding, head, final norm, a block that is drawn again) keeps
its moments, and a block that comes on starts with none.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from peftkit import stacks
from peftkit.schedules.schedule import SteppedSchedule, check_count


class LISA(SteppedSchedule):
    """Train `active_layers` of the blocks at a time, and all that lies outside of blocks always.

    Gradients and optimizer state exist for what trains alone: at a switch those of the blocks that leave are dropped. Only
    what was trainable before takes part: what you froze stays frozen, and what `inject` froze does not.

    Args:
        model: any model; adapters in it train as before. As made, or wrapped in DistributedDataParallel with
            `find_unused_parameters=True` while all of it was on, or sharded by `fully_shard`.
        optimizer: it holds all parameters: `AdamW(model.parameters(), lr=…)`; or several that do together, as Muon needs.
            The state is kept by parameter (no LBFGS).
        active_layers: γ, how many blocks train at a time; 0 leaves embedding, head and norm.
        interval: K, optimizer steps from one draw to the next.
        seed: of the draws alone.
        blocks: patterns (`"model.layers.*"`) or modules; found by themselves where a model repeats a block.
        weights: how likely each block is drawn, in the model's order, which is that of `blocks` here; positive numbers or
            0. They need not add up to 1. The blocks of a draw are taken one after the other, without replacement.
            `MeanWeightNorms` measures the paper's.
        check_ranks: compare between ranks, at every switch, a number of each parameter that was trained.

    Raises:
        ValueError: more active layers than blocks, weights that leave fewer; nothing trainable in a block; an optimizer
            that lacks parameters; a wrapper that does not see the switch; ranks that were given different settings.
        TypeError: an optimizer without state by parameter. TargetError: no blocks.
        RuntimeError: an adapter is merged.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        active_layers: int = 2,
        interval: int = 20,
        seed: int = 0,
        *,
        blocks: stacks.Blocks | None = None,
        weights: Sequence[float] | None = None,
        check_ranks: bool = True,
    ):
        settings = {
            "active_layers": active_layers,
            "interval": interval,
            "seed": seed,
            "weights": None if weights is None else _numbers(weights),
        }
        if weights is not None and isinstance(blocks, list | tuple):
            _check_order(model, blocks)
        super().__init__(model, optimizer, blocks, settings, check_ranks)

    @property
    def active(self) -> tuple[str, ...]:
        """The names of the blocks that train now."""
        return tuple(self.blocks[i].name for i in self._chosen)

    def _check_settings(self) -> None:
        count, weights = self._settings["active_layers"], self._settings["weights"]
        check_count("active_layers", count, 0)
        check_count("interval", self._settings["interval"], 1)
        check_count("seed", self._settings["seed"], 0)
        total = len(self.blocks)
        if count > total:
            raise ValueError(
                f"active_layers={count}, and the model has {total} block{'s' * (total != 1)} ({self.blocks[0].name} "
                "first): there are no more to train"
            )
        if weights is None:
            return
        if len(weights) != total:
            raise ValueError(f"weights: one for each of the {total} blocks, not {len(weights)}")
        if not all(0 <= w < math.inf for w in weights):
            raise ValueError(f"weights: numbers that are not negative, not {weights}")
        above = sum(w > 0 for w in weights)
        if above < count:
            raise ValueError(f"weights: {above} are above 0, and active_layers={count} are to be drawn")

    def _prepare(self, model: nn.Module) -> None:
        self._of = self._turns.blocks_of(self.blocks)

    def _choose(self, switch: int) -> list[int]:
        weights = self._settings["weights"]
        if weights is not None:  # the largest first: sums of what is near the largest float would overflow
            weights = [w / max(weights) for w in weights]
        p = None if weights is None else [w / sum(weights) for w in weights]
        drawn = self._rng(switch).choice(len(self.blocks), self._settings["active_layers"], replace=False, p=p)
        return sorted(int(i) for i in drawn)

    def _may_choose(self, chosen: list[int]) -> bool:
        count = self._settings["active_layers"]
        return len(set(chosen)) == len(chosen) == count and all(0 <= i < len(self.blocks) for i in chosen)

    def _on(self, chosen: Collection[int]) -> Collection[str]:
        # what several modules hold trains where one of them does; None stands for outside of all blocks
        return [name for name, of in self._of.items() if None in of or of & set(chosen)]


def _numbers(weights: Any) -> list[float]:
    try:
        return [float(w) for w in weights]
    except (TypeError, ValueError):
        raise ValueError(f"weights: a number for each block, not {weights!r}") from None


def _check_order(model: nn.Module, given: Sequence[Any]) -> None:
    order = [block.name for one in given for block in stacks.find(model, [one])]
    names = [block.name for block in stacks.find(model, given)]
    if order != names:
        raise ValueError(f"weights: they go by the model's order of blocks, {names}; name the blocks in that order")
