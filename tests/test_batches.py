"""Batches of every kind: their loss, mask, counts and device."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding
from transformers.modeling_outputs import SequenceClassifierOutput

from lowrank.batches import (
    attention_mask,
    count_examples,
    count_targets,
    count_tokens,
    model_device,
    output_loss,
    scalar_loss,
    to_device,
)

META = torch.device("meta")


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Plain:
    x: Tensor


class Returns(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, **inputs: Tensor) -> Any:
        return self.output


LOSS = torch.tensor(2.0)


@pytest.mark.parametrize(
    "output", [SimpleNamespace(loss=LOSS), {"loss": LOSS}, SequenceClassifierOutput(loss=LOSS)]
)
def test_default_loss_is_the_outputs(output: Any) -> None:
    assert output_loss(Returns(output), {"x": torch.ones(1)}) is LOSS
    assert output_loss(Returns(output), BatchEncoding({"x": torch.ones(1)})) is LOSS


@pytest.mark.parametrize(
    "output", [SimpleNamespace(loss=None), {"logits": LOSS}, SequenceClassifierOutput(), LOSS]
)
def test_default_loss_asks_for_labels(output: Any) -> None:
    with pytest.raises(ValueError, match=r"Returns returned no loss .* keys \['a', 'b'\]; add labels"):
        output_loss(Returns(output), {"b": LOSS, "a": LOSS})


def test_default_loss_wants_a_mapping() -> None:
    with pytest.raises(ValueError, match=r"expected a mapping, got tuple; pass loss="):
        output_loss(Returns(LOSS), (LOSS, LOSS))


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (torch.ones(3), r"torch.float32 of shape \(3,\)"),
        (torch.tensor(1), r"torch.int64 of shape \(\)"),
        (0.5, "got float"),
    ],
)
def test_a_loss_is_a_scalar(value: Any, got: str) -> None:
    with pytest.raises(ValueError, match=got):
        scalar_loss(lambda model, batch: value, nn.Identity(), None)


def test_mask_is_boolean() -> None:
    kept = torch.tensor([[1, 1, 0], [1, 0, 0]])
    for mask in (kept, kept.bool(), kept.float()):
        assert torch.equal(attention_mask({"attention_mask": mask}), kept.bool())
    assert attention_mask({"input_ids": kept}) is None
    assert attention_mask((kept, kept)) is None


@pytest.mark.parametrize("mask", [torch.ones(2, 1, 3, 3), [[1, 1, 0]]])
def test_a_mask_of_another_shape_is_refused(mask: Any) -> None:
    with pytest.raises(ValueError, match=r"expected \(batch, tokens\), .*; pass mask="):
        attention_mask({"attention_mask": mask})


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict, BatchEncoding])
def test_mappings_move_and_keep_their_type(kind: type[Mapping]) -> None:
    batch = kind({"x": torch.ones(2), "inner": {"y": [torch.ones(1)]}, "name": "a"})
    moved = to_device(batch, META)
    assert type(moved) is kind and set(moved) == {"x", "inner", "name"}
    assert moved["x"].device == moved["inner"]["y"][0].device == META and moved["name"] == "a"
    assert batch["x"].device == batch["inner"]["y"][0].device == torch.device("cpu")


def test_other_containers_move() -> None:
    x = torch.ones(2)
    batch = [x, (x, Pair(x, x)), MappingProxyType({"x": x}), None, 3, defaultdict(list, x=x)]
    moved = to_device(batch, META)
    assert [type(item) for item in moved] == [Tensor, tuple, dict, type(None), int, defaultdict]
    assert type(moved[1][1]) is Pair and moved[5].default_factory is list
    tensors = [moved[0], moved[1][0], *moved[1][1], moved[2]["x"], moved[5]["x"]]
    assert all(tensor.device == META for tensor in tensors)


def test_dataclasses_are_passed_on_and_what_can_move_moves_itself() -> None:
    plain = Plain(torch.ones(2))
    assert to_device(plain, META) is plain
    packed = nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(1)])
    moved = to_device(packed, META)
    assert type(moved) is type(packed) and moved.data.device == META


IDS = torch.zeros(2, 5, dtype=torch.long)
MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
LABELS = torch.tensor([[-100, 4, 4, 4, -100], [-100, 4, -100, -100, -100]])


@pytest.mark.parametrize(
    ("batch", "tokens", "targets", "examples"),
    [
        ({"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}, 6, 4, 2),
        ({"input_ids": IDS, "labels": torch.tensor([0, 1])}, 10, 2, 2),
        ({"pixels": torch.ones(3, 3, 8, 8), "labels": torch.ones(3, 4)}, 3, 3, 3),
        ((torch.ones(4, 7), torch.ones(4)), 4, 4, 4),
        (Pair(torch.tensor(1.0), torch.ones(4)), 4, 4, 4),
        (Plain(torch.ones(3)), 1, 1, 1),
        (torch.ones(0, 3), 0, 0, 0),
    ],
)
def test_counts(batch: Any, tokens: int, targets: int, examples: int) -> None:
    assert (count_tokens(batch), count_targets(batch), count_examples(batch)) == (tokens, targets, examples)


def test_device_of_a_model() -> None:
    assert model_device(nn.Linear(2, 2, device="meta")) == META
    assert model_device(nn.BatchNorm1d(2, affine=False, device="meta")) == META
    assert model_device(nn.Identity()) == torch.device("cpu")


def test_what_is_offloaded_does_not_say_where_inputs_go() -> None:
    """Parameters on the meta device are elsewhere until they are called."""
    model = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2))
    assert model_device(model) == torch.device("cpu")


def test_hooks_say_where_offloaded_parameters_are_used() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    x = torch.randn(3, 2)
    wanted = model(x)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model_device(model) == torch.device("cpu")
    torch.testing.assert_close(model(x.to(model_device(model))), wanted)
    several = accelerate.cpu_offload(nn.Linear(2, 2), execution_device=torch.device("cpu"))
    accelerate.hooks.add_hook_to_module(several, accelerate.hooks.ModelHook(), append=True)
    assert several.weight.is_meta and model_device(several) == torch.device("cpu")
