"""What was asked of LISA, beside what the runs gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

STATE_MIB = 20.1  # of the small Llama after 60 steps
FLAT = 0.01  # growth from switch 5 to switch 50 that still counts as none, as a share of the peak
ALLOCATOR = {"plain": "glibc as it comes", "mapped": "every block over 64 KiB mapped apart"}


def asked(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each promise that was measured: what, figure, unit, what was asked, whether it is met."""
    by = {(r["measure"], r["arm"], r["allocator"]): r for r in found["memory"]}
    rows: list[dict[str, Any]] = []
    for allocator, title in ALLOCATOR.items():
        full, lisa = (by.get(("peaks", arm, allocator)) for arm in ("full", "lisa-2"))
        if full is not None and lisa is not None:
            rows.append(_saved(full, lisa, title))
    for allocator, title in ALLOCATOR.items():
        if (r := by.get(("switches", "lisa-2", allocator))) is not None:
            rows += [_growth(r, "peak", f"the peak, {title}"), _growth(r, "resident", f"resident memory, {title}")]
            spread = max(r["resident"][4:]) - min(r["resident"][4:])
            rows.append(
                _row(f"most less least of resident memory over these switches, {title}", spread / 1e6, "MB", "", None)
            )
    if (r := by.get(("state", "lisa-2", "plain"))) is not None:
        size = r["state_bytes"] / 2**20
        what = "optimizer state of a small Llama after 60 steps, 2 of 8 blocks"
        rows.append(_row(what, size, "MiB", f"{STATE_MIB}", round(size, 1) <= STATE_MIB))
    if (r := by.get(("state", "full", "plain"))) is not None:
        what = "the same under full fine-tuning, as where LISA drops no state (LMFlow's, measured elsewhere: 56.8)"
        rows.append(_row(what, r["state_bytes"] / 2**20, "MiB", "", None))
    if (ratio := norm_ratio(found["runs"])) is not None:
        for name, extreme in (("least", min), ("most", max)):
            what = f"LoRA's mean weight norm over full fine-tuning's, the {name} of all blocks"
            rows.append(_row(what, extreme(ratio), "", "", None))
    return rows


def norm_ratio(runs: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """Of each block: the mean norm under LoRA over that under full fine-tuning, which LISA takes as weights."""
    norms = {r["recipe"]: r["norms"] for r in runs if "norms" in r}
    if not {"lora", "full"} <= norms.keys():
        return None
    return [lora / full for lora, full in zip(norms["lora"], norms["full"], strict=True)]


def _saved(full: Mapping[str, Any], lisa: Mapping[str, Any], title: str) -> dict[str, Any]:
    dropped = 12 * (full["blocks"] - 2) * full["block_parameters"]  # a gradient and two moments in fp32
    over = (full["peak_bytes"] - lisa["peak_bytes"]) / dropped
    what = f"full fine-tuning's peak less LISA's, over the {dropped / 1e6:,.0f} MB of {full['blocks'] - 2} resting blocks; "
    return _row(what + title, over, "×", "1 ± 10 %", abs(over - 1) <= 0.1)


def _growth(r: Mapping[str, Any], key: str, title: str) -> dict[str, Any]:
    grown = r[key][49] - r[key][4]
    limit = FLAT * r["peak"][49]
    asked = f"flat: under {limit / 1e6:.0f}, 1 % of the peak"
    return _row(f"growth from switch 5 to switch 50 of {title}", grown / 1e6, "MB", asked, grown <= limit)


def _row(what: str, measured: float, unit: str, asked: str, met: bool | None) -> dict[str, Any]:
    return {"what": what, "measured": measured, "unit": unit, "asked": asked, "met": met}
