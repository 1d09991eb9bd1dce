"""What every kernel takes of a chip, compiled for chips that are not there: registers, stack, shared memory.

`python -m benchmarks.resources` writes `results/resources.json` and fails where the gate does not hold: no stack,
shared memory within the chip's limit, matrix instructions where the kernel's dtype has them. No GPU is needed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.measure import RESULTS
from peftkit.kernels import dora_norm_tiles, dys_dyb, expand, rescale_rows, shrink
from peftkit.kernels.gpu import Launch

PATH = RESULTS / "resources.json"
# Shared memory of a block in bytes, by compute capability (CUDA C++ programming guide, technical specifications).
CHIPS = {80: 166_912, 90: 232_448, 100: 232_448}
TOKENS, WIDTH = 8192, 4096
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64"}


@dataclass(frozen=True)
class Variant:
    """A kernel as one dtype, rank and dropout launch it."""

    name: str
    launch: Launch


@dataclass(frozen=True)
class Row:
    """What ptxas says of one variant on one chip; sizes in bytes."""

    kernel: str
    chip: int
    registers: int
    stack: int
    shared: int
    matrix_instructions: int
    warps: int
    stages: int

    def broken(self, *, matrix: bool) -> str | None:
        """Which part of the gate does not hold."""
        if self.stack:
            return f"{self.stack} bytes of stack"
        if self.shared > CHIPS[self.chip]:
            return f"{self.shared} bytes of shared memory, of {CHIPS[self.chip]}"
        if matrix and not self.matrix_instructions:
            return "no matrix instructions"
        return None


def variants(chip: int) -> Iterator[Variant]:
    """Every kernel in every configuration that its file chooses, with the pair in fp32, which takes most."""
    for dtype, r, p in (
        (torch.bfloat16, 16, 0.0),
        (torch.bfloat16, 16, 0.1),
        (torch.bfloat16, 64, 0.0),
        (torch.bfloat16, 128, 0.0),
        (torch.bfloat16, 256, 0.1),
        (torch.float16, 16, 0.0),
        (torch.float32, 16, 0.0),
        (torch.float32, 256, 0.1),
    ):
        for name, launch in _launches(dtype, r, p, chip):
            yield Variant(f"{name}, {TYPES[dtype]}, r {r}" + (", dropout" if p else ""), launch)


def _launches(dtype: torch.dtype, r: int, p: float, chip: int) -> Iterator[tuple[str, Launch]]:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, w, bias, s = empty(TOKENS, WIDTH), empty(WIDTH, WIDTH), empty(WIDTH), empty(TOKENS, r)
    a, b = empty(r, WIDTH, dtype=torch.float32), empty(WIDTH, r, dtype=torch.float32)
    seed = empty(1, dtype=torch.int64) if p else None
    tiles = shrink.tiles(dtype, r)
    yield "shrink", shrink.shrink_launch(x, a.to(dtype), s, p, seed, tiles)
    yield "shrink_da", shrink.shrink_da_launch(s, x, p, seed, tiles)[0]
    if p:
        yield "add_shrink_dx", shrink.add_shrink_dx_launch(x, s, a, x, p, seed, tiles)
    if not p or r == 256:
        gain = empty(WIDTH, dtype=torch.float32)
        yield "dys_dyb", dys_dyb.launch(x, b, s, 2.0, dys_dyb.tiles(dtype, r))[0]
        tiles = dys_dyb.tiles(dtype, r, gained=True)
        yield "dys_dyb gained", dys_dyb.launch(x, b, s, 2.0, tiles, x, gain, bias)[0]
        for name, pair in ({"dora_norm": (a, b), "dora_norm, narrow pair": (a.to(dtype), b.to(dtype))}).items():
            tiles = dora_norm_tiles.tiles(pair[0].dtype)
            yield name, dora_norm_tiles.launch(w, *pair, 2.0, tiles)[0]
        if dtype is not torch.float32 and r == 16:
            yield "rescale_rows", rescale_rows.launch(x, gain, bias, x)
        yield (
            "expand forward",
            expand.launch(x, w.t(), bias, s, b.t(), x, 2.0, 0.0, None, expand.tiles(dtype, 0.0, chip)),
        )
        tiles = expand.tiles(dtype, 0.0, chip, gained=True)
        yield "expand gained", expand.launch(x, w.t(), bias, s, b.t(), x, 2.0, 0.0, None, tiles, gain, x)
    if r < 256:
        yield "expand backward", expand.launch(x, w, None, s, a, x, 2.0, p, seed, expand.tiles(dtype, p, chip))


def compiled(launch: Launch, chip: int) -> Any:
    """The launch as Triton would compile it on the device: specialised as its arguments are."""
    signature, constants, attributes = {}, dict(launch.constants), {}
    for name, value in launch.arguments.items():
        index = (launch.kernel.arg_names.index(name),)
        if value is None or (type(value) is int and value == 1):
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[index] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[index] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    ordered = {name: signature[name] for name in launch.kernel.arg_names}
    at = {(launch.kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=launch.kernel, signature=ordered, constexprs=at, attrs=attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)


def measure(variant: Variant, chip: int) -> Row:
    """Compile and count."""
    made = compiled(variant.launch, chip)
    used, code = _cuobjdump(made.asm["cubin"], "-res-usage"), _cuobjdump(made.asm["cubin"], "-sass")
    return Row(
        kernel=variant.name,
        chip=chip,
        registers=int(re.findall(r"REG:(\d+)", used)[-1]),
        stack=int(re.findall(r"STACK:(\d+)", used)[-1]),
        shared=made.metadata.shared,
        matrix_instructions=len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", code)),
        warps=variant.launch.warps,
        stages=variant.launch.stages,
    )


def _cuobjdump(cubin: bytes, flag: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), flag, file.name], capture_output=True, text=True, check=True).stdout


def needs_matrix(variant: Variant) -> bool:
    """Products of fp32 in full precision have no matrix instruction, and `rescale_rows` has no product."""
    return ", fp32, " not in variant.name and not variant.name.startswith("rescale_rows")


def main() -> None:
    """Measure, print, write."""
    rows, faults = [], []
    todo = [(variant, chip) for chip in CHIPS for variant in variants(chip)]
    for variant, chip in track(todo, "compiling"):
        row = measure(variant, chip)
        rows.append(row)
        if (reason := row.broken(matrix=needs_matrix(variant))) is not None:
            faults.append(f"{row.kernel} on sm_{chip}: {reason}")
    table = Table("kernel", "sm", "registers", "stack", "shared", "matrix", "warps", "stages", title="resources")
    for row in rows:
        table.add_row(*(str(v) for v in asdict(row).values()))
    Console(width=140).print(table)
    RESULTS.mkdir(exist_ok=True)
    made = {"triton": triton.__version__, "rows": [asdict(row) for row in rows]}
    PATH.write_text(json.dumps(made, indent=2) + "\n")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
