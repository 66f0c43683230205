"""Compiled generation: one graph for a token, no break in it, and no compilation from token to token."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import lowrank
from tests import zoo
from tests.helpers import perturb
from tests.test_invariants import PRESETS, wrap

TOKENS = 4


def tokens(model: nn.Module, run: nn.Module) -> Tensor:
    """The logits of the last of a prompt, by ``model``, and of some tokens after it, by ``run``."""
    ids = zoo.batch("llama")["input_ids"]
    cache = transformers.StaticCache(config=model.config, max_cache_len=ids.shape[1] + TOKENS)
    with torch.no_grad():
        made = [model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:]]
        for _ in range(TOKENS):
            token = made[-1].argmax(-1)
            made.append(run(input_ids=token, past_key_values=cache, use_cache=True).logits)
    return torch.cat(made, 1)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_token_is_one_graph_that_is_compiled_once(preset: str) -> None:
    torch.compiler.reset()
    model = perturb(wrap(zoo.build("llama"), preset, "llama", torch.float32))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for graphs, context in ((1, nullcontext()), (2, lowrank.merged(model, progress=False))):
        with context:
            wanted = tokens(model, model)
            torch.testing.assert_close(tokens(model, compiled), wanted, rtol=1e-4, atol=1e-4)
            assert counter.frame_count == graphs
    tokens(model, compiled)
    assert counter.frame_count == 2, "compiled again after the context"
