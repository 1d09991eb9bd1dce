"""The commands. Each calls one function of the package and shows what that returns.

Exit codes are those of grep and diff: 0 done, or yes; 1 no (`verify` and `diff` alone); 2 it cannot be done, and why.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import peftkit
from peftkit.cli.surroundings import surroundings
from peftkit.cli.values import adapter_and_weight, dtype_named, rank_or_full

app = typer.Typer(
    name="peftkit",
    help="Work on stored adapters and the checkpoints they belong to. No model is run, nor held in memory.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Adapter = Annotated[Path, typer.Argument(help="Directory of a stored adapter.", show_default=False)]
Adapters = Annotated[
    list[str],
    typer.Argument(
        help="Directories of stored adapters, each with its weight if that is not 1: DIR=0.5.", show_default=False
    ),
]
Out = Annotated[Path, typer.Argument(help="Directory to write.", show_default=False)]
Base = Annotated[Path, typer.Argument(help="Directory of the model's safetensors.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Dtype = Annotated[str | None, typer.Option(help="Such as float32, bfloat16 or float16; otherwise as it comes.")]
AnyBase = Annotated[bool, typer.Option("--any-base", help="Do not ask whether the base is the one it was trained on.")]


def main() -> None:
    """Run a command; a user's mistake is a message on stderr and the exit code 2."""
    try:
        app(prog_name="peftkit")
    except (ValueError, OSError, ImportError) as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"peftkit: {error}", markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _show(found: Any, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(found, soft_wrap=isinstance(found, str))


@app.command()
def info(as_json: AsJson = False) -> None:
    """What is installed here, and what peftkit can do with it.

    Example: peftkit info
    """
    _show(surroundings(), as_json=as_json)


@app.command()
def inspect(adapter: Adapter, as_json: AsJson = False) -> None:
    """What is in an adapter.

    Method, settings, modules, ranks, bytes, norms, and what it says of its base.

    Example: peftkit inspect adapter
    """
    _show(peftkit.inspect(adapter), as_json=as_json)


@app.command()
def verify(
    adapter: Adapter,
    base: Annotated[Path, typer.Option("--base", help="Directory of the model's safetensors.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Whether an adapter fits a base's files.

    All that loading it into the model would check. Exits with 1 where it does not fit.

    Example: peftkit verify adapter --base base
    """
    for folder in (adapter, base):
        if not folder.is_dir():
            raise ValueError(f"{folder} is no directory")
    try:
        found = peftkit.verify(adapter, base)
    except peftkit.StorageError as error:
        if as_json:
            print(json.dumps({"fits": False, "error": str(error)}, indent=2))
        else:
            Console(stderr=True, soft_wrap=True, highlight=False).print(f"does not fit: {error}", markup=False)
        raise typer.Exit(1) from error
    if as_json:
        print(json.dumps({"fits": True, **found.to_dict()}, indent=2))
    else:
        _show(str(found), as_json=False)


@app.command()
def merge(
    base: Base,
    adapters: Adapters,
    out: Out,
    dtype: Dtype = None,
    any_base: AnyBase = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, if it is a directory of weights.")
    ] = False,
) -> None:
    """Fold adapters into a base's files.

    A tensor at a time. Where it was stopped, the same command goes on from there.

    Example: peftkit merge base adapter merged --dtype bfloat16
    """
    done = peftkit.merge_checkpoint(
        base,
        [adapter_and_weight(a) for a in adapters],
        out,
        dtype=dtype_named(dtype),
        check_base=not any_base,
        overwrite=overwrite,
        progress=sys.stderr.isatty(),
    )
    added = f" and added {len(done.added)}" if done.added else ""
    _show(f"{done.path}: changed {len(done.changed)} tensors{added}, {done.bytes:,} bytes in all", as_json=False)


@app.command()
def combine(
    adapters: Adapters,
    out: Out,
    how: Annotated[str, typer.Option(help="concatenate (exact), svd, ties, dare or dare_ties.")] = "concatenate",
    rank: Annotated[str | None, typer.Option(help="Rank of the result, or 'full'; not for concatenate.")] = None,
    density: Annotated[float | None, typer.Option(help="Share that ties and dare keep.")] = None,
    seed: Annotated[int, typer.Option(help="Of what dare draws.")] = 0,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """The weighted sum of LoRAs as one LoRA.

    A negative weight subtracts.

    Example: peftkit combine adapter=0.7 other=-0.3 sum --how svd --rank 8
    """
    pairs = [adapter_and_weight(a) for a in adapters]
    kinds = {"r": rank_or_full(rank), "density": density, "seed": seed, "dtype": dtype_named(dtype)}
    _show(peftkit.combine(pairs, out, how=how, **kinds), as_json=as_json)


@app.command()
def extract(
    base: Base,
    tuned: Annotated[Path, typer.Argument(help="Directory of the same model, fine-tuned.", show_default=False)],
    out: Out,
    rank: Annotated[int, typer.Option(help="Of the LoRA.")] = 16,
    targets: Annotated[list[str] | None, typer.Option(help="Pattern or preset; may be given again.")] = None,
    also_train: Annotated[list[str] | None, typer.Option(help="Module to store whole; may be given again.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Randomised, with so many power iterations: faster.")] = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """The LoRA nearest to the difference of two checkpoints.

    Example: peftkit extract base merged extracted --rank 8
    """
    found = peftkit.extract(
        base,
        tuned,
        out,
        r=rank,
        targets=targets or "all-linear",
        also_train=also_train or (),
        iterations=iterations,
        dtype=dtype_named(dtype),
    )
    _show(found, as_json=as_json)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="peft's or torchtune's directory, kohya's or LyCORIS's file.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="Directory, or GGUF file, to write.", show_default=False)],
    base: Annotated[Path, typer.Option(help="Directory of the model it is for.", show_default=False)],
    to: Annotated[str, typer.Option(help="peftkit or gguf.")] = "peftkit",
    prefix: Annotated[str | None, typer.Option(help="Of a kohya file for several models: the part to take.")] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="Of a torchtune file with no config beside it, or of a kohya file that has none."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of a GGUF file: float32, which it is otherwise, or float16.")
    ] = None,
    any_base: AnyBase = False,
) -> None:
    """An adapter from one format to another.

    From peft's, kohya's, LyCORIS's and torchtune's to a directory that peftkit, peft and vLLM read, or to GGUF for
    llama.cpp.

    Example: peftkit convert adapter adapter.gguf --to gguf --base base
    """
    wanted = dtype_named(dtype)
    peftkit.convert(source, out, base=base, to=to, prefix=prefix, alpha=alpha, dtype=wanted, check_base=not any_base)
    _show(f"{out}: written as {to}", as_json=False)


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="Directory of an adapter, or of a checkpoint.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Another one.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """How two adapters or two checkpoints differ.

    Adapters in what they do to the base, checkpoints in their tensors. Exits with 1 where they differ.

    Example: peftkit diff adapter other
    """
    found = peftkit.difference(a, b)
    _show(found, as_json=as_json)
    if not found.same:
        raise typer.Exit(1)
