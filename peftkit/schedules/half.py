"""Half fine-tuning: in each round a random half of every kind of matrix trains (Hui et al., arXiv 2404.18466).

A round is a stage of training: supervised tuning, then preferences, or one task after another. The half that rests keeps
what the model knew; the paper's ablation prefers halves by category (here) over halves of layers or of the whole model.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from peftkit import stacks
from peftkit.blocks import is_norm
from peftkit.schedules.schedule import Schedule, check_count
from peftkit.targets import sub_layer_named

Unit = list[str]  # names of parameters that train together: a Linear's weight and bias


class HalfFineTuning(Schedule):
    """Freeze half of each category of the blocks' weights, another half in each round.

    In each block 2 of {Q, K, V, O} train; of {up, gate, down} 2 in a random half of the blocks and 1 in the others; so with
    any other odd number. Cross-attention and what belongs to neither (a router's neighbours, a layer's scales) are
    categories of their own. Of all norms of the model together half train. A bias goes with its weight, fused matrices as
    one. What lies outside of the blocks and is no norm, embeddings and heads, always trains.

    Frozen parameters have neither gradient nor optimizer state, by the first optimizer step of a round at the latest.

    Args:
        model, optimizer, blocks, check_ranks: as of `LISA`.
        seed: of the selection alone.

    Raises:
        As `LISA`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        seed: int = 0,
        *,
        blocks: stacks.Blocks | None = None,
        check_ranks: bool = True,
    ):
        super().__init__(model, optimizer, blocks, {"seed": seed}, check_ranks)

    def new_round(self) -> None:
        """Select anew, at the start of the next stage; call it between two optimizer steps.

        Raises:
            RuntimeError: something else turned parameters on or off, or they differ between the ranks.
        """
        self._turns.check()
        self._switch()

    @property
    def frozen(self) -> list[str]:
        """The names of the base parameters that rest in this round."""
        on = set(self.trained)
        return [name for name in self._turns.trained if name not in on]

    def _check_settings(self) -> None:
        check_count("seed", self._settings["seed"], 0)

    def _prepare(self, model: nn.Module) -> None:
        categories: dict[str, dict[int | None, dict[str, Unit]]] = {}  # kind -> block -> unit -> names
        for name, inside in self._turns.blocks_of(self.blocks).items():
            holder, key = self._turns.places[name][0]
            path = name.rpartition(".")[0]
            block = None
            if is_norm(holder):
                kind, unit = "norm", path
            elif None in inside:
                continue
            else:
                block = min(i for i in inside if i is not None)
                kind = _kind(path[len(self.blocks[block].name) + 1 :], holder)
                unit = path if _matrices(holder) == 1 else f"{path}.{key.removesuffix('_bias')}"
            categories.setdefault(kind, {}).setdefault(block, {}).setdefault(unit, []).append(name)
        self._groups = [[list(units.values()) for units in by.values()] for by in categories.values()]
        self._units = [unit for groups in self._groups for units in groups for unit in units]

    def _choose(self, switch: int) -> list[int]:
        rng = self._rng(switch)
        chosen: list[int] = []
        start = 0
        for groups in self._groups:
            odd = [i for i, units in enumerate(groups) if len(units) % 2]
            more = set(rng.permutation(odd)[: (len(odd) + int(rng.integers(2))) // 2].tolist())
            for i, units in enumerate(groups):
                count = len(units) // 2 + (i in more)
                chosen += [start + int(j) for j in rng.choice(len(units), count, replace=False)]
                start += len(units)
        return sorted(chosen)

    def _on(self, chosen: Collection[int]) -> Collection[str]:
        resting = {name for i, unit in enumerate(self._units) if i not in set(chosen) for name in unit}
        return [name for name in self._turns.trained if name not in resting]


def _kind(path: str, holder: nn.Module) -> str:
    """The category of a unit by its path in the block: an attention by its own path, feed-forward, or what is left."""
    if not _matrices(holder) or isinstance(holder, nn.Embedding):  # T5's relative positions
        return "other"
    parts = path.split(".")
    for i, part in enumerate(parts):
        if sub_layer_named(part) == "attention":
            return ".".join(parts[: i + 1])
    return "feed-forward"


def _matrices(holder: nn.Module) -> int:
    held = holder._parameters.items()
    return sum(p is not None and p.dim() > 1 and not key.endswith("bias") for key, p in held)
