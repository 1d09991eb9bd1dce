"""The ways to get peftkit give the same package, and none of them takes the name `kernels`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ("peftkit", "kernels", "pyproject.toml", "README.md", "LICENSE")
MODULES = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "peftkit").rglob("*.py"))
KERNELS = sorted(f"peftkit/kernels/{file.name}" for file in (ROOT / "kernels").glob("*.py"))


def python(*arguments: str, cwd: Path, path: list[Path] | None = None) -> str:
    """Run a fresh interpreter that sees `path` and what is installed."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A copy of the sources, built in it: `built("wheel")` or `built("sdist")` is the file."""
    source = tmp_path_factory.mktemp("source")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source)
    return lambda kind: build(source, kind)


def build(source: Path, kind: str) -> Path:
    """Build as pip does, with the setuptools that is installed."""
    out = source.parent / f"{source.name}-{kind}"
    script = f"from setuptools.build_meta import build_{kind} as build; build({str(out)!r})"
    python("-c", script, cwd=source)
    (file,) = out.iterdir()
    return file


def from_tree(built: Callable[[str], Path], _: Path) -> Path:
    """The wheel of a checkout."""
    return built("wheel")


def from_sdist(built: Callable[[str], Path], tmp_path: Path) -> Path:
    """The wheel of a source distribution."""
    with tarfile.open(built("sdist")) as sdist:
        safely: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # not in Python 3.11.2
        sdist.extractall(tmp_path, **safely)
    (source,) = tmp_path.iterdir()
    return build(source, "wheel")


@pytest.mark.parametrize("make", [from_tree, from_sdist])
def test_a_wheel_holds_every_module_and_no_other_package(
    make: Callable[[Callable[[str], Path], Path], Path], built: Callable[[str], Path], tmp_path: Path
):
    with zipfile.ZipFile(make(built, tmp_path)) as wheel:
        names = set(wheel.namelist())
    info = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert {name for name in names - info if name.endswith(".py")} == {*MODULES, *KERNELS}
    assert {name for name in names - info if not name.endswith(".py")} == {
        "peftkit/py.typed",
        "peftkit/kernels/ways.json",
    }
    assert any(name.endswith("/LICENSE") for name in info)


@pytest.mark.parametrize("how", ["uninstalled", "wheel"])
def test_every_module_imports(how: str, built: Callable[[str], Path], tmp_path: Path):
    if how == "wheel":
        place = tmp_path / "site"
        with zipfile.ZipFile(built("wheel")) as wheel:
            wheel.extractall(place)
    else:
        place = ROOT
    names = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in MODULES + KERNELS]
    script = f"""
import importlib
for name in {names!r}:
    importlib.import_module(name)
import peftkit
print(peftkit.__file__)
"""
    assert python("-c", script, cwd=tmp_path, path=[place]).strip() == str(place / "peftkit" / "__init__.py")


def test_kernels_stays_the_package_of_that_name(tmp_path: Path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("theirs = True")
    # Even with the checkout first: a folder without `__init__.py` gives way to a package.
    python("-c", "import peftkit, kernels; assert kernels.theirs", cwd=tmp_path, path=[ROOT, tmp_path])


def test_the_link_to_the_kernels_is_relative():
    link = ROOT / "peftkit" / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()
