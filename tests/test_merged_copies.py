"""`merged`: one product a call, the bits of `merge`, never out of date, and no trace of it afterwards."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.optimizer import _global_optimizer_post_hooks

import lowrank
from lowrank import notices, presets
from lowrank.layers.copied import _layers
from tests import zoo
from tests.helpers import logits, perturb, wrapped
from tests.layers.test_functional import IN, Count
from tests.layers.test_inference import (
    edit,
    edit_anchor,
    exchange,
    exchange_the_weight,
    fused_step,
    hook_the_base,
    load_state,
    own_step,
    put_another,
    reassign_data,
    rescale,
    step,
    switch_off,
    train_through_data,
    weigh,
)

BF16 = torch.bfloat16


def model(policy: lowrank.Policy | None = None) -> nn.Module:
    """Two layers in bf16 whose adapters are not zero."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(IN, 2 * IN), nn.Tanh(), nn.Linear(2 * IN, IN)).to(BF16).eval()
    return perturb(lowrank.wrap_model(net, policy or presets.pissa(rank=4), progress=False))


def run(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


def merged_apart(net: nn.Module, x: Tensor) -> Tensor:
    """The output of a copy of ``net`` inside a context of its own."""
    twin = copy.deepcopy(net)
    with lowrank.merged(twin, progress=False):
        return run(twin, x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("policy", [presets.pissa(rank=4), presets.dora(rank=4)], ids=["pissa", "dora"])
def test_a_call_is_one_product_with_the_bits_of_merge(policy: lowrank.Policy, mode: Callable) -> None:
    net, x = model(policy), torch.randn(3, IN, dtype=BF16)
    with lowrank.merged(net, progress=False) as copies, mode():
        y = net(x)
        with Count() as count:
            net[0](x)
        assert list(count.counter.values()) == [1], count.counter
    assert copies.layers == ("0", "2") and copies.by_factors == {}
    assert copies.bytes == 2 * 2 * IN * 2 * IN
    assert str(copies) == "2 layers have a copy of W + ΔW, 0.0 MiB in all"
    assert not torch.equal(y, run(net, x)), "the factors' rounding differs in bf16"
    assert torch.equal(y, run(lowrank.merge(net), x))


def test_nothing_of_it_is_left() -> None:
    net, x = model(), torch.randn(3, IN, dtype=BF16)
    before, size, state = run(net, x), len(pickle.dumps(net)), copy.deepcopy(net.state_dict())
    hooks = len(_global_optimizer_post_hooks)
    with lowrank.merged(net, progress=False):
        assert not torch.equal(run(net, x), before)
        assert len(pickle.dumps(net)) == size
        assert set(net.state_dict()) == set(state)
        twin = copy.deepcopy(net)
        assert torch.equal(run(twin, x), before), "a copy of the model is outside"
        assert len(_global_optimizer_post_hooks) == hooks + 1
    assert torch.equal(run(net, x), before)
    assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())
    assert net[0].copied.weight is None and not _layers and len(_global_optimizer_post_hooks) == hooks


def test_an_error_inside_and_a_context_inside() -> None:
    net, x = model(), torch.randn(3, IN, dtype=BF16)
    before = run(net, x)
    with pytest.raises(ZeroDivisionError), lowrank.merged(net, progress=False):
        raise ZeroDivisionError
    assert torch.equal(run(net, x), before) and not _layers
    with lowrank.merged(net, progress=False) as outer:
        y = run(net, x)
        with lowrank.merged(net, progress=False) as inner:
            assert torch.equal(run(net, x), y) and inner == outer
        with Count() as count:
            run(net[0], x)
        assert dict(count.counter) == {"addmm": 1}
    assert torch.equal(run(net, x), before)


def move_to_fp64(net: nn.Module) -> None:
    net.double()


def other_bits_in_the_base(net: nn.Module) -> None:
    with torch.no_grad():
        net[2].base.weight.mul_(1.5)


def other_data_in_the_base(net: nn.Module) -> None:
    net[2].base.weight.data = net[2].base.weight.data * 1.5


def merge_one_of_two(net: nn.Module) -> None:
    lowrank.add_adapter(net, presets.pissa(rank=2), name="other", progress=False)
    lowrank.set_adapters(net, ("default", "other"))
    with torch.no_grad():
        net[0].part("other")[0].B.add_(0.3)
    lowrank.merge(net, "other")


def load_another(net: nn.Module) -> None:
    lowrank.add_adapter(net, presets.lora(rank=2), name="other", progress=False)
    with torch.no_grad():
        for parameter in net[0].part("other").parameters():
            parameter.add_(0.3)
    lowrank.set_adapters(net, "other")


CHANGES = [
    step, fused_step, own_step, edit, edit_anchor, exchange, reassign_data, load_state, train_through_data,
    rescale, put_another, switch_off, hook_the_base, exchange_the_weight, weigh, other_bits_in_the_base,
    other_data_in_the_base, move_to_fp64, merge_one_of_two, load_another, lowrank.merge, lowrank.unwrap,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_by_the_next_call(change: Callable[[nn.Module], object]) -> None:
    net, x = model(), torch.randn(3, IN, dtype=BF16)
    with lowrank.merged(net, progress=False):
        before = run(net, x)
        change(net)
        x = x.to(net[0].weight.dtype)
        after = run(net, x)
        wrapped_still = lowrank.adapter_names(net)
        wanted = merged_apart(net, x) if wrapped_still else run(copy.deepcopy(net), x)
        assert torch.equal(after, wanted)
        assert torch.equal(after, before) == (change is lowrank.merge)
        assert torch.equal(run(net, x), after)
    assert torch.equal(run(net, x), run(copy.deepcopy(net), x))


def average(net: nn.Module) -> None:
    for parameter in lowrank.adapter_parameters(net):
        parameter.data.add_(0.1)


def test_what_leaves_no_trace_is_seen_when_asked_for() -> None:
    net, x = model(), torch.randn(3, IN, dtype=BF16)
    with lowrank.merged(net, progress=False) as copies:
        average(net)
        copies.renew()
        assert torch.equal(run(net, x), merged_apart(net, x))


def test_a_step_of_another_models_optimizer_makes_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net, other, x = model(), nn.Linear(2, 2), torch.randn(3, IN, dtype=BF16)
    with lowrank.merged(net, progress=False):
        before = run(net, x)
        monkeypatch.setattr("lowrank.layers.copied.add_updates", lambda *_: pytest.fail("made again"))
        other(torch.randn(3, 2)).sum().backward()
        torch.optim.AdamW(other.parameters(), fused=True).step()
        assert torch.equal(run(net, x), before)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_compiled_code_sees_a_fused_step() -> None:
    net, x = model(), torch.randn(3, IN, dtype=BF16)
    compiled = torch.compile(net, backend="eager")
    with lowrank.merged(net, progress=False):
        before = run(compiled, x)
        fused_step(net)
        after = run(compiled, x)
        assert torch.equal(after, merged_apart(net, x)) and not torch.equal(after, before)


def test_a_magnitude_is_seen() -> None:
    net, x = model(presets.dora(rank=4)), torch.randn(3, IN, dtype=BF16)
    with lowrank.merged(net, progress=False):
        before = run(net, x)
        with torch.no_grad():
            net[0].part()[0].magnitude.offset.add_(0.5)
        assert not torch.equal(run(net, x), before)
        assert torch.equal(run(net, x), merged_apart(net, x))


def test_a_choice_and_back_makes_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = model(), torch.randn(3, IN, dtype=BF16)
    with lowrank.disable_adapters(net):
        base = run(net, x)
    with lowrank.merged(net, progress=False):
        before = run(net, x)
        monkeypatch.setattr("lowrank.layers.copied.add_updates", lambda *_: pytest.fail("made again"))
        with lowrank.disable_adapters(net):
            assert torch.equal(run(net, x), base)
        assert torch.equal(run(net, x), before)


def two(net: nn.Module) -> nn.Module:
    lowrank.add_adapter(net, presets.lora(rank=2), name="other", progress=False)
    with torch.no_grad():
        for index in (0, 2):
            for parameter in net[index].part("other").parameters():
                parameter.add_(0.3)
    return net


def test_several_adapters_and_mixtures() -> None:
    net, x = two(model()), torch.randn(3, IN, dtype=BF16)
    with lowrank.merged(net, progress=False):
        alone = run(net, x)
        seen = [alone]
        for choice in ("other", {"default": 0.7, "other": -0.5}, {"default": 0.7, "other": 0.5}):
            with lowrank.use_adapters(net, choice):
                seen.append(run(net, x))
                assert torch.equal(seen[-1], run(lowrank.merge(copy.deepcopy(net)), x))
        assert torch.equal(run(net, x), alone)
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_what_acts_only_later_has_a_copy_too() -> None:
    net, x = model(), torch.randn(3, IN, dtype=BF16)
    lowrank.set_adapters(net, ())
    with lowrank.merged(net, progress=False) as copies:
        assert copies.layers == () and copies.bytes == 0
        lowrank.set_adapters(net, "default")
        assert torch.equal(run(net, x), merged_apart(net, x))


def test_training_inside_goes_by_the_factors() -> None:
    net, x = model(presets.lora(rank=4, dropout=0.5)), torch.randn(3, IN, dtype=BF16)
    outside = net(x)
    gradients = torch.autograd.grad(outside.sum(), list(lowrank.adapter_parameters(net)))
    with lowrank.merged(net, progress=False):
        inside = net(x)
        again = torch.autograd.grad(inside.sum(), list(lowrank.adapter_parameters(net)))
        assert torch.equal(inside, outside)
        assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
        net.train()
        assert not torch.equal(run(net, x), run(net, x)), "no dropout"
        for index in (0, 2):
            net[index].part().dropout = 0.0
        run(net, x)
        with Count() as count:
            run(net[0], x)
        assert dict(count.counter) == {"addmm": 1}


def test_an_adapter_for_each_example_and_transforms_go_by_the_factors() -> None:
    net, x = two(model()), torch.randn(3, IN, dtype=BF16)
    names = ["default", None, "other"]
    with lowrank.adapters_for_rows(net, names):
        wanted = run(net, x)
    mapped = run(lambda x: torch.vmap(net)(x), x)  # type: ignore[arg-type]
    with lowrank.merged(net, progress=False):
        with lowrank.adapters_for_rows(net, names):
            assert torch.equal(run(net, x), wanted)
        assert torch.equal(run(lambda x: torch.vmap(net)(x), x), mapped)  # type: ignore[arg-type]


def test_a_shared_module_has_one_copy_and_a_tied_weight_stays() -> None:
    net, x = zoo.Shared(), torch.randn(3, 8)
    perturb(lowrank.wrap_model(net, presets.lora(rank=2), progress=False))
    with lowrank.merged(net, progress=False) as copies:
        inside = run(net, x)
    assert len(copies.layers) == 2
    assert torch.equal(inside, run(lowrank.merge(net), x))
    tied = perturb(wrapped("tied_llama", presets.lora(target=("lm_head", "q_proj"), rank=2)))
    batch = zoo.batch("tied_llama")
    with lowrank.merged(tied, progress=False) as copies:
        inside = logits(tied, batch)
    assert "lm_head" in copies.layers
    assert torch.equal(inside, logits(lowrank.merge(tied, untie=True), batch))


@pytest.mark.parametrize(
    ("family", "policy", "copied", "reason"),
    [
        ("torch_encoder", presets.lora(rank=2), False, "adapted on the weight: MultiheadAttention"),
        ("mixtral", presets.lora(rank=2), True, "adapted on the weight: MixtralExperts"),
        ("vit", presets.lora(rank=2, target=("query", "conv")), True, "no linear layer: Conv2d"),
        ("llama", presets.lora(rank=2, target=("q_proj", "embedding")), True, "no linear layer: Embedding"),
        ("tied_llama", presets.lora(rank=2, rows={"embed_tokens": (5,)}), True, "rows train apart"),
    ],
)
def test_what_goes_by_the_factors_is_said(
    family: str,
    policy: lowrank.Policy,
    copied: bool,
    reason: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notices, "_said", set())
    net, batch = perturb(wrapped(family, policy)), zoo.batch(family)
    wanted = logits(net, batch)
    with caplog.at_level(logging.WARNING, "lowrank"), lowrank.merged(net, progress=False) as copies:
        inside = logits(net, batch)
    assert reason in copies.by_factors.values() and bool(copies.layers) == copied
    assert set(copies.layers) | set(copies.by_factors) == set(lowrank.adapted_layers(net))
    assert f"go by their factors: {reason}" in caplog.text
    torch.testing.assert_close(inside, wanted, rtol=1e-4, atol=1e-5)


def test_a_base_that_has_to_be_called() -> None:
    net, x = model(), torch.randn(3, IN, dtype=BF16)
    hook_the_base(net)
    wanted = run(net[0], x)
    with lowrank.merged(net, progress=False) as copies:
        assert torch.equal(run(net[0], x), wanted)
    assert copies.layers == ("2",) and copies.by_factors == {"0": "the base has to be called: Linear"}


@pytest.mark.parametrize("inside", [False, True])
def test_inference_tensors_go_by_the_factors(inside: bool) -> None:
    """A change of them would not be seen."""
    net, x = model(), torch.randn(3, IN, dtype=BF16)

    def exchange_factor() -> None:
        net[0].part()[0].B = nn.Parameter(net[0].part()[0].B.clone(), requires_grad=False)

    with torch.inference_mode():
        if not inside:
            exchange_factor()
        with lowrank.merged(net, progress=False) as copies:
            net(x)
            if inside:
                exchange_factor()
            else:
                assert copies.by_factors == {"0": "on the meta device, or an inference tensor"}
            before = net(x)
            net[0].part()[0].B.add_(1)
            assert not torch.equal(net(x), before)


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="not wrapped"), lowrank.merged(nn.Linear(2, 2)):
        pass


def test_a_bar_is_shown_unless_it_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    real = lowrank.merged_copies.bar
    monkeypatch.setattr(
        "lowrank.merged_copies.bar", lambda *a, **o: (shown.append(o["shown"]), real(*a, **o))[1]
    )
    for progress in (True, False):
        with lowrank.merged(model(), progress=progress):
            pass
    assert shown == [True, False]


def test_generation_gives_the_tokens_of_the_merged_model() -> None:
    net = perturb(wrapped("llama"), 0.5)
    ids = zoo.batch("llama")["input_ids"]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    outside = net.generate(ids, **settings)
    with lowrank.merged(net, progress=False):
        inside = net.generate(ids, **settings)
    assert torch.equal(net.generate(ids, **settings), outside)
    assert torch.equal(lowrank.merge(net).generate(ids, **settings), inside)


# -- compiled --------------------------------------------------------------------------------------------


@pytest.fixture
def compiled() -> Callable[[nn.Module], tuple[nn.Module, CompileCounterWithBackend]]:
    torch.compiler.reset()

    def compile_(net: nn.Module) -> tuple[nn.Module, CompileCounterWithBackend]:
        counter = CompileCounterWithBackend("aot_eager")
        return torch.compile(net, backend=counter, fullgraph=True), counter

    return compile_


def test_compiled_code_inside_and_after(compiled: Callable) -> None:
    net, x = model(), torch.randn(3, IN, dtype=BF16)
    code, counter = compiled(net)
    outside = run(code, x)
    for _ in range(2):
        with lowrank.merged(net, progress=False):
            assert torch.equal(run(code, x), merged_apart(net, x))
            assert torch.equal(run(code, x), run(net, x))
        assert torch.equal(run(code, x), outside)
    assert counter.frame_count == 2, "one without copies, one with them"


def swap(net: nn.Module, folder: Path) -> None:
    other = copy.deepcopy(net)
    edit(other)
    lowrank.save_adapter(other, folder / "adapter")
    lowrank.swap_adapter(net, folder / "adapter", "default")


def renewed_by_hand(net: nn.Module) -> None:
    edit(net)
    lowrank.layers.copied.renew_copies()


@pytest.mark.parametrize(
    "change", [step, switch_off, weigh, load_another, merge_one_of_two, swap, move_to_fp64, renewed_by_hand]
)
def test_compiled_code_sees_a_change(change: Callable[..., None], compiled: Callable, tmp_path: Path) -> None:
    net, x = model(), torch.randn(3, IN, dtype=BF16)
    code, _ = compiled(net)
    with lowrank.merged(net, progress=False):
        before = run(code, x)
        change(net, tmp_path) if change is swap else change(net)
        x = x.to(net[0].weight.dtype)
        after = run(code, x)
        assert not torch.equal(after, before)
        torch.testing.assert_close(after, merged_apart(net, x), rtol=0.02, atol=0.02)
        if change is not move_to_fp64:  # which goes by the factors, until the copies are renewed
            assert torch.equal(after, merged_apart(net, x))


def test_other_weights_and_other_values_do_not_compile_again(compiled: Callable) -> None:
    net, x = two(model()), torch.randn(3, IN, dtype=BF16)
    code, counter = compiled(net)
    with lowrank.merged(net, progress=False) as copies:
        for weight in (1.0, 0.5, -2.0):
            lowrank.set_adapters(net, {"default": weight, "other": 1.0})
            with torch.no_grad():
                net[0].part("default")[0].B.add_(0.5)
            copies.renew()
            assert torch.equal(run(code, x), merged_apart(net, x))
    assert counter.frame_count == 1


def test_an_exported_program_goes_by_the_factors() -> None:
    net, x = model(), torch.randn(3, IN, dtype=BF16)
    wanted = run(net, x)
    with lowrank.merged(net, progress=False), torch.no_grad():
        program = torch.export.export(net, (x,))
    assert torch.equal(program.module()(x), wanted)
