"""Any order of verbs keeps the laws: after every step the model computes what a plain formula says it should."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import peftkit
from peftkit import LoRAConfig

NAMES = ("a", "b", "c")
name_st = st.sampled_from(NAMES)


class Net(nn.Module):
    """Two Linears, one of them behind a hook, and an embedding tied to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.embed(ids))))


def expected(base: nn.Module, deltas: dict[str, dict[str, Tensor]], acting: tuple[str, ...], ids: Tensor) -> Tensor:
    """The formula, in fp64 and by dense matrices, with nothing of the library in it."""

    def weight(layer: str) -> Tensor:
        return base.get_submodule(layer).weight.double() + sum(deltas[n].get(layer, 0) for n in acting)

    x = F.embedding(ids, weight("embed"))
    x = torch.tanh(F.linear(x, weight("up"), base.up.bias.double()))
    return F.linear(x, weight("down"), base.down.bias.double())


class Verbs(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 3), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def begin(self, seed, dtype):
        torch.manual_seed(seed)
        self.base = Net().to(dtype).requires_grad_(True)
        self.base.embed.weight.requires_grad_(False)
        self.flags = {k: p.requires_grad for k, p in self.base.named_parameters()}
        self.model = copy.deepcopy(self.base)
        self.ids = torch.randint(0, 7, (2, 5))
        self.deltas: dict[str, dict[str, Tensor]] = {}
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.directory = Path(tempfile.mkdtemp())
        self.saved: dict[str, tuple[dict[str, Tensor], Tensor]] = {}
        self.calls = calls = []
        self.model.up.register_forward_hook(lambda *_: calls.append(1))

    def _read(self, name):
        """ΔW of each layer as the adapter's own tensors give it."""
        found = {}
        for layer in ("embed", "up", "down"):
            children = dict(self.model.get_submodule(layer).named_modules())
            adapter = children.get(f"peftkit.{name}")
            if adapter is not None:
                delta = adapter.scale * adapter.lora_B.detach().double() @ adapter.lora_A.detach().double()
                found[layer] = delta.T if layer == "embed" else delta
        self.deltas[name] = found

    @rule(name=name_st, r=st.integers(1, 4), alpha=st.sampled_from([None, 3.0]), layers=st.sampled_from(
        [("up",), ("down", "up"), ("embed",), ("embed", "up", "down")]), draw=st.integers(0, 99))  # fmt: skip
    def inject(self, name, r, alpha, layers, draw):
        config = LoRAConfig(r=r, alpha=alpha, targets=list(layers))
        if name in self.deltas or self.merged:
            with pytest.raises(ValueError):
                peftkit.inject(self.model, config, name=name)
            return
        before = peftkit.active(self.model)
        peftkit.inject(self.model, config, name=name)
        assert before == self.active
        g = torch.Generator().manual_seed(draw)
        with torch.no_grad():
            for p in peftkit.parameters(self.model, name):
                p.add_(0.2 * torch.randn(p.shape, generator=g))
        self._read(name)
        self.active = (name,)

    @rule(names=st.lists(name_st, unique=True, max_size=3))
    def activate(self, names):
        if not self.deltas or not set(names) <= set(self.deltas) or not set(self.merged) <= set(names):
            with pytest.raises((ValueError, KeyError)):
                peftkit.activate(self.model, *names)
        else:
            peftkit.activate(self.model, *names)
            self.active = tuple(names)

    @rule(names=st.lists(name_st, unique=True, max_size=3))
    def use(self, names):
        possible = self.deltas and set(names) <= set(self.deltas) and set(self.merged) <= set(names)
        if not possible:
            with pytest.raises((ValueError, KeyError)), peftkit.using(self.model, *names):
                pass
            return
        with peftkit.using(self.model, *names):
            self._agrees(tuple(names))

    @rule(names=st.lists(name_st, unique=True, max_size=2), keep=st.sampled_from([True, True, True, False]))
    def merge(self, names, keep):
        chosen = tuple(names) or self.active
        possible = chosen and set(chosen) <= set(self.active) and not set(chosen) & set(self.merged)
        if not possible or (self.merged and not keep):
            with pytest.raises((ValueError, KeyError)):
                peftkit.merge(self.model, *names, keep_base=keep)
            return
        if keep:
            peftkit.merge(self.model, *names)
            self.merged = (*self.merged, *chosen)
            return
        peftkit.merge(self.model, *names, keep_base=False)
        with torch.no_grad():  # the base is what it is now
            for layer in ("embed", "up", "down"):
                now = self.model.get_submodule(layer).weight
                wanted = self.base.get_submodule(layer).weight.double() + sum(
                    self.deltas[n].get(layer, 0) for n in chosen
                )
                assert torch.allclose(now.double(), wanted, rtol=2 * torch.finfo(now.dtype).eps, atol=1e-2 * 2**-7)
                self.base.get_submodule(layer).weight.copy_(now)
        for n in chosen:
            del self.deltas[n]
        self.active = tuple(n for n in self.active if n not in chosen)
        self.saved.clear()  # what was saved belongs to another base now

    @rule()
    def unmerge(self):
        if not self.merged:
            with pytest.raises(ValueError):
                peftkit.unmerge(self.model)
            return
        peftkit.unmerge(self.model)
        self.merged = ()

    @precondition(lambda self: self.deltas)
    @rule(name=name_st)
    def save(self, name):
        if name not in self.deltas:
            with pytest.raises(KeyError):
                peftkit.save(self.model, self.directory / name, name=name)
            return
        peftkit.save(self.model, self.directory / name, name=name)
        self.saved[name] = self.deltas[name]

    @rule(source=name_st, name=name_st, trainable=st.booleans())
    def load(self, source, name, trainable):
        if source not in self.saved or name in self.deltas or self.merged:
            with pytest.raises(ValueError):
                peftkit.load(self.model, self.directory / source if source in self.saved else "nowhere", name=name)
            return
        peftkit.load(self.model, self.directory / source, name=name, trainable=trainable)
        self._read(name)
        assert all(torch.equal(d, self.deltas[name][k]) for k, d in self.saved[source].items())
        self.active = (name,)

    @rule(names=st.lists(name_st, unique=True, max_size=2))
    def eject(self, names):
        chosen = names or list(self.deltas)
        if not self.deltas or not set(chosen) <= set(self.deltas) or set(chosen) & set(self.merged):
            with pytest.raises((ValueError, KeyError)):
                peftkit.eject(self.model, *names)
            return
        peftkit.eject(self.model, *names)
        for n in chosen:
            del self.deltas[n]
        self.active = tuple(n for n in self.active if n not in chosen)

    @rule()
    def copy(self):
        self.model = copy.deepcopy(self.model)

    @rule(name=name_st)
    def train(self, name):
        """One step of an optimizer that was given everything."""
        if name not in self.active or not any(p.requires_grad for p in self.model.parameters()):
            return
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.model(self.ids).float().square().mean().backward()
        optimizer.step()
        self.model.zero_grad()
        for n in self.deltas:
            before = self.deltas[n]
            self._read(n)
            if n not in self.active or n in self.merged:
                assert all(torch.equal(d, self.deltas[n][k]) for k, d in before.items())

    def _agrees(self, acting):
        exact = expected(self.base, self.deltas, acting, self.ids)
        with torch.no_grad():
            found = self.model(self.ids)
        eps = torch.finfo(found.dtype).eps
        assert torch.allclose(found.double(), exact, rtol=0, atol=24 * eps * float(exact.abs().max() + 1))

    @invariant()
    def laws(self):
        calls = len(self.calls)
        self._agrees(self.active)
        assert len(self.calls) == calls + 1  # the hook is where it was
        assert tuple(peftkit.adapters(self.model)) == tuple(self.deltas)
        assert set(peftkit.active(self.model)) == set(self.active)
        own, now = self.base.state_dict(), self.model.state_dict()
        assert set(own) <= set(now)
        if not self.merged:
            assert all(torch.equal(t, now[k]) for k, t in own.items())
        for k, p in self.model.named_parameters():
            if "peftkit" not in k:
                assert p.requires_grad == (self.flags[k] and not self.deltas)
            elif (
                k.split("peftkit.")[1].split(".")[0] not in self.active
                or k.split("peftkit.")[1].split(".")[0] in self.merged
            ):
                assert not p.requires_grad
        if not self.deltas:
            assert type(self.model.up) is nn.Linear and list(own) == list(now) and "_peftkit" not in vars(self.model)


TestVerbs = Verbs.TestCase
TestVerbs.settings = settings(
    max_examples=40, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
