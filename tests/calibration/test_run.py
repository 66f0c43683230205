"""Statistics against the definitions written out plainly, one example at a time."""

from __future__ import annotations

import re
import weakref
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank import presets
from lowrank.adapters import adapters_of
from lowrank.allocate import Uniform
from lowrank.calibration import calibrate
from lowrank.models.projections import Projection, find_projections
from lowrank.models.storage import stored_transposed
from lowrank.models.targets import select
from tests import zoo
from tests.helpers import numbers

ALL = ("covariance", "sensitivity", "gradient")


class Chain(nn.Module):
    """Calls ``layers`` in turn, then sums; ``after`` each it does what it is told."""

    def __init__(self, *layers: nn.Module, after: Any = torch.tanh) -> None:
        super().__init__()
        self.layers, self.after = nn.ModuleList(layers), after

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        for layer in self.layers:
            x = self.after(layer(x))
        return x.square().sum(-1).mean()


def singles(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The batch's examples one by one, without their padding."""
    made = []
    for i in range(len(next(iter(batch.values())))):
        example = {key: value[i : i + 1] for key, value in batch.items()}
        if "attention_mask" in batch:
            kept = batch["attention_mask"][i].bool()
            example = {
                key: value[:, kept] if value.shape[1:2] == kept.shape else value
                for key, value in example.items()
            }
        made.append(example)
    return made


def by_definition(
    model: nn.Module, projections: list[Projection], examples: list[Any]
) -> dict[Projection, dict]:
    """Covariance, sensitivity and gradient of linear layers, by autograd on the weights themselves.

    The covariance of inputs with one token an example is around the mean of all examples.
    """
    inputs: dict[str, Tensor] = {}
    lone: dict[Projection, list[Tensor]] = {p: [] for p in projections}
    handles = [
        model.get_submodule(p.module).register_forward_pre_hook(
            lambda m, args, path=p.module: inputs.__setitem__(path, args[0].detach())
        )
        for p in projections
    ]
    found = {p: {"covariance": 0.0, "sensitivity": 0.0, "gradient": 0.0} for p in projections}
    for example in examples:
        model.zero_grad()
        model(**example).loss.backward()
        for p in projections:
            x = inputs[p.module].reshape(-1, p.in_features)
            lone[p] += [x] if len(x) == 1 else []
            centred = x - x.mean(0)
            module = model.get_submodule(p.module)
            stored = module.weight.grad.T if stored_transposed(module) else module.weight.grad
            gradient = stored[numbers(p.rows)]
            found[p]["covariance"] += centred.T @ centred / len(examples)
            found[p]["sensitivity"] += (p.weight(model) * gradient).abs().mean() / len(examples)
            found[p]["gradient"] += gradient / len(examples)
    for p, tokens in lone.items():
        if len(tokens) == len(examples):
            centred = torch.cat(tokens) - torch.cat(tokens).mean(0)
            found[p]["covariance"] = centred.T @ centred / len(examples)
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit", "neox", "falcon40b"])
def test_batches_of_one_follow_the_definitions(family: str) -> None:
    model = zoo.build(family)
    projections = select(model, "all-linear").projections
    examples = [one for seed in (0, 1) for one in singles(zoo.batch(family, seed=seed))]
    wanted = by_definition(model, projections, examples)
    got = calibrate(model, projections, ALL, examples, progress=False)
    for p in projections:
        torch.testing.assert_close(got[p].covariance, wanted[p]["covariance"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[p].gradient, wanted[p]["gradient"], rtol=1e-4, atol=1e-6)
        assert got[p].sensitivity == pytest.approx(float(wanted[p]["sensitivity"]), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("family", ["bert", "vit", "llama", "gpt2"])
def test_padded_batches_measure_what_single_examples_do(family: str) -> None:
    model, batch = zoo.build(family), zoo.batch(family)
    projections = select(model, "all-linear").projections
    one, many = (
        calibrate(model, projections, ALL, batches, progress=False) for batches in (singles(batch), [batch])
    )
    for p in projections:
        torch.testing.assert_close(many[p].covariance, one[p].covariance, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(many[p].gradient, one[p].gradient, rtol=1e-4, atol=1e-6)
        assert many[p].sensitivity == pytest.approx(one[p].sensitivity, rel=1e-4)


def test_an_input_of_one_token_an_example_is_centred_over_all_examples() -> None:
    model = zoo.build("perceptron")
    projections = select(model, "all-linear").projections
    batches = [zoo.batch("perceptron", seed=seed) for seed in (0, 1)]
    wanted = by_definition(model, projections, [one for batch in batches for one in singles(batch)])
    got = calibrate(model, projections, ALL, batches, progress=False)
    for p in projections:
        torch.testing.assert_close(got[p].covariance, wanted[p]["covariance"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[p].gradient, wanted[p]["gradient"], rtol=1e-4, atol=1e-6)
        assert got[p].sensitivity == pytest.approx(float(wanted[p]["sensitivity"]), rel=1e-4)
    assert got[projections[0]].covariance.any()


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_weights_that_no_linear_holds(batch_first: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    model = nn.ModuleDict({"attention": attention, "after": nn.Linear(8, 8)})
    x = torch.randn(1, 5, 8)

    def loss(model: Any, x: Tensor) -> Tensor:
        x = x if batch_first else x.transpose(0, 1)
        y, _ = model["attention"](x, x, x)
        return model["after"](y).square().mean()

    projections = find_projections(model)
    got = calibrate(model, projections, ALL, [x], loss=loss, progress=False)

    loss(model, x).backward()
    tokens = x.reshape(5, 8)
    centred = tokens - tokens.mean(0)
    for p in projections:
        holder = model.get_submodule(p.module)
        gradient = getattr(holder, p.param).grad[slice(*p.rows)]
        torch.testing.assert_close(got[p].gradient, gradient)
        assert got[p].sensitivity == pytest.approx(float((p.weight(model) * gradient).abs().mean()), rel=1e-5)
        if p.param == "in_proj_weight":
            torch.testing.assert_close(got[p].covariance, centred.T @ centred)

    values = tokens @ attention.in_proj_weight[16:].T  # the output projection mixes these
    out = next(p for p in projections if p.module == "attention.out_proj")
    assert got[out].covariance.shape == (8, 8) and torch.linalg.matrix_rank(values) >= 4
    y, _ = attention(*[x if batch_first else x.transpose(0, 1)] * 3)
    seen = torch.linalg.solve(attention.out_proj.weight, (y.reshape(5, 8) - attention.out_proj.bias).T).T
    seen = (seen - seen.mean(0)).detach()
    torch.testing.assert_close(got[out].covariance, seen.T @ seen, rtol=1e-3, atol=1e-4)


def test_projections_that_read_one_input_share_one_covariance() -> None:
    model = zoo.build("llama")
    projections = [p for p in select(model, "all-linear").projections if "layers.0" in p.module]
    got = calibrate(
        model, projections, ["covariance"], [zoo.batch("llama", seed=s) for s in (0, 1)], progress=False
    )
    storages = {p.module.split(".")[-1]: got[p].covariance.data_ptr() for p in projections}
    assert storages["q_proj"] == storages["k_proj"] == storages["v_proj"]
    assert storages["gate_proj"] == storages["up_proj"]
    assert len(set(storages.values())) == 4


def test_sharing_is_checked_in_each_batch() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, apart: bool) -> Tensor:
            return (self.a(x) + self.b(x * 2 if apart else x)).sum()

    model = Fickle()
    batches = [{"x": torch.randn(2, 3, 4), "apart": apart} for apart in (False, True)]
    with pytest.raises(ValueError, match="read the same input at first, but not in batch 1"):
        calibrate(
            model, find_projections(model), ["covariance"], batches, loss=lambda m, b: m(**b), progress=False
        )


def test_an_address_used_again_is_another_input() -> None:
    """What a freed input leaves is often where the next one of that shape is put."""

    class Passing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            memory = x * 1
            first = memory.data  # same place, a version of its own
            y = self.a(first).sum()
            del first
            memory *= 2
            return y + self.b(memory.data).sum()

    model, x = Passing(), torch.randn(2, 5, 64)
    got = calibrate(
        model, find_projections(model), ["covariance"], [x], loss=lambda m, b: m(b), progress=False
    )
    a, b = got.values()
    torch.testing.assert_close(b.covariance, 4 * a.covariance)


def test_a_projection_out_of_the_losss_reach_has_sensitivity_zero() -> None:
    model = zoo.build("deberta")
    model.register_module("unused", nn.Linear(4, 4))
    projections = find_projections(model)
    got = calibrate(model, projections, ["sensitivity"], [zoo.batch("deberta")], progress=False)
    assert got[next(p for p in projections if p.module == "unused")].sensitivity == 0


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    model, batch = zoo.build("bert"), zoo.batch("bert")
    model.train()
    model.bert.encoder.eval()
    model.bert.embeddings.requires_grad_(False)
    model.classifier.weight.grad = torch.full_like(model.classifier.weight, 7)

    def state() -> tuple:
        return (
            {name: tensor.clone() for name, tensor in model.state_dict().items()},
            {name: module.training for name, module in model.named_modules()},
            {name: p.requires_grad for name, p in model.named_parameters()},
            {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
            {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()},
            torch.get_rng_state(),
            torch.backends.mha.get_fastpath_enabled(),
        )

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        return torch.equal(a, b) if isinstance(a, Tensor) else a == b

    def loss(model: nn.Module, batch: Any) -> Tensor:
        torch.rand(3)
        value = model(**batch).loss
        if fails:
            raise RuntimeError("the loss gave up")
        return value

    before = state()
    projections = select(model, "all-linear").projections
    if fails:
        with pytest.raises(RuntimeError, match="gave up"):
            calibrate(model, projections, ALL, [batch], loss=loss, progress=False)
    else:
        calibrate(model, projections, ALL, [batch], loss=loss, progress=False)
    assert all(same(a, b) for a, b in zip(before, state(), strict=True))


def test_attention_is_left_as_it_was() -> None:
    model = zoo.build("torch_encoder")
    attention = model.encoder.layers[0].self_attn
    weights = attention.in_proj_weight, attention.out_proj.weight, attention.out_proj.bias
    calibrate(
        model, select(model, "all-linear").projections, ALL, [zoo.batch("torch_encoder")], progress=False
    )
    after = attention.in_proj_weight, attention.out_proj.weight, attention.out_proj.bias
    assert all(a is b for a, b in zip(weights, after, strict=True))
    assert "forward" not in attention.__dict__


def test_every_gradient_of_the_base_stays_unset() -> None:
    model = zoo.build("llama").requires_grad_(False)
    projections = select(model, "all-linear").projections
    got = calibrate(model, projections, ALL, [zoo.batch("llama")], progress=False)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    wanted = by_definition(model.requires_grad_(), projections, singles(zoo.batch("llama")))
    for p in projections:
        assert got[p].sensitivity == pytest.approx(float(wanted[p]["sensitivity"]), rel=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_are_counted_once(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, on: bool) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.first, self.second = (
                    nn.Linear(4, 4),
                    nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)),
                )
            self.on = on

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            if self.on:
                return checkpoint(self.second, x, use_reentrant=reentrant).square().mean()
            return self.second(x).square().mean()

    x = torch.randn(3, 5, 4)
    plain, saved = (
        calibrate(m, find_projections(m), ALL, [x], loss=lambda m, b: m(b), progress=False)
        for m in (Checkpointed(False), Checkpointed(True))
    )
    for p, each in plain.items():
        torch.testing.assert_close(saved[p].covariance, each.covariance)
        torch.testing.assert_close(saved[p].gradient, each.gradient)
        assert saved[p].sensitivity == pytest.approx(each.sensitivity)


def test_statistics_of_half_precision_models_are_fp32() -> None:
    model = zoo.build("llama", torch.bfloat16)
    got = calibrate(model, select(model, "query").projections, ALL, [zoo.batch("llama")], progress=False)
    assert {each.covariance.dtype for each in got.values()} == {torch.float32}
    assert {each.gradient.dtype for each in got.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_are_as_exact_as_what_is_summed(dtype: torch.dtype) -> None:
    """Also where the program around lets products round: with TF32 or bf16 inside, or under autocast."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 40)).to(dtype)
    x = torch.randn(2, 50, 300, dtype=dtype) + 3

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            return model(x).float().square().mean()

    projections = find_projections(model)
    torch.set_float32_matmul_precision("medium")
    try:
        statistics = calibrate(model, projections, ALL, [x], loss=loss, progress=False)
        fast = calibrate(model, projections, ["sensitivity"], [x], loss=loss, progress=False)
    finally:
        torch.set_float32_matmul_precision("highest")
    centred = (x.double() - x.double().mean(1, keepdim=True)).flatten(0, 1)
    wanted = centred.T @ centred / 2
    error = (statistics[projections[0]].covariance - wanted).norm() / wanted.norm()
    assert error < (1e-6 if dtype == torch.float32 else 2**-9)
    for p in projections:
        assert fast[p].sensitivity == pytest.approx(statistics[p].sensitivity, rel=1e-3)


def test_a_part_that_cancels_does_not_leave_its_rounding() -> None:
    """A softmax over tokens has gradients that add up to zero, so what all tokens share does not count."""
    torch.manual_seed(0)
    q, common = torch.randn(64), 300 * torch.randn(1, 1, 300)
    x = torch.randn(3, 100, 300) + common

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) @ q.to(x) / 50).softmax(1)[:, 0].square().mean()

    model = nn.Sequential(nn.Linear(300, 64))
    with torch.no_grad():
        model[0].weight -= model[0].weight @ common[0].T @ common[0] / common.square().sum()
    wanted, got = (
        calibrate(m, find_projections(m), ["sensitivity"], [x.to(m[0].weight)], loss=loss, progress=False)
        for m in (deepcopy(model).double(), model)
    )
    for p, each in wanted.items():
        assert got[p].sensitivity == pytest.approx(each.sensitivity, rel=1e-2)


def test_a_batchs_graph_is_let_go_before_the_next() -> None:
    """With it go the inputs that the hooks hold, which else would double what calibration takes."""
    held: list[weakref.ref[Any]] = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            assert all(each() is None for each in held)
            hidden = self.first(x) * 1
            hook = partial(lambda gradient: None)  # it lives as long as the graph
            held.append(weakref.ref(hook))
            hidden.register_hook(hook)
            return self.second(hidden).square().mean()

    model, batches = Watching(), [torch.randn(2, 4) for _ in range(3)]
    projections = find_projections(model)  # which tries a copy out
    held.clear()
    calibrate(model, projections, ALL, batches, loss=lambda model, x: model(x), progress=False)
    assert len(held) == 6, "three batches of two examples"


def test_covariance_alone_needs_no_gradient() -> None:
    model = zoo.build("llama")

    def loss(model: nn.Module, batch: Any) -> Tensor:
        assert not torch.is_grad_enabled()
        return model(**batch).loss

    calibrate(
        model,
        select(model, "query").projections,
        ["covariance"],
        [zoo.batch("llama")],
        loss=loss,
        progress=False,
    )


def test_a_mask_of_ones_own() -> None:
    model, batch = zoo.build("bert"), zoo.batch("bert")
    projections = select(model, "query").projections
    own = calibrate(
        model, projections, ["covariance"], [batch], mask=lambda b: b["input_ids"] >= 0, progress=False
    )
    default = calibrate(model, projections, ["covariance"], [batch], progress=False)
    p = projections[0]
    assert not torch.allclose(own[p].covariance, default[p].covariance)


def test_weights_that_spoil_the_loss_are_named() -> None:
    model = zoo.build("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[0, 0] = float("nan")
    message = (
        "the loss of calibration batch 0 is not finite: nan; these weights hold NaN or Inf: "
        "model.layers.0.mlp.down_proj.weight, model.layers.1.mlp.down_proj.weight"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        calibrate(
            model,
            select(model, "down").projections[-1:],
            ["sensitivity"],
            [zoo.batch("llama")],
            progress=False,
        )


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: m(**b).loss * float("nan"), "loss of calibration batch 0 is not finite"),
        (lambda m, b: m(**b).logits, "scalar"),
        (lambda m, b: 1.0, "scalar"),
    ],
)
def test_a_loss_must_be_a_finite_scalar(loss: Any, message: str) -> None:
    model = zoo.build("llama")
    with pytest.raises(ValueError, match=message):
        calibrate(
            model, select(model, "query").projections, ALL, [zoo.batch("llama")], loss=loss, progress=False
        )


def measured(model: nn.Module, batches: Any, needs: Any = ALL, **options: Any) -> dict[str, Any]:
    options = {"loss": lambda m, b: m(b), "progress": False, **options}
    got = calibrate(model, find_projections(model), needs, batches, **options)
    return {p.name: each for p, each in got.items()}


def plain_sensitivities(model: nn.Module, x: Tensor) -> dict[str, float]:
    """By autograd on the weights of the Linears, one example of x after the other."""
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = dict.fromkeys(linears, 0.0)
    for example in x.split(1):
        model.zero_grad()
        model(example).backward()
        for path, linear in linears.items():
            found[path] += float((linear.weight.detach() * linear.weight.grad).abs().mean()) / len(x)
    model.zero_grad()
    return found


@pytest.mark.parametrize("tokens", [(), (5,)])
def test_outputs_may_be_written_over(tokens: tuple[int, ...]) -> None:
    """A biased product of three dimensions is a view, whose hooks are lost when it is written to."""
    layers, x = [nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)], torch.randn(3, *tokens, 4)
    inside, apart = (Chain(*layers, after=f) for f in (torch.relu_, torch.relu))
    wanted = plain_sensitivities(apart, x)
    for name, each in measured(inside, [x]).items():
        assert each.sensitivity == pytest.approx(wanted[name], rel=1e-5)


def test_an_input_that_is_written_over_is_noticed() -> None:
    class Residual(Chain):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            x = x.clone()
            x += self.layers[0](x)
            return x.square().mean()

    with pytest.raises(ValueError, match="input of layers.0 was overwritten"):
        measured(Residual(nn.Linear(4, 4)), [torch.randn(3, 5, 4)])


@pytest.mark.parametrize("tokens", [(), (5,)])
def test_all_uses_of_a_shared_module_make_one_gradient(tokens: tuple[int, ...]) -> None:
    shared = nn.Linear(4, 4)
    model, x = Chain(shared, shared, nn.Linear(4, 2)), torch.randn(3, *tokens, 4)
    wanted = plain_sensitivities(model, x)["layers.0"]
    assert measured(model, [x])["layers.0"].sensitivity == pytest.approx(wanted, rel=1e-5)


def test_layers_called_by_keyword() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(input=x).square().mean()

    model, x = Named(), torch.randn(3, 5, 4)
    wanted = plain_sensitivities(model, x)["a"]
    assert measured(model, [x])["a"].sensitivity == pytest.approx(wanted, rel=1e-5)


def covariances(family: str, batch: Any, **options: Any) -> dict[str, Tensor]:
    model = zoo.build(family, torch.float64)
    got = calibrate(
        model, select(model, "all-linear").projections, ["covariance"], [batch], progress=False, **options
    )
    return {p.name: each.covariance for p, each in got.items()}


def test_a_mask_of_numbers_is_one_of_truth_values() -> None:
    batch = zoo.batch("bert")
    own, default = covariances("bert", batch, mask=lambda b: b["attention_mask"]), covariances("bert", batch)
    assert all(torch.equal(own[name], default[name]) for name in default)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (lambda b: b["attention_mask"][:, 1:], r"mask= gives \(3, 6\) .* not the \(batch, tokens\)"),
        (lambda b: b["attention_mask"].flatten(), r"mask=: expected \(batch, tokens\) bool"),
        (lambda b: b["attention_mask"].tolist(), "mask=: expected .* got list"),
        (lambda b: b["attention_mask"] < 0, "selects no token"),
    ],
)
def test_a_mask_that_says_nothing_is_an_error(mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        covariances("bert", zoo.batch("bert"), mask=mask)


def test_a_decoders_padding_is_told_by_its_labels() -> None:
    batch = zoo.batch("t5")
    said = {**batch, "decoder_attention_mask": (batch["labels"] != -100).long()}
    told, default = covariances("t5", said), covariances("t5", batch)
    for name, each in told.items():
        torch.testing.assert_close(default[name], each, msg=name)


def test_each_side_of_torch_attention_has_its_own_mask() -> None:
    class Across(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Identity()
            self.decoder = nn.ModuleDict({"multihead_attn": nn.MultiheadAttention(4, 1, batch_first=True)})

        def forward(self, x: Tensor, memory: Tensor, **_: Any) -> Tensor:
            return self.decoder["multihead_attn"](x, memory, memory)[0].mean()

    x, memory = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    batch = {"x": x, "memory": memory, "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    got = measured(Across(), [batch], ["covariance"], loss=lambda m, b: m(**b))

    def scatter(*examples: Tensor) -> Tensor:
        return sum((e - e.mean(0)).T @ (e - e.mean(0)) for e in examples) / 2

    path = "decoder.multihead_attn.in_proj_weight"
    torch.testing.assert_close(got[f"{path}[query]"].covariance, scatter(*x))
    torch.testing.assert_close(got[f"{path}[key]"].covariance, scatter(memory[0], memory[1, :2]))


def test_a_text_mask_is_not_one_of_pixels() -> None:
    model, batch = zoo.build("clip"), zoo.batch("clip")
    tokens = 5  # of an image: 2 × 2 patches and a class
    text = {key: batch[key][:, :tokens] for key in ("input_ids", "attention_mask")}
    text["attention_mask"] = torch.tensor([[1] * tokens, [1, 1, 1, 0, 0], [1] * tokens])
    projections = select(model, "query").projections
    whole, masked = (
        calibrate(
            model, projections, ["covariance"], [{**batch, **text, "attention_mask": mask}], progress=False
        )
        for mask in (torch.ones(3, tokens, dtype=torch.long), text["attention_mask"])
    )
    for p in projections:
        same = torch.allclose(whole[p].covariance, masked[p].covariance)
        assert same == p.module.startswith("vision_model")


def test_one_batch_is_not_a_list_of_them() -> None:
    model = zoo.build("bert")
    with pytest.raises(
        ValueError, match="batches=: expected a list of batches or a DataLoader, got one dict"
    ):
        calibrate(model, select(model, "query").projections, ALL, zoo.batch("bert"), progress=False)


def test_an_empty_loader() -> None:
    model = zoo.build("llama")
    with pytest.raises(ValueError, match="calibration needs batches, and got none"):
        calibrate(model, select(model, "query").projections, ALL, [], progress=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_an_input_names_module_and_batch(value: float) -> None:
    model, good = zoo.build("perceptron"), zoo.batch("perceptron")
    bad = {**good, "x": good["x"].clone()}
    bad["x"][1, 2] = value
    with pytest.raises(ValueError, match=r"NaN or Inf in the input of layers.0 in calibration batch 1"):
        calibrate(
            model, select(model, "all-linear").projections, ["covariance"], [good, bad],
            loss=lambda m, b: m(**b).logits.nan_to_num().sum(), progress=False,
        )  # fmt: skip


def test_an_unknown_statistic() -> None:
    with pytest.raises(ValueError, match="unknown statistics"):
        calibrate(zoo.build("perceptron"), [], ["variance"], [])


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit", "llama"])
def test_tlora_spans_the_reference_space_from_padded_batches_too(family: str) -> None:
    """A against a plain SVD of W·C from single examples (TLoRA, section 3); only its row space matters."""
    batch, policy = zoo.batch(family), presets.tlora(rank=3, allocate=Uniform())
    model = zoo.build(family)
    projections = select(model, "all-linear").projections
    wanted = by_definition(model, projections, singles(batch))
    for batches in ([batch], singles(batch)):
        adapted = lowrank.wrap_model(zoo.build(family), policy, batches=batches, progress=False)
        for p, adapter in adapters_of(adapted).items():
            product = p.weight(model).double() @ wanted[p]["covariance"].double()
            _, S, Vh = torch.linalg.svd(product)
            if 1e-5 * S[0] < S[2] and S[3] < 0.97 * S[2]:  # otherwise the first three are not determined
                overlap = torch.linalg.svdvals(adapter.A.double() @ Vh[:3].T)
                torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=0, atol=1e-3)
            assert not adapter.B.any() and adapter.frozen == {"A"}


# -- on a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("home", [None, "cpu"], ids=["where the inputs are", "cpu"])
@pytest.mark.parametrize("family", ["bert", "llama", "mixtral"])
def test_a_gpu_measures_what_a_cpu_does(family: str, home: str | None) -> None:
    model, batch = zoo.build(family), zoo.batch(family)
    projections = select(model, "all-linear").projections
    wanted = calibrate(model, projections, ALL, [batch], progress=False)
    got = calibrate(model.cuda(), projections, ALL, [batch], device=home, progress=False)
    for p in projections:
        assert got[p].covariance.device.type == got[p].gradient.device.type == (home or "cuda")
        covariance, gradient = got[p].covariance.cpu(), got[p].gradient.cpu()
        torch.testing.assert_close(covariance, wanted[p].covariance, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(gradient, wanted[p].gradient, rtol=1e-3, atol=1e-5)
        assert got[p].sensitivity == pytest.approx(wanted[p].sensitivity, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["pissa", "milora", "olora", "tlora", "eva", "corda", "lora_ga"])
def test_starts_on_a_gpu_are_those_on_a_cpu(preset: str) -> None:
    policy = getattr(presets, preset)(rank=2)
    models = zoo.build("llama"), zoo.build("llama").cuda()
    for model in models:
        lowrank.wrap_model(model, policy, batches=[zoo.batch("llama")], progress=False)
    on_cpu, on_gpu = (adapters_of(model) for model in models)
    for p, adapter in on_cpu.items():
        A, B = (factor.detach() for factor in adapter.factors())
        other_A, other_B = (factor.detach().cpu() for factor in on_gpu[p].factors())
        assert other_A.shape == A.shape
        same_rows(other_A, A)  # signs are free
        if preset == "lora_ga":  # pairs vectors of different numbers, so the signs of B·A are free, too
            same_rows(other_B.T, B.T)
            torch.testing.assert_close(other_B.norm(dim=0), B.norm(dim=0), rtol=1e-3, atol=0)
        else:
            update, allowed = B @ A, 1e-2 * float((B @ A).norm() + 1e-3)
            torch.testing.assert_close(other_B @ other_A, update, rtol=0, atol=allowed)


def same_rows(other: Tensor, wanted: Tensor) -> None:
    """Do the rows of both span the same space?"""
    projectors = [torch.linalg.pinv(each) @ each for each in (other, wanted)]
    torch.testing.assert_close(*projectors, rtol=0, atol=1e-2)
