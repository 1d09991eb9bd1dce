"""Merging files is, bit for bit, merging the model that they hold."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from storage_helpers import folder_bytes, llama, moved
from storage_models import bert, conv, gpt2
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
)

import peftkit
from peftkit import (
    DoRAConfig,
    IA3Config,
    LoHaConfig,
    LoRAConfig,
    NotMergeable,
    PrefixTuningConfig,
    PromptTuningConfig,
    SeriesAdapterConfig,
    StorageError,
    ledger,
)
from peftkit.method import registered


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.same = nn.MultiheadAttention(8, 2, batch_first=True)
        self.apart = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)
        self.norm = nn.LayerNorm(8)


MODELS = {"bert": bert, "gpt2": gpt2, "llama": llama, "conv": conv, "attention": Attention}
DTYPES = [torch.float32, torch.bfloat16]


def write(model: nn.Module, folder: Path, shards: int = 1) -> Path:
    """The model's files as transformers writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        save_file(
            {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"}
        )
    if shards > 1:
        sharded(folder, shards)
    return folder


def sharded(folder: Path, count: int) -> None:
    """Spread one file over `count`, with an index."""
    found = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    where = {key: names[i % count] for i, key in enumerate(found)}
    for name in names:
        save_file({k: v for k, v in found.items() if where[k] == name}, folder / name, {"format": "pt"})
    size = sum(v.nbytes for v in found.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key].view(torch.uint8), value.contiguous().view(torch.uint8)), key
    return found.keys() == expected.keys()


CASES = [
    pytest.param(
        make,
        replace(config, targets=("0", "2")) if make is conv else config,
        dtype,
        id=f"{name}-{config.method}-{i}-{str(dtype)[6:]}",
    )
    for name, make in MODELS.items()
    for method in registered().values()
    if method.mergeable and method.__module__.startswith("peftkit.")
    for i, config in enumerate(method.examples())
    for dtype in (DTYPES if name in ("llama", "conv") else DTYPES[:1])
    if not (getattr(config, "dropout", 0) and name == "attention")
]


@pytest.mark.parametrize(("make", "config", "dtype"), CASES)
def test_it_is_the_merge_of_the_model(tmp_path, make, config, dtype):
    model = make().to(dtype)
    write(model, tmp_path / "base", shards=3)
    try:
        peftkit.inject(model, config)
    except ValueError as error:
        pytest.skip(str(error))
    moved(model, peftkit.parameters(model))
    peftkit.save(model, tmp_path / "adapter")
    peftkit.merge(model, keep_base=False)
    expected = write(model, tmp_path / "expected")
    done = peftkit.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert same_bits(weights(tmp_path / "out"), weights(expected))
    before = weights(tmp_path / "base")
    differ = {k for k, v in weights(expected).items() if not torch.equal(before[k], v)}
    assert differ and differ <= set(done.changed)


def lora(model: nn.Module, folder: Path, seed: int = 1, **kwargs: Any) -> Path:
    """A trained adapter of `model`, which is left as it was."""
    config = kwargs.pop("config", None) or LoRAConfig(r=2, alpha=6, targets="all-linear", **kwargs)
    peftkit.inject(model, config)
    moved(model, peftkit.parameters(model), seed)
    peftkit.save(model, folder)
    peftkit.eject(model)
    return folder


@pytest.fixture
def base(tmp_path) -> Path:
    return write(llama(), tmp_path / "base", shards=2)


@pytest.fixture
def adapter(tmp_path) -> Path:
    return lora(llama(), tmp_path / "adapter")


def in_memory(tmp_path: Path, *adapters: Path, dtype: torch.dtype = torch.float32, make: Any = llama) -> dict[str, Any]:
    model = make().to(dtype)
    names = [f"a{i}" for i in range(len(adapters))]
    for name, folder in zip(names, adapters, strict=True):
        peftkit.load(model, folder, name=name)
    peftkit.activate(model, *names)
    peftkit.merge(model, keep_base=False)
    return weights(write(model, tmp_path / f"expected-{uuid.uuid4().hex}"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_adapters_in_one_pass(tmp_path, dtype):
    write(llama().to(dtype), tmp_path / "base", shards=2)
    configs = [
        LoRAConfig(r=2, targets="all-linear"),
        DoRAConfig(r=3, targets="attention"),
        DoRAConfig(r=1, targets="mlp"),
    ]
    folders = [lora(llama().to(dtype), tmp_path / f"{i}", seed=i, config=c) for i, c in enumerate(configs)]
    peftkit.merge_checkpoint(tmp_path / "base", folders, tmp_path / "out")
    assert same_bits(weights(tmp_path / "out"), in_memory(tmp_path, *folders, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config", [LoRAConfig(r=2, alpha=6), DoRAConfig(r=3), IA3Config(), LoHaConfig(r=2)], ids=lambda c: c.method
)
def test_weights_scale_what_an_adapter_changes(tmp_path, dtype, config):
    """Against `W + Σ wᵢ ΔWᵢ` in fp64: rounded once."""
    model = llama().to(dtype)
    write(model, tmp_path / "base", shards=2)
    pairs = [(lora(model, tmp_path / "a", 1, config=config), 0.7), (lora(model, tmp_path / "b", 2), -1.3)]
    exact = llama().to(dtype).double()
    expected = {name: p.clone() for name, p in exact.state_dict().items()}
    for folder, weight in pairs:
        peftkit.load(exact, folder, check_base=False)
        for site, found in ledger.require(exact)[1].attachments["default"].adapters.items():
            for name in found.merges:
                expected[f"{site}.{name}"] += weight * found.double().delta(name)
        peftkit.eject(exact)
    peftkit.merge_checkpoint(tmp_path / "base", dict(pairs), tmp_path / "out")
    eps = torch.finfo(dtype).eps
    sums = 1e-12 if dtype == torch.float64 else 4e-6  # of fp64 or fp32, in which adapters and their sum are computed
    for key, value in weights(tmp_path / "out").items():
        room = 0.51 * eps * expected[key].abs() + sums  # one rounding
        assert ((value.double() - expected[key]).abs() <= room).all(), key
    assert not torch.equal(
        weights(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"],
        weights(tmp_path / "base")["model.layers.0.mlp.up_proj.weight"],
    )


def test_the_dtype_of_what_is_written(tmp_path, adapter):
    for own, wanted in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        write(llama().to(own), tmp_path / f"base-{wanted}", shards=2)
        peftkit.merge_checkpoint(
            tmp_path / f"base-{wanted}", adapter, tmp_path / f"{wanted}", dtype=wanted, check_base=False
        )
        wide = llama().to(own).to(torch.float32)
        peftkit.load(wide, adapter, check_base=False)
        peftkit.merge(wide, keep_base=False)
        expected = {k: v.to(wanted) for k, v in weights(write(wide, tmp_path / "expected")).items()}
        assert same_bits(weights(tmp_path / f"{wanted}"), expected)
        index = json.loads((tmp_path / f"{wanted}" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(v.nbytes for v in expected.values())
        config = json.loads((tmp_path / f"{wanted}" / "config.json").read_text())
        assert config["dtype"] == str(wanted)[6:]
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"{wanted}")
        assert model.dtype == wanted and same_bits(dict(model.state_dict()), dict(wide.to(wanted).state_dict()))


def test_files_beside_the_weights(tmp_path, base, adapter):
    (base / "tokenizer.json").write_text("{}")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("[1]")
    (base / "onnx").mkdir()
    (base / "onnx" / "model.onnx").write_bytes(b"the base's weights")
    (base / "pytorch_model.bin").write_bytes(b"the base's weights")
    (base / ".git").mkdir()
    peftkit.merge_checkpoint(base, adapter, tmp_path / "out")
    kept = {str(p.relative_to(base)) for p in base.rglob("*") if p.is_file()} - {"onnx/model.onnx", "pytorch_model.bin"}
    assert {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()} == kept
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == "[1]"
    for name in ("config.json", "model.safetensors.index.json", "tokenizer.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((base / name).read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out"]


def test_a_body_and_the_head_that_an_adapter_brings(tmp_path):
    """The base holds a body; the adapter was trained under a head, which it holds whole."""
    model = bert()
    folder = lora(model, tmp_path / "adapter", also_train=["classifier"])
    write(model.bert, tmp_path / "base")
    done = peftkit.merge_checkpoint(tmp_path / "base", folder, tmp_path / "out")
    assert sorted(done.added) == ["classifier.bias", "classifier.weight"]
    found = type(model).from_pretrained(tmp_path / "out", num_labels=3)
    assert same_bits(dict(found.state_dict()), in_memory(tmp_path, folder, make=bert))


def test_an_adapter_of_a_body_on_a_whole_model(tmp_path):
    model = bert()
    folder = lora(model.bert, tmp_path / "adapter")
    write(model, tmp_path / "base")
    peftkit.merge_checkpoint(tmp_path / "base", folder, tmp_path / "out")
    peftkit.load(model.bert, folder)
    peftkit.merge(model.bert, keep_base=False)
    assert same_bits(weights(tmp_path / "out"), weights(write(model, tmp_path / "expected")))


def test_rows_of_a_tied_vocabulary(tmp_path):
    def tied() -> nn.Module:
        return llama(tie_word_embeddings=True)

    folder = lora(tied(), tmp_path / "adapter", also_train={"embed_tokens": [3, 5]})
    write(tied(), tmp_path / "base")
    peftkit.merge_checkpoint(tmp_path / "base", folder, tmp_path / "out")
    assert same_bits(weights(tmp_path / "out"), in_memory(tmp_path, folder, make=tied))


def test_what_peft_saved(tmp_path, base):
    torch.manual_seed(0)
    made = peft.get_peft_model(
        llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    made.save_pretrained(tmp_path / "adapter")
    peftkit.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert same_bits(weights(tmp_path / "out"), in_memory(tmp_path, tmp_path / "adapter"))
    made.merge_and_unload()
    for key, value in made.get_base_model().state_dict().items():
        assert torch.allclose(weights(tmp_path / "out")[key], value, atol=1e-6)


# -- refusals ------------------------------------------------------------------------------------------------------------


def refuses(tmp_path: Path, kind: type[Exception], words: str, base: Path, adapters: Any, **kwargs: Any) -> None:
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(kind, match=words):
        peftkit.merge_checkpoint(base, adapters, tmp_path / "out", **kwargs)
    assert sorted(p.name for p in tmp_path.iterdir()) == before  # nothing was written


def without(folder: Path, ending: str) -> None:
    (file,) = folder.glob("*.safetensors")
    found = {k: v for k, v in load_file(file).items() if not k.endswith(ending)}
    save_file(found, file, {"format": "pt"})


def test_a_tensor_that_the_base_lacks(tmp_path, adapter):
    write(llama(), tmp_path / "base")
    without(tmp_path / "base", "1.mlp.up_proj.weight")
    refuses(
        tmp_path,
        StorageError,
        r"base has no model\.layers\.1\.mlp\.up_proj\.weight, which the adapter in",
        tmp_path / "base",
        adapter,
    )


def test_a_quantised_base(tmp_path, adapter):
    write(llama(), tmp_path / "base")
    (file,) = (tmp_path / "base").glob("*.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    found = load_file(file)
    packed = {f"{name}.qweight": torch.zeros(4, 4, dtype=torch.int32)}
    save_file({k: v for k, v in found.items() if not k.startswith(name)} | packed, file)
    refuses(tmp_path, StorageError, "it is quantised", tmp_path / "base", adapter)
    save_file(found | {f"{name}.weight": found[f"{name}.weight"].to(torch.float8_e4m3fn)}, file)
    refuses(tmp_path, NotMergeable, "packed torch.float8_e4m3fn", tmp_path / "base", adapter, check_base=False)


def test_tied_weights(tmp_path):
    write(llama(vocab_size=40, tie_word_embeddings=True), tmp_path / "base")
    table = lora(llama(vocab_size=40), tmp_path / "table", config=LoRAConfig(r=2, targets="embed_tokens"))
    head = lora(llama(vocab_size=40), tmp_path / "head", config=LoRAConfig(r=2, targets="lm_head"))
    whole = lora(llama(vocab_size=40), tmp_path / "whole", also_train=["lm_head"])
    refuses(
        tmp_path, NotMergeable, "ties its head to model.embed_tokens.weight", tmp_path / "base", table, check_base=False
    )
    refuses(tmp_path, StorageError, "lm_head.weight.*ties it to its embedding", tmp_path / "base", head)
    refuses(tmp_path, NotMergeable, "ties its head", tmp_path / "base", whole, check_base=False)
    replaced = lora(llama(vocab_size=40), tmp_path / "replaced", also_train=["embed_tokens"])
    refuses(tmp_path, NotMergeable, "ties its head", tmp_path / "base", replaced, check_base=False)
    with pytest.raises(NotMergeable, match="ties its head"):
        peftkit.verify(replaced, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    del config["tie_word_embeddings"]  # as where it is what the class does anyway
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    refuses(tmp_path, NotMergeable, "ties its head to", tmp_path / "base", table, check_base=False)
    (file,) = (tmp_path / "base").glob("*.safetensors")
    found = load_file(file)  # as a dump that writes what is shared twice
    save_file(found | {"lm_head.weight": found["model.embed_tokens.weight"].clone()}, file)
    refuses(tmp_path, NotMergeable, "ties its head to", tmp_path / "base", table, check_base=False)
    write(llama(vocab_size=40), tmp_path / "apart")
    peftkit.merge_checkpoint(tmp_path / "apart", [table, head], tmp_path / "both")


def test_another_base(tmp_path, base, adapter):
    write(llama(seed=5), tmp_path / "other")
    refuses(tmp_path, StorageError, "saved from another base", tmp_path / "other", adapter)
    peftkit.merge_checkpoint(tmp_path / "other", adapter, tmp_path / "sure", check_base=False)


@pytest.mark.parametrize(
    "config",
    [PrefixTuningConfig(length=2), PromptTuningConfig(length=2), SeriesAdapterConfig(bottleneck=4)],
    ids=lambda c: c.method,
)
def test_what_no_weight_can_hold(tmp_path, base, config):
    refuses(tmp_path, NotMergeable, "depends on the input", base, lora(llama(), tmp_path / "adapter", config=config))


def test_every_method_says_whether_it_merges():
    for method in registered().values():
        if method.__module__.startswith("peftkit."):
            for config in method.examples():
                model = llama() if method.method != "bitfit" else bert()
                peftkit.inject(model, config)
                made = ledger.require(model)[1].attachments["default"].adapters.values()
                assert method.mergeable == all(a.why_not_merge() is None for a in made if not a.beside), config


def test_two_that_replace_one_module(tmp_path, base):
    folders = [lora(llama(), tmp_path / str(i), seed=i, also_train=["lm_head"]) for i in range(2)]
    refuses(tmp_path, ValueError, "takes the place of 'lm_head'", base, folders)
    refuses(tmp_path, ValueError, "'lm_head' is taken whole", base, {folders[0]: 0.5})


def test_values_that_a_dtype_cannot_hold(tmp_path, adapter):
    model = llama()
    with torch.no_grad():
        model.model.norm.weight[0] = 1e5
    write(model, tmp_path / "base")
    refuses(
        tmp_path,
        StorageError,
        r"model.norm.weight would hold values beyond torch.float16",
        tmp_path / "base",
        adapter,
        dtype=torch.float16,
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "bfloat16"])
def test_a_dtype_that_is_none(tmp_path, base, adapter, dtype):
    refuses(tmp_path, ValueError, "floating-point dtype of 16 bits or more", base, adapter, dtype=dtype)


@pytest.mark.parametrize(
    ("adapters", "kind"),
    [
        ([], ValueError),
        ({"a": float("nan")}, ValueError),
        ([3], TypeError),
        ([("a", "b")], ValueError),
        ({"a": True}, ValueError),
    ],
)
def test_what_is_no_list_of_adapters(tmp_path, base, adapters, kind):
    refuses(tmp_path, kind, "adapters: ", base, adapters)


def test_what_is_no_base(tmp_path, adapter):
    refuses(tmp_path, StorageError, "is not there", tmp_path / "none", adapter)
    (tmp_path / "empty").mkdir()
    refuses(tmp_path, StorageError, "has no safetensors file", tmp_path / "empty", adapter)
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"")
    refuses(tmp_path, StorageError, "is a pickle", tmp_path / "empty", adapter)


def test_square_weights_beside_transposed_ones(tmp_path):
    """A model of two kinds of weights, `(out, in)` and `(in, out)`, some of them square."""
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        BertConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2),
        GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, add_cross_attention=True),
    )

    def made() -> nn.Module:
        torch.manual_seed(0)
        return EncoderDecoderModel(config)

    folder = lora(made(), tmp_path / "adapter", config=LoRAConfig(r=2, targets=["query", "c_attn", "c_proj", "q_attn"]))
    write(made(), tmp_path / "base")
    peftkit.merge_checkpoint(tmp_path / "base", folder, tmp_path / "out")
    assert same_bits(weights(tmp_path / "out"), in_memory(tmp_path, folder, make=made))


def test_more_modules_than_files_may_be_open(tmp_path):
    """Mapped tensors are open files; a model may have more of them than a process may have."""
    import resource

    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(400)))
    write(model, tmp_path / "base")
    folder = lora(model, tmp_path / "adapter")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        peftkit.verify(folder, tmp_path / "base")
        peftkit.merge_checkpoint(tmp_path / "base", folder, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    peftkit.load(model, folder)
    peftkit.merge(model, keep_base=False)
    assert same_bits(weights(tmp_path / "out"), dict(model.state_dict()))


def test_the_base_may_not_change_meanwhile(tmp_path, base, adapter):
    def progress(done: int, total: int) -> None:
        os.utime(next(base.glob("*.safetensors")))

    refuses(tmp_path, StorageError, "were changed while they were merged", base, adapter, progress=progress)


def test_layers_in_directories_of_their_own(tmp_path, base, adapter):
    """sentence-transformers': copied whole where `modules.json` names them; other weights are not copied at all."""
    for name, file in (("2_Dense", "model.safetensors"), ("onnx", "model.onnx"), ("checkpoint-5", "notes.txt")):
        (base / name).mkdir()
        (base / name / "config.json").write_text("{}")
        (base / name / file).write_bytes(b"weights")
    (base / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    peftkit.merge_checkpoint(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").read_bytes() == b"weights"
    assert not (tmp_path / "out" / "onnx").exists() and not (tmp_path / "out" / "checkpoint-5").exists()


def test_two_forms_of_the_weights(tmp_path, base, adapter):
    save_file({"a": torch.zeros(1)}, base / "model.safetensors")
    refuses(tmp_path, StorageError, "remove the one that is not the model's", base, adapter)


def test_an_index_that_lies(tmp_path, base, adapter):
    file = base / "model.safetensors.index.json"
    good = json.loads(file.read_text())
    key = "model.norm.weight"
    for change, words in (
        ({key: "../other/model.safetensors"}, "no safetensors file beside it"),
        ({key: "model-00003-of-00002.safetensors"}, "is not there; the download is not complete"),
        ({"model.more.weight": good["weight_map"][key]}, "model.more.weight should be in .*no file has it"),
        ({key: next(v for v in good["weight_map"].values() if v != good["weight_map"][key])}, "but it is in"),
    ):
        file.write_text(json.dumps({**good, "weight_map": good["weight_map"] | change}))
        refuses(tmp_path, StorageError, words, base, adapter)
    for text in ("[]", "{}", "{", '{"weight_map": {"a": 1}}'):
        file.write_text(text)
        refuses(tmp_path, StorageError, "index.json", base, adapter)


def test_where_it_is_not_written(tmp_path, base, adapter):
    with pytest.raises(StorageError, match="is read"):
        peftkit.merge_checkpoint(base, adapter, base, overwrite=True)
    for inside in (base / "merged", base.parent, adapter, adapter / "merged"):
        with pytest.raises(StorageError, match=r"is read; write to a directory beside it"):
            peftkit.merge_checkpoint(base, adapter, inside, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(StorageError, match="overwrite=True"):
        peftkit.merge_checkpoint(base, adapter, tmp_path / "mine")
    with pytest.raises(StorageError, match="not taken for a model"):
        peftkit.merge_checkpoint(base, adapter, tmp_path / "mine", overwrite=True)
    with pytest.raises(StorageError, match="is a file"):
        peftkit.merge_checkpoint(base, adapter, tmp_path / "mine" / "thesis.txt")
    other = lora(llama(), tmp_path / "other")
    with pytest.raises(StorageError, match="holds README.md|holds adapter_"):  # an adapter is no model, and is not lost
        peftkit.merge_checkpoint(base, adapter, other, overwrite=True)
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"")
    with pytest.raises(StorageError, match=r"holds thesis\.txt, which the new one would not have"):
        peftkit.merge_checkpoint(base, adapter, tmp_path / "mine", overwrite=True)
    assert folder_bytes(tmp_path / "mine") == {"thesis.txt": b"x", "model.safetensors": b""}
    assert len(list(tmp_path.iterdir())) == 4
    peftkit.merge_checkpoint(base, adapter, tmp_path / "out")
    (tmp_path / "out" / "model-stale.safetensors").write_bytes(b"")
    peftkit.merge_checkpoint(base, adapter, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "model-stale.safetensors").exists()
