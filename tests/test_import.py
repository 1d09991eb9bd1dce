"""Law 14: nothing happens at import."""

import json
import subprocess
import sys

import pytest

PROBE = """
import json, sys, torch, torch.nn.functional as F
before = {(m, k): id(v) for m in ("torch.nn", "torch.nn.functional", "torch") for k, v in vars(sys.modules[m]).items()}
linear = dict(vars(torch.nn.Linear)); module = dict(vars(torch.nn.Module))
state = torch.get_rng_state().tolist()
loaded = set(sys.modules)
import peftkit
after = {(m, k): id(v) for m in ("torch.nn", "torch.nn.functional", "torch") for k, v in vars(sys.modules[m]).items()}
changed = [k for k in before if before[k] != after.get(k)]
print(json.dumps({
    "changed": changed,
    "classes": dict(vars(torch.nn.Linear)) != linear or dict(vars(torch.nn.Module)) != module,
    "rng": torch.get_rng_state().tolist() != state,
    "cuda": torch.cuda.is_initialized(),
    "new": sorted({m.partition(".")[0] for m in set(sys.modules) - loaded}),
}))
"""


def test_importing_changes_nothing_and_loads_no_model_library():
    out = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    found = json.loads(out.stdout)
    assert found["changed"] == [] and not found["classes"] and not found["rng"] and not found["cuda"]
    heavy = {
        "transformers",
        "peft",
        "accelerate",
        "bitsandbytes",
        "torchao",
        "rich",
        "triton",
        "huggingface_hub",
        "einops",
        "trl",
        "lightning",
        "pytorch_lightning",
    }
    assert not heavy & set(found["new"])


def test_kernels_on_the_path_is_not_ours():
    out = subprocess.run(
        [sys.executable, "-c", "import peftkit.kernels.lora_linear, sys; print('kernels' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert out.stdout.strip() == "False"


def test_everything_named_is_there():
    import peftkit

    assert all(hasattr(peftkit, name) for name in peftkit.__all__)
    assert all(getattr(peftkit, name).__doc__ for name in peftkit.__all__)


@pytest.mark.parametrize(
    ("module", "packages"),
    [
        ("transformers", ["transformers"]),
        ("trl", ["trl"]),
        ("lightning", ["lightning", "lightning.pytorch", "pytorch_lightning"]),
    ],
)
def test_an_integration_without_its_package_says_what_to_install(module, packages):
    code = f"import sys; sys.modules.update(dict.fromkeys({packages})); import peftkit.integrations.{module}"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = out.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ") and f"pip install 'peftkit[{module}]'" in last


def test_importing_peftkit_imports_no_integration():
    code = "import peftkit, sys; print([m for m in sys.modules if m.startswith('peftkit.integrations')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
