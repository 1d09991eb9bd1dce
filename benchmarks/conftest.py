"""What pytest-benchmark writes into its file: nothing that says whose machine it was, and no more than is read."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.measure import machine


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    """In place of its own, which has the name of the machine."""
    return machine()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Leaves out every single timing, most of the file, and parameters, which are functions."""
    for found in output_json["benchmarks"]:
        found["stats"].pop("data", None)
        found["params"] = None
