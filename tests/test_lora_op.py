"""What the operator promises on any machine, and which way is taken; the Triton ways are in tests/gpu."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

import peftkit
from peftkit.kernels import choice, lora_linear, lora_op, philox, rescale
from peftkit.kernels.lora_linear import lora_delta, reference
from peftkit.kernels.lora_linear import lora_linear as linear

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SCALE = 1.5


def operands(t=6, k=10, n=8, r=3, dtype=torch.float32):
    return (
        torch.randn(t, k, dtype=dtype, requires_grad=True),
        torch.randn(n, k, dtype=dtype),
        torch.randn(n, dtype=dtype),
        torch.randn(r, k, requires_grad=True),
        torch.randn(n, r, requires_grad=True),
    )


# -- the mask -----------------------------------------------------------------------------------------------------------


def test_philox_gives_the_published_numbers():
    words = 0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8  # Random123's known answer for counter 0 and key 0
    halves = [half for w in words for half in (w & 0xFFFF, w >> 16)]
    assert plain_philox(0, 0, 0) == halves
    for p in (0.1, 0.5, 0.9):
        mask = philox.keep_mask(torch.tensor([0]), 1, 8, p)
        assert mask[0].tolist() == [half >= philox.threshold(p) for half in halves]


def plain_philox(seed: int, row: int, block: int) -> list[int]:
    """Philox4x32-10 on Python's integers."""
    c, k, low = [block, row, 0, 0], [seed & 0xFFFFFFFF, seed >> 32], 0xFFFFFFFF
    for _ in range(10):
        p, q = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [q >> 32 ^ c[1] ^ k[0], q & low, p >> 32 ^ c[3] ^ k[1], p & low]
        k = [k[0] + 0x9E3779B9 & low, k[1] + 0xBB67AE85 & low]
    return [half for w in c for half in (w & 0xFFFF, w >> 16)]


def test_every_position_has_numbers_of_its_own():
    seed, rows, cols = 0x0FED_CBA9_8765_4321, 5, 43
    mask = philox.keep_mask(torch.tensor([seed]), rows, cols, 0.5)
    for t in range(rows):
        drawn = [u for block in range(6) for u in plain_philox(seed, t, block)][:cols]
        assert mask[t].tolist() == [u >= 2**15 for u in drawn]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.95])
def test_as_many_are_kept_as_promised(p):
    mask = philox.keep_mask(torch.tensor([7]), 512, 512, p).double()
    spread = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(mask.mean().item() - philox.kept(p)) < 4 * spread
    corner = np.corrcoef(mask[:, :-1].flatten(), mask[:, 1:].flatten())[0, 1]
    assert abs(corner) < 4 / mask.numel() ** 0.5


@pytest.mark.parametrize("small", [0, 2**62], ids=["kernel", "composed"])
def test_a_seed_draws_one_mask_on_every_path(monkeypatch, small):
    monkeypatch.setattr(lora_linear, "SMALL", small)
    given, seed = operands(), torch.tensor([3])
    dy = torch.randn(6, 8)
    runs = [
        linear(*given, SCALE, 0.4, seed=seed),
        reference(*given, SCALE, 0.4, seed),
        torch.ops.peftkit.lora_linear(given[0], None, *given[1:3], None, *given[3:], SCALE, 0.4, seed, "torch")[0],
        lora_delta(given[0], nn.functional.linear(*given[:3]), *given[3:], SCALE, 0.4, seed=seed),
    ]
    wanted = given[0], given[3], given[4]
    results = [(y, *torch.autograd.grad(y, wanted, dy)) for y in runs]
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(runs[0], linear(*given, SCALE, 0.4, seed=torch.tensor([4])))


# -- the operator -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore")
def test_opcheck(dropout, dtype):
    x, weight, bias, a, b = operands(dtype=dtype)
    seed = torch.tensor([5]) if dropout else None
    gain = torch.rand(8, requires_grad=True)
    torch.library.opcheck(lora_op.FORWARD, (x, None, weight, bias, None, a, b, SCALE, dropout, seed, ""))
    torch.library.opcheck(lora_op.FORWARD, (x, None, weight, bias, gain, a, b, SCALE, dropout, seed, ""))
    y = torch.randn(6, 8, dtype=dtype, requires_grad=True)
    torch.library.opcheck(lora_op.FORWARD, (x, y, None, None, None, a, b, SCALE, dropout, seed, ""))
    dy, s, z = torch.randn(6, 8, dtype=dtype), torch.randn(6, 3, dtype=dtype), torch.randn(6, 8, dtype=dtype)
    x, a, b, gain, rest = x.detach(), a.detach(), b.detach(), gain.detach(), (SCALE, dropout, seed, "")
    torch.library.opcheck(
        lora_op.BACKWARD, (dy, x, None, weight, bias, None, a, b, s, *rest, [True, True, True, False])
    )
    torch.library.opcheck(lora_op.BACKWARD, (dy, x, z, weight, bias, gain, a, b, s, *rest, [True] * 4))


@pytest.mark.parametrize("lead", [(), (5,), (3, 5), (1, 5), (4, 1, 2), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("gained", [False, True])
def test_the_operator_masks_every_token_whatever_the_leading_sizes(lead, gained):
    torch.manual_seed(0)
    x, (_, weight, bias, a, b), seed = torch.randn(*lead, 10, requires_grad=True), operands(), torch.tensor([5])
    gain = torch.rand(8, requires_grad=True) if gained else None
    leaves = (x, a, b) if gain is None else (x, a, b, gain)
    y = torch.ops.peftkit.lora_linear(x, None, weight, bias, gain, a, b, SCALE, 0.4, seed, "torch")[0]
    true = reference(x, weight, bias, a, b, SCALE, 0.4, seed)
    true = true if gain is None else rescale.reference(true, gain, bias)
    dy = torch.randn(true.shape)
    torch.testing.assert_close(y, true)
    for found, wanted in zip(*(torch.autograd.grad(t, leaves, dy) for t in (y, true)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_operator_is_one_node_of_a_compiled_graph():
    seen = []

    def backend(graph, _):
        seen.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    given = operands()
    compiled = torch.compile(
        lambda x, w, c, a, b: torch.ops.peftkit.lora_linear(x, None, w, c, None, a, b, SCALE, 0.0, None, "")[0],
        fullgraph=True,
        backend=backend,
    )
    torch.testing.assert_close(compiled(*given), linear(*given, SCALE))
    assert sum("peftkit.lora_linear" in name for name in seen[0]) == 1 and len(seen) == 1


def test_the_operator_casts_under_autocast():
    given = operands()
    with torch.autocast("cpu", torch.bfloat16):
        y, *_ = torch.ops.peftkit.lora_linear(given[0], None, *given[1:3], None, *given[3:], SCALE, 0.0, None, "")
    assert y.dtype is torch.bfloat16
    gradient = torch.autograd.grad(y.sum(), given[3])[0]
    assert gradient.dtype is torch.float32 and gradient.abs().sum() > 0


# -- which way ----------------------------------------------------------------------------------------------------------


def test_a_cpu_takes_torch_and_says_why():
    assert choice.way(CPU, torch.float32, 64, 64, 64, 8, 0.0) == "torch"
    model = nn.Sequential(nn.Linear(4, 4))
    report = peftkit.inject(model, peftkit.LoRAConfig(r=2, targets="0"))
    assert report.path == "torch (no GPU: the tensors are on cpu)"
    assert f"computed by {report.path}" in str(peftkit.describe(model)) and "\n" not in report.path


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr(choice, "_has_triton", lambda: False)
    assert choice.line(CUDA) == "torch (Triton is not installed)"


@pytest.mark.parametrize("way", ["epilogue", "augmented", "addmm"])
def test_a_way_that_cannot_run_is_refused(way):
    with pytest.raises(ValueError, match=f"way: '{way}' cannot run here: no GPU: the tensors are on cpu; 'torch' can"):
        linear(*operands(), SCALE, way=way)


def test_a_way_that_there_is_not_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="way: expected one of torch, addmm, epilogue, augmented, found 'cublas'"):
        linear(*operands(), SCALE, way="cublas")
    monkeypatch.setattr(lora_linear, "SMALL", 0)
    monkeypatch.setenv(choice.VARIABLE, "cublas")
    with pytest.raises(ValueError, match="PEFTKIT_LORA_LINEAR"):
        linear(*operands(), SCALE)


class Here:
    """A GPU that is not there, as far as the choice asks."""

    def __init__(self, monkeypatch, name="NVIDIA Test", capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        choice._nearest.cache_clear()


def test_a_device_that_was_not_measured_takes_addmm(monkeypatch):
    Here(monkeypatch)
    assert choice.way(CUDA, torch.bfloat16, 8192, 4096, 4096, 16, 0.0) == "addmm"
    assert choice.line(CUDA) == "addmm, with masks by Triton (NVIDIA Test was not measured)"


def test_a_measured_device_takes_what_was_fastest_nearby(monkeypatch, tmp_path):
    Here(monkeypatch)
    base = {"tokens": 8192, "fan_in": 4096, "fan_out": 4096, "r": 16, "dropout": 0.0}
    rows = [
        {**base, "way": "epilogue"},
        {**base, "r": 128, "way": "augmented"},
        {**base, "dropout": 0.1, "way": "addmm"},
    ]
    monkeypatch.setattr(choice, "TABLE", tmp_path / "ways.json")
    choice.TABLE.write_text(json.dumps({"NVIDIA Test": rows}))
    choice.table.cache_clear()
    try:
        for r, dropout, way in ((8, 0.0, "epilogue"), (100, 0.0, "augmented"), (100, 0.3, "addmm")):
            assert choice.way(CUDA, torch.bfloat16, 4096, 4096, 4096, r, dropout) == way
        assert choice.way(CUDA, torch.float64, 4096, 4096, 4096, 8, 0.0) == "torch"
        assert choice.way(CUDA, torch.bfloat16, 4096, 4096, 4096, 300, 0.0) == "torch"
        assert "as measured on this NVIDIA Test" in choice.line(CUDA)
        monkeypatch.setenv(choice.VARIABLE, "addmm")
        assert choice.way(CUDA, torch.bfloat16, 4096, 4096, 4096, 8, 0.0) == "addmm"
        assert choice.line(CUDA) == "addmm (PEFTKIT_LORA_LINEAR is set)"
    finally:
        choice.table.cache_clear()
        choice._nearest.cache_clear()


def test_an_old_gpu_takes_torch(monkeypatch):
    Here(monkeypatch, capability=(7, 5))
    assert choice.way(CUDA, torch.float16, 64, 64, 64, 8, 0.0) == "torch"
    assert "older than the kernels" in choice.line(CUDA)


def test_the_table_that_is_shipped_names_ways_that_there_are():
    for rows in choice.table().values():
        assert rows and all(row["way"] in choice.WAYS for row in rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": torch.tensor(3)}, "seed: expected \\(1\\) in int64"),
        ({"seed": torch.tensor([3.0])}, "seed: expected \\(1\\) in int64"),
        ({"dropout": 1.0}, "dropout: expected a probability in \\[0, 1\\), found 1.0"),
        ({"dropout": -0.1}, "dropout: expected a probability"),
    ],
)
def test_bad_input_is_named_before_anything_runs(change, message):
    with pytest.raises(ValueError, match=message):
        linear(*operands(), SCALE, **{"dropout": 0.1, **change})


def test_triton_is_not_imported_before_it_is_needed():
    import subprocess

    script = (
        "import sys, torch, peftkit; from peftkit.kernels.lora_linear import lora_linear as f;"
        "x = torch.randn(300, 300, requires_grad=True); "
        "f(x, x.detach(), None, x.detach(), x.detach(), 1.0).sum().backward();"
        "print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
