"""What PEFT calls a model's task, which decides what it trains in full unasked."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lowrank.peft_format.folder import base_paths

# By the end of a model's class name: PEFT's task, and the heads that PEFT then trains in full unasked.
TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ForCausalLM": ("CAUSAL_LM", ()),
    "LMHeadModel": ("CAUSAL_LM", ()),
    "ForConditionalGeneration": ("SEQ_2_SEQ_LM", ()),
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
}


def task_of(root: nn.Module, trained: Sequence[str]) -> str | None:
    for ending, (task, heads) in TASKS.items():
        if type(root).__name__.endswith(ending):
            unasked = {path for path in base_paths(root) if heads and path.endswith(heads)}
            return task if unasked <= set(trained) else None
    return None
