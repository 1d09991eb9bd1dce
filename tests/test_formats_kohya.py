"""Files of kohya-ss and LyCORIS: LyCORIS itself is the oracle; what no adapter here can hold is refused by its key."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from storage_helpers import config_of, folder_bytes, peft_model, tensors_of
from torch import Tensor, nn

import peftkit
from peftkit import StorageError


class UNet(nn.Module):
    """Names with underscores in them, Linears and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.down_blocks = nn.ModuleList([Block(), Block()])
        self.proj_out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = x + block(x.mean((2, 3)))[:, :, None, None]
        return self.proj_out(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(8, 12), nn.ModuleList([nn.Linear(12, 8)])

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out[0](self.to_q(x).tanh())


X = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(3))


def out(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)


def from_lycoris(folder: Path, **settings: Any) -> tuple[Path, Tensor]:
    """A file that LyCORIS made, and what it computes with it."""
    lycoris = pytest.importorskip("lycoris")
    model = UNet().eval()
    lycoris.LycorisNetwork.apply_preset(
        {"target_module": ["UNet"], "target_name": [], "unet_target_module": [], "lora_prefix": "lycoris"}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = lycoris.create_lycoris(model, 1.0, **{"linear_dim": 3, "linear_alpha": 5.0, **settings})
    net.apply_to()
    generator = torch.Generator().manual_seed(1)
    for p in net.parameters():
        with torch.no_grad():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    net.eval()
    made = {k: v.detach().contiguous() for k, v in net.state_dict().items() if isinstance(v, Tensor)}
    save_file(made, folder / "theirs.safetensors")
    return folder / "theirs.safetensors", out(model)


ALGORITHMS = {
    "lora": {"algo": "lora"},
    "conv": {"algo": "lora", "conv_dim": 2, "conv_alpha": 1.0},
    "tucker": {"algo": "lora", "conv_dim": 2, "conv_alpha": 3.0, "use_tucker": True},
    "dora": {"algo": "lora", "dora_wd": True, "conv_dim": 2, "conv_alpha": 1.0},
    "loha": {"algo": "loha", "conv_dim": 2, "conv_alpha": 1.0},
    "lokr": {"algo": "lokr", "conv_dim": 1, "conv_alpha": 1.0},
    "lokr-both": {"algo": "lokr", "decompose_both": True, "linear_dim": 1},
    "lokr-full": {"algo": "lokr", "linear_dim": 100000, "conv_dim": 100000},
    "lokr-factor": {"algo": "lokr", "factor": 2, "linear_dim": 1, "conv_dim": 1},
}


TELLING = {  # tensors that show that a case is what its name says
    "lora": {"lora_down.weight", "lora_up.weight", "alpha"},
    "tucker": {"lora_mid.weight"},
    "dora": {"dora_scale"},
    "loha": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    "lokr": {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    "lokr-both": {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a"},
    "lokr-full": {"lokr_w1", "lokr_w2"},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_lycoris_computes_what_the_converted_adapter_does(name, tmp_path):
    file, expected = from_lycoris(tmp_path, **ALGORITHMS[name])
    assert TELLING.get(name, set()) <= {key.partition(".")[2] for key in load_file(file)}
    bare = UNet().eval()
    assert (out(bare) - expected).abs().max() > 0.05
    peftkit.convert(file, tmp_path / "ours", base=UNet())
    model = UNet().eval()
    peftkit.load(model, tmp_path / "ours")
    assert torch.allclose(out(model), expected, atol=2e-5, rtol=1e-5)
    peftkit.merge(model)
    assert torch.allclose(out(model), expected, atol=2e-5, rtol=1e-5)
    assert torch.allclose(out(peft_model(UNet(), tmp_path / "ours")), expected, atol=2e-5, rtol=1e-5)
    # from a directory of weights too, without the model
    (tmp_path / "base").mkdir()
    save_file(dict(UNet().state_dict()), tmp_path / "base" / "model.safetensors")
    peftkit.convert(file, tmp_path / "again", base=tmp_path / "base")
    first, second = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "again")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    other = UNet().eval()
    peftkit.load(other, tmp_path / "again")
    assert torch.equal(out(other), out(peftkit_loaded(tmp_path / "ours")))


def peftkit_loaded(path: Path) -> nn.Module:
    model = UNet().eval()
    peftkit.load(model, path)
    return model


# -- by hand ---------------------------------------------------------------------------------------------------


def pair(head: str, rows: int, cols: int, r: int = 2, alpha: float | None = 6.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(head))
    made = {
        f"{head}.lora_down.weight": torch.randn(r, cols, generator=generator),
        f"{head}.lora_up.weight": torch.randn(rows, r, generator=generator),
    }
    return made if alpha is None else {**made, f"{head}.alpha": torch.tensor(alpha)}


Q, OUT = "lora_unet_down_blocks_0_to_q", "lora_unet_down_blocks_1_to_out_0"
GOOD = {**pair(Q, 12, 8), **pair(OUT, 8, 12, r=3, alpha=None)}


def convert(tensors: dict[str, Tensor], folder: Path, **kwargs: Any) -> None:
    save_file(tensors, folder / "theirs.safetensors")
    peftkit.convert(folder / "theirs.safetensors", folder / "ours", base=kwargs.pop("base", UNet()), **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_alpha_over_rank_by_module(dtype, tmp_path):
    made = {k: v.to(dtype) for k, v in GOOD.items()}
    convert(made, tmp_path)
    model = UNet()
    weights = {n: p.detach().double() for n, p in model.named_parameters()}
    peftkit.load(model, tmp_path / "ours")
    assert config_of(tmp_path / "ours")["target_modules"] == ["down_blocks.0.to_q", "down_blocks.1.to_out.0"]
    assert {t.dtype for t in tensors_of(tmp_path / "ours").values()} == {dtype}
    peftkit.merge(model)
    merged = dict(model.named_parameters())
    for head, path, scale in ((Q, "down_blocks.0.to_q.weight", 6 / 2), (OUT, "down_blocks.1.to_out.0.weight", 1.0)):
        a, b = made[f"{head}.lora_down.weight"].double(), made[f"{head}.lora_up.weight"].double()
        assert torch.allclose(merged[path].double(), weights[path] + scale * b @ a, atol=1e-5)
    assert torch.equal(merged["down_blocks.1.to_q.weight"].double(), weights["down_blocks.1.to_q.weight"])


CONV = "lora_unet_proj_out"


@pytest.mark.parametrize("given", [2, 4])
@pytest.mark.parametrize("head", [Q, CONV])
@pytest.mark.parametrize("kind", ["lora", "dora", "mid", "lokr"])
def test_a_linear_and_a_convolution_of_one_by_one_are_alike(given, head, kind, tmp_path):
    rows, cols = (12, 8) if head == Q else (4, 8)
    made = pair(head, rows, cols)
    weight = UNet().get_submodule("down_blocks.0.to_q" if head == Q else "proj_out").weight.detach().flatten(1)
    up, down = made[f"{head}.lora_up.weight"], made[f"{head}.lora_down.weight"]
    change = 3 * up @ down
    if kind == "dora":
        made[f"{head}.dora_scale"] = 0.5 + torch.rand(rows, 1)
        wide = weight + change
        change = made[f"{head}.dora_scale"] * wide / wide.norm(dim=1, keepdim=True) - weight
    if kind == "mid":
        middle = torch.randn(2, 2)
        made[f"{head}.lora_mid.weight"], change = middle[..., None, None], 3 * up @ middle @ down
    if kind == "lokr":
        made = {f"{head}.lokr_w1": torch.randn(2, 2), f"{head}.lokr_w2": torch.randn(rows // 2, cols // 2)}
        change = torch.kron(*made.values())
    if given == 4:
        made = {k: t[..., None, None] if t.dim() == 2 and "lokr_w1" not in k else t for k, t in made.items()}
    convert(made, tmp_path)
    model = UNet()
    peftkit.load(model, tmp_path / "ours")
    peftkit.merge(model)
    merged: Any = model.get_submodule("down_blocks.0.to_q" if head == Q else "proj_out").weight
    assert torch.allclose(merged.flatten(1), weight + change, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 8, 3, 3), (2, 8, 1, 3), (2, 8, 1, 1, 2)])
def test_a_kernel_that_is_not_one_by_one_is_kept_and_refused(shape, tmp_path):
    made = {**pair(Q, 12, 8), f"{Q}.lora_down.weight": torch.ones(shape)}
    with pytest.raises(StorageError, match=rf"{Q}.lora_down.weight has shape {re.escape(str(shape))}, expected"):
        convert(made, tmp_path)
    with pytest.raises(StorageError, match=r"lora_unet_conv_in.lora_down.weight has shape \(2, 4\), expected"):
        convert(pair("lora_unet_conv_in", 8, 4), tmp_path)


def test_one_part_of_several(tmp_path):
    both = {**GOOD, **pair("lora_te1_down_blocks_0_to_q", 12, 8)}
    with pytest.raises(StorageError, match=r"several models, such as .*prefix='lora_te1' or 'lora_unet'"):
        convert(both, tmp_path)
    convert(both, tmp_path, prefix="lora_unet")
    assert len(tensors_of(tmp_path / "ours")) == 4
    convert(both, tmp_path, prefix="lora_te1")
    assert len(tensors_of(tmp_path / "ours")) == 2
    with pytest.raises(StorageError, match="no key begins with lora_te2_"):
        convert(both, tmp_path, prefix="lora_te2")
    own = {k.replace("lora_unet", "my_own"): v.clone() for k, v in GOOD.items()}
    convert({**own, **GOOD}, tmp_path, prefix="my_own")
    with pytest.raises(StorageError, match=r"unexpected my_own_.*does not begin with lora_unet_, lora_te_ or lycoris_"):
        convert(own, tmp_path)


class Ambiguous(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(8, 12)
        self.to = nn.ModuleDict({"q": nn.Linear(8, 12)})


WRONG: dict[str, tuple[dict[str, Tensor], str]] = {
    "module": (pair("lora_unet_down_blocks_0_to_k", 12, 8), r"no module 'down_blocks_0_to_k'; did you mean 'down_blocks_0_"),
    "tensor": ({f"{Q}.lora_dwn.weight": torch.ones(1)}, rf"unexpected {Q}.lora_dwn.weight; did you mean 'lora_down.weight'"),
    "far": ({f"{Q}.zzzz": torch.ones(1), **GOOD}, rf"unexpected {Q}.zzzz; known are 'alpha', 'dora_scale'"),
    "base": (pair("lora_unet_xyz", 12, 8), "no module 'xyz'; the base has 'conv_in'"),
    "prefix": ({"unet_x.lora_up.weight": torch.ones(1)}, "unexpected unet_x.lora_up.weight: it does not begin with"),
    "missing": ({f"{Q}.lora_up.weight": torch.ones(12, 2)}, rf"missing {Q}.lora_down.weight"),
    "alone": ({f"{Q}.alpha": torch.ones(())}, rf"{Q}.alpha is alone"),
    "alpha": ({**GOOD, f"{Q}.alpha": torch.ones(2)}, rf"{Q}.alpha has the shape \(2,\), expected one number"),
    "shape": ({**GOOD, f"{Q}.lora_up.weight": torch.ones(11, 2)}, rf"{Q}.lora_up.weight has shape \(11, 2\), expected"),
    "rank": ({**GOOD, f"{Q}.lora_up.weight": torch.ones(12, 4)}, rf"{Q}.lora_up.weight has shape \(12, 4\)"),
    "inputs": ({**pair(Q, 12, 8), f"{Q}.dora_scale": torch.ones(1, 8)}, rf"{Q}.dora_scale has.*wd_on_out=False"),
    "some": ({**GOOD, f"{Q}.dora_scale": torch.ones(12, 1)}, "several methods, DoRA at 'down_blocks.0.to_q', LoRA at"),
    "hada": (
        {**GOOD, f"{Q}.hada_w1_a": torch.ones(12, 2)}, rf"{Q}.hada_w1_a and {Q}.lora_(up|down).weight are of different"
    ),
    "full": ({f"{Q}.diff": torch.ones(12, 8)}, rf"{Q}.diff is of a whole weight's change"),
    "bias": ({**GOOD, f"{Q}.diff_b": torch.ones(12)}, rf"{Q}.diff_b is of a bias's change"),
    "norm": ({"lora_unet_n.w_norm": torch.ones(12)}, "lora_unet_n.w_norm is of a norm's change"),
    "oft": ({f"{Q}.oft_blocks": torch.ones(2, 2, 2)}, rf"{Q}.oft_blocks is of OFT or BOFT"),
    "glora": ({f"{Q}.a1.weight": torch.ones(2, 2)}, rf"{Q}.a1.weight is of GLoRA"),
    "tucker": ({f"{Q}.hada_t1": torch.ones(2, 2)}, rf"{Q}.hada_t1 is of a LoHa whose kernel"),
    "nan": ({**GOOD, f"{Q}.lora_up.weight": torch.full((12, 2), torch.nan)}, rf"{Q}.lora_up.weight has values that are not"),
    "factors": (
        {f"{Q}.lokr_w1": torch.ones(3, 2), f"{Q}.lokr_w2": torch.ones(4, 3)}, rf"factors of {Q} make 12 × 6, but the weight"
    ),
    "no-factor": (
        {f"{Q}.lokr_w1": torch.ones(6, 8), f"{Q}.lokr_w2": torch.ones(2, 1), f"{OUT}.lokr_w1": torch.ones(2, 3),
         f"{OUT}.lokr_w2": torch.ones(4, 4)},
        "no one factor splits 8 as 2 · 4, 8 as 8 · 1, 12 as 3 · 4, 12 as 6 · 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name, tmp_path):
    convert(GOOD, tmp_path)
    before = folder_bytes(tmp_path / "ours")
    tensors, match = WRONG[name]
    with pytest.raises(StorageError, match=match):
        convert(tensors, tmp_path)
    assert folder_bytes(tmp_path / "ours") == before


def test_a_name_that_means_two_modules(tmp_path):
    with pytest.raises(StorageError, match=r"lora_unet_to_q can mean 'to\.q' or 'to_q'"):
        convert(pair("lora_unet_to_q", 12, 8), tmp_path, base=Ambiguous())


def test_a_scale_of_zero_is_the_rank(tmp_path):
    """As sd-scripts and LyCORIS read it."""
    convert(pair(Q, 12, 8, alpha=0.0), tmp_path)
    assert config_of(tmp_path / "ours")["lora_alpha"] == config_of(tmp_path / "ours")["r"] == 2


def test_files_of_no_known_kind(tmp_path):
    with pytest.raises(StorageError, match=r"unexpected x\.y: its keys are none of peft's"):
        convert({"x.y": torch.ones(2)}, tmp_path)
    with pytest.raises(StorageError, match="has peft's keys; give its directory"):
        convert({"base_model.model.a.lora_A.weight": torch.ones(2, 2)}, tmp_path)
    with pytest.raises(StorageError, match="is not there; expected a file of tensors"):
        peftkit.convert(tmp_path / "none.safetensors", tmp_path / "ours", base=UNet())
    (tmp_path / "empty").mkdir()
    with pytest.raises(StorageError, match="is no adapter"):
        peftkit.convert(tmp_path / "empty", tmp_path / "ours", base=UNet())
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(StorageError, match="GGUF is written here, not read"):
        peftkit.convert(tmp_path / "a.gguf", tmp_path / "ours", base=UNet())
    with pytest.raises(ValueError, match="to: 'onnx' is no format; known are 'gguf', 'peftkit'"):
        peftkit.convert(tmp_path / "theirs.safetensors", tmp_path / "ours", base=UNet(), to="onnx")
