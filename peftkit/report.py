"""What was attached where: a table that prints well, and the numbers behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from peftkit.graft import original_class
from peftkit.kernels import choice
from peftkit.ledger import Ledger
from peftkit.method import own_parameters
from peftkit.printing import printed
from peftkit.sites import Site, base_parameters, starred, walk

if TYPE_CHECKING:
    from rich.table import Table


_SAVING = (
    "save it by peftkit.save(model, path): from_pretrained reads the base alone of what model.save_pretrained writes"
)


class Row(NamedTuple):
    """One adapter on one site. `parameters` counts its own; `trained` those with `requires_grad`; sizes are bytes."""

    adapter: str
    site: str
    host: str
    method: str
    detail: str
    parameters: int
    trained: int
    bytes: int
    state: str


@dataclass(frozen=True)
class Report:
    """What `inject`, `load` and `describe` return.

    Attributes:
        rows: one for each adapter and site.
        trained: parameters with `requires_grad` in the whole model.
        total: parameters of the base.
        path: how the low-rank product is computed here, and why.
        saving: what a `save_pretrained` of the model's own would not do; empty where it has none.
    """

    rows: Sequence[Row]
    trained: int
    total: int
    path: str
    saving: str = ""

    @property
    def parameters(self) -> int:
        """Parameters of the adapters."""
        return sum(r.parameters for r in self.rows)

    @property
    def bytes(self) -> int:
        """Bytes of the adapters."""
        return sum(r.bytes for r in self.rows)

    @property
    def sites(self) -> list[str]:
        """Names of the sites, each once."""
        return list(dict.fromkeys(r.site for r in self.rows))

    def __str__(self) -> str:
        longest = max((len(name) for name, *_ in self._grouped()), default=0)
        return printed(self, max(100, min(160, 80 + longest)))

    def __rich__(self) -> Table:
        from rich.table import Table  # a table is seldom asked for; importing it costs more than this package

        table = Table(caption=self.summary(), caption_justify="left")
        for title in ("adapter", "where", "on", "what", "state"):
            table.add_column(title, overflow="fold")
        for title in ("parameters", "bytes"):
            table.add_column(title, justify="right")
        for where, row, count, size in self._grouped():
            what = f"{row.method} {row.detail}"
            table.add_row(row.adapter, where, row.host, what, row.state, f"{count:,}", _size(size))
        return table

    def summary(self) -> str:
        """What is trained and how large it is; then a line each on how products are computed and on how to save."""
        share = 100 * self.trained / max(1, self.total + self.parameters)
        return (
            f"{self.trained:,} parameters are trained ({share:.3g} % of {self.total + self.parameters:,}); "
            f"adapters: {_size(self.bytes)}\ncomputed by {self.path}" + (f"\n{self.saving}" if self.saving else "")
        )

    def _grouped(self) -> list[tuple[str, Row, int, int]]:
        """Sites that differ in their block's number alone share a line."""
        groups: dict[tuple[str, ...], list[Row]] = {}
        for r in self.rows:
            kind = (r.adapter, starred(r.site), r.host, r.method, r.detail, r.state, str(r.parameters))
            groups.setdefault(kind, []).append(r)
        lines = []
        for key, rows in groups.items():
            name = rows[0].site if len(rows) == 1 else f"{key[1]} ×{len(rows)}"
            lines.append((name or "(the model)", rows[0], sum(r.parameters for r in rows), sum(r.bytes for r in rows)))
        return lines


def report(
    model: nn.Module,
    ledger: Ledger | None,
    names: Sequence[str] | None = None,
    everything: Sequence[Site] | None = None,
) -> Report:
    """The report of the adapters `names`, or of all; `everything` is `walk(model)`, where the caller has it."""
    rows: list[Row] = []
    acting = (
        [p for a in ledger.attachments.values() if a.name in ledger.switch.names for p in a.parameters()]
        if ledger
        else []
    )
    for attachment in ledger.attachments.values() if ledger else ():
        if names is not None and attachment.name not in names:
            continue
        merged, active = attachment.name in ledger.merged, attachment.name in ledger.switch.names  # type: ignore[union-attr]
        state = "merged" if merged else "active" if active else "attached"
        seen: set[int] = set()
        for name, adapter in attachment.adapters.items():
            count = trained = size = 0
            for p in own_parameters(adapter):
                if id(p) in seen:  # shared with a site above, as VeRA's matrices are
                    continue
                seen.add(id(p))
                n = p.numel()
                count, size = count + n, size + n * p.element_size()
                trained += n if p.requires_grad else 0
            rows.append(
                Row(
                    adapter=attachment.name,
                    site=name,
                    host=original_class(attachment.sites[name].module).__name__,
                    method=attachment.config.method if type(adapter).__module__ != "peftkit.also_train" else "whole",
                    detail=adapter.extra_repr(),
                    parameters=count,
                    trained=trained,
                    bytes=size,
                    state=state,
                )
            )
    # what does not act is not trained; asking it all the same would cost more with every adapter attached
    base = base_parameters(everything or walk(model))
    return Report(
        rows=tuple(rows),
        trained=sum(p.numel() for p in (*base, *acting) if p.requires_grad and not nn.parameter.is_lazy(p)),
        total=sum(p.numel() for p in base if not nn.parameter.is_lazy(p)),
        path=choice.line(next((p.device for p in base if not nn.parameter.is_lazy(p)), torch.device("cpu"))),
        saving=_SAVING if rows and hasattr(model, "save_pretrained") else "",
    )


def _size(count: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count = count / 1024  # type: ignore[assignment]
    raise AssertionError
