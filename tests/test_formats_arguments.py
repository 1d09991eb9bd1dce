"""What is given to `convert` is used, or refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from storage_helpers import config_of, llama, small, trained
from torch import Tensor, nn

import peftkit
from peftkit import StorageError

Q = "layers.0.attn.q_proj"
TUNE = {f"{Q}.lora_a.weight": torch.ones(2, 16), f"{Q}.lora_b.weight": torch.ones(16, 2)}


def kohya(path: str, alpha: float | None = None) -> dict[str, Tensor]:
    made = {
        f"lora_unet_{path}.lora_down.weight": torch.ones(2, 6),
        f"lora_unet_{path}.lora_up.weight": torch.ones(8, 2),
    }
    return made if alpha is None else {**made, f"lora_unet_{path}.alpha": torch.tensor(alpha)}


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)


def alphas(folder: Path) -> dict[str, float]:
    """What each module's product is scaled by, times its rank."""
    model = Two()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    peftkit.load(model, folder)
    peftkit.merge(model)
    # the product of the ones is 2 everywhere, and so is the rank
    return {n[0]: (p - before[n]).mean().item() for n, p in model.named_parameters() if n.endswith("weight")}


def test_alpha_where_a_kohya_file_has_none(tmp_path):
    file = tmp_path / "theirs.safetensors"
    save_file({**kohya("a"), **kohya("b", 6.0)}, file)
    peftkit.convert(file, tmp_path / "ours", base=Two(), alpha=16)
    assert alphas(tmp_path / "ours") == pytest.approx({"a": 16, "b": 6})
    peftkit.convert(file, tmp_path / "ours", base=Two())
    assert alphas(tmp_path / "ours") == pytest.approx({"a": 2, "b": 6})
    save_file({**kohya("a"), **kohya("b", 0.0)}, file)  # 0 is what the file says, and means the rank
    peftkit.convert(file, tmp_path / "ours", base=Two(), alpha=16)
    assert alphas(tmp_path / "ours") == pytest.approx({"a": 16, "b": 2})


def test_alpha_where_a_loha_and_a_lokr_have_none(tmp_path):
    file = tmp_path / "theirs.safetensors"
    ends = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 6), "hada_w2_a": (8, 2), "hada_w2_b": (2, 6)}
    save_file({f"lora_unet_a.{end}": torch.ones(shape) for end, shape in ends.items()}, file)
    peftkit.convert(file, tmp_path / "loha", base=Two(), alpha=16)
    assert config_of(tmp_path / "loha")["alpha"] == 16
    ends = {"lokr_w1": (2, 2), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 3)}
    save_file({f"lora_unet_a.{end}": torch.ones(shape) for end, shape in ends.items()}, file)
    peftkit.convert(file, tmp_path / "lokr", base=Two(), alpha=16)
    assert config_of(tmp_path / "lokr")["alpha"] == 16
    save_file({"lora_unet_a.lokr_w1": torch.ones(2, 2), "lora_unet_a.lokr_w2": torch.ones(4, 3)}, file)
    with pytest.raises(ValueError, match=r"alpha=16 has no use: every module .* needs none"):
        peftkit.convert(file, tmp_path / "lokr", base=Two(), alpha=16)


def test_alpha_of_torchtune(tmp_path):
    torch.save(TUNE, tmp_path / "adapter_0.pt")
    peftkit.convert(tmp_path, tmp_path / "ours", base=llama(), alpha=16)
    assert config_of(tmp_path / "ours")["lora_alpha"] == 16
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2}))
    peftkit.convert(tmp_path, tmp_path / "ours", base=llama(), alpha=16)
    assert config_of(tmp_path / "ours")["lora_alpha"] == 16


def sources(folder: Path) -> dict[str, tuple[Path, nn.Module]]:
    peftkit.save(trained(small()), folder / "ours")
    save_file(kohya("a", 6.0), folder / "kohya.safetensors")
    (folder / "tune").mkdir()
    torch.save(TUNE, folder / "tune" / "adapter_0.pt")
    (folder / "tune" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    return {
        "ours": (folder / "ours", small()),
        "kohya": (folder / "kohya.safetensors", Two()),
        "tune": (folder / "tune", llama()),
    }


USELESS: list[tuple[str, dict[str, Any], str]] = [
    ("ours", {"alpha": 16}, r"alpha=16 has no use: \S*ours is peft's or peftkit's"),
    ("ours", {"prefix": "lora_te"}, "prefix='lora_te' has no use"),
    ("ours", {"dtype": torch.float16}, r"dtype=torch\.float16 is for to='gguf'"),
    ("ours", {"dtype": torch.float32}, r"dtype=torch\.float32 is for to='gguf'"),
    ("kohya", {"alpha": 16}, r"alpha=16 has no use: every module of \S*kohya\.safetensors has its own"),
    ("kohya", {"dtype": torch.float16}, r"dtype=torch\.float16 is for to='gguf'"),
    ("tune", {"alpha": 16}, r"alpha=16 has no use: adapter_config\.json beside \S* says lora_alpha=4"),
    ("tune", {"prefix": "lora_unet"}, r"prefix='lora_unet' has no use: \S*adapter_0\.pt is torchtune's"),
    ("tune", {"dtype": torch.float16}, r"dtype=torch\.float16 is for to='gguf'"),
    *(("kohya", {"alpha": wrong}, "expected a number above 0") for wrong in (0, -1.0, float("nan"), float("inf"))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "words"), USELESS)
def test_what_has_no_use_is_refused(name, given, words, tmp_path):
    source, base = sources(tmp_path)[name]
    peftkit.convert(source, tmp_path / "without", base=base)
    with pytest.raises(ValueError, match=words) as caught:
        peftkit.convert(source, tmp_path / "out", base=base, **given)
    assert not isinstance(caught.value, StorageError)  # the adapter is good
    assert not (tmp_path / "out").exists()


def test_so_says_the_command_line(tmp_path, capsys, monkeypatch):
    from peftkit.cli import app as commands

    def code(*line: str) -> Any:
        argv = ["peftkit", "convert", str(tmp_path / "ours"), str(tmp_path / "out"), "--base", str(tmp_path / "base")]
        monkeypatch.setattr("sys.argv", [*argv, *line])
        with pytest.raises(SystemExit) as end:
            commands.main()
        return end.value.code

    llama().save_pretrained(tmp_path / "base")
    peftkit.save(trained(llama()), tmp_path / "ours")
    assert code("--dtype", "float16") == 2
    assert "dtype=torch.float16 is for to='gguf'" in capsys.readouterr().err
    assert code("--alpha", "3") == 2 and not (tmp_path / "out").exists()
    assert code("--to", "gguf", "--dtype", "float16") == 0
    half = (tmp_path / "out").stat().st_size
    assert code("--to", "gguf") == 0
    assert half < (tmp_path / "out").stat().st_size
