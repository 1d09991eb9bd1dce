"""Time by a clock that the test turns, energy by counters that it writes."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peftkit
from peftkit import LoRAConfig, SeriesAdapterConfig, ledger
from peftkit.costs import energy, latency
from peftkit.costs.energy import NotMeasured
from peftkit.testing import models

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


class Clock:
    """Seconds pass when a model is called."""

    def __init__(self) -> None:
        self.now, self.kinds = 0.0, []  # of the calls, which a model would not remember

    def perf_counter(self) -> float:
        return self.now


class Slow(nn.Module):
    """A second a call, half a second more with an adapter beside the weights, and all slower as time goes on."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.inner, self.clock = models.linear(), clock

    def forward(self, x: Tensor) -> Tensor:
        merged = (found := ledger.find(self)) is not None and bool(found[1].merged)
        acting = bool(peftkit.active(self)) and not merged
        self.clock.kinds.append("merged" if merged else "acting" if acting else "base")
        self.clock.now += (1.5 if acting else 1.1 if merged else 1.0) * (1 + self.clock.now / 1e6)
        return self.inner(x)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(latency, "time", made)
    return made


def test_latency_is_over_the_base(clock):
    model = Slow(clock)
    peftkit.inject(model, LoRAConfig(r=1, targets="all-linear"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = peftkit.cost(model, torch.randn(3, 6), seconds=100)
    assert found.added_latency == pytest.approx(0.5, rel=1e-3)
    assert found.added_latency_merged == pytest.approx(0.1, rel=1e-2)
    assert found.base_seconds == pytest.approx(1, rel=1e-3) and found.merged_seconds == pytest.approx(1.1, rel=1e-3)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("seconds", [1e-9, 30.0, 300.0])
def test_kinds_take_turns_within_the_budget(clock, seconds):
    model = Slow(clock)
    peftkit.inject(model, LoRAConfig(r=1, targets="all-linear"))
    x, kinds = torch.randn(3, 6), clock.kinds
    times = latency.time_forwards(model, lambda: lambda: model(x), seconds)
    in_a_row = len(times.base[0])
    first = ["acting"] * 2 + ["base"] + ["base", "acting"] * in_a_row + ["merged"] * (in_a_row + 1) + ["acting"]
    assert kinds[: len(first)] == first
    assert clock.now < seconds + 1.5 * len(first)
    assert len(times.base) == len(times.acting) == len(times.merged) >= (1 if seconds < 1 else 3)


def test_a_slow_moment_meets_base_and_adapter_alike():
    times = latency.Times(
        [[1.0, 1.0], [9.0, 9.0], [9.0, 9.0]], [[1.2, 1.2], [10.8, 10.8], [10.8, 10.8]], [[1.0], [9.0], [9.0]]
    )
    assert times.added_acting() == pytest.approx(0.2)
    assert times.added_merged() == pytest.approx(0.0)
    assert latency.Times().added_acting() is latency.Times().added_merged() is latency.median([]) is None


def test_what_cannot_be_merged_says_why(clock):
    model = Slow(clock)
    peftkit.inject(model, SeriesAdapterConfig(bottleneck=1, targets="inner.0"))
    found = peftkit.cost(model, torch.randn(3, 6), seconds=20)
    assert found.added_latency == pytest.approx(0.5, rel=1e-3)
    assert found.merged_seconds is found.added_latency_merged is None
    assert found.notes["added_latency_merged"].startswith("not mergeable: ")
    assert set(clock.kinds) == {"base", "acting"}


def test_without_adapters_there_is_the_base_alone(clock):
    model = Slow(clock)
    found = peftkit.cost(model, torch.randn(3, 6), seconds=20)
    assert found.base_seconds == found.forward_seconds and found.added_latency == 0.0
    assert found.merged_seconds is None and "added_latency_merged" not in found.notes
    untimed = peftkit.cost(model, torch.randn(3, 6), seconds=0)
    assert untimed.base_seconds is untimed.forward_seconds is untimed.added_latency is None


# -- energy ------------------------------------------------------------------------------------------------------------


class Rapl:
    """Zones as the kernel has them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def zone(self, directory: str, name: str, uj: int, largest: int = 1000) -> None:
        there = self.root / directory
        there.mkdir(parents=True, exist_ok=True)
        for file, text in (("name", name), ("energy_uj", uj), ("max_energy_range_uj", largest)):
            (there / file).write_text(f"{text}\n")


@pytest.fixture
def rapl(tmp_path, monkeypatch) -> Rapl:
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    return Rapl(tmp_path)


def test_rapl_adds_packages_and_memory(rapl):
    def turn(first: int, second: int, memory: int, other: int) -> None:
        rapl.zone("intel-rapl:0", "package-0", first)
        rapl.zone("intel-rapl:1", "package-1", second)
        rapl.zone("intel-rapl:0:1", "dram", memory)
        rapl.zone("intel-rapl:0:0", "core", other)
        rapl.zone("intel-rapl:2", "psys", other)
        rapl.zone("intel-rapl-mmio:0", "package-0", other)

    turn(100, 200, 50, 7)
    joules = energy.rapl_counter(rapl.root)
    assert joules() == 0
    turn(300, 250, 60, 900)
    assert joules() == pytest.approx(260e-6)
    turn(100, 250, 60, 0)  # the first ran over, at 1000
    assert joules() == pytest.approx((260 + 800) * 1e-6)
    turn(300, 250, 60, 0)
    assert joules() == pytest.approx((260 + 800 + 200) * 1e-6)


def test_energy_of_a_step_is_the_mean(rapl):
    drawn = 0

    def step() -> None:
        nonlocal drawn
        drawn = (drawn + 300) % 1001  # the counter runs from 0 to its largest number
        rapl.zone("intel-rapl:0", "package-0", drawn)

    rapl.zone("intel-rapl:0", "package-0", 0)
    assert energy.energy_of(step, CPU, 0.0) == pytest.approx(300e-6)
    assert energy.energy_of(step, CPU, 0.02) > 0


def test_the_cost_has_the_energy_of_forward_and_backward(rapl):
    model, drawn = models.linear(), 0

    def draw(*_: object) -> None:
        nonlocal drawn
        drawn += 500_000
        rapl.zone("intel-rapl:0", "package-0", drawn, 2**60)

    def draw_in_both(module: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        draw()
        if y.requires_grad:
            y.register_hook(draw)

    rapl.zone("intel-rapl:0", "package-0", 0, 2**60)
    model.register_forward_hook(draw_in_both)
    found = peftkit.cost(model, torch.randn(3, 6), seconds=0.01)
    assert found.joules == pytest.approx(1.0) and "joules" not in found.notes
    assert "1.00 J" in str(found)


def test_without_rapl_it_says_so(rapl):
    found = peftkit.cost(models.linear(), torch.randn(3, 6), seconds=0.001)
    assert found.joules is None and found.notes["joules"].startswith("not measured: no RAPL counter")
    rapl.zone("intel-rapl:0", "package-0", 1)
    (rapl.root / "intel-rapl:0" / "energy_uj").unlink()
    (rapl.root / "intel-rapl:0" / "energy_uj").mkdir()  # cannot be read, by root neither
    with pytest.raises(NotMeasured, match="RAPL: .*energy_uj"):
        energy.energy_of(lambda: None, CPU, 0)
    with pytest.raises(NotMeasured, match="xpu"):
        energy.energy_of(lambda: None, torch.device("xpu"), 0)


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch) -> types.SimpleNamespace:
    """A GPU that has drawn `millijoules`."""

    def total(handle: str) -> int:
        if made.refuses:
            raise NVMLError("Not Supported")
        assert handle == "handle of GPU-12ab"
        return made.millijoules

    made = types.SimpleNamespace(millijoules=5000, refuses=False, waits=0, NVMLError=NVMLError, nvmlInit=lambda: None)
    made.nvmlDeviceGetHandleByUUID = lambda uuid: f"handle of {uuid}"
    made.nvmlDeviceGetTotalEnergyConsumption = total
    monkeypatch.setitem(sys.modules, "pynvml", made)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="12ab"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: setattr(made, "waits", made.waits + 1))
    return made


def test_nvml_counts_millijoules(nvml):
    assert energy.energy_of(lambda: setattr(nvml, "millijoules", nvml.millijoules + 1500), GPU, 0) == pytest.approx(1.5)
    assert nvml.waits == 2


def test_nvml_that_cannot_tell_says_so(nvml, monkeypatch):
    nvml.refuses = True
    with pytest.raises(NotMeasured, match="NVML: Not Supported"):
        energy.energy_of(lambda: None, GPU, 0)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NotMeasured, match=r"pip install 'peftkit\[energy\]'"):
        energy.energy_of(lambda: None, GPU, 0)
