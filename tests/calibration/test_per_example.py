"""Statistics do not depend on batching: against plain autograd on one unpadded example at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank.calibration import calibrate
from lowrank.models.projections import Projection, Role, find_projections
from lowrank.models.storage import stored_transposed
from lowrank.models.targets import select
from tests import zoo
from tests.helpers import numbers

GRADIENTS = ("sensitivity", "gradient")
ALL = ("covariance", "moment", *GRADIENTS)
LENGTHS = (12, 2, 7)  # so ragged that the labels counted differ by a factor 11

Loss = Callable[[nn.Module, Any], Tensor]


def default(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


def by_tokens(model: nn.Module, batch: Any) -> Tensor:
    """A loss of the user's own, a mean over all counted tokens."""
    logits, labels = (
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits,
        batch["labels"],
    )
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def by_examples(model: nn.Module, batch: Any) -> Tensor:
    """A mean over examples of the mean over each one's tokens; 0 of one with none."""
    logits, labels = (
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits,
        batch["labels"],
    )
    losses = F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], ignore_index=-100, reduction="none")
    return (losses.sum(1) / (labels[:, 1:] != -100).sum(1).clamp_min(1)).mean()


def examples(family: str) -> list[dict[str, Tensor]]:
    """One by one and without padding."""
    made = []
    for i, length in enumerate(LENGTHS):
        ids = torch.randint(3, zoo.VOCABULARY, (1, length), generator=torch.Generator().manual_seed(i))
        mask = torch.ones_like(ids)
        labels = torch.tensor([i % 2]) if family == "bert" else ids.clone()
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def padded(
    examples: list[dict[str, Tensor]], side: str = "right", positions: bool = False
) -> dict[str, Tensor]:
    """All in one batch."""
    longest, fills = max(LENGTHS), {"input_ids": 0, "attention_mask": 0, "labels": -100}

    def fill(key: str, row: Tensor) -> Tensor:
        lacking = longest - row.shape[1] if row.ndim == 2 else 0
        return F.pad(row, (lacking, 0) if side == "left" else (0, lacking), value=fills[key])

    batch = {key: torch.cat([fill(key, each[key]) for each in examples]) for key in fills}
    if positions:
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return batch


def packed(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All in one row, as DataCollatorWithFlattening does."""
    lengths = [each["input_ids"].shape[1] for each in examples]
    labels = [each["labels"].clone() for each in examples]
    for each in labels:
        each[0, 0] = -100
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return {
        "input_ids": torch.cat([each["input_ids"] for each in examples], 1),
        "labels": torch.cat(labels, 1),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
    }


def by_autograd(
    model: nn.Module, projections: list[Projection], examples: list[Any], loss: Loss = default
) -> dict[Projection, tuple[float, Tensor]]:
    """Sensitivity and gradient, with weights that require grad, whoever holds them."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    model.requires_grad_()
    found: dict[Projection, tuple[float, Tensor]] = {}
    for example in examples:
        model.zero_grad()
        loss(model, example).backward()
        for p in projections:
            module = model.get_submodule(p.module)
            gradient = module._parameters[p.param].grad
            gradient = torch.zeros_like(module._parameters[p.param]) if gradient is None else gradient
            gradient = gradient.T if stored_transposed(module) else gradient.reshape(-1, p.in_features)
            own = gradient[numbers(p.rows)] / len(examples)
            sensitivity, total = found.get(p, (0.0, torch.zeros_like(own)))
            found[p] = sensitivity + float((p.weight(model) * own).abs().mean()), total + own
    model.zero_grad()
    return found


def check(
    family: str, batches: list[Any], wanted: dict[Projection, tuple[float, Tensor]], loss: Loss | None = None
) -> None:
    model = zoo.build(family, torch.float64)
    got = calibrate(model, list(wanted), GRADIENTS, batches, loss=loss, progress=False)
    for p, (sensitivity, gradient) in wanted.items():
        assert got[p].sensitivity == pytest.approx(sensitivity, rel=1e-6, abs=1e-12), p.name
        torch.testing.assert_close(got[p].gradient, gradient, rtol=1e-6, atol=1e-10, msg=p.name)


def built(family: str) -> tuple[nn.Module, list[Projection]]:
    model = zoo.build(family, torch.float64)
    return model, select(model, "all-linear").projections


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bert", "t5", "neox", "codegen"])
def test_ragged_batches_measure_what_each_example_gives_alone(family: str) -> None:
    model, projections = built(family)
    alone = examples(family)
    wanted = by_autograd(model, projections, alone)
    check(family, alone, wanted)
    check(family, [padded(alone)], wanted)
    check(family, [padded(alone[:1]), padded(alone[1:])], wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_so_do_those_that_are_padded_on_the_left(family: str) -> None:
    model, projections = built(family)
    alone = examples(family)
    wanted = by_autograd(model, projections, alone)
    for example in alone:
        example["labels"][0, 0] = -100  # else the padding before it is to predict it
    check(family, [padded(alone, "left", positions=True)], wanted)


@pytest.mark.parametrize("family", ["vit", "perceptron", "torch_encoder", "torch_transformer"])
def test_batches_without_padding_measure_it_too(family: str) -> None:
    """`nn.MultiheadAttention`, whose weights no Linear holds, among them."""
    model, projections = built(family)
    batch = zoo.batch(family, torch.float64)
    alone = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(zoo.BATCH)]
    wanted = by_autograd(model, projections, alone)
    check(family, alone, wanted)
    check(family, [batch], wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_packed_sequences_are_examples(family: str) -> None:
    model, projections = built(family)
    alone = examples(family)
    check(family, [packed(alone)], by_autograd(model, projections, alone))


@pytest.mark.parametrize("loss", [by_tokens, by_examples])
def test_it_does_not_matter_what_a_loss_averages_over(loss: Loss) -> None:
    model, projections = built("llama")
    alone = examples("llama")
    wanted = by_autograd(model, projections, alone, loss)
    check("llama", [padded(alone)], wanted, loss)
    check("llama", alone, wanted, loss)


@pytest.mark.parametrize("loss", [default, by_tokens, by_examples])
def test_an_example_without_a_label_counts_for_nothing(loss: Loss) -> None:
    model, projections = built("llama")
    alone = examples("llama")
    wanted = by_autograd(model, projections, [alone[0], alone[2]], loss)
    alone[1]["labels"] = torch.full_like(alone[1]["labels"], -100)
    check("llama", [padded(alone)], wanted, loss)
    check("llama", alone, wanted, loss)


def test_a_label_that_no_causal_model_predicts_counts_for_nothing() -> None:
    model, projections = built("llama")
    alone = examples("llama")
    wanted = by_autograd(model, projections, alone[:1])
    alone[1]["labels"][:, 1:] = -100
    check("llama", alone[:2], wanted)


def test_labels_under_another_name_may_be_missing_too() -> None:
    """The loss of one example is NaN, that of its batch is not: it averages over nothing."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["x"]).logits, batch["target"], ignore_index=7)

    model, projections = built("perceptron")
    x, target = torch.randn(3, 12, dtype=torch.float64), torch.tensor([0, 7, 1])
    alone = [{"x": x[i : i + 1], "target": target[i : i + 1]} for i in (0, 2)]
    check("perceptron", [{"x": x, "target": target}], by_autograd(model, projections, alone, loss), loss)


def test_no_label_at_all_is_an_error() -> None:
    model = zoo.build("llama")
    batch = {**zoo.batch("llama"), "labels": torch.full((zoo.BATCH, zoo.TOKENS), -100)}
    with pytest.raises(ValueError, match="no example of the calibration batches has a label"):
        calibrate(model, select(model, "query").projections, GRADIENTS, [batch], progress=False)


def test_a_loss_that_compares_examples_is_measured_by_the_batch() -> None:
    """CLIP's is 0 for one example: nothing is told apart."""
    model, projections = built("clip")
    batches = [zoo.batch("clip", torch.float64, seed=seed) for seed in (0, 1)]
    wanted = by_autograd(model, projections, batches)
    assert max(sensitivity for sensitivity, _ in wanted.values()) > 1e-6
    check("clip", batches, wanted)


def test_a_tensor_whose_first_dimension_is_tokens_is_not_guessed_at() -> None:
    """As many tokens as examples: the shape tells neither which is which nor a row an example."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=False, dtype=torch.float64)
    x = torch.randn(4, 4, 8, dtype=torch.float64)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        tokens = x.transpose(0, 1)
        return model(tokens, tokens, tokens)[0].square().mean()

    projections = find_projections(model)
    wanted = by_autograd(model, projections, list(x.split(1)), loss)
    got = calibrate(model, projections, ALL, [x], loss=loss, progress=False)
    query = next(p for p in projections if p.role == Role.QUERY)
    centred = x - x.mean(1, keepdim=True)
    scatter = torch.einsum("bti,btj->ij", centred, centred) / 4
    torch.testing.assert_close(got[query].covariance, scatter)
    for p, (sensitivity, gradient) in wanted.items():
        assert got[p].sensitivity == pytest.approx(sensitivity, rel=1e-9)
        torch.testing.assert_close(got[p].gradient, gradient)


# -- experts -------------------------------------------------------------------------------------------------


def routed(model: nn.Module, example: dict[str, Tensor]) -> dict[int, Tensor]:
    """The tokens that the first layer's experts get of an example without padding."""
    model.set_experts_implementation("eager")  # others take no fp64
    seen: dict[str, Tensor] = {}
    hook = model.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda module, args: seen.update(x=args[0].detach(), to=args[1])
    )
    with torch.no_grad():
        model(**example)
    hook.remove()
    return {e: seen["x"][(seen["to"] == e).any(-1)] for e in range(4)}


@pytest.mark.parametrize("side", ["right", "left"])
def test_an_experts_covariance_is_of_each_examples_own_tokens_without_padding(side: str) -> None:
    model, projections = built("mixtral")
    alone = examples("mixtral")
    tokens = [routed(model, example) for example in alone]
    projections = [p for p in projections if "layers.0" in p.module and p.param == "gate_up_proj"]
    assert len(projections) == 8
    for batches in (alone, [padded(alone, side)], [packed(alone)]):
        got = calibrate(model, projections, ["covariance", "moment"], batches, progress=False)
        for p in projections:
            own = [each[int(p.block.split(".")[0])] for each in tokens]
            assert max(map(len, own)) > 1, "else it is centred over all examples"
            scatter = sum((x - x.mean(0)).T @ (x - x.mean(0)) for x in own if len(x)) / len(own)
            torch.testing.assert_close(got[p].covariance, scatter, rtol=1e-6, atol=1e-9)
            x = torch.cat(own)
            torch.testing.assert_close(got[p].moment, x.T @ x / len(x), rtol=1e-6, atol=1e-9)


def test_as_many_tokens_of_an_expert_as_examples_are_tokens() -> None:
    """Four tokens in a batch of four are not one an example."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(2, 6, 5, dtype=torch.float64))
            self.down_proj = nn.Parameter(torch.randn(2, 5, 3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            """The first two tokens of each example go to the first expert, the others to the second."""
            flat, output = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
            for e, index in enumerate(self.routes(len(x), x.shape[1])):
                gate, up = F.linear(flat[index], self.gate_up_proj[e]).chunk(2, -1)
                output[index] = F.linear(gate.sigmoid() * up, self.down_proj[e])
            return output.view_as(x)

        def routes(self, examples: int, tokens: int) -> list[Tensor]:
            every = torch.arange(examples * tokens).view(examples, tokens)
            return [every[:, :2].flatten(), every[:, 2:].flatten()]

    model = nn.Sequential(Experts())
    x = torch.randn(4, 3, 5, dtype=torch.float64)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    projections = find_projections(model)
    wanted = by_autograd(model, projections, list(x.split(1)), loss)
    got = calibrate(model, projections, GRADIENTS, [x], loss=loss, progress=False)
    for p, (sensitivity, gradient) in wanted.items():
        assert got[p].sensitivity == pytest.approx(sensitivity, rel=1e-9)
        torch.testing.assert_close(got[p].gradient, gradient)


class Reads(nn.Module):
    """Uses the weights of two layers without calling them, as Mamba's and WavLM's modules do."""

    def __init__(self, *, and_calls: bool = False) -> None:
        super().__init__()
        self.read = nn.Linear(5, 7)
        self.transposed = Conv1D(7, 7)
        self.called = nn.Linear(7, 3)
        self.and_calls = and_calls
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.read.weight, self.read.bias)
        if self.and_calls:
            hidden = hidden + self.read(x)
        return self.called((hidden.tanh() @ self.transposed.weight).tanh())


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def test_a_weight_that_is_read_and_not_called_has_its_gradient() -> None:
    torch.manual_seed(0)
    model = Reads()
    projections = find_projections(model)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    wanted = by_autograd(model, projections, list(x.split(1)), squares)
    before = dict(model.named_parameters())
    got = calibrate(model, projections, GRADIENTS, [x], loss=squares, progress=False)
    for p, (sensitivity, gradient) in wanted.items():
        assert sensitivity > 0
        assert got[p].sensitivity == pytest.approx(sensitivity, rel=1e-9), p.name
        torch.testing.assert_close(got[p].gradient, gradient, msg=p.name)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_layer_that_is_called_and_read_has_no_sensitivity_to_be_measured() -> None:
    model, x = Reads(and_calls=True), torch.randn(2, 3, 5, dtype=torch.float64)
    projections = find_projections(model)
    with pytest.raises(ValueError, match="^read is called, and its weight is read by other code too"):
        calibrate(model, projections, GRADIENTS, [x], loss=squares, progress=False)
    wanted = by_autograd(model, projections, list(x.split(1)), squares)
    got = calibrate(model, projections, {"gradient"}, [x], loss=squares, progress=False)
    for p, (_, gradient) in wanted.items():
        torch.testing.assert_close(got[p].gradient, gradient, msg=p.name)
