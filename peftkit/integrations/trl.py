"""TRL: a reference model that is the policy with its adapters switched off, and trainers that keep adapters alone.

TRL knows a `PeftModel` and switches that off; of any other model it loads a second copy as the reference. `Reference` is
given in its place and holds no weights. TRL's trainers also compute log-probabilities from `lm_head.weight`, without
calling the head, so an adapter there would neither act nor learn; the trainers here refuse it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.sft_trainer import SFTTrainer
except ImportError as error:
    raise ImportError("peftkit.integrations.trl needs trl: pip install 'peftkit[trl]'") from error

import torch
from torch import nn

from peftkit import api, ledger
from peftkit.eval_mode import evaluating
from peftkit.holder import graft_of
from peftkit.integrations.base_weights import base_state
from peftkit.integrations.transformers import AdapterCheckpoints

if TYPE_CHECKING:
    from transformers import Trainer

    _Base = Trainer
else:
    _Base = object

__all__ = ["AdapterDPOTrainer", "AdapterSFTTrainer", "Reference"]


class Reference(nn.Module):
    """What a trainer takes for a reference model: the policy itself, in eval mode and with its adapters switched off.

    It has no parameters of its own, so a device, a dtype or a mode that it is given changes nothing.

    Args:
        model: the policy, with adapters attached.
        names: adapters that act in the reference too, such as one trained before that the new one is stacked on.

    Raises:
        ValueError: nothing is attached. KeyError: no such adapter.
    """

    _policy: Any
    _names: tuple[str, ...]

    def __init__(self, model: nn.Module, *names: str):
        super().__init__()
        _, record = ledger.require(model)
        record.named(names)
        vars(self).update(_policy=model, _names=names)  # past nn.Module, which would count its parameters

    @property
    def config(self) -> Any:
        return self._policy.config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # not `forward`: trainers replace that by one that reads the head's weight, which the policy has had already
        with api.using(self._policy, *self._names), evaluating(self._policy):
            return self._policy(*args, **kwargs)

    def check_rests(self) -> None:
        """Refuse a reference that would change while the policy is trained.

        Raises:
            ValueError: naming the adapter that is trained.
        """
        _, record = ledger.require(self._policy)
        for attachment in record.named(self._names):
            if any(p.requires_grad for p in attachment.parameters()):
                raise ValueError(
                    f"{attachment.name!r} is trained, so the reference would change with it; load it without trainable=True"
                )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The base's, by which TRL tells cached log-probabilities of different references apart."""
        if self._names:
            return self._policy.state_dict(*args, **kwargs)
        return base_state(self._policy)


class _Adapters(AdapterCheckpoints, _Base):
    def __init__(self, model: Any, *args: Any, **kwargs: Any):
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model: one with adapters attached, not {model!r}; load it with from_pretrained and peftkit.inject first"
            )
        if kwargs.get("peft_config") is not None:
            raise ValueError(
                "peft_config would wrap the model for peft; peftkit's adapters are attached by peftkit.inject"
            )
        _check_head(model)
        super().__init__(model, *args, **kwargs)


class AdapterSFTTrainer(_Adapters, SFTTrainer):
    """`trl.SFTTrainer` on a model with adapters: only they are trained and kept in checkpoints.

    Raises:
        ValueError: an adapter on the output head, which TRL would pass by; as `AdapterCheckpoints`.
    """


class AdapterDPOTrainer(_Adapters, DPOTrainer):
    """`trl.DPOTrainer` likewise; the reference is the model without adapters, or the `ref_model` that it is given.

    Raises:
        As `AdapterSFTTrainer`; ValueError: adapters that change the output already, of which it cannot be told whether the
            reference is to be with them (TRL would take a copy of a `PeftModel`'s) or without; `sync_ref_model`.
    """

    def __init__(self, model: Any, ref_model: Any = None, *args: Any, **kwargs: Any):
        if ref_model is None and isinstance(model, nn.Module):
            ref_model = Reference(model)
            _check_fresh(model, ref_model)
        elif isinstance(ref_model, Reference):
            ref_model.check_rests()
        super().__init__(model, ref_model, *args, **kwargs)
        if isinstance(ref_model, Reference) and getattr(self.args, "sync_ref_model", False):
            raise ValueError(
                "sync_ref_model changes the reference's weights, and here they are the policy's; give a copy"
            )


def _check_fresh(model: nn.Module, base: Reference) -> None:
    inputs: Any = getattr(model, "dummy_inputs", None)
    if inputs is None:
        return
    try:
        device = next(model.parameters()).device
        with torch.no_grad(), evaluating(model):
            given = {key: value.to(device) for key, value in inputs.items()}
            ours, theirs = model(**given).logits, base(**given).logits
    except Exception:  # the model is not where it computes yet, or takes no such inputs; then nothing is known
        return
    close = 1e-4 if ours.dtype in (torch.float32, torch.float64) else 2e-2  # a fresh PiSSA is the base but for rounding
    same = torch.allclose(ours, theirs, rtol=close, atol=close, equal_nan=True)
    if not same:
        raise ValueError(
            f"{', '.join(map(repr, api.active(model)))} changes the output before training begins, so name the reference: "
            "ref_model=Reference(model) is the base; for the adapter as it is now load it a second time, "
            "peftkit.load(model, path, name='ref'), before the one that is trained, and give Reference(model, 'ref')"
        )


def _check_head(model: nn.Module) -> None:
    ledger.require(model)
    get = getattr(model, "get_output_embeddings", None)
    head = None if get is None else get()
    made = None if head is None else graft_of(head)
    if made is not None and made._modules:
        raise ValueError(
            f"the output head carries {', '.join(map(repr, made._modules))}, and TRL reads lm_head.weight without calling "
            "the head, so it would neither act nor learn; leave the head out of targets and also_train, and where it "
            "is tied the embedding's rows too, or use transformers' Trainer"
        )
