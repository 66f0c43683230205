"""Adapters that nothing uses are named: by `fit`, after a backward, on saving; merging them is refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank import presets
from lowrank.layers import layer
from lowrank.wrapping.unused import unused_layers
from tests.helpers import perturb


class Block(nn.Module):
    """Holds one of its layers where nobody can replace it: in a closure."""

    def __init__(self, passes_by: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        down = self.down
        self.closure = (lambda x: down(x)) if passes_by else None

    def forward(self, x: Tensor) -> Tensor:
        down = self.closure or self.down
        return x + down(F.relu(self.up(x)))


class Branches(nn.Module):
    """Two experts, of which a batch uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.deep = nn.ModuleList([Block(False), Block(False)])

    def forward(self, x: Tensor, which: int = 0) -> Tensor:
        return self.deep[which](self.experts[which](x))


class Model(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.head = block, nn.Linear(8, 2)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.head(self.block(x, **options))


def wrapped(block: nn.Module | None = None, preset: Any = presets.lora) -> tuple[nn.Module, Tensor]:
    model = Model(block or Block())
    lowrank.wrap_model(model, preset(rank=2), progress=False)
    return model, torch.randn(3, 8)


NAMED = r"no forward has used these adapted layers so far: block\.down\. Their adapters have no effect"


# -- named ----------------------------------------------------------------------------------------------


def test_the_first_backward_of_any_training_names_them_once() -> None:
    model, x = wrapped()
    with pytest.warns(UserWarning, match=NAMED):
        model(x).sum().backward()
    up, down = model.block.up.part()[0], model.block.down.part()[0]
    assert up.B.grad is not None and down.A.grad is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x).sum().backward()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_no_hook_is_left_where_all_are_used() -> None:
    model, x = wrapped(Block(passes_by=False))
    assert any(p._post_accumulate_grad_hooks for p in model.parameters())
    model(x).sum().backward()  # a warning would be an error here
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_unwrapped_models_and_copies_say_nothing() -> None:
    model, _ = wrapped(Branches())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(p._post_accumulate_grad_hooks for p in twin.parameters())
    parameters = list(lowrank.adapter_parameters(model))
    lowrank.unwrap(model)
    sum(p.sum() for p in parameters).backward()  # a warning would be an error here


def test_fit_names_their_parameters() -> None:
    model, x = wrapped()
    with (
        pytest.warns(UserWarning, match=NAMED),
        pytest.raises(ValueError, match=r"no gradient to 1 of what is to train: block\.down;"),
    ):
        lowrank.train.fit(model, [x], lambda model, x: model(x).sum(), progress=False)


def test_saving_names_them(tmp_path: Path) -> None:
    model, x = wrapped()
    lowrank.save_adapter(model, tmp_path / "before")  # nothing is known yet
    model(x)
    with pytest.warns(UserWarning, match=NAMED):
        lowrank.save_adapter(model, tmp_path / "after")
    assert (tmp_path / "after" / "adapter.json").is_file()


def test_the_message_stays_short() -> None:
    model = Model(nn.Sequential(*(Block() for _ in range(9))))
    lowrank.wrap_model(model, presets.lora(rank=2), progress=False)
    message = r"no forward has used .*: (block\.\d\.down, ){4}block\.4\.down and 4 more\."
    with pytest.warns(UserWarning, match=message):
        model(torch.randn(3, 8)).sum().backward()


# -- merging --------------------------------------------------------------------------------------------


def test_merging_what_was_passed_by_is_refused_and_nothing_changes() -> None:
    model, x = wrapped()
    perturb(model)
    y = model(x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"block\.down was not used when the model ran.*unwrap\(model\)"):
        lowrank.merge(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(x), y)


def test_merging_what_never_moved_is_harmless() -> None:
    for preset in (presets.lora, presets.pissa):
        model, x = wrapped(preset=preset)
        with torch.no_grad():
            model.block.up.adapters["default"][0].B.normal_()
        y = model(x)
        torch.testing.assert_close(lowrank.merge(model)(x), y)


def test_merging_at_once_after_loading_is_ordinary(tmp_path: Path) -> None:
    model, x = wrapped(Block(passes_by=False))
    lowrank.save_adapter(perturb(model), tmp_path)
    fresh = Model(Block(passes_by=False))
    fresh.load_state_dict(lowrank.unwrap(copy.deepcopy(model)).state_dict())
    y = lowrank.load_adapter(fresh, tmp_path)(x)
    torch.testing.assert_close(lowrank.merge(fresh)(x), y)


def test_a_branch_that_no_batch_reached_may_be_merged() -> None:
    model, x = wrapped(Branches())
    perturb(model)
    wanted = model(x)
    assert unused_layers(model) == ["block.experts.1", "block.deep.1.up", "block.deep.1.down"]
    torch.testing.assert_close(lowrank.merge(model)(x), wanted)


def test_a_later_call_makes_it_used() -> None:
    model, x = wrapped()
    perturb(model)
    model(x)
    model.block.down(torch.randn(3, 12))
    assert unused_layers(model) == []
    lowrank.merge(model)


# -- what is known --------------------------------------------------------------------------------------


def test_only_what_acts_is_used() -> None:
    model, x = wrapped()
    with lowrank.disable_adapters(model):
        model(x)
    assert unused_layers(model) == []  # nothing is known
    F.linear(torch.randn(3, 12), model.block.down.weight)
    assert unused_layers(model) == ["block.up"]
    assert model.block.up.weight.shape == (12, 8)
    assert unused_layers(model) == ["block.up"], "asking for the shape of a weight is no use of it"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own
def test_compiled_code_keeps_no_record_but_the_gradients_tell() -> None:
    torch.compiler.reset()
    model, x = wrapped(preset=presets.pissa)
    perturb(model)
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.warns(UserWarning, match=NAMED):
        compiled(x).sum().backward()
    assert layer.seen_by_compiler() and not model.block.up.used
    model(x)
    assert model.block.up.used and unused_layers(model) == []
    lowrank.merge(model)


def test_checkpointing_that_runs_backward_within_backward() -> None:
    model = Model(nn.Sequential(Block(False), Block(False)))
    lowrank.wrap_model(model, presets.lora(rank=2), progress=False)
    x = torch.randn(3, 8, requires_grad=True)
    y = checkpoint(model.block[1], checkpoint(model.block[0], x, use_reentrant=True), use_reentrant=True)
    y.sum().backward()  # a warning would be an error here
    assert all(p.grad is not None for p in lowrank.adapter_parameters(model))
