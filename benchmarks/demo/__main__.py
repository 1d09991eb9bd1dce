"""Fine-tune a real model with LoRA on every Linear, then save, reload, merge, unmerge and eject it.

    python -m benchmarks.demo --model minilm

Ends with one table; the exit status is 1 if any check of agreement fails.
"""

from __future__ import annotations

import argparse
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

import peftkit
from benchmarks.measure import write_result
from peftkit import LoRAConfig

from .checks import Check, check_adapter, fingerprint
from .data import SDIST, read_reviews, split
from .tasks import MiniLM, SmolLM2, Task
from .training import accuracy, all_logits, fine_tune, in_length_order, progress_display, watched

CACHE = Path(".cache")
TASKS: dict[str, Callable[[], Task]] = {"minilm": MiniLM, "smollm2": partial(SmolLM2, CACHE)}


@dataclass(frozen=True)
class Outcome:
    """What the table shows."""

    base_accuracy: float
    tuned_accuracy: float
    trained_parameters: int
    all_parameters: int
    training_seconds: float
    seconds: float
    peak_bytes: int
    adapter_bytes: int
    checks: list[Check]


def main() -> int:
    """Run one task; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description="Fine-tune a real model with LoRA.")
    parser.add_argument("--model", choices=sorted(TASKS), default="minilm")
    parser.add_argument("--seed", type=int, default=0, help="of new layers and of the order of texts")
    parser.add_argument("--write", action="store_true", help="keep the outcome in benchmarks/results")
    options = parser.parse_args()

    started = time.perf_counter()
    console = Console()
    task = TASKS[options.model]()
    with progress_display() as progress:
        outcome = run(task, CACHE / f"adapter-{options.model}", options.seed, progress, started)
    console.print(table(task, outcome))
    if options.write:
        console.print(f"written to {write_result(f'demo-{options.model}', asdict(outcome))}")
    return 0 if all(check.held for check in outcome.checks) else 1


def run(task: Task, adapter: Path, seed: int, progress: Progress, started: float) -> Outcome:
    """The whole job: the rival, the training, the checks."""
    recipe = task.recipe
    train, held_out = split(read_reviews(CACHE / SDIST), recipe.train, recipe.held_out)
    exam = in_length_order(task, held_out)
    torch.manual_seed(seed)

    def held_out_accuracy(model: nn.Module, note: str) -> float:
        return accuracy(all_logits(model, task, exam, progress, f"held out, {note}"), exam)

    rival = task.load()
    task.fit_rival(rival, watched(in_length_order(task, train), progress, "fitting the probe"))
    base_accuracy = held_out_accuracy(rival, "base")
    del rival

    model = task.load()
    before = fingerprint(model)
    config = LoRAConfig(r=recipe.r, alpha=recipe.alpha, targets="all-linear", also_train=task.also_train)
    progress.console.print(peftkit.inject(model, config).summary())

    training_started = time.perf_counter()
    fine_tune(model, task, recipe, train, progress, seed=seed)
    training_seconds = time.perf_counter() - training_started
    trained, parameters = count(peftkit.parameters(model)), count(model.parameters())
    tuned_accuracy = held_out_accuracy(model, "fine-tuned")

    peftkit.save(model, adapter)
    compared = in_length_order(task, held_out[: recipe.checked])
    checks = check_adapter(
        model,
        fresh=task.load,
        adapter=adapter,
        logits=lambda model, note: all_logits(model, task, compared, progress, f"checking, {note}"),
        before=before,
    )
    return Outcome(
        base_accuracy=base_accuracy,
        tuned_accuracy=tuned_accuracy,
        trained_parameters=trained,
        all_parameters=parameters,
        training_seconds=training_seconds,
        seconds=time.perf_counter() - started,
        peak_bytes=peak_memory(),
        adapter_bytes=sum(file.stat().st_size for file in adapter.iterdir()),
        checks=checks,
    )


def table(task: Task, outcome: Outcome) -> Table:
    """Everything that was found, one line each."""
    rows = Table(title=f"{task.title}: good film reviews from bad", show_header=False, title_justify="left")
    share = outcome.trained_parameters / outcome.all_parameters
    rows.add_row("held-out accuracy", f"{outcome.base_accuracy:.1%}", task.rival)
    rows.add_row("", f"[bold]{outcome.tuned_accuracy:.1%}", "fine-tuned with LoRA on every Linear")
    counts = f"{outcome.trained_parameters:,} of {outcome.all_parameters:,}"
    rows.add_row("parameters trained", f"{share:.2%}", counts)
    rows.add_row("time", f"{outcome.training_seconds:.0f} s", f"training; {outcome.seconds:.0f} s in all")
    rows.add_row("peak memory", f"{outcome.peak_bytes / 1e9:.2f} GB", "of the process")
    rows.add_row("adapter on disk", f"{outcome.adapter_bytes / 1e6:.2f} MB")
    rows.add_section()
    for check in outcome.checks:
        rows.add_row(check.name, "[green]yes" if check.held else "[bold red]NO", check.finding)
    return rows


def count(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers they hold."""
    return sum(parameter.numel() for parameter in parameters)


def peak_memory() -> int:
    """The most bytes that this process has had resident."""
    status = Path("/proc/self/status")
    if status.exists():  # what `getrusage` says of a process includes what it was forked from
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])  # type: ignore[index]
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    sys.exit(main())
