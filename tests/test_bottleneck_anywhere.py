"""Series and parallel adapters among torch's features, other adapters, dtypes, files and mistakes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from block_models import Layer, Numbered, stack
from safetensors import safe_open
from storage_helpers import rewrite, tensors_of
from test_bottleneck import CLASSES, draw, every
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftkit
from peftkit import LoRAConfig, NotMergeable, ParallelAdapterConfig, SeriesAdapterConfig, StorageError, TargetError
from peftkit.testing.models import bert, convolutions, drawn, encoder, evaluated, gpt2, ids, llama, numbers, output

PLACES = (
    (SeriesAdapterConfig, ("attention", "mlp")),
    (SeriesAdapterConfig, "all-linear"),
    (ParallelAdapterConfig, ("attention", "mlp")),
    (ParallelAdapterConfig, "all-linear"),
)
placed = pytest.mark.parametrize(("cls", "targets"), PLACES, ids=lambda v: getattr(v, "method", str(v)))


def adapted(model: nn.Module, cls, targets, **kwargs) -> nn.Module:
    peftkit.inject(model, cls(bottleneck=2, activation="tanh", targets=targets, **kwargs))
    draw(model)
    return model


# -- torch's features ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [False, True])
@placed
def test_identity_to_the_bit_in_training_too(cls, targets, training, dtype):
    for make, x in ((llama, ids()), (bert, ids()), (lambda: stack(), numbers(2, 5, 8)().to(dtype))):
        before = make().to(dtype).requires_grad_(False).train(training)
        if getattr(before, "config", None) is not None:
            before.config._attn_implementation = "eager"
        model = copy.deepcopy(before)
        peftkit.inject(model, cls(bottleneck=2, scale=-4.0, targets=targets))
        torch.manual_seed(0)
        found = output(model, x)
        torch.manual_seed(0)
        assert torch.equal(found, output(before, x))


@pytest.mark.parametrize("targets", ["attention", "mlp", ("attention", "mlp"), "all-linear"], ids=str)
def test_torchs_encoder_acts_alike_in_training_in_eval_and_without_gradients(targets):
    """In eval it reads weights in one fused call, and packs padded rows; what hangs in it must act all the same."""
    before = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 2)
    before = drawn(before).requires_grad_(False)
    model, x = copy.deepcopy(before), numbers(2, 5, 8)()
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 3:] = True
    peftkit.inject(model, SeriesAdapterConfig(bottleneck=3, targets=targets))
    assert torch.equal(model.train()(x), before.train()(x))
    draw(model)
    found = model(x, src_key_padding_mask=mask)[~mask]
    torch.testing.assert_close(model.eval()(x, src_key_padding_mask=mask)[~mask], found)
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=mask)[~mask], found)
        plain = before.eval()(x, src_key_padding_mask=mask)
        assert not torch.allclose(found, plain[~mask])
        with peftkit.disabled(model):
            assert torch.equal(model(x, src_key_padding_mask=mask), plain)


@pytest.mark.parametrize("make", [lambda: llama(1), lambda: bert()], ids=["llama", "bert"])
def test_compiles_as_one_graph(make):
    model = make()
    for i, cls in enumerate((*CLASSES, *CLASSES)):
        peftkit.inject(model, cls(bottleneck=2, scale=4.0, targets=("attention", "mlp")), name=f"{cls.method}{i}")
        draw(model, f"{cls.method}{i}", seed=i)
    peftkit.activate(model, *peftkit.adapters(model))
    expected = output(model, ids())
    torch.testing.assert_close(output(torch.compile(model, fullgraph=True, backend="aot_eager"), ids()), expected)


def test_inductor_keeps_the_scale():
    model, x = stack()[0], numbers(2, 5, 8)()
    peftkit.inject(model, SeriesAdapterConfig(bottleneck=2, activation="tanh", scale=4.0, targets="mlp"))
    peftkit.inject(model, ParallelAdapterConfig(bottleneck=2, scale="learned", targets="mlp.0"), name="beside")
    for name in ("default", "beside"):
        peftkit.activate(model, name)
        draw(model, name)
    peftkit.activate(model, "default", "beside")
    torch.testing.assert_close(torch.compile(model.mlp, fullgraph=True)(x), model.mlp(x), rtol=1e-4, atol=1e-5)


@placed
def test_gradient_checkpointing_gives_the_same_gradients(cls, targets):
    model = adapted(llama(), cls, targets)
    model.config._attn_implementation = "eager"
    plain = gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert all(torch.allclose(a, b) for a, b in zip(plain, gradients(model.train()), strict=True))
    layer, x = adapted(stack()[0], cls, "mlp" if targets != "all-linear" else ["mlp.0"]), numbers(2, 5, 8)()
    torch.testing.assert_close(checkpoint(layer, x, use_reentrant=False), layer(x))


def gradients(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    output(model, ids()).square().mean().backward()
    return [p.grad.clone() for p in peftkit.parameters(model)]


@pytest.mark.parametrize("make", [llama, gpt2], ids=lambda m: m.__name__)
@placed
def test_generation_with_a_cache_is_generation_without(cls, targets, make):
    model = adapted(make(), cls, targets)
    kwargs = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    kwargs |= {"return_dict_in_generate": True, "output_logits": True}
    cached, whole = (model.generate(ids(), use_cache=use, **kwargs) for use in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), rtol=1e-4, atol=1e-4)
    with peftkit.disabled(model):
        assert not torch.allclose(torch.stack(model.generate(ids(), **kwargs).logits), torch.stack(whole.logits))


@placed
def test_autocast_and_half_precision_keep_the_bases_dtypes(cls, targets):
    model = adapted(llama(1).bfloat16(), cls, targets)
    assert all(p.dtype == torch.float32 for p in peftkit.parameters(model))
    assert output(model, ids()).dtype == torch.bfloat16
    peftkit.eject(model)
    model = adapted(llama(1), cls, targets)
    exact = output(model, ids())
    with torch.autocast("cpu", torch.bfloat16):
        found = output(model, ids())
    assert float((found.float() - exact).detach().norm() / exact.detach().norm()) < 0.05
    peftkit.eject(model)
    peftkit.inject(model, cls(bottleneck=2, dtype=torch.bfloat16, targets=targets))
    assert all(p.dtype == torch.bfloat16 for p in peftkit.parameters(model))


@placed
def test_copies_and_pickles_are_their_own(cls, targets):
    model = adapted(bert(), cls, targets, scale="learned")
    found = evaluated(model, ids())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(evaluated(other, ids()), found)
        with torch.no_grad():
            for p in peftkit.parameters(other):
                p.zero_()
        assert not torch.equal(evaluated(other, ids()), found)
        peftkit.eject(other)
    assert torch.equal(evaluated(model, ids()), found)


def test_a_model_on_the_meta_device_gets_its_values_later():
    with torch.device("meta"):
        model = Layer(nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)))
    peftkit.inject(model, SeriesAdapterConfig(bottleneck=2))
    assert all(p.is_meta for p in peftkit.parameters(model))
    model.to_empty(device="cpu")
    drawn(model)
    peftkit.reset(model)
    assert not model.mlp.peftkit.default.up.any() and model.mlp.peftkit.default.down.any()


# -- beside others --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaving", ["lora", "beside", "after"])
@pytest.mark.parametrize(
    "order", [("lora", "beside", "after"), ("after", "beside", "lora"), ("beside", "lora", "after")]
)
def test_with_lora_in_the_same_block_in_any_order(order, leaving):
    configs = {
        "lora": LoRAConfig(r=2, targets=("attention", "mlp")),
        "beside": ParallelAdapterConfig.he(bottleneck=2),
        "after": SeriesAdapterConfig.houlsby(bottleneck=2),
    }
    found = []
    for names in (order, tuple(configs)):
        model = llama().double()
        for name in names:
            peftkit.inject(model, configs[name], name=name)
        for i, name in enumerate(configs):
            peftkit.activate(model, name)
            draw(model, name, seed=i)
        peftkit.activate(model, *names)
        found.append([evaluated(model, ids())])
        peftkit.eject(model, leaving)
        found[-1].append(evaluated(model, ids()))
        peftkit.eject(model)
        found[-1].append(evaluated(model, ids()))
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-9)
    assert torch.equal(found[0][2], evaluated(llama().double(), ids()))
    assert not torch.allclose(found[0][0], found[0][1])


@every
def test_merging_is_refused_with_the_reason_and_lora_beside_it_merges(cls):
    model = adapted(llama(), cls, "mlp")
    with pytest.raises(NotMergeable, match="nonlinearity .tanh. lies between"):
        peftkit.merge(model)
    peftkit.inject(model, LoRAConfig(r=2, targets="mlp"), name="lora")
    draw(model, "lora")
    peftkit.activate(model, "default", "lora")
    found = evaluated(model, ids())
    peftkit.merge(model, "lora")
    torch.testing.assert_close(evaluated(model, ids()), found, rtol=1e-4, atol=1e-4)


def test_no_order_of_numbered_sub_layers_is_needed():
    model, x = drawn(Numbered()), numbers(2, 5, 8)()
    before = evaluated(model, x)
    for cls in CLASSES:
        assert len(peftkit.inject(model, cls(bottleneck=2, targets=("attention", "mlp"))).sites) == 4
        assert torch.equal(evaluated(model, x), before)
        draw(model)
        assert not torch.allclose(evaluated(model, x), before)
        peftkit.eject(model)


# -- files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2.5, "learned"])
@every
def test_a_file_that_another_program_wrote_again_means_the_same(cls, scale, tmp_path):
    model = adapted(llama(), cls, ["mlp", "self_attn"], scale=scale)
    peftkit.save(model, tmp_path / "a")
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as file:
        keys = {k.partition("layers.0.mlp.")[2] for k in file.keys()} - {""}  # noqa: SIM118
    expected = {f"adapter_{n}.{kind}" for n in ("down", "up") for kind in ("weight", "bias")}
    assert keys == expected | ({"adapter_scale"} if scale == "learned" else set())
    rewrite(tmp_path / "a", tensors_of(tmp_path / "a"))
    other = llama()
    peftkit.load(other, tmp_path / "a")
    assert torch.equal(evaluated(other, ids()), evaluated(model, ids()))


@every
def test_another_base_is_noticed_by_what_lies_in_a_block(cls, tmp_path):
    peftkit.save(adapted(llama(), cls, "mlp"), tmp_path / "a")
    assert "peft reads" not in (tmp_path / "a" / "README.md").read_text()
    other = llama()
    with torch.no_grad():
        other.model.layers[1].mlp.gate_proj.weight.neg_()
    with pytest.raises(StorageError, match="another base"):
        peftkit.load(other, tmp_path / "a")
    assert peftkit.adapters(other) == {}


# -- mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bottleneck": 0}, "integer of at least 1, not 0"),
        ({"bottleneck": True}, "not True"),
        ({"bottleneck": 2.5}, "not 2.5"),
        ({"bottleneck": {"a": -1}}, "not -1"),
        ({"reduction": 0}, "reduction: an integer"),
        ({"bottleneck": 2, "reduction": 2}, "give one of them"),
        ({"activation": "rellu"}, "did you mean 'relu'"),
        ({"activation": "ReLU"}, "did you mean 'relu'"),
        ({"activation": None}, "known are"),
        ({"init": "brt"}, "did you mean 'bert'"),
        ({"scale": 0}, "scale: a finite number other than 0"),
        ({"scale": float("nan")}, "nan"),
        ({"scale": "learnt"}, "'learned'"),
        ({"dropout": 1.0}, "dropout: a probability"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"dtype": torch.int8}, "floating-point"),
        ({"size": 0}, "size: a positive"),
        ({"size": (1, 2, 3)}, "size: a positive"),
    ],
    ids=str,
)
@every
def test_settings_that_make_no_sense(cls, kwargs, message):
    with pytest.raises(ValueError, match=message):
        cls(**kwargs)


@pytest.mark.parametrize(
    ("make", "cls", "kwargs", "message"),
    [
        (llama, SeriesAdapterConfig, {"bottleneck": 17}, "bottleneck=17 at 'model.layers.0.mlp' is wider than the 16"),
        (llama, ParallelAdapterConfig, {"bottleneck": 25, "targets": "down_proj"}, "wider than the 24"),
        (llama, SeriesAdapterConfig, {}, "bottleneck=64 .* wider"),
        (llama, SeriesAdapterConfig, {"bottleneck": {"no_such": 2, "*": 2}}, "'no_such' matches none"),
        (llama, SeriesAdapterConfig, {"bottleneck": 2, "size": {"no_such": 2}}, "'no_such' matches none"),
        (llama, SeriesAdapterConfig, {"bottleneck": 2, "targets": "layers"}, "it is a ModuleList, which computes nothing"),
        (llama, SeriesAdapterConfig, {"bottleneck": 2, "targets": "mlp.act_fn"}, r"give size=\{'model.layers.0.mlp.act_fn'"),
        (convolutions, SeriesAdapterConfig, {"bottleneck": 2, "targets": "0"}, "it is a convolution"),
        (convolutions, SeriesAdapterConfig, {"bottleneck": 2}, "'?mlp'?, the default, matches no module"),
        (encoder, ParallelAdapterConfig, {"bottleneck": 2}, "feed-forward of 'layers.0', but it is no module of its own"),
        (encoder, SeriesAdapterConfig, {"bottleneck": 2, "targets": "out_proj"}, "reads the weight"),
    ],
)  # fmt: skip
def test_places_that_make_no_sense_leave_the_model_as_it_was(make, cls, kwargs, message):
    model = make()
    classes, flags = [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        peftkit.inject(model, cls(**kwargs))
    assert peftkit.adapters(model) == {} and classes == [type(m) for m in model.modules()]
    assert flags == [p.requires_grad for p in model.parameters()]


def test_a_size_that_is_given_is_taken():
    model, x = nn.Sequential(nn.Linear(6, 8), nn.GELU()), numbers(3, 6)()
    for cls in CLASSES:
        peftkit.inject(model, cls(bottleneck=2, targets="1", size={"1": 8}))
        draw(model)
        assert not torch.allclose(model(x), nn.GELU()(model[0](x)))
        peftkit.eject(model)
    peftkit.inject(model, SeriesAdapterConfig(bottleneck=2, targets="1", size=(7, 7)))
    with pytest.raises(ValueError, match="last dimension of 7, not for .3, 8.*size="):
        model(x)


def test_what_gives_no_tensor_or_another_shape_is_told():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return {"y": self.fc(x)} if x.dim() == 2 else self.fc(x).mean(1)

    model = nn.Sequential(Named())
    peftkit.inject(model, ParallelAdapterConfig(bottleneck=2, targets="0"))
    with pytest.raises(TypeError, match="returns a dict"):
        model(torch.randn(3, 8))
    with pytest.raises(ValueError, match="keeps all but the last dimension"):
        model(torch.randn(3, 5, 8))
    with pytest.raises(TargetError, match="it is an Embedding"):
        peftkit.inject(nn.Sequential(nn.Embedding(5, 6)), ParallelAdapterConfig(bottleneck=2, targets="0"))
