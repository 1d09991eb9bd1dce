"""What is installed and what the machine has."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import peftkit
from peftkit.method import registered

if TYPE_CHECKING:
    from rich.console import Group

# extra -> the packages whose presence is what it is for
_EXTRAS = {
    "transformers": ("transformers", "accelerate"),
    "trl": ("trl",),
    "lightning": ("lightning",),
    "hub": ("huggingface-hub",),
    "gguf": ("gguf",),
    "plots": ("matplotlib",),
}
_NEEDED = ("torch", "triton", "safetensors", "numpy")


@dataclass(frozen=True)
class Surroundings:
    """What `peftkit info` says.

    Attributes:
        versions: of Python, peftkit and what it needs; None where it is not there.
        extras: whether what each is for is installed.
        devices: names of the GPUs, if any.
        methods: name -> whether a weight can hold it, and whether peft reads it.
    """

    versions: Mapping[str, str | None]
    extras: Mapping[str, bool]
    devices: tuple[str, ...]
    methods: Mapping[str, tuple[bool, bool]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        methods = {n: {"merges": merges, "read_by_peft": reads} for n, (merges, reads) in self.methods.items()}
        return {
            "versions": dict(self.versions),
            "extras": dict(self.extras),
            "devices": list(self.devices),
            "methods": methods,
        }

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("method", "merges", "read by peft")
        for name, flags in self.methods.items():
            table.add_row(name, *("yes" if flag else "no" for flag in flags))
        versions = ", ".join(f"{n} {v or 'missing'}" for n, v in self.versions.items())
        extras = ", ".join(f"{n} {'yes' if there else 'no'}" for n, there in self.extras.items())
        devices = ", ".join(self.devices) or "no GPU: products are torch's"
        return Group(Text(f"{versions}\nextras: {extras}\n{devices}"), table)


def surroundings() -> Surroundings:
    """Look; nothing but torch is imported for it."""
    cuda = torch.cuda.is_available()
    devices = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) if cuda else ()
    versions = {"peftkit": peftkit.__version__, "Python": platform.python_version()}
    return Surroundings(
        {**versions, **{name: _version(name) for name in _NEEDED}},
        {extra: all(_version(p) is not None for p in packages) for extra, packages in _EXTRAS.items()},
        devices,
        {name: (m.mergeable, m.peft_reads) for name, m in sorted(registered().items())},
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
