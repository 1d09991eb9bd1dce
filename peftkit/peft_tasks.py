"""peft's word for what a model is for: its `task_type`, by which it chooses the wrapper that knows where a prompt goes.

LoRA needs none. What peft computes outside of the model it computes in that wrapper alone: without a task, it would load
such an adapter and leave it out.
"""

from __future__ import annotations

from torch import nn

from peftkit.holder import original_class

_TASKS = (
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("Model", "FEATURE_EXTRACTION"),
)


def task_of(model: nn.Module) -> str | None:
    """By the name that transformers gives a class of models; None where it is none of those that peft wraps."""
    name = original_class(model).__name__
    if name.endswith(("ForConditionalGeneration", "LMHeadModel")) and getattr(
        getattr(model, "config", None), "is_encoder_decoder", False
    ):
        return "SEQ_2_SEQ_LM"
    return next((task for ending, task in _TASKS if name.endswith(ending)), None)
