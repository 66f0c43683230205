"""`memory_report` where a model looks at its batch's numbers, what it says would help, and its record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import lowrank
from lowrank import Policy, presets
from lowrank.train import History
from lowrank.train.memory import step_memory
from lowrank.train.memory_table import MemoryReport
from tests import zoo
from tests.helpers import wrapped
from tests.test_memory import held_in_a_step

TOKENS = 512
IDS = torch.arange(2 * TOKENS).view(2, TOKENS) % 500
LOOKED_AT: dict[str, dict[str, Any]] = {
    "no mask": {},
    "a mask of ones": {"attention_mask": torch.ones_like(IDS)},
    "padding": {"attention_mask": (torch.arange(TOKENS) < 300).long().expand(2, -1)},
    "packed sequences": {
        "position_ids": torch.cat([torch.arange(200), torch.arange(TOKENS - 200)]).expand(2, -1)
    },
}


def llama() -> nn.Module:
    config = hf.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


@pytest.mark.parametrize("case", LOOKED_AT)
def test_what_a_model_sees_in_its_batch_decides_its_kernels(case: str) -> None:
    batch = {"input_ids": IDS, "labels": IDS, **LOOKED_AT[case]}
    policy, model = presets.lora(rank=4), llama()
    report = lowrank.memory_report(model, lowrank.plan_model(model, policy), batch=batch)
    assert report.peak == pytest.approx(held_in_a_step(lowrank.wrap_model(model, policy), batch), rel=0.02)


def checkpointed(model: nn.Module) -> nn.Module:
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})  # type: ignore[operator]
    return model


@pytest.mark.parametrize(
    ("what", "change", "policy", "batch"),
    [
        ("gradient checkpointing", checkpointed, presets.lora, 4),
        ("the base in bfloat16", lambda model: model.to(torch.bfloat16), presets.lora, 4),
        ("A frozen, as in presets.tlora()", lambda model: model, presets.lora_fa, 4),
    ],
)
def test_a_saving_is_that_of_a_report_with_the_choice_made(
    what: str, change: Callable[[nn.Module], nn.Module], policy: Callable[..., Policy], batch: int
) -> None:
    model = llama()
    plan = lowrank.plan_model(model, presets.lora(rank=4))
    report = lowrank.memory_report(model, plan, batch=batch, tokens=64, available=1)
    model = change(model)
    plan = lowrank.plan_model(model, policy(rank=4))
    chosen = lowrank.memory_report(model, plan, batch=batch, tokens=64)
    assert chosen.peak < report.peak
    assert dict(report.helps)[what] == pytest.approx(chosen.peak, rel=0.01)
    assert not lowrank.memory_report(model, plan, batch=batch, tokens=64, available=2**50).helps


def test_several_batches_of_a_step_hold_the_gradient_of_those_before() -> None:
    model = wrapped("llama", presets.lora(rank=16))
    batch = {name: tensor[:1, :4] for name, tensor in zoo.batch("llama").items()}
    once, again = (step_memory(model, batch, accumulate=several) for several in (False, True))
    assert again.activations == once.activations and again.gradients == once.gradients
    assert once.peak < again.peak <= once.peak + once.gradients


@pytest.mark.parametrize("lr", [1e-3, "auto"])
def test_fit_puts_the_report_into_the_history_and_the_log(
    lr: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lowrank.train.begin.measured_rate", lambda turns, steps: 1e-3)
    monkeypatch.setattr("lowrank.train.begin.turning", lambda *args: 1.0)
    monkeypatch.setattr("lowrank.train.stand_in.free_bytes", lambda device: 1000)
    model, batches = wrapped("llama"), [zoo.batch("llama", seed) for seed in range(2)]
    log = tmp_path / "log.jsonl"
    history = lowrank.train.fit(model, batches, lr=lr, report=True, log=log, progress=False, accumulate=2)
    assert history.memory is not None and history.memory.helps
    assert str(history.memory) in capsys.readouterr().err
    assert log.read_text().startswith('{"memory": {')
    history.save(tmp_path / "saved.jsonl")
    for path in (log, tmp_path / "saved.jsonl"):
        read = History.load(path)
        assert read == history and read.memory == history.memory
    assert MemoryReport.from_json(history.memory.to_json()) == history.memory
