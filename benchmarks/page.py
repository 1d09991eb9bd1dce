"""The page of figures, made from the result files alone: `python -m benchmarks.page` writes `docs/benchmarks.md`."""

from __future__ import annotations

import json
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.kernels.cases import GPU
from benchmarks.kernels.measure import NAMES
from benchmarks.kernels.report import KIND, percent
from benchmarks.measure import RESULTS
from benchmarks.methods import summary as methods
from benchmarks.schedules import summary as schedules

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"

HEAD = """# Figures

Every figure here comes from a result file in `benchmarks/results`, written by the script named beside it, and this page is
made from those files by `python -m benchmarks.page`. What is compared ran in one process, taking turns; medians, one thread.
Absolute times mean little: read the ratios. The machine was shared and busy while these were measured, and its CPU has no
bf16 instructions, so that a frozen base in bf16 is slow and hides what an adapter adds.
"""

NO_GPU = "No figure of a GPU is here: not measured.\n"
NOT_MEASURED = "not measured"

KERNELS = """## The kernels on a GPU

`make gpu`, or `python -m benchmarks.kernels` alone. Forward and backward with the base frozen and adapters in fp32, over the
base's own forward and dX in the same run: inputs rotated so that L2 is cold, medians, replayed from CUDA graphs where they
can be captured. What is asked is asked of the fastest of our own ways, which `lora_linear` takes. Errors are against fp64.
"""


def main() -> None:
    """Write the page and its plots."""
    PAGE.write_text(page())
    for name, (title, plot) in PLOTS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            plot(json.loads(path.read_text())["rows"], title, PAGE.parent / "figures" / f"{name}.svg")


def page() -> str:
    """The text of `docs/benchmarks.md`."""
    kernels = _kernel_results()
    parts = [HEAD] if kernels else [HEAD, NO_GPU]
    for name, title, script, render in SECTIONS:
        for path in sorted(RESULTS.glob(f"{name}.json")):
            found = json.loads(path.read_text())
            what = title.format(device=path.stem.partition("-")[2])
            parts.append(f"## {what}\n\n`{script}`; {_machine(found['machine'])}.\n\n{render(found['rows'])}")
    parts.append(_kernels(kernels))
    return "\n".join(parts)


def _machine(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {found[k]}" for k in ("torch", "peft", "transformers") if k in found)
    return f"{found['cpu']}, {found['threads']} thread{'s' if found['threads'] > 1 else ''}, {versions}"


def _against_peft(rows: list[dict[str, Any]]) -> str:
    verdict = {True: "met", False: "**missed**", None: ""}
    lines = [(r["what"], f"{_figure(r['measured'])} {r['unit']}", _figure(r["limit"]), verdict[r["met"]]) for r in rows]
    return _table(("what", "measured", "at most", ""), lines)


def _lora_linear(rows: list[dict[str, Any]]) -> str:
    lines = []
    for case, group in groupby(rows, key=lambda r: r["case"]):
        for r in group:
            saved = "" if r["saved_mib"] is None else f"{r['saved_mib']:.2f}"
            errors = (f"{r['errors'][k]:.1e}" if k in r["errors"] else "" for k in ("y", "dX", "dA", "dB"))
            lines.append((case, r["name"], f"{r['ratio']:.2f}", saved, *errors))
            case = ""
    return _table(("case", "by", "over the frozen base", "saved MiB", "error y", "dX", "dA", "dB"), lines)


def _siblings(rows: list[dict[str, Any]]) -> str:
    lines = [(r["case"], *(f"{100 * r['over'][k]:.1f}" for k in ("apart", "shared"))) for r in rows]
    return _table(("siblings of one x", "apart, % over the frozen base", "products shared"), lines)


def _demo(r: dict[str, Any]) -> str:
    lines = [
        ("held-out accuracy without the adapter", f"{r['base_accuracy']:.1%}"),
        ("held-out accuracy, LoRA on every Linear", f"{r['tuned_accuracy']:.1%}"),
        ("parameters trained", f"{r['trained_parameters']:,} beside {r['all_parameters']:,}"),
        ("seconds, training and in all", f"{r['training_seconds']:.0f}, {r['seconds']:.0f}"),
        ("peak memory of the process", f"{r['peak_bytes'] / 1e9:.2f} GB"),
        ("adapter on disk", f"{r['adapter_bytes'] / 1e6:.2f} MB"),
        *((c["name"], f"{'yes' if c['held'] else '**no**'}; {c['finding']}") for c in r["checks"]),
    ]
    return _table(("what", ""), lines)


def _methods(name: str, rows: dict[str, Any]) -> str:
    head = ("method", "trained", "held-out accuracy", "each seed", "step over the base's", "peak of the process")
    return f"{METHODS}\n{_table(head, methods.summarised(rows))}\n{_plot(name)}"


def _schedules(name: str, rows: dict[str, Any]) -> str:
    verdict = {True: "met", False: "**missed**", None: ""}
    figures = [f"{r['measured']:.4g} {r['unit']}" if r["unit"] else f"{r['measured']:.6f}" for r in rows["asked"]]
    lines = [
        (r["what"], figure, r["asked"], verdict[r["met"]]) for r, figure in zip(rows["asked"], figures, strict=True)
    ]
    runs, parts = schedules.summarised(rows), schedules.parts(rows)
    tables = [_table(schedules.HEAD, runs), _plot(name), ASKED, _table(("what", "measured", "asked", ""), lines)]
    return "\n".join((SCHEDULES, *tables, PARTS, _table(schedules.PARTS, parts)))


def _plot(name: str) -> str:
    return f"![{PLOTS[name][0]}](figures/{name}.svg)\n"


def _kernel_results() -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return [result for result in found if result.get("benchmark") == KIND]


def _kernels(results: list[dict[str, Any]]) -> str:
    """The kernels, on each GPU that was measured; what would be measured, where none was."""
    parts = [KERNELS]
    head = "case", "by", "over the frozen base, %", "at most, %", "", "error y", *NAMES[1:], "saved MiB"
    for result in results:
        m = result["machine"]
        facts = [m["device"], *(f"{k} {m[k]}" for k in ("driver", "cuda", "torch", "triton", "peft") if m.get(k))]
        facts += [f"commit {m['commit'][:7]}"] if m.get("commit") else []
        parts.append(f"{', '.join(facts)}:\n\n{_table(head, _kernel_lines(result['rows']))}")
        if result.get("norms"):
            parts.append(_norms(result["norms"]))
    if not results:
        ours = {"lora": "lora_linear", "dora": "dora_linear", "layer": "peftkit"}
        lines = [(str(c), ours[c.kind], NOT_MEASURED, percent(c.target), *[NOT_MEASURED] * 7) for c in GPU]
        parts.append(_table(head, lines))
    return "\n".join(parts)


def _kernel_lines(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    lines = []
    for case, group in groupby(rows, key=lambda r: r["case"]):
        for r in group:
            overhead = "failed" if r["failed"] else percent(r["overhead"])
            verdict = {True: "met", False: "**missed**", None: ""}[r["met"]]
            errors = (f"{r['errors'][k]:.1e}" if k in r["errors"] else "" for k in NAMES)
            saved = "" if r["saved_mib"] is None else f"{r['saved_mib']:.1f}"
            lines.append((case, r["by"], overhead, percent(r["target"]), verdict, *errors, saved))
            case = ""
    return lines


def _norms(rows: list[dict[str, Any]]) -> str:
    head = (
        f"DoRA's norm, {rows[0]['width']}², r {rows[0]['r']}",
        "× one read of W",
        "peft's is × slower",
        "error",
        "peak MiB",
    )
    keys = "over_read", "under_peft", "error", "peak_mib"
    lines = [(r["by"], *("" if r[k] is None else f"{r[k]:.3g}" for k in keys)) for r in rows]
    return _table(head, lines)


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"1/{1 / value:.3g}" if 0 < value < 0.4 else f"{value:.3g}"


def _table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    rows = [head, tuple("---" for _ in head), *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


METHODS = """Every method starts from the same model, its head solved to convergence where it has one, and sees the same
texts: one learning rate each, the customary one, none searched for. Accuracy on held-out texts, mean of the seeds shown; its
standard error from the choice of texts alone is about 1.3 points with 1,000 of them and 2.3 with 300. A step is forward,
backward and AdamW, over forward and backward of the frozen base down to its embeddings, which a method that begins further
up need not reach; all take turns on one model.
"""

SCHEDULES = """Language-model loss on film reviews, their first 32 tokens each, in nats a token, padding left out; held out
are 128 of them. 60 steps of AdamW on 16 texts, the same in the same order for all, in fp32 without dropout or decay. One
constant learning rate for everything that trains base weights, 5e-5, and LoRA's customary 2e-3; none was searched for. One
seed. LISA draws anew every 10 steps, so that 1, 2 and 4 blocks at a time reach at most 6, 12 and 24 of the 30, each for few
steps; half fine-tuning has one round. The embedding, which is the head as well, has 28 M of the 135 M parameters and trains
under every schedule. State and gradients are counted over the tensors in the last step, before its switch; the peak is what
the process had resident during the steps, evaluation left out.
"""

ASKED = """What was asked of LISA's memory (`--memory`), with 2 active blocks, in fresh processes and on a text of 8
tokens, so that activations do not blur it; LISA switches there after every second step, and after every step where growth
is counted. With glibc as it comes, what lies in its heap is not always given back. Mapped apart, resident memory moves by
one block's state, 28 MB, and only where a block is drawn twice in a row and keeps it. In the last rows, the norms by
which the paper of LISA chose what to sample, means over the 60 steps of the runs above: taken as weights, they draw as
good as evenly here.
"""

PARTS = """What those peaks are made of, in MB. Before the steps, what was imported is resident beside the weights; above the
sum of the parts, AdamW's two temporaries for the embedding, of 113 MB each.
"""

PLOTS = {
    "methods-minilm": ("MiniLM-L6 on film reviews", methods.plot),
    "methods-smollm2": ("SmolLM2-135M on film reviews", methods.plot),
    "schedules-smollm2": ("SmolLM2-135M, language-model loss on film reviews", schedules.plot),
}


def _llama_cpp(rows: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in rows["versions"].items())
    lines = []
    for row in rows["adapters"]:
        others = {what: of for what, of in row.items() if isinstance(of, dict)}
        for what, of in {"llama.cpp": row, **others}.items():
            agree = [f"{of[key]} of {of['prompts']}" for key in ("same first", "same ten")]
            lines.append((row["adapter"], what, *agree, f"{of['largest difference']:.1e}"))
    head = ("adapter", "beside torch with the adapter", "same next token", "same ten, in order", "log p apart at most")
    return f"{versions}; fp32 throughout, six prompts.\n\n{_table(head, lines)}"


SECTIONS = (
    ("against_peft", "The verbs, beside peft", "python -m benchmarks.against_peft --full", _against_peft),
    ("lora_linear-cpu", "The LoRA linear", "python benchmarks/lora_linear.py", _lora_linear),
    ("siblings-*", "What siblings could share, {device}", "python -m benchmarks.siblings", _siblings),
    ("demo-minilm", "The main job: MiniLM-L6", "make demo", _demo),
    ("demo-smollm2", "The main job: SmolLM2-135M", "make demo MODEL=smollm2", _demo),
    (
        "methods-minilm",
        "Every method on an encoder: MiniLM-L6",
        "python -m benchmarks.methods",
        partial(_methods, "methods-minilm"),
    ),
    (
        "methods-smollm2",
        "Every method on a decoder: SmolLM2-135M",
        "python -m benchmarks.methods --model smollm2",
        partial(_methods, "methods-smollm2"),
    ),
    (
        "schedules-smollm2",
        "Who trains when: SmolLM2-135M",
        "python -m benchmarks.schedules",
        partial(_schedules, "schedules-smollm2"),
    ),
    ("gguf-smollm2", "An adapter in llama.cpp: SmolLM2-135M", "python -m benchmarks.llama_cpp", _llama_cpp),
)


if __name__ == "__main__":
    main()
