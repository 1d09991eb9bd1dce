"""Every kind of host computes with a pair what an fp64 reference, written out here, says it should."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import peftkit
from peftkit import LoRAConfig
from peftkit.testing import models
from peftkit.testing.models import drawn, numbers

S = 1.5  # alpha / r of every adapter below


def plain(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return b @ a


def transposed(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("or,ri->io", b, a)


def convolved(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Written by loops over output channels, so that it shares nothing with the code."""
    groups = a.shape[0] // b.shape[1]
    out, per_out, per_r = b.shape[0], b.shape[0] // groups, a.shape[0] // groups
    delta = torch.zeros_like(w)
    for o in range(out):
        g = o // per_out
        for j in range(per_r):
            delta[o] += b[o, j].reshape(()) * a[g * per_r + j]
    return delta


@dataclass(frozen=True)
class Kind:
    """A model of one adapted weight: `site` as peftkit names it, `weight` the parameter's name."""

    name: str
    make: Callable[[], nn.Module]
    x: Callable[[], Any]
    site: str
    weight: str
    delta: Callable[[Tensor, Tensor, Tensor], Tensor] = plain
    r: int = 2

    def __str__(self) -> str:
        return self.name

    @property
    def adapter(self) -> str:
        """The path of the adapter called default."""
        path, _, last = self.weight.rpartition(".")
        part = "" if last == "weight" else f":{last.removesuffix('_weight')}"
        return f"{path}.peftkit.NAME{part}"


class Scaled(nn.Embedding):
    """Gemma's."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class Own(nn.Linear):
    """A subclass with a forward of its own, that computes with weight and bias."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", input, self.weight) + self.bias


def conv1d_of_gpt2() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(7, 5)


def tokens() -> Tensor:
    return torch.tensor([[1, 2, 0], [5, 2, 8]])


def one(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: drawn(nn.Sequential(make(), nn.Tanh()))


class Attend(nn.Module):
    def __init__(self, kdim: int | None = None, weights: bool = False, **kwargs: Any):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=kdim and kdim - 1, **kwargs)
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        key = x if self.attn.kdim == 8 else x[..., : self.attn.kdim]
        value = x if self.attn.vdim == 8 else x[..., : self.attn.vdim]
        y, w = self.attn(x, key, value, need_weights=self.weights)
        return y if w is None else torch.cat([y.flatten(), w.flatten()])


def attend(site: str, weight: str | None = None, **kwargs: Any) -> Kind:
    name = f"attention-{site}-" + "-".join(f"{k}={v}" for k, v in kwargs.items())
    return Kind(
        name, lambda: drawn(Attend(**kwargs)), numbers(3, 4, 8), f"attn.{site}", f"attn.{weight or site + '_weight'}"
    )


def layer(**kwargs: Any) -> nn.Module:
    return drawn(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, **({"batch_first": True} | kwargs)))


def encoder_layer(site: str, weight: str, **kwargs: Any) -> Kind:
    name = f"encoder-layer-{site}-" + "-".join(f"{k}={v}" for k, v in kwargs.items())
    return Kind(name, lambda: layer(**kwargs), numbers(3, 4, 8), site, weight)


KINDS = (
    Kind("linear", one(lambda: nn.Linear(5, 7)), numbers(2, 3, 5), "0", "0.weight"),
    Kind("linear-without-bias", one(lambda: nn.Linear(5, 7, bias=False)), numbers(3, 5), "0", "0.weight"),
    Kind("subclass", one(lambda: Own(5, 7)), numbers(3, 5), "0", "0.weight"),
    Kind("gpt2-conv1d", one(conv1d_of_gpt2), numbers(3, 5), "0", "0.weight", transposed),
    Kind("embedding", one(lambda: nn.Embedding(9, 4, padding_idx=0)), tokens, "0", "0.weight", transposed),
    Kind("scaled-embedding", one(lambda: Scaled(9, 4)), tokens, "0", "0.weight", transposed),
    Kind("conv1d", one(lambda: nn.Conv1d(3, 4, 3, padding=1)), numbers(2, 3, 8), "0", "0.weight", convolved),
    Kind("conv1d-unbatched", one(lambda: nn.Conv1d(3, 4, 3)), numbers(3, 8), "0", "0.weight", convolved),
    Kind("conv2d", one(lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), groups=2)), numbers(2, 4, 7, 6), "0", "0.weight",
         convolved),
    Kind("conv2d-depthwise", one(lambda: nn.Conv2d(4, 4, 3, groups=4, padding="same", dilation=2)), numbers(2, 4, 7, 6),
         "0", "0.weight", convolved, r=4),
    Kind("conv3d", one(lambda: nn.Conv3d(2, 3, 2, padding=1, padding_mode="circular")), numbers(1, 2, 3, 4, 3), "0",
         "0.weight", convolved),
    attend("in_proj"), attend("in_proj", batch_first=True, weights=True), attend("in_proj", bias=False),
    attend("in_proj", add_bias_kv=True, add_zero_attn=True),
    *(attend(f"{part}_proj", kdim=6, batch_first=True) for part in "qkv"),
    attend("out_proj", "out_proj.weight"), attend("out_proj", "out_proj.weight", batch_first=True),
    encoder_layer("linear1", "linear1.weight"), encoder_layer("linear2", "linear2.weight", norm_first=True),
    encoder_layer("self_attn.in_proj", "self_attn.in_proj_weight"),
    encoder_layer("out_proj", "self_attn.out_proj.weight", activation="gelu"),
    encoder_layer("linear1", "linear1.weight", batch_first=False),
)  # fmt: skip
each = pytest.mark.parametrize("kind", KINDS, ids=str)


def inject(model: nn.Module, kind: Kind, name: str = "default", seed: int = 7) -> tuple[Tensor, Tensor]:
    """Attach, draw A and B, and return them in fp64."""
    peftkit.inject(model, LoRAConfig(r=kind.r, alpha=S * kind.r, targets=kind.site), name=name)
    adapter = model.get_submodule(kind.adapter.replace("NAME", name))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (adapter.lora_A, adapter.lora_B):
            p.copy_(torch.randn(p.shape, generator=g) * 0.4)
        if kind.name == "embedding":
            adapter.lora_A[:, 0] = 0  # the row of padding is never trained, so it stays where it starts
    return adapter.lora_A.detach().double(), adapter.lora_B.detach().double()


def expected(kind: Kind, x: Tensor, *pairs: tuple[Tensor, Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    """The plain model, rounded to `dtype`, in fp64 with the deltas added to its weight."""
    model = kind.make().to(dtype).double()
    with torch.no_grad():
        weight = model.get_parameter(kind.weight)
        weight.data += sum(S * kind.delta(weight.data, a, b) for a, b in pairs)
        return model(x.to(dtype).double() if x.is_floating_point() else x).detach()


@each
def test_attaching_changes_no_bit_and_adds_no_key_to_the_base(kind):
    # frozen, as the base will be: torch takes other kernels where a weight is trained
    model, x = kind.make().requires_grad_(False), kind.x()
    before, keys = models.evaluated(model, x), dict(model.state_dict())
    peftkit.inject(model, LoRAConfig(r=kind.r, targets=kind.site))
    assert torch.equal(models.evaluated(model, x), before)
    after = model.state_dict()
    assert {k for k in after if ".peftkit." not in k} == set(keys)
    assert all(torch.equal(after[k], keys[k]) for k in keys)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@each
def test_forward_is_the_fp64_reference(kind, grad, train):
    model, x = kind.make().double().train(train), kind.x()
    x = x.double() if x.is_floating_point() else x
    pair = inject(model, kind)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(x).detach(), expected(kind, x, pair), rtol=1e-10, atol=1e-10)


@each
def test_several_adapters_sum_and_each_can_act_alone(kind):
    model, x = kind.make().double(), kind.x()
    x = x.double() if x.is_floating_point() else x
    first, second = inject(model, kind, "one", 1), inject(model, kind, "two", 2)
    for names, pairs in {("one",): [first], ("two",): [second], ("one", "two"): [first, second], (): []}.items():
        with torch.no_grad(), peftkit.using(model, *names):
            want = expected(kind, x, *pairs) if pairs else kind.make().double()(x)
            torch.testing.assert_close(model(x), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("train", [False, True])
@each
def test_gradients_are_the_reference_s_and_reach_a_and_b_alone(kind, train):
    model, x = kind.make().double().train(train), kind.x()
    x = x.double() if x.is_floating_point() else x
    a, b = inject(model, kind)
    model(x).square().sum().backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    plain_model = kind.make().double()
    weight = plain_model.get_parameter(kind.weight).detach().clone()
    a.requires_grad_(), b.requires_grad_()
    y = torch.func.functional_call(plain_model.train(), {kind.weight: weight + S * kind.delta(weight, a, b)}, (x,))
    want = torch.autograd.grad(y.square().sum(), (a, b))
    path = kind.adapter.replace("NAME", "default")
    assert set(got) == {f"{path}.lora_A", f"{path}.lora_B"}
    torch.testing.assert_close(got[f"{path}.lora_A"], want[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got[f"{path}.lora_B"], want[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each
def test_merging_is_forward_and_undone_to_the_bit(kind, dtype):
    model, x = kind.make().to(dtype), kind.x()
    x = x.to(dtype) if x.is_floating_point() else x
    classes = {n: type(m) for n, m in model.named_modules()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    dicts = {n: set(m.__dict__) for n, m in model.named_modules()}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    pair = inject(model, kind)
    want = expected(kind, x, pair, dtype=dtype)
    with torch.no_grad():
        apart = model(x)
        peftkit.merge(model)
        merged = model(x)
        plainly = copy.deepcopy(kind.make().to(dtype))
        weight = plainly.get_parameter(kind.weight)
        weight += (S * kind.delta(weight.double(), *pair)).to(dtype)
        error = (plainly(x).double() - want).abs().max()
    floor = torch.finfo(dtype).eps * want.abs().max()
    for y in (apart, merged):
        assert (y.double() - want).abs().max() <= 2 * error + floor
    peftkit.unmerge(model)
    with torch.no_grad():
        assert torch.equal(model(x), apart)
    peftkit.eject(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == dicts
    after = model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert set(after) == set(before)


@settings(max_examples=60, deadline=None)
@given(
    dim=st.integers(1, 3), groups=st.integers(1, 3), wide=st.integers(1, 2), out=st.integers(1, 2), k=st.integers(1, 3),
    stride=st.integers(1, 2), dilation=st.integers(1, 2), padding=st.sampled_from([0, 1, 2, "same", "valid"]),
    mode=st.sampled_from(["zeros", "circular", "reflect", "replicate"]), last=st.booleans(),
)  # fmt: skip
def test_convolutions_of_any_shape(dim, groups, wide, out, k, stride, dilation, padding, mode, last):
    assume(not (padding == "same" and stride > 1))
    assume(mode == "zeros" or not isinstance(padding, int) or padding > 0)
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
    size = (4, 5, 6)[:dim]
    shape = {"stride": stride, "dilation": dilation, "padding": padding, "padding_mode": mode, "groups": groups}
    kind = Kind(
        "conv", one(lambda: cls(groups * wide, groups * out, k, **shape)), numbers(2, groups * wide, *size), "0",
        "0.weight", convolved, r=groups,
    )  # fmt: skip
    x = kind.x().double()
    try:
        kind.make().double()(x)
    except RuntimeError:
        assume(False)  # the kernel does not fit
    model = kind.make().double()
    if last and dim > 1:
        model = model.to(memory_format=torch.channels_last if dim == 2 else torch.channels_last_3d)
    pair = inject(model, kind)
    want = expected(kind, x, pair)
    with torch.no_grad():
        torch.testing.assert_close(model(x), want, rtol=1e-10, atol=1e-10)
        peftkit.merge(model)
        torch.testing.assert_close(model(x), want, rtol=1e-10, atol=1e-10)


def test_a_rank_that_groups_do_not_divide_is_refused():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="r=3 at '0' is no multiple of its 2 groups"):
        peftkit.inject(model, LoRAConfig(r=3, targets="0"))


@pytest.mark.parametrize("fan_in", [False, True])
def test_row_blocks_of_unequal_size_adapt_these_rows_alone(fan_in):
    """A fused qkv of grouped-query attention: q 6 rows, k and v 2 each; q and v are adapted."""
    make = one(lambda: conv1d_of_gpt2() if fan_in else nn.Linear(5, 7))
    model, x = make().double(), numbers(3, 5)().double()
    blocks = ((0, 3), (5, 7))
    peftkit.inject(model, LoRAConfig(r=2, alpha=2 * S, targets="0", rows={"0": blocks}))
    adapter = model.get_submodule("0.peftkit.default")
    assert (adapter.lora_A.shape, adapter.lora_B.shape) == ((4, 5), (5, 2))
    with torch.no_grad():
        adapter.lora_B.normal_()
    a, b = adapter.lora_A.detach(), adapter.lora_B.detach()
    delta = torch.zeros(7, 5, dtype=torch.float64)
    delta[0:3] = S * b[:3] @ a[:2]
    delta[5:7] = S * b[3:] @ a[2:]
    plainly = make().double()
    plainly[0].weight.data += delta.t() if fan_in else delta
    torch.testing.assert_close(model(x), plainly(x))
    peftkit.merge(model)
    torch.testing.assert_close(model[0].weight, plainly[0].weight)


def fast_paths(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, int]:
    """The output, and how often torch's fused encoder layer computed it."""
    real = torch._transformer_encoder_layer_fwd
    with mock.patch.object(torch, "_transformer_encoder_layer_fwd", side_effect=real) as spy, torch.no_grad():
        return model(*args, **kwargs), spy.call_count


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("target", ["linear1", "linear2", "self_attn", "out_proj"])
def test_the_fast_path_of_an_encoder_with_padding_reads_the_adapters(target, nested):
    make = lambda: drawn(  # noqa: E731
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2, enable_nested_tensor=nested)
    )
    model, x = make(), numbers(2, 4, 8)()
    padding = torch.tensor([[False] * 4, [False, False, True, True]])
    before, count = fast_paths(model, x, src_key_padding_mask=padding)
    assert count == 2
    peftkit.inject(model, LoRAConfig(r=2, targets=target))
    again, count = fast_paths(model, x, src_key_padding_mask=padding)
    assert torch.equal(again, before)
    assert count == 2
    with torch.no_grad():
        for p in peftkit.parameters(model):
            p.normal_(std=0.3)
    apart, _ = fast_paths(model, x, src_key_padding_mask=padding)
    with_grad = model(x, src_key_padding_mask=padding)
    peftkit.merge(model)
    merged, _ = fast_paths(model, x, src_key_padding_mask=padding)
    assert not torch.allclose(apart, before)
    torch.testing.assert_close(apart, merged, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(with_grad[~padding], merged[~padding], rtol=1e-4, atol=1e-5)
    peftkit.unmerge(model)
    with peftkit.disabled(model):
        assert torch.equal(fast_paths(model, x, src_key_padding_mask=padding)[0], before)
    model.use_nested_tensor = False
    peftkit.eject(model)
    assert model.use_nested_tensor is False


def test_what_a_subclass_of_attention_notes_down_stays():
    class Noting(nn.MultiheadAttention):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
            y, self.last = super().forward(query, key, value, **kwargs)
            return y, self.last

    model, x = drawn(Noting(8, 2)), numbers(3, 2, 8)()
    peftkit.inject(nn.ModuleList([model]), LoRAConfig(r=2, targets="0"))
    _, weights = model(x, x, x)
    assert model.last is weights


@pytest.mark.parametrize("make", [models.encoder, lambda: drawn(Attend(batch_first=True))])
def test_threads_that_read_weights_do_not_see_each_other(make):
    model, x = make(), numbers(2, 4, 8)()
    target = "attn" if isinstance(model, Attend) else ["self_attn", "linear1"]
    for name in ("one", "two"):
        peftkit.inject(model, LoRAConfig(r=2, targets=target), name=name)
        with torch.no_grad():
            for p in peftkit.parameters(model, name):
                p.normal_(std=0.3)
    wants, wrong = {}, []
    with torch.no_grad():
        for names in ((), ("one",), ("two",)):
            with peftkit.using(model, *names):
                wants[names] = model(x)

    def work(names: tuple[str, ...]) -> None:
        with torch.no_grad(), peftkit.using(model, *names):
            wrong.extend(1 for _ in range(30) if not torch.equal(model(x), wants[names]))

    threads = [threading.Thread(target=work, args=(names,)) for names in wants for _ in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


PEFT = (
    "linear",
    "gpt2-conv1d",
    "embedding",
    "scaled-embedding",
    "conv1d",
)  # it pads A with zeros whatever padding_mode says


@pytest.mark.parametrize(
    "kind", [k for k in KINDS if k.name in PEFT or k.name.startswith("attention-in_proj-b")], ids=str
)
def test_peft_computes_the_same(kind, tmp_path):
    peft = pytest.importorskip("peft")
    model, x = kind.make(), kind.x()
    inject(model, kind)
    peftkit.save(model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(kind.make(), str(tmp_path / "a")).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-5)


def grouped() -> nn.Module:
    return drawn(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, padding=1), nn.Tanh()))


def test_a_grouped_convolution_s_adapter_goes_to_peft_and_back(tmp_path):
    peft = pytest.importorskip("peft")
    kind = Kind("conv", grouped, numbers(2, 4, 5, 5), "0", "0.weight", convolved)
    model, x = grouped(), kind.x()
    inject(model, kind)
    peftkit.save(model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(grouped(), str(tmp_path / "a")).eval()
    back = grouped()
    peftkit.load(back, tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), model(x))
        assert torch.equal(back(x), model(x))
        peftkit.merge(back)
        torch.testing.assert_close(back(x), model(x))


def test_an_adapter_that_peft_trained_across_groups_computes_but_is_not_merged(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(grouped(), peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)).eval()
    theirs.save_pretrained(str(tmp_path / "a"))
    model, x = grouped(), numbers(2, 4, 5, 5)()
    peftkit.load(model, tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x))
    with pytest.raises(ValueError, match="'0' cannot be merged: its A, as peft trains it, crosses the 2 groups"):
        peftkit.merge(model)
