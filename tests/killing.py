"""A child that writes for ever, killed at random moments, again and again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]

_BEFORE = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
torch.set_num_threads(1)
os.fsync = lambda fd: None  # a killed process loses nothing that it wrote; more writes are interrupted
"""
_FORKING = """
sys.stdin.readline()
while os.fork():  # every child of this one is killed
    pid = os.wait()[0]
    sys.stdin.readline()
print(flush=True)
for turn in range(os.getpid() % 2, 10**9):
    write(turn % 2)
"""


def seconds(write: Callable[[], object]) -> float:
    """What a write takes once it is warm."""
    taken = []
    for _ in range(4):
        began = time.perf_counter()
        write()
        taken.append(time.perf_counter() - began)
    return min(taken)


def kill_often(code: str, state: Callable[[], int], interrupted: Callable[[], bool], *, window: float) -> None:
    """Kill 200 times a process that calls `write(0)` and `write(1)`, as `code` defines it, in turn.

    Args:
        state: called after each kill: 0 or 1, whichever is there whole; it raises where that is neither.
        interrupted: whether a kill has left something half written; so that it is known that some came in the middle.
        window: seconds within which it is killed; it widens for a process that takes longer.
    """
    seen, middle = [0, 0], 0
    random.seed(0)
    program = textwrap.dedent(_BEFORE) + textwrap.dedent(code) + _FORKING
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None
        try:
            for kills in range(600):
                if kills >= 200 and min(seen) > 2 and middle > 2:
                    break
                child.stdin.write(b"\n")
                child.stdin.flush()
                child.stdout.readline()
                time.sleep(random.uniform(0, window))
                os.kill(_only_child(child.pid), signal.SIGKILL)
                _wait_until_gone(child.pid)
                seen[state()] += 1
                middle += interrupted()
                if min(seen) <= 2:  # a machine whose forked children write more slowly than this process does
                    window = min(window * 1.2, 5)
        finally:
            child.kill()
    assert min(seen) > 2, seen  # both were found, so writes were interrupted at both ends
    assert middle > 2, "no write was interrupted in its middle"


def _only_child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def _wait_until_gone(pid: int) -> None:
    while Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        time.sleep(0.001)
