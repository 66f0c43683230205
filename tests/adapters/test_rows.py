"""An adapter for each example of a batch: each example as if it ran with its adapter alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank
from lowrank import Policy, presets
from tests import zoo
from tests.helpers import frozen_logits, logits

POLICIES = {
    "fr": presets.lora(rank=2),
    "de": presets.pissa(rank=3, target=("query", "value")),
    "it": presets.lora(rank=1, alpha=3.0, target="all-linear"),
}
NAMES = [["fr", "de", "it"], ["de", None, "de"], [None, "it", "fr"], [None] * 3, ["it", "it", "it"]]


def model_of(
    family: str, policies: dict[str, Policy] = POLICIES, dtype: torch.dtype = torch.float32
) -> nn.Module:
    model = zoo.build(family, dtype)
    for name, policy in policies.items():
        lowrank.add_adapter(model, policy, name=name, progress=False)
        with torch.no_grad():
            for parameter in lowrank.adapter_parameters(model, name):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def by_example(model: nn.Module, names: list[str | None], batch: dict[str, Tensor]) -> Tensor:
    """The logits of each example from a run of the whole batch with its adapter alone."""
    outputs = []
    for i, name in enumerate(names):
        with lowrank.use_adapters(model, () if name is None else name):
            outputs.append(logits(model, batch)[i])
    return torch.stack(outputs)


@pytest.mark.parametrize("names", NAMES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "t5", "phi3", "perceptron"])
def test_each_example_is_as_alone(family: str, names: list[str | None]) -> None:
    if family == "perceptron":
        model = model_of(family, {name: presets.lora(rank=2) for name in POLICIES})
    else:
        model = model_of(family)
    batch = zoo.batch(family)
    before, base = logits(model, batch), frozen_logits(zoo.build(family), batch)
    wanted = by_example(model, names, batch)
    with lowrank.adapters_for_rows(model, names):
        got = logits(model, batch)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    for i, name in enumerate(names):
        assert (name is None) == torch.equal(got[i], base[i]), name
    assert torch.equal(logits(model, batch), before)


def test_half_precision_and_autocast() -> None:
    names = ["de", None, "fr"]
    model, batch = model_of("llama", dtype=torch.bfloat16), zoo.batch("llama")
    with lowrank.adapters_for_rows(model, names):
        got = logits(model, batch)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, by_example(model, names, batch), rtol=0.05, atol=0.05)
    model = model_of("llama")
    with torch.autocast("cpu", torch.bfloat16), lowrank.adapters_for_rows(model, names):
        got = logits(model, batch)
    torch.testing.assert_close(got.float(), by_example(model, names, batch), rtol=0.05, atol=0.05)


def test_several_train_in_one_step() -> None:
    """The gradients are those of separate runs, each over its own examples."""
    model, batch = model_of("llama"), zoo.batch("llama")
    names = ["fr", "de", "fr"]

    def loss(output: Tensor, rows: list[int]) -> Tensor:
        return output[rows].square().mean((1, 2)).sum()

    with lowrank.adapters_for_rows(model, names):
        loss(model(**batch).logits, [0, 1, 2]).backward()
    for name, rows in (("fr", [0, 2]), ("de", [1])):
        parameters = list(lowrank.adapter_parameters(model, name))
        got = [parameter.grad.clone() for parameter in parameters]
        with lowrank.use_adapters(model, name):
            wanted = torch.autograd.grad(loss(model(**batch).logits, rows), parameters)
        torch.testing.assert_close(got, list(wanted), rtol=1e-3, atol=1e-5)
        assert all(gradient.any() for gradient in got)
    assert all(parameter.grad is None for parameter in lowrank.adapter_parameters(model, "it"))


def test_generate() -> None:
    model = model_of("llama").eval()
    ids = zoo.batch("llama")["input_ids"]
    names = ["fr", None, "de"]
    options: dict[str, Any] = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, output_logits=True)
    options |= dict(return_dict_in_generate=True, attention_mask=torch.ones_like(ids))
    with lowrank.adapters_for_rows(model, names):
        got = model.generate(ids, **options)
    for i, name in enumerate(names):
        with lowrank.use_adapters(model, name or ()):
            alone = model.generate(ids[i : i + 1], **options | {"attention_mask": torch.ones_like(ids[:1])})
        assert torch.equal(got.sequences[i], alone.sequences[0])
        for step, wanted in zip(got.logits, alone.logits, strict=True):
            torch.testing.assert_close(step[i], wanted[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("returned", [1, 3])
def test_generate_with_beams(family: str, returned: int) -> None:
    """T5's encoder sees each example once, its decoder and all of Llama as often as there are beams."""
    model = model_of(family).eval()
    ids = zoo.batch(family)["input_ids"]
    names = ["fr", None, "de"]
    options: dict[str, Any] = dict(
        num_beams=3, num_return_sequences=returned, max_new_tokens=5, do_sample=False
    )

    def generated(ids: Tensor) -> Tensor:
        return model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=5, **options)

    with lowrank.adapters_for_rows(model, names, repeats=3):
        got = generated(ids).unflatten(0, (3, returned))
    for i, name in enumerate(names):
        with lowrank.use_adapters(model, name or ()):
            assert torch.equal(got[i], generated(ids[i : i + 1]))


def test_a_fused_step_is_seen() -> None:
    """It leaves the version of a tensor as it is."""
    model, batch = model_of("llama"), zoo.batch("llama")
    names = ["fr", "de", None]
    parameters = list(lowrank.adapter_parameters(model, "fr"))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with lowrank.adapters_for_rows(model, names):
        before = logits(model, batch)
        torch.optim.AdamW(parameters, lr=0.1, fused=True).step()
        after = logits(model, batch)
    torch.testing.assert_close(after, by_example(model, names, batch), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after[0], before[0], atol=1e-3) and torch.equal(after[1:], before[1:])


@pytest.mark.parametrize("examples", [1, 2, 4, 9, 12])
def test_another_number_of_repeats_is_refused(examples: int) -> None:
    model, ids = model_of("llama"), torch.ones(examples, 4, dtype=torch.long)
    message = r"expected an input of 3 examples, .*, or 6 with repeats=2, as its leading"
    with lowrank.adapters_for_rows(model, NAMES[0], repeats=2), pytest.raises(ValueError, match=message):
        model(ids)


@pytest.mark.parametrize("repeats", [0, -1, True, 2.0, None])
def test_bad_repeats(repeats: Any) -> None:
    model = model_of("llama")
    with pytest.raises(ValueError, match="repeats: expected a whole number from 1 on"):
        lowrank.adapters_for_rows(model, NAMES[0], repeats=repeats).__enter__()


class Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kinds", [1, 2, 8])
def test_one_grouped_product_for_any_number_of_adapters(kinds: int) -> None:
    base = nn.Sequential(nn.Linear(8, 6))
    for i in range(kinds):
        lowrank.add_adapter(base, presets.lora(rank=1 + i % 3), name=f"n{i}", progress=False)
    names = [f"n{i % kinds}" for i in range(16)]
    x = torch.randn(16, 4, 8)
    with torch.no_grad(), lowrank.adapters_for_rows(base, names):
        base(x)
        with Products() as products:
            base(x)
    assert products.found.count("bmm") == 2
    assert not {"cat", "stack", "constant_pad_nd"} & set(products.found), "they were stacked again"


def test_stacked_factors_are_made_again_where_one_changed() -> None:
    model, batch, names = model_of("bert"), zoo.batch("bert"), ["fr", "de", "it"]
    with torch.no_grad(), lowrank.adapters_for_rows(model, names):
        before = logits(model, batch)
        for parameter in lowrank.adapter_parameters(model, "de"):
            parameter.add_(0.1)
        after = logits(model, batch)
    torch.testing.assert_close(after, by_example(model, names, batch), rtol=1e-4, atol=1e-5)
    assert torch.equal(before[[0, 2]], after[[0, 2]]) and not torch.allclose(before[1], after[1])
    with torch.inference_mode(), lowrank.adapters_for_rows(model, names):
        model(**batch)
    with lowrank.adapters_for_rows(model, names):
        model(**batch).loss.backward()  # after tensors were made in inference mode
    other = ["it", "fr", "fr"]
    with lowrank.adapters_for_rows(model, other):
        torch.testing.assert_close(
            logits(model, batch), by_example(model, other, batch), rtol=1e-4, atol=1e-5
        )


def test_dropout_by_example() -> None:
    base = nn.Sequential(nn.Linear(4, 1, bias=False)).requires_grad_(False)
    with torch.no_grad():
        base[0].weight.zero_()
    for name, dropout in (("drops", 0.5), ("keeps", 0.0)):
        lowrank.add_adapter(
            base, presets.lora(rank=1, dropout=dropout, scaling=1.0), name=name, progress=False
        )
        (adapter,) = base[0].part(name)
        with torch.no_grad():
            adapter.A.copy_(torch.tensor([[1.0, 0, 0, 0]]))
            adapter.B.fill_(1)
    x = torch.ones(3, 4000, 4)
    with lowrank.adapters_for_rows(base.train(), ["drops", "keeps", None]):
        y = base(x)
    assert set(y[0].unique().tolist()) == {0.0, 2.0} and 0.4 < (y[0] == 0).float().mean() < 0.6
    assert (y[1] == 1).all() and not y[2].any()
    with lowrank.adapters_for_rows(base.eval(), ["drops", "keeps", None]):
        assert (base(x)[0] == 1).all()


# -- refused ---------------------------------------------------------------------------------------------


def test_examples_that_cannot_be_told() -> None:
    model, batch = model_of("llama"), zoo.batch("llama")
    with lowrank.adapters_for_rows(model, ["fr", "de"]):
        with pytest.raises(ValueError, match=r"self_attn.q_proj: expected an input of 2 ex.*\(3, 7, 32\)"):
            model(**batch)
    flat = nn.Sequential(nn.Flatten(0, 1), nn.Linear(8, 6))
    lowrank.wrap_model(flat, presets.lora(rank=2), progress=False)
    with lowrank.adapters_for_rows(flat, ["default"] * 3):
        assert flat[1](torch.randn(3, 8)).shape == (3, 6)
        with pytest.raises(ValueError, match=r"1: expected an input of 3 examples.*\(15, 8\)"):
            flat(torch.randn(3, 5, 8))
        with pytest.raises(ValueError, match=r"1: expected an input of 3 examples.*\(8,\)"):
            flat[1](torch.randn(8))


def test_what_examples_cannot_have_apart() -> None:
    attention = zoo.build("torch_encoder")
    lowrank.add_adapter(attention, presets.lora(rank=2), name="a", progress=False)
    lowrank.add_adapter(attention, presets.lora(rank=2, target="head"), name="head", progress=False)
    bert = zoo.build("bert")
    lowrank.add_adapter(bert, presets.lora(rank=2, train=("classifier",)), name="a", progress=False)
    lowrank.add_adapter(bert, presets.lora(rank=2), name="plain", progress=False)
    for model, found in (
        (attention, r"encoder\.layers\.0\.self_attn: a is added to its weight"),
        (bert, "classifier: trained in full by a"),
    ):
        with pytest.raises(ValueError, match=found), lowrank.adapters_for_rows(model, ["a", None, None]):
            pass
    # Beside them what is only called works, and copies of other adapters do not act.
    base = frozen_logits(zoo.build("bert"), zoo.batch("bert"))
    with torch.no_grad():
        bert.classifier.copies["a"].bias.add_(1)
    with lowrank.adapters_for_rows(bert, [None, "plain", None]):
        assert torch.equal(logits(bert, zoo.batch("bert")), base)
    with lowrank.adapters_for_rows(attention, ["head"] * 3):
        logits(attention, zoo.batch("torch_encoder"))


def test_a_weight_that_is_read_is_refused() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x.to(self.inner.weight.dtype), self.inner.weight)

    model = lowrank.wrap_model(Reads(), presets.lora(rank=2), progress=False)
    with lowrank.adapters_for_rows(model, ["default", None]):
        assert model.inner.weight.shape == (8, 8)
        with pytest.raises(ValueError, match="inner: its weight is read without a call"):
            model(torch.randn(2, 3, 8))
    with lowrank.adapters_for_rows(model, [None, None]):
        model(torch.randn(2, 3, 8))


@pytest.mark.parametrize("names", [[], "fr", ["fr", "xx", None]])
def test_names_that_are_none(names: Any) -> None:
    model = model_of("bert")
    with pytest.raises(ValueError, match="expected a list|no adapter 'xx'"):
        with lowrank.adapters_for_rows(model, names):
            pass


# -- among other things ------------------------------------------------------------------------------------


def test_choices_nest() -> None:
    model, batch, names = model_of("bert"), zoo.batch("bert"), ["fr", None, "de"]
    outside, base = logits(model, batch), frozen_logits(zoo.build("bert"), batch)
    with lowrank.adapters_for_rows(model, names):
        mixed = logits(model, batch)
        with lowrank.disable_adapters(model):
            assert torch.equal(logits(model, batch), base)
        with lowrank.use_adapters(model, "fr"):
            assert torch.equal(logits(model, batch), outside)
        with pytest.raises(KeyError), lowrank.adapters_for_rows(model, ["it"] * 3):
            raise KeyError
        assert torch.equal(logits(model, batch), mixed)
    assert torch.equal(logits(model, batch), outside)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("graph", [False, True])
def test_compiled_whole(graph: bool) -> None:
    torch.compiler.reset()
    model, ids = model_of("llama"), zoo.batch("llama")["input_ids"]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(graph), lowrank.adapters_for_rows(model, ["fr", None, "de"]):
        got, wanted = compiled(input_ids=ids).logits, model(input_ids=ids).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


class OwnForward(nn.Linear):
    """A base that may only be called."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2 + 1


def test_a_base_that_can_only_be_called() -> None:
    model = nn.Sequential(OwnForward(8, 6))
    x = torch.randn(3, 5, 8)
    base = frozen_logits(model, x)
    layer = lowrank.LoRALinear(model[0], in_features=8, out_features=6)
    layer.put("a", [lowrank.layers.Adapter(torch.randn(2, 8), torch.randn(6, 2), 0.5, rows=(0, 6))])
    with torch.no_grad():
        layer.part("a")[0].A.add_(0.1)
    layer.acting.rows = lowrank.layers.grouped.ExampleAdapters([None, "a", None], {})
    torch.testing.assert_close(logits(layer, x)[1], base[1] + x[1] @ layer.delta_weight("a").T)
    assert torch.equal(logits(layer, x)[[0, 2]], base[[0, 2]])
