"""`memory_report` against what PyTorch's allocator is then asked for in a real step."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import lowrank
from lowrank import presets
from lowrank.init import CovarianceOriented, GradientAligned, Principal
from lowrank.init.base import starts_anchored
from lowrank.models.projections import Role
from lowrank.train.memory import OPTIMIZERS, step_memory
from lowrank.train.storages import Storages, bytes_of
from tests import zoo
from tests.helpers import wrapped

LLAMA: dict[str, Any] = {"num_hidden_layers": 2, "use_cache": False}
SHAPES: dict[str, Any] = {
    "MiniLM": hf.BertConfig(
        hidden_size=384, num_hidden_layers=2, num_attention_heads=12, intermediate_size=1536, vocab_size=8000
    ),
    "SmolLM2-135M": hf.LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=8192,
        tie_word_embeddings=True,
        **LLAMA,
    ),
    "Llama of 1B": hf.LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=8192,
        tie_word_embeddings=True,
        **LLAMA,
    ),
}


def build(shape: str, dtype: torch.dtype) -> nn.Module:
    config = SHAPES[shape]
    cls = hf.BertForSequenceClassification if "MiniLM" in shape else hf.LlamaForCausalLM
    return cls(config).to(dtype)


def inputs(model: nn.Module, batch: int, tokens: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 8000, (batch, tokens))
    labels = torch.randint(0, 2, (batch,)) if "Bert" in type(model).__name__ else ids
    return {"input_ids": ids, "labels": labels}


def allocated(run: Callable[[], object]) -> int:
    """The most bytes that the CPU's allocator holds during a run, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def held_in_a_step(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """The peak of a second step of training, all tensors of the model included."""
    optimizer = OPTIMIZERS["adamw"]([p for p in model.parameters() if p.requires_grad])
    model.train()

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    states = (value for state in optimizer.state.values() for value in state.values())
    return bytes_of([*model.parameters(), *model.buffers(), *states]) + allocated(step)


@pytest.mark.parametrize("preset", [presets.lora, presets.pissa])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ("MiniLM", torch.float32),
        ("SmolLM2-135M", torch.bfloat16),
        pytest.param("Llama of 1B", torch.bfloat16, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_the_peak_is_within_a_tenth_of_what_is_measured(
    shape: str, dtype: torch.dtype, preset: Callable[..., lowrank.Policy]
) -> None:
    model = build(shape, torch.float32)
    policy = preset(rank=8)
    plan = lowrank.plan_model(model, policy)
    report = lowrank.memory_report(model, plan, batch=2, tokens=64, precision=dtype)
    # An anchored start costs a decomposition, which is not what is tested: any start away from zero will do.
    lowrank.wrap_model(
        model.to(dtype), replace(policy, init=NearZero()) if preset is presets.pissa else policy
    )
    measured = held_in_a_step(model, inputs(model, 2, 64))
    assert report.peak == pytest.approx(measured, rel=0.1)
    assert report.peak > report.weights + report.activations


class NearZero(Principal):
    """A start with B away from zero, which needs no decomposition."""

    def factors(self, given: Any) -> lowrank.Factors:
        out, columns = given.weight.shape
        return lowrank.Factors(A=torch.ones(given.rank, columns), B=torch.ones(out, given.rank))


def test_parts_are_what_they_say() -> None:
    model = wrapped("llama")
    report = step_memory(model, zoo.batch("llama"))
    trained = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    whole = bytes_of([*model.parameters(), *model.buffers()])
    assert report.adapters == report.gradients == trained
    assert report.weights == whole - trained
    assert 2 * trained <= report.optimizer <= 2 * trained + 4 * len(list(model.parameters()))
    sgd = step_memory(model, zoo.batch("llama"), optimizer="sgd")
    assert sgd.optimizer == 0 and sgd.activations == report.activations
    assert report.peak == sum(report.at_peak.values())


def test_a_plan_and_the_wrapped_model_give_the_same_report() -> None:
    batch, base = zoo.batch("llama"), zoo.build("llama")
    policies = (
        presets.lora(rank=4),
        presets.pissa(rank=4),
        presets.dora(rank=4),
        presets.lora(rank=4, train=("lm_head",)),
    )
    for policy in policies:
        before = {name: (t.clone(), t.requires_grad) for name, t in base.named_parameters()}
        planned = lowrank.memory_report(base, lowrank.plan_model(base, policy), batch=batch)
        assert all(t.equal(base.get_parameter(n)) for n, (t, _) in before.items())
        assert all(flag == base.get_parameter(n).requires_grad for n, (_, flag) in before.items())
        model = lowrank.wrap_model(zoo.build("llama"), policy)
        wrapped = lowrank.memory_report(model, None, batch=batch)
        assert replace(planned, free=None, title="") == replace(wrapped, free=None, title="")


def test_a_model_on_the_meta_device_is_enough() -> None:
    with torch.device("meta"):
        model = build("Llama of 1B", torch.bfloat16)
    plan = lowrank.plan_model(model, presets.lora(rank=8))
    small = lowrank.memory_report(model, plan, batch=1, tokens=64)
    large = lowrank.memory_report(model, plan, batch=4, tokens=64)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert (
        small.weights
        == large.weights
        == sum(p.nbytes for p in model.parameters()) + bytes_of(model.buffers())
    )
    copies = 2 * plan.trainable_parameters  # of the factors, in half precision, whatever the batch
    assert large.activations - copies == pytest.approx(4 * (small.activations - copies), rel=0.05)


def test_what_would_help_is_told_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank.train.stand_in.free_bytes", lambda device: 1000)
    model = build("SmolLM2-135M", torch.float32)
    plan = lowrank.plan_model(model, presets.lora(rank=8))
    report = lowrank.memory_report(model, plan, batch=4, tokens=64)
    assert not report.fits and "it does not fit" in str(report)
    helps = dict(report.helps)
    assert list(helps) == [
        "gradient checkpointing",
        "batches of 2, two for a step",
        "batches of 1, 4 for a step",
        "the base in bfloat16",
        "A frozen, as in presets.tlora()",
    ]
    assert all(peak < report.peak for peak in helps.values())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    for what, peak in helps.items():
        assert f"{what}: {peak / 2**20:,.1f} MiB" in str(report)


def test_the_table_adds_up() -> None:
    report = step_memory(wrapped("bert"), zoo.batch("bert"))
    cells = [re.split(r"\s{2,}", line) for line in str(report).splitlines()]
    peaks = {cell[0]: float(cell[-1]) for cell in cells if re.fullmatch(r"[\d.]+", cell[-1])}
    total = peaks.pop("peak")
    assert set(peaks) == {"weights", "adapters", "optimizer", "gradients", "activations", "temporary"}
    assert total == pytest.approx(sum(peaks.values()), abs=0.4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "half"}, "precision: expected"),
        ({"optimizer": "lion"}, "optimizer: expected one of"),
        ({"batch": 2}, "batch and tokens: expected numbers of at least 1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    model = zoo.build("llama")
    plan = lowrank.plan_model(model, presets.lora(rank=4))
    with pytest.raises(ValueError, match=message):
        lowrank.memory_report(model, plan, **{"batch": zoo.batch("llama"), **options})


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing requires grad"):
        step_memory(zoo.build("llama").requires_grad_(False), zoo.batch("llama"))


@pytest.mark.parametrize("preset", ["lora", "pissa", "milora", "olora", "ailora", "tlora", "eva"])
def test_initializers_say_whether_they_are_anchored(preset: str) -> None:
    policy = getattr(presets, preset)(rank=4)
    model = lowrank.wrap_model(
        zoo.build("llama"), policy, batches=[zoo.batch("llama")] if policy.needs else None
    )
    for p, adapter in lowrank.adapters.adapters_of(model).items():
        assert starts_anchored(policy.init, p.role) == adapter.anchored
    for init in (CovarianceOriented(), GradientAligned()):
        assert starts_anchored(init, Role.QUERY)


def test_storages_are_counted_once_and_until_they_are_freed() -> None:
    with Storages() as storages:
        a = torch.zeros(256)
        b = a[:8].view(2, 4) + 1
        first = storages.alive()
        del a
        c = torch.zeros(64)
    assert storages.size(first) == 1024 + 32
    assert storages.size(storages.alive()) == 32 + 256 and storages.numbers([c]) <= storages.alive()
    assert storages.peak == 1024 + 32
    assert storages.at_peak({"first": storages.numbers([b])}) == {"first": 32, "temporary": 1024}


def test_fit_shows_the_report_before_the_first_step(capsys: pytest.CaptureFixture[str]) -> None:
    model, batch = wrapped("llama"), zoo.batch("llama")
    expected = str(step_memory(model, batch)).splitlines()
    torch.manual_seed(3)
    lowrank.train.fit(model, [batch], steps=2, report=True, progress=False)
    printed = capsys.readouterr().err.splitlines()
    assert printed[: len(expected) - 1] == expected[:-1]  # the last line says what is free just then
    other = wrapped("llama")
    lowrank.train.fit(other, [batch], steps=2, progress=False)
    assert all(p.equal(other.get_parameter(name)) for name, p in model.named_parameters())
    assert not any(p.grad is not None for p in model.parameters())


def test_gradient_checkpointing_keeps_less() -> None:
    model, batch = wrapped("llama"), zoo.batch("llama")
    plain = step_memory(model, batch)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    assert step_memory(model, batch).activations < plain.activations / 2


@pytest.mark.parametrize("family", ["gpt2", "t5", "vit", "torch_encoder"])
def test_other_families_give_the_same_report_planned_and_wrapped(family: str) -> None:
    model, batch, policy = zoo.build(family), zoo.batch(family), presets.lora(rank=4)
    planned = lowrank.memory_report(model, lowrank.plan_model(model, policy), batch=batch)
    wrapped = lowrank.memory_report(lowrank.wrap_model(model, policy), None, batch=batch)
    assert planned.peak == wrapped.peak > planned.weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_are_not_adapted(dtype: torch.dtype) -> None:
    """Products by groups of rows have sizes that shapes tell."""
    model = mixtral(None, dtype, width=256)
    policy = presets.lora(rank=4, target=("query", "value"))
    ids = torch.randint(0, 500, (2, 64))
    batch = {"input_ids": ids, "labels": ids}
    report = lowrank.memory_report(model, lowrank.plan_model(model, policy), batch=batch)
    assert report.peak == pytest.approx(held_in_a_step(lowrank.wrap_model(model, policy), batch), rel=0.1)


def test_a_step_that_shapes_do_not_tell_is_refused() -> None:
    model = zoo.build("mixtral")
    model.set_experts_implementation("eager")  # looks at which experts are hit
    plan = lowrank.plan_model(model, presets.lora(rank=4, target=("query", "value")))
    logged: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = logged.append  # type: ignore[method-assign]
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addHandler(handler)
    try:
        with pytest.raises(
            ValueError, match="MixtralForCausalLM: the memory of a step cannot be told from shapes"
        ):
            lowrank.memory_report(model, plan, batch=zoo.batch("mixtral"))
    finally:
        log.removeHandler(handler)
    assert not logged and not log.disabled


def mixtral(implementation: str | None, dtype: torch.dtype, width: int = 64) -> nn.Module:
    """Two layers of four experts; by None in the implementation that is the default."""
    config = hf.MixtralConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        use_cache=False,
    )
    model = hf.MixtralForCausalLM(config).to(dtype)
    if implementation is not None:
        model.set_experts_implementation(implementation)
    return model


@pytest.mark.parametrize("preset", ["lora", "pissa", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_adapted_experts(implementation: str, dtype: torch.dtype, preset: str) -> None:
    """Routing says which expert gets which token, and not how many there are in all."""
    policy = {
        "lora": presets.lora(rank=4),
        "pissa": presets.pissa(rank=4, init=NearZero()),
        "shared": presets.lora(rank=4, experts="shared"),
    }[preset]
    model = mixtral(implementation, dtype)
    ids = torch.randint(0, 500, (2, 64))
    batch = {"input_ids": ids, "labels": ids}
    planned = lowrank.memory_report(model, lowrank.plan_model(model, policy), batch=batch)
    lowrank.wrap_model(model, policy)
    assert planned.peak == lowrank.memory_report(model, None, batch=batch).peak
    assert planned.peak == pytest.approx(held_in_a_step(model, batch), rel=0.02)


def test_experts_that_are_called_one_by_one_are_refused_adapted_too() -> None:
    model = mixtral("eager", torch.float32)
    plan = lowrank.plan_model(model, presets.lora(rank=4))
    with pytest.raises(ValueError, match="the memory of a step cannot be told"):
        lowrank.memory_report(model, plan, batch=zoo.batch("mixtral"))


def test_several_adapters_that_act_at_once() -> None:
    model, batch = wrapped("llama", presets.lora(rank=4)), zoo.batch("llama")
    one = lowrank.memory_report(model, None, batch=batch)
    lowrank.add_adapter(model, presets.pissa(rank=2), name="other")
    lowrank.set_adapters(model, {"default": 1.0, "other": 0.5})
    both = lowrank.memory_report(model, None, batch=batch)
    assert both.adapters > one.adapters and both.activations > one.activations
    assert both.peak == pytest.approx(held_in_a_step(model, batch), rel=0.02)


@pytest.mark.parametrize(
    ("kind", "within"),
    [
        ("torchao int8", 0.02),
        ("torchao int4", 0.02),
        ("bitsandbytes 8 bits", 0.02),
        ("bitsandbytes 4 bits", 0.1),  # of which one dequantized weight too many is held at the peak
    ],
)
def test_a_quantized_base(kind: str, within: float) -> None:
    quantized = pytest.importorskip("tests.test_quantized")
    model, policy, batch = quantized.base(kind, "llama"), presets.lora(rank=4), zoo.batch("llama")
    before = dict(model.named_parameters())
    planned = lowrank.memory_report(model, lowrank.plan_model(model, policy), batch=batch)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    lowrank.wrap_model(model, policy, progress=False)
    assert planned.peak == lowrank.memory_report(model, None, batch=batch).peak
    assert planned.peak == pytest.approx(held_in_a_step(model, batch), rel=within)


def test_a_tensor_of_an_unknown_class_is_refused_by_name() -> None:
    class Own(nn.Parameter):
        pass

    model = zoo.build("llama")
    norm = model.model.norm
    norm.weight = Own(norm.weight.detach(), requires_grad=False)
    plan = lowrank.plan_model(model, presets.lora(rank=4))
    with pytest.raises(ValueError, match=r"since model.norm.weight is stored as Own of torch.float32"):
        lowrank.memory_report(model, plan, batch=zoo.batch("llama"))
