"""Running statistics of a wrapped base stand still, and what changes in it all the same is named."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import presets
from lowrank.train import fit
from tests.helpers import perturb


class Noted(nn.Module):
    """Keeps a running mean of its own, as a vector quantizer does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean


def with_norm(case: str = "batch norm") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), NORMS[case](), nn.Linear(6, 3))
    for _ in range(3):  # it has statistics
        model(3 * torch.randn(16, 6) + 1)
    return model


NORMS: dict[str, Any] = {
    "batch norm": lambda: nn.BatchNorm1d(6),
    "without weights": lambda: nn.BatchNorm1d(6, affine=False),
    "cumulative": lambda: nn.BatchNorm1d(6, momentum=None),
    "synchronized": lambda: nn.SyncBatchNorm(6),
    "instance norm": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()
    ),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
    "older spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(6, 6)),
}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def batches(count: int = 6) -> Iterator[Any]:
    torch.manual_seed(1)
    for _ in range(count):
        yield 2 * torch.randn(16, 6) - 1, torch.randint(0, 3, (16,))


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train(model: nn.Module) -> None:
    fit(model, list(batches()), lr=1e-2, loss=loss, progress=False)


@pytest.mark.parametrize("case", NORMS)
@pytest.mark.parametrize("mode", [True, False])
def test_statistics_of_the_base_stand_still(case: str, mode: bool, tmp_path: Path) -> None:
    base, untouched = with_norm(case).train(mode), with_norm(case).train(mode)
    before = state(base)
    model = lowrank.wrap_model(base, presets.lora(rank=2, target=("0", "2")), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model)
        x = next(iter(batches()))[0]
        if case != "synchronized":  # which computes on a GPU alone in training mode
            model.train()
            model(x)
        model.eval()
        lowrank.save_adapter(model, tmp_path / "own")
        lowrank.export_peft(model, tmp_path / "peft")
    again = lowrank.load_adapter(untouched, tmp_path / "own").eval()
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    model.train(mode)
    plain = lowrank.unwrap(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())
    assert all(module.training == mode for module in plain.modules())
    assert all("train" not in module.__dict__ for module in plain.modules())


def test_a_norm_computes_the_same_in_training_as_afterwards() -> None:
    model = lowrank.wrap_model(with_norm(), presets.lora(rank=2), progress=False)
    x = torch.randn(8, 6)
    assert torch.equal(perturb(model).train()(x), model.eval()(x))


def test_a_norm_that_is_trained_moves_its_own_statistics(tmp_path: Path) -> None:
    base = with_norm()
    before, untouched = state(base), copy.deepcopy(base)
    model = lowrank.wrap_model(base, presets.lora(rank=2, target=("0", "2"), train=("1",)), progress=False)
    train(model)
    own = model[1].copies["default"]
    assert not torch.equal(own.running_mean, before["1.running_mean"])
    lowrank.save_adapter(model, tmp_path)
    x = next(iter(batches()))[0]
    assert torch.equal(lowrank.load_adapter(untouched, tmp_path).eval()(x), model.eval()(x))
    with lowrank.disable_adapters(model):  # nor do the base's, where it computes itself
        model.train()(x)
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in lowrank.unwrap(model).state_dict().items()
    )


def test_a_second_adapter_finds_and_leaves_the_modes(tmp_path: Path) -> None:
    base = with_norm().train()
    model = lowrank.wrap_model(base, presets.lora(rank=2), name="a", progress=False)
    lowrank.add_adapter(
        model, presets.lora(rank=2, target=("0", "2"), train=("1",)), name="b", progress=False
    )
    assert model[1].copies["b"].training and not model[1].base.training
    lowrank.remove_adapter(model, "b")
    assert not model[1].training
    assert lowrank.remove_adapter(model, "a")[1].training


def test_a_norm_that_was_put_into_evaluation_stays_there() -> None:
    base = with_norm().train()
    base[1].eval()
    assert not lowrank.unwrap(lowrank.wrap_model(base, presets.lora(rank=2), progress=False))[1].training
    assert base[0].training


def test_copies_of_the_model_hold_their_own() -> None:
    model = lowrank.wrap_model(with_norm(), presets.lora(rank=2), progress=False)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = made[1].running_mean.clone()
        made.train()(torch.randn(8, 6))
        assert torch.equal(made[1].running_mean, before)
        assert lowrank.unwrap(made.train())[1].training
    assert not model.train()[1].training


def test_other_buffers_that_change_are_named(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(6, 6), Noted(), nn.Linear(6, 3))
    untouched = copy.deepcopy(base)
    model = lowrank.wrap_model(base, presets.lora(rank=2), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowrank.save_adapter(model, tmp_path / "before")
    train(model)
    message = r"buffers of the base have changed since it was wrapped.*: 1\.mean; name their modules"
    with pytest.warns(lowrank.UnsavedParametersWarning, match=message):
        lowrank.save_adapter(model, tmp_path / "after")
    with pytest.warns(lowrank.UnsavedParametersWarning, match=message):
        lowrank.export_peft(model, tmp_path / "peft")
    assert lowrank.load_adapter(untouched, tmp_path / "after") is untouched


def test_a_buffer_of_a_trained_module_is_saved_with_it(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(6, 6), Noted(), nn.Linear(6, 3))
    untouched = copy.deepcopy(base)
    model = lowrank.wrap_model(base, presets.lora(rank=2, train=("1",)), progress=False)
    train(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowrank.save_adapter(model, tmp_path)
    x = next(iter(batches()))[0]
    assert torch.equal(lowrank.load_adapter(untouched, tmp_path).eval()(x), model.eval()(x))


def test_parameters_of_the_base_that_train_are_named_where_they_are_not_written(tmp_path: Path) -> None:
    model = lowrank.wrap_model(with_norm(), presets.lora(rank=2), progress=False)
    model[1].weight.requires_grad_()
    message = r"require grad.*: 1\.weight; name their"
    for write in (lowrank.export_peft, lowrank.save_adapter):
        with pytest.warns(lowrank.UnsavedParametersWarning, match=message) as seen:
            write(model, tmp_path / write.__name__)
        assert seen[0].filename == __file__
