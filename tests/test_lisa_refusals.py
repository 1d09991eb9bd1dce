"""What LISA refuses, and what it notices."""

from __future__ import annotations

import pytest
import torch
from schedule_models import ADAM, backward, bits, changed, llama, train
from torch import nn

import peftkit
from peftkit import LISA, LoRAConfig
from peftkit.targets import TargetError


def test_bad_settings():
    model = llama()
    optimizer = ADAM(model.parameters())
    for settings_, error, message in [
        ({"active_layers": 7}, ValueError, r"active_layers=7, and the model has 6 blocks \(model.layers.0 first\)"),
        ({"active_layers": -1}, ValueError, "active_layers is a whole number of at least 0, not -1"),
        ({"active_layers": 1.5}, ValueError, "active_layers is a whole number"),
        ({"active_layers": True}, ValueError, "active_layers is a whole number"),
        ({"interval": 0}, ValueError, "interval is a whole number of at least 1, not 0"),
        ({"seed": -3}, ValueError, "seed is a whole number of at least 0"),
        ({"weights": [1, 2]}, ValueError, "one for each of the 6 blocks, not 2"),
        ({"weights": [1, 2, 3, 4, 5, -1]}, ValueError, "not negative"),
        ({"weights": [1, 2, 3, 4, 5, float("nan")]}, ValueError, "not negative"),
        ({"weights": [1, 0, 0, 0, 0, 0]}, ValueError, "1 are above 0, and active_layers=2"),
        ({"weights": 5}, ValueError, "weights: a number for each block, not 5"),
        (
            {"weights": [1, 0], "blocks": ["layers.3", "layers.1"], "active_layers": 1},
            ValueError,
            r"the model's order of blocks, \['model.layers.1', 'model.layers.3'\]",
        ),
        ({"blocks": "layer.*"}, TargetError, r"'layer.\*' matches no module"),
        ({"blocks": [nn.Linear(2, 2)]}, TargetError, "no module of the model"),
        (
            {"blocks": ["model.layers.0", "model.layers.0.mlp"]},
            TargetError,
            "'model.layers.0.mlp' lies in 'model.layers.0'",
        ),
        ({"blocks": []}, TargetError, "nothing was given"),
    ]:
        with pytest.raises(error, match=message):
            LISA(model, optimizer, **settings_)  # type: ignore[arg-type]
        assert all(p.requires_grad for p in model.parameters()) and not optimizer._optimizer_step_pre_hooks


def test_an_optimizer_that_lacks_parameters_is_refused():
    model = llama()
    some = [p for n, p in model.named_parameters() if "layers.3" not in n]
    with pytest.raises(
        ValueError, match=r"lacks 9 of them, such as 'model.layers.3.self_attn.q_proj.weight'.*AdamW\(model.para"
    ):
        LISA(model, ADAM(some))
    peftkit.inject(model, LoRAConfig(r=2))
    with pytest.raises(ValueError, match="lacks 57 of them"):
        LISA(model, ADAM(peftkit.parameters(model)))
    with pytest.raises(TypeError, match="a torch.optim.Optimizer, not Linear"):
        LISA(model, nn.Linear(2, 2))
    with pytest.raises(TypeError, match="LBFGS keeps one state"):
        LISA(model, torch.optim.LBFGS(model.parameters()))


def test_what_cannot_train_is_refused():
    model = llama()
    model.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"no base parameter of this LlamaForCausalLM is trainable.*requires_grad_\(True\)"
    ):
        LISA(model, ADAM(model.parameters()))
    model.requires_grad_(True).model.layers[2].requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter of 'model.layers.2' is trainable"):
        LISA(model, ADAM(model.parameters()))
    model.requires_grad_(True)
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj is quantised"):
        LISA(model, ADAM(model.parameters()))


def test_what_somebody_else_changes_is_noticed():
    model = llama()
    optimizer = ADAM(model.parameters())
    lisa = LISA(model, optimizer, interval=2)
    train(model, optimizer, range(1), lisa)
    model.requires_grad_(True)
    backward(model, 0)
    before = bits(model)
    with pytest.raises(RuntimeError, match=r"'model.layers.0.* was turned on by something else since LISA switched"):
        optimizer.step()
    assert changed(before, model) == set()  # noticed before anything was trained
    with pytest.raises(RuntimeError, match="turned on by something else"):
        lisa.step()
    lisa.close()
    lisa = LISA(model, optimizer, interval=2)
    peftkit.inject(model, LoRAConfig(r=2))
    with pytest.raises(RuntimeError, match="turned off by something else"):
        lisa.step()
    peftkit.eject(model)
    lisa.close()
    lisa = LISA(model, optimizer, interval=2)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(RuntimeError, match="'lm_head.weight' is another parameter"):
        lisa.step()


def test_weights_that_are_quantised_in_other_ways_are_refused():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = llama()
    quantize_(model.model.layers, Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj is quantised"):
        LISA(model, ADAM(model.parameters()))

    class Packed(nn.Module):  # as GPTQ and AWQ do it
        def __init__(self) -> None:
            super().__init__()
            self.in_features = self.out_features = 16
            self.register_buffer("qweight", torch.zeros(16, 2, dtype=torch.int32))

    model = llama()
    model.model.layers[1].self_attn.q_proj = Packed()
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.q_proj is quantised"):
        LISA(model, ADAM(model.parameters()))
    with pytest.raises(ValueError, match="q_proj' is quantised"):
        peftkit.MeanWeightNorms(model).update()
    model = llama()
    model.model.layers[1].self_attn.q_proj.requires_grad_(False)  # frozen by the user, and left so
    assert "model.layers.1.self_attn.q_proj.weight" not in LISA(model, ADAM(model.parameters()), 6).trained
