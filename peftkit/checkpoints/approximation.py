"""How near a LoRA that was computed comes to what it stands for: a table that prints well, and the numbers behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peftkit.checkpoints.saying import plain, some
from peftkit.printing import printed

if TYPE_CHECKING:
    from rich.table import Table


class Nearness(NamedTuple):
    """One site: the rank of its pair, ‖ΔW‖² of the change it stands for, and ‖ΔW − sBA‖², before its values are rounded
    to the dtype they are stored in.
    """

    site: str
    r: int
    whole: float
    lost: float

    @property
    def kept(self) -> float:
        """The share of ‖ΔW‖² that the pair has."""
        return 1.0 - self.lost / self.whole if self.whole else 1.0


class LeftOut(NamedTuple):
    """A tensor that differs and is in no pair: how far at most in one number, and ‖difference‖²; NaN where it is NaN."""

    tensor: str
    largest: float
    whole: float


@dataclass(frozen=True)
class Approximation:
    """What `combine` and `extract` return.

    Attributes:
        path: where the adapter was written.
        sites: one for each pair.
        left_out: tensors whose difference the adapter does not have.
        unchanged: sites without a pair, since nothing differs there.
    """

    path: Path
    sites: Sequence[Nearness]
    left_out: Sequence[LeftOut] = ()
    unchanged: Sequence[str] = ()

    @property
    def kept(self) -> float:
        """The share of ‖ΔW‖² of all sites together that the pairs have."""
        whole = math.fsum(s.whole for s in self.sites)
        return 1.0 - math.fsum(s.lost for s in self.sites) / whole if whole else 1.0

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it; what is no finite number is None."""
        return plain(
            {
                "path": str(self.path),
                "kept": self.kept,
                "sites": [{**s._asdict(), "kept": s.kept} for s in self.sites],
                "left_out": [t._asdict() for t in self.left_out],
                "unchanged": list(self.unchanged),
            }
        )

    def __str__(self) -> str:
        return printed(self)

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(caption=self.summary(), caption_justify="left")
        table.add_column("where", overflow="fold")
        for title in ("r", "‖ΔW‖", "kept of ‖ΔW‖²"):
            table.add_column(title, justify="right")
        for site in self.sites:
            table.add_row(site.site or "(the model)", str(site.r), f"{math.sqrt(site.whole):.4g}", f"{site.kept:.6%}")
        return table

    def summary(self) -> str:
        """What is kept in all, what is not in the adapter, and where it is."""
        lines = [f"{self.kept:.6%} of ‖ΔW‖² is kept, at {len(self.sites)} sites; written to {self.path}"]
        if self.unchanged:
            lines.append(f"{len(self.unchanged)} targets do not differ and have no pair")
        if self.left_out:
            names = some([t.tensor for t in self.left_out])
            lines.append(f"{len(self.left_out)} tensors differ and are not in the adapter: {names}")
        return "\n".join(lines)
