"""Half fine-tuning: in each round a random half of every kind of matrix trains (Hui et al., arXiv 2404.18466).

A round is a stage of training: supervised tuning, then preferences, or one task after another. The half that rests keeps
what the model knew; the paper's ablation prefers halves by category (here) over halves of layers or of the whole model.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from peftkit import stacks
from peftkit.blocks import is_norm, linear_sizes
from peftkit.schedules.schedule import Schedule, check_count
from peftkit.targets import sub_layer_named

Unit = list[str]  # names of parameters that train together: a Linear's weight and bias


class HalfFineTuning(Schedule):
    """Freeze half of each category of the blocks' weights, another half in each round.

    In each block 2 of {Q, K, V, O} train; of {up, gate, down} 2 in a random half of the blocks and 1 in the others; so with
    any other odd number. Cross-attention, each expert that has Linears of its own, and what is no such matrix (routers,
    convolutions, tables of positions, scales) are categories of their own. Of all norms of the model together half train.
    A bias goes with its weight, fused matrices as one. What lies outside of the blocks and is no norm, embeddings and
    heads, always trains.

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
            RuntimeError: it was closed; something else turned parameters on or off, or they differ between the ranks.
        """
        self._check_open()
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
        units: dict[tuple[str, int | None], dict[str, Unit]] = {}  # by kind and block
        for name, inside in self._turns.blocks_of(self.blocks).items():
            holder, key = self._turns.places[name][0]
            path = name.rpartition(".")[0]
            if is_norm(holder):
                units.setdefault(("norm", None), {}).setdefault(path, []).append(name)
            elif None not in inside:
                block = min(i for i in inside if i is not None)
                matrix = _matrix_of(holder, key)
                kind = "other" if matrix is None else _kind(path[len(self.blocks[block].name) + 1 :], holder)
                unit = f"{path}.{matrix}" if matrix else path
                units.setdefault((kind, block), {}).setdefault(unit, []).append(name)
        groups: dict[str, list[list[Unit]]] = {}
        for (kind, _), found in _singles_together(units).items():
            groups.setdefault(kind, []).append(list(found.values()))
        self._groups = list(groups.values())
        self._units = [unit for blocks in self._groups for units_ in blocks for unit in units_]

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

    def _may_choose(self, chosen: list[int]) -> bool:
        return len(set(chosen)) == len(chosen) and all(0 <= i < len(self._units) for i in chosen)

    def _on(self, chosen: Collection[int]) -> Collection[str]:
        training = set(chosen)
        resting = {name for i, unit in enumerate(self._units) if i not in training for name in unit}
        return [name for name in self._turns.trained if name not in resting]


def _matrix_of(holder: nn.Module, key: str) -> str | None:
    """Which matrix of its holder a parameter belongs to; empty for the only one; None where it belongs to none.

    Matrices are the weights of Linears and MultiheadAttention, and stacks of them such as experts; a convolution, a
    router, a table of positions, a scale is none.
    """
    if linear_sizes(holder) is not None:
        return ""
    if isinstance(holder, nn.MultiheadAttention):
        stem = key.removesuffix("_weight").removesuffix("_bias")
        return stem if holder._parameters.get(f"{stem}_weight") is not None else None
    stem = key.removesuffix("_bias")
    p = holder._parameters.get(stem)
    stacked = p is not None and p.dim() == 3 and not isinstance(holder, nn.Embedding | nn.modules.conv._ConvNd)
    return stem if stacked else None


def _kind(path: str, holder: nn.Module) -> str:
    """The category of a matrix by its path in the block: the attention that it lies in, or else what holds it."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if sub_layer_named(part) == "attention":
            return ".".join(parts[: i + 1])
    return path.rpartition(".")[0] if linear_sizes(holder) is not None else path


def _singles_together(
    units: dict[tuple[str, int | None], dict[str, Unit]],
) -> dict[tuple[str, int | None], dict[str, Unit]]:
    """BERT's two feed-forward matrices lie in a module each: what is alone in its module makes one category of a block."""
    found: dict[tuple[str, int | None], dict[str, Unit]] = {}
    for (kind, block), held in units.items():
        apart = kind in ("norm", "other") or sub_layer_named(kind.rpartition(".")[2]) == "attention"
        found.setdefault((kind if apart or len(held) > 1 else "feed-forward", block), {}).update(held)
    return found
