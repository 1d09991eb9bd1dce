"""Writes adapters of a real decoder as GGUF, asks llama.cpp and torch for next tokens, and keeps how far they agree."""

from __future__ import annotations

import argparse
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import peftkit
from benchmarks.llama_cpp.asked import next_tokens
from benchmarks.llama_cpp.base import write_base
from benchmarks.measure import write_result
from peftkit import LoRAConfig

BASE = Path(__file__).parents[2] / ".cache" / "smollm2-135m"
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a little",
    "Review: the plot is thin, but the actors are a joy.\nSentiment:",
    "def add(a, b):\n    return",
    "Water boils at a temperature of",
    "She opened the door and saw",
)
EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS = {
    "every Linear": LoRAConfig(r=8, alpha=16, targets=EVERY),
    "ranks and alphas by pattern, rsLoRA": LoRAConfig(
        r={"q_proj": 4, "k_proj": 6, "mlp.**": 12, "**": 8},
        alpha={"v_proj": 4, "layers.0.**": 24, "**": 16},
        rank_stabilized=True,
        targets=EVERY,
    ),
    "attention alone": LoRAConfig(r=16, alpha=16, targets=["q_proj", "k_proj", "v_proj"]),
}
STD = {
    "every Linear": 0.02,
    "ranks and alphas by pattern, rsLoRA": 0.015,
    "attention alone": 0.1,
}  # of the entries of B


def main() -> None:
    """Measure, keep, show."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llama_cpp", description=__doc__)
    parser.add_argument("--base", type=Path, default=BASE, help="a directory that transformers wrote, of a Llama")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(options.base, Path(folder))
    versions = {name: metadata.version(name) for name in ("xllamacpp", "gguf")}
    write_result("gguf-smollm2", {"versions": versions, "adapters": rows})
    Console().print(table(rows))


def measured(base: Path, folder: Path) -> list[dict[str, Any]]:
    """A row for each adapter."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    write_base(model, folder / "base.gguf")
    bare = in_torch(model, prompts)
    expected, files = {}, {}
    for name, config in ADAPTERS.items():
        peftkit.inject(model, config)
        with torch.no_grad():
            for key, p in model.named_parameters():
                if key.endswith("lora_B"):
                    p.normal_(std=STD[name])
        expected[name] = in_torch(model, prompts)
        peftkit.save(model, folder / name)
        peftkit.eject(model)
        files[name] = folder / f"{name}.gguf", folder / f"{name} mistaken.gguf"
        peftkit.convert(folder / name, files[name][0], to="gguf", base=base)
        without_order(folder / name, files[name][1], base)
    asked = [None, *(file for pair in files.values() for file in pair)]
    found = next_tokens(folder / "base.gguf", asked, prompts, len(bare[0]))
    rows = [{"adapter": "none", **compared(found[0], bare)}]
    for i, name in enumerate(ADAPTERS):
        right, wrong = found[1 + 2 * i], found[2 + 2 * i]
        rows.append(
            {
                "adapter": name,
                **compared(right, expected[name]),
                "without the adapter": compared(bare, expected[name]),
                "rows of q and k not reordered": compared(wrong, expected[name]),
            }
        )
    return rows


@torch.no_grad()
def in_torch(model: nn.Module, prompts: list[list[int]]) -> Tensor:
    """Log probabilities of the next token: `(prompts vocabulary)`."""
    return torch.stack([model(torch.tensor([p])).logits[0, -1].log_softmax(-1) for p in prompts])


def without_order(adapter: Path, out: Path, base: Path) -> None:
    """The same file with the mistake that is easiest to make, to see that it is one."""
    from peftkit.formats import gguf

    right = gguf.interleaved
    gguf.interleaved = lambda t, heads: t
    try:
        peftkit.convert(adapter, out, to="gguf", base=base)
    finally:
        gguf.interleaved = right


def compared(found: Tensor, expected: Tensor) -> dict[str, Any]:
    """Over all prompts: how many agree in the first and in the first ten tokens and their order, and how far at most."""
    ten = (found.topk(10).indices == expected.topk(10).indices).all(-1)
    first = found.argmax(-1) == expected.argmax(-1)
    return {
        "prompts": len(expected),
        "same first": int(first.sum()),
        "same ten": int(ten.sum()),
        "largest difference": (found - expected).abs().max().item(),
        "least correlation": min(
            torch.corrcoef(torch.stack([a, b]))[0, 1].item()
            for a, b in zip(found.double(), expected.double(), strict=True)
        ),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """As it is shown."""
    shown = Table(
        "adapter", "compared", "same first", "same ten in order", "largest difference of log p", "least correlation"
    )
    for row in rows:
        others = {k: v for k, v in row.items() if isinstance(v, dict)}
        for what, of in {"llama.cpp, torch": row, **others}.items():
            shown.add_row(
                row["adapter"],
                what,
                f"{of['same first']} of {of['prompts']}",
                f"{of['same ten']} of {of['prompts']}",
                f"{of['largest difference']:.1e}",
                f"{of['least correlation']:.7f}",
            )
    return shown


if __name__ == "__main__":
    main()
