"""LISA on several ranks: the same draw, the same weights as one process has, and what cannot work is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lisa_ranks import STEPS, WORLD, alone

HERE = Path(__file__).parent


def ranks(job: str, tmp_path: Path) -> list[dict[str, Any]]:
    """What each rank has found."""
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", HERE / "lisa_ranks.py", str(rank), str(tmp_path / "store"), job],
            stdout=subprocess.PIPE,
            text=True,
            cwd=HERE.parent,
            env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        )
        for rank in range(WORLD)
    ]
    try:
        found = [p.communicate(timeout=180)[0] for p in started]
    finally:
        for p in started:
            p.kill()
    assert all(p.returncode == 0 for p in started)
    return [json.loads(text.splitlines()[-1]) for text in found]


@pytest.mark.parametrize("job", ["ddp", "sharded"])
def test_ranks_train_what_one_process_does(job, tmp_path):
    drawn = [list(names) for names in alone()[1]]
    assert len(drawn) == STEPS and len({tuple(names) for names in drawn}) > 1
    for found in ranks(job, tmp_path):
        assert found["drawn"] == drawn
        assert found["off"] < 1e-5
        assert found["states"] <= 2 * 6 + 5  # two blocks, embedding, norm, head


def test_what_cannot_work_is_refused(tmp_path):
    for found in ranks("refused", tmp_path):
        assert found["seeds"] == (
            "ValueError: LISA was made with seed=0 on rank 0 and seed=1 on rank 1; all ranks must switch the same parameters"
        )
        assert "blocks=4 on rank 0 and blocks=2 on rank 1" in found["models"]
        for case in ("no wrapper", "wrapped too late"):
            assert "is no longer the same on ranks 0 and 1: nothing sums the gradients" in found[case], case
        assert found["not compared"] == ""
        for case in ("block frozen", "adapters alone"):
            assert found[case].startswith("ValueError"), case
        assert "each rank would train its own" in found["adapters alone"]
        assert "find_unused_parameters=False waits for the gradients" in found["waiting"]
        assert "static_graph=True waits" in found["static"]
        assert "FSDP1 keeps the parameters of a unit in one flat tensor" in found["fsdp1"]
        assert "ZeroRedundancyOptimizer keeps its state" in found["zero"]
