"""The tutorial's method, held to the contract tests from outside: peftkit on the path and nothing else of this tree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from pages import ROOT, file_of, python_blocks

PAGE = ROOT / "docs" / "adding-a-method.md"

# each a mistake in the method, and the law that must find it
MISTAKES = {
    "merged without its scale": (
        "return self.host.from_matrices([self.change()])",
        "return self.host.from_matrices([self.change() / self.config.scale])",
        "law_6",
    ),
    "starts anywhere": ("nn.init.zeros_(self.spectrum)", "nn.init.normal_(self.spectrum)", "law_1"),
    "stores nothing": ('tensor_names = {"spectrum": "fourierft_spectrum"}', "tensor_names = {}", "law_8_loading"),
    "reads another seed": ('seed=stored["random_loc_seed"]', "seed=0", "law_8_what"),
    "takes the place of what is there": (
        "return y + nn.functional.linear(",
        "return self.host.apply(input, self.host.weight, self.host.module.bias) + nn.functional.linear(",
        "two_adapters",
    ),
    "trains nothing": ("self.spectrum.to(", "self.spectrum.detach().to(", "law_5"),
    "refuses everything": ('or (None if host_class(site) is LinearHost else "it is no Linear")', 'or "no"', "attaches"),
    "merges nothing, though it says so": (
        "return self.host.why_not_merge()",
        'return "its weight is not for writing"',
        None,  # what a method says of itself is believed: the laws of merging are skipped
    ),
}


def files() -> dict[str, str]:
    """The reader's files, as the page has them."""
    found: dict[str, str] = defaultdict(str)
    for _, code in python_blocks(PAGE.read_text(encoding="utf-8")):
        if (name := file_of(code)) is not None:
            found[name] += code
    return found


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What pytest says of the tutorial's files, and of the same with each mistake, in a folder of the reader's."""
    library, folder = tmp_path_factory.mktemp("library"), tmp_path_factory.mktemp("mine")
    (library / "peftkit").symlink_to(ROOT / "peftkit")
    sources = files()
    for name, source in sources.items():
        (folder / name).write_text(source)
    for i, (before, after, _) in enumerate(MISTAKES.values()):
        source = sources["fourier.py"]
        assert source.count(before) == 1, before
        source = source.replace(before, after)
        source = source.replace('method="fourier", peft_type="FOURIERFT"', f'method="mistake{i}"')
        (folder / f"mistake{i}.py").write_text(source)
        test = sources["test_fourier.py"].replace("from fourier import", f"from mistake{i} import")
        test = test.replace("(FourierConfig)", "(FourierConfig, cases=CASES[:1])")  # two Linears are enough to find it
        (folder / f"test_mistake{i}.py").write_text("from peftkit.testing import CASES\n" + test)
    command = [sys.executable, "-m", "pytest", "-q", "-rfs", "--tb=no", "-p", "no:cacheprovider", "-p", "no:randomly"]
    environment = {**os.environ, "PYTHONPATH": str(library), "PYTEST_ADDOPTS": "", "COLUMNS": "500"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def failed(report: str, module: str) -> set[str]:
    return set(re.findall(rf"^FAILED {module}\.py::test_contract\[(\w+)", report, re.MULTILINE))


def test_the_tutorials_method_keeps_every_law(outside: str):
    assert failed(outside, "test_fourier") == set()
    passed = int(re.findall(r"(\d+) passed", outside)[-1])
    assert passed > 110, outside[-2000:]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_it_is_found(mistake: str, outside: str):
    number, law = list(MISTAKES).index(mistake), MISTAKES[mistake][2]
    found = failed(outside, f"test_mistake{number}")
    if law is None:
        assert found == set() and "its weight is not for writing" in outside
    else:
        assert any(name.startswith(law) for name in found), outside[-3000:]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_reads_what_it_writes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import peft

    import peftkit
    from peftkit import method
    from peftkit.testing import models

    monkeypatch.setattr(method, "_registry", method.registered())
    fourier = types.ModuleType("fourier")
    monkeypatch.setitem(sys.modules, "fourier", fourier)
    exec(files()["fourier.py"], vars(fourier))
    model, x = getattr(models, kind)(), models.ids()
    before = models.evaluated(model, x)
    peftkit.inject(model, fourier.FourierConfig(n=40, scale=50.0, seed=3))
    with torch.no_grad():
        for p in peftkit.parameters(model):
            p.normal_()
    peftkit.save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(getattr(models, kind)(), str(tmp_path / "ours")).eval()
    ours = models.evaluated(model, x)
    assert not torch.allclose(ours, before, rtol=1e-2)
    torch.testing.assert_close(models.evaluated(theirs, x), ours, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    peftkit.eject(model)
    peftkit.load(model, tmp_path / "theirs")
    torch.testing.assert_close(models.evaluated(model, x), ours, rtol=1e-4, atol=1e-5)
