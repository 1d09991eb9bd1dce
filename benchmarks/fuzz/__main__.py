"""Coverage-guided fuzzing of the readers by atheris, which is libFuzzer for Python: `python -m benchmarks.fuzz`.

Each target runs in a process of its own, in turn. An input is the choices that `mutations` makes, so what libFuzzer mutates
is always a valid directory with some damage; it keeps inputs that reach new branches of peftkit. What it finds does
not end a run: every finding is kept once, by what it says, with the input that leads to it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NAMES = ("read", "load", "look", "fit", "merge", "checkpoint", "compare", "add", "change")
_LONGEST = 4096  # bytes of choices


def main() -> None:
    """Run all targets and write `benchmarks/results/fuzz.json`; fails where something was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=600, help="of all targets together")
    parser.add_argument("--targets", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--corpus", type=Path, help="directory in which inputs are kept from one run to the next")
    parser.add_argument("--in-process", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="corpus") as fresh:
        corpus = asked.corpus or Path(fresh)
        if asked.in_process:
            fuzz(asked.in_process, asked.seconds, corpus)
            return
        rows = [_run(name, asked.seconds // len(asked.targets), corpus) for name in asked.targets]
    from benchmarks.measure import write_result

    print(write_result("fuzz", rows))
    if any(row["findings"] for row in rows):
        raise SystemExit(f"found: {json.dumps([row['findings'] for row in rows if row['findings']], indent=2)}")


def _run(name: str, seconds: int, corpus: Path) -> dict[str, Any]:
    """One target in a process of its own: what libFuzzer and the target say of it."""
    (corpus / name).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.fuzz", "--in-process", name, "--seconds", str(seconds)]
    made = subprocess.run([*command, "--corpus", str(corpus)], stderr=subprocess.PIPE, text=True, check=False)
    said = made.stderr
    done = re.findall(r"stat::number_of_executed_units: (\d+)", said)
    covered = re.findall(r"cov: (\d+) ft: (\d+)", said)
    if made.returncode or not done or not covered:
        raise SystemExit(f"{name} ended with {made.returncode}:\n{said[-3000:]}")
    report = corpus / f"{name}.json"
    row = {
        "target": name,
        "seconds": seconds,
        "executions": int(done[-1]),
        "edges": int(covered[-1][0]),
        "features": int(covered[-1][1]),
        "corpus": len(list((corpus / name).iterdir())),
        **json.loads(report.read_text()),
    }
    report.unlink()
    print(
        f"{name}: {row['executions']:,} in {seconds} s, {row['edges']:,} edges, {len(row['findings'])} findings",
        flush=True,
    )
    return row


def fuzz(name: str, seconds: int, corpus: Path) -> None:
    """Fuzz one target; never returns."""
    import atheris

    with atheris.instrument_imports(include=["peftkit"]):
        from benchmarks.fuzz import targets

    outcomes: dict[str, int] = {}
    findings: dict[str, dict[str, str]] = {}
    report = corpus / f"{name}.json"
    targets.warm_up()
    targets.limit_addresses()

    def one(data: bytes) -> None:
        choices = atheris.FuzzedDataProvider(data)
        try:
            outcome = targets.check(targets.TARGETS[name], lambda n: choices.ConsumeIntInRange(0, n - 1))
        except targets.Finding as finding:
            outcome = "finding"
            kind = re.sub(r"/\S+|\d+", "…", str(finding))[:100]
            if kind not in findings:
                findings[kind] = {"says": str(finding)[:400], "input": data.hex()}
                print(f"{name}: {finding}", flush=True)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        if outcome == "finding" or sum(outcomes.values()) % 16 == 0:
            report.write_text(json.dumps({"outcomes": outcomes, "findings": list(findings.values())}))

    report.write_text(json.dumps({"outcomes": outcomes, "findings": []}))
    folder = corpus / name
    if not any(folder.iterdir()):
        for i in range(64):  # long enough for every choice to be one
            (folder / f"{i}").write_bytes(os.urandom(256))
    flags = [f"-max_total_time={seconds}", f"-max_len={_LONGEST}", "-print_final_stats=1", "-rss_limit_mb=0"]
    atheris.Setup([sys.argv[0], *flags, "-timeout=600", str(folder)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
