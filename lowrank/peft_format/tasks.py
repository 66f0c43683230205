"""What PEFT calls a model's task, which decides what it trains in full unasked."""

from __future__ import annotations

import inspect
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


# What PEFT's class for a task passes to the model by name, whether it is given or not.
PASSED = {"SEQ_2_SEQ_LM": {"input_ids", "decoder_input_ids"}}
PASSED_BY_ALL = {"input_ids"}


def task_of(root: nn.Module, trained: Sequence[str]) -> str | None:
    """PEFT's task for ``root``; None where none fits, with which PEFT calls a model as it is called alone."""
    for ending, (task, heads) in TASKS.items():
        if type(root).__name__.endswith(ending):
            unasked = {path for path in base_paths(root) if heads and path.endswith(heads)}
            taken = inspect.signature(type(root).forward).parameters.keys()
            fits = unasked <= set(trained) and PASSED.get(task, PASSED_BY_ALL) <= taken
            return task if fits else None
    return None
