"""peft's word for what a model is for: its `task_type`, by which it chooses the wrapper that knows where a prompt goes.

LoRA needs none. What peft computes outside of the model it computes in that wrapper alone: without a task, it would load
such an adapter and leave it out.
"""

from __future__ import annotations

from collections.abc import Sequence

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
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def task_of(model: nn.Module, saved: Sequence[str]) -> str | None:
    """By the name that transformers gives a class of models; None where it is none of those that peft wraps.

    Args:
        saved: names of modules whose weights lie in the file. For the tasks with a head peft wants the head's there;
            where they are not, it is told to extract features, whose wrapper gives out all that the model does.
    """
    name = original_class(model).__name__
    if name.endswith(("ForConditionalGeneration", "LMHeadModel")) and getattr(
        getattr(model, "config", None), "is_encoder_decoder", False
    ):
        return "SEQ_2_SEQ_LM"
    task = next((task for ending, task in _TASKS if name.endswith(ending)), None)
    wanted = [n for n, _ in model.named_modules() if n.endswith(_HEADS.get(task or "", ("no head",)))]
    return task if set(wanted) <= set(saved) else "FEATURE_EXTRACTION"
