"""Finding projections tries copies out, and leaves the model and the process as they were."""

from __future__ import annotations

import gc
import itertools
import random
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations

import lowrank
from lowrank import presets
from lowrank.models import copies
from lowrank.models.copies import NoCopyError, copied
from lowrank.models.influence import refilled

CPU = torch.device("cpu")
TOLD = {"alpha": "gate", "beta": "up", "omega": "down"}


class Gated(nn.Module):
    """Names tell nothing, and a trial that is made tells `TOLD`. ``kept`` is whatever a case keeps in it."""

    def __init__(self, kept: Any = None) -> None:
        super().__init__()
        self.alpha, self.beta, self.omega = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6)
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        self.touch(x)
        return self.omega(nn.functional.silu(self.alpha(x)) * self.beta(x))

    def touch(self, x: Tensor) -> None:
        """What a case does beside."""


def with_touch(touch: Callable[[Any, Tensor], Any], kept: Any = None) -> Gated:
    """In a class of its own: a trial is made once for each."""

    class Touched(Gated):
        def touch(self, x: Tensor) -> None:
            touch(self, x)

    return Touched(kept)


def found(block: nn.Module) -> dict[str, str]:
    projections = lowrank.find_projections(nn.ModuleDict({"block": block}))
    return {p.module.removeprefix("block."): p.role.value for p in projections}


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


# -- what a block holds -------------------------------------------------------------------------------


def append(block: Any, x: Tensor) -> None:
    block.kept["inner"].append(x)


def set_attribute(block: Any, x: Tensor) -> None:
    block.kept.last = x


def add_in_place(block: Any, x: Tensor) -> None:
    block.kept.add_(1)


def add_in_numpy(block: Any, x: Tensor) -> None:
    np.add(block.kept, 1, out=block.kept)


def count(block: Any, x: Tensor) -> None:
    next(block.kept)


def draw(block: Any, x: Tensor) -> None:
    torch.rand(3, generator=block.kept)


@pytest.mark.parametrize(
    ("touch", "make", "state"),
    [
        (append, lambda: {"inner": []}, lambda kept: len(kept["inner"])),
        (set_attribute, SimpleNamespace, lambda kept: vars(kept).copy()),
        (add_in_place, lambda: torch.zeros(3), lambda kept: kept.tolist()),
        (add_in_numpy, lambda: np.zeros(3), lambda kept: kept.tolist()),
        (count, itertools.count, repr),
        (draw, torch.Generator, lambda kept: kept.get_state().tolist()),
    ],
    ids=["a list in a dict", "an object", "a tensor", "an array", "an iterator", "a generator"],
)
def test_what_a_block_keeps_is_copied(
    touch: Any, make: Callable[[], Any], state: Callable[[Any], Any]
) -> None:
    block = with_touch(touch, make())
    before = state(block.kept)
    assert found(block) == TOLD
    assert state(block.kept) == before
    block(torch.randn(2, 6))
    assert state(block.kept) != before, "the case does nothing"


def test_a_method_and_a_closure_over_the_block_become_the_copys() -> None:
    block = with_touch(lambda block, x: [each(x) for each in block.kept])
    block.counter = Counter()
    block.kept = [block.counter.forward, lambda x: block.counter(x)]
    assert found(block) == TOLD
    assert block.counter.calls == 0
    block(torch.randn(2, 6))
    assert block.counter.calls == 2


def test_a_block_that_is_compiled_in_place_is_not_run() -> None:
    block = with_touch(lambda block, x: None)
    seen: list[Any] = []
    block.register_forward_hook(lambda module, args, y: seen.append(module))
    block.compile(backend="eager")
    assert found(block) == TOLD and seen == []


class OpenFile:
    """Holds a file, in which each call leaves a line."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w")

    def __call__(self, x: Tensor) -> None:
        self.file.write("called\n")
        self.file.flush()


def test_what_cannot_be_copied_is_not_tried(tmp_path: Path) -> None:
    elsewhere, path = Counter(), tmp_path / "log"
    lock, log = threading.Lock(), OpenFile(path)
    cases = {
        "a list of modules": with_touch(lambda block, x: block.kept[0](x), [elsewhere]),
        "a closure over a module": with_touch(lambda block, x: block.kept(x), lambda x: elsewhere(x)),
        "a weak reference": with_touch(lambda block, x: block.kept()(x), weakref.ref(elsewhere)),
        "a lock": with_touch(lambda block, x: block.kept.acquire(blocking=False), lock),
        "a file": with_touch(lambda block, x: block.kept(x), log),
        "a tensor on the meta device": with_touch(lambda block, x: None, torch.zeros(2, device="meta")),
    }
    for name, block in cases.items():
        assert set(found(block).values()) == {"other"}, name
    assert elsewhere.calls == 0 and not lock.locked() and path.read_text() == ""
    log.file.close()
    for block in list(cases.values())[:3]:
        block(torch.randn(2, 6))
    assert elsewhere.calls == 3


def test_a_scripted_block_is_left_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.trace(Gated().eval(), torch.randn(2, 6))
    assert found(scripted) == {}
    with pytest.raises(NoCopyError, match="TorchScript"):
        copied(scripted, torch.clone, CPU)


def test_a_block_too_large_for_a_copy_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    block = with_touch(lambda block, x: None)
    numbers = sum(p.numel() for p in block.parameters())
    monkeypatch.setattr(copies, "MOST", numbers - 1)
    assert set(found(block).values()) == {"other"}
    monkeypatch.setattr(copies, "MOST", numbers)
    assert found(with_touch(lambda block, x: None)) == TOLD


def test_numbers_that_are_too_many_are_counted_before_any_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    block, made = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)), list[Tensor]()
    monkeypatch.setattr(copies, "MOST", 8 + 2 * 20 + 8)  # one less than with the batches that it has seen

    def new(tensor: Tensor) -> Tensor:
        made.append(tensor)
        return tensor.clone()

    with pytest.raises(NoCopyError, match="more than 56 numbers"):
        copied(block, new, CPU)
    assert not made
    weight = block[0].weight
    copied(block, new, CPU, {id(weight): weight.detach()})
    assert made


def test_a_module_whose_train_gives_nothing() -> None:
    class Silent(Gated):
        def train(self, mode: bool = True) -> None:  # type: ignore[override]
            super().train(mode)

    assert found(Silent()) == TOLD


def test_a_copy_is_tied_where_the_module_is_and_shares_no_numbers() -> None:
    block = Gated()
    block.beta.weight = block.alpha.weight
    copy = refilled(block)
    assert copy.alpha.weight is copy.beta.weight
    own = {p.data_ptr() for p in block.parameters()}
    assert not own & {p.data_ptr() for p in copy.parameters()}
    assert not copy.training and not any(p.requires_grad for p in copy.parameters())


def test_a_layer_without_parameters_beside_it() -> None:
    """All that it holds are buffers."""
    block = with_touch(lambda block, x: None)
    for layer in (block.alpha, block.beta, block.omega):
        for name in ("weight", "bias"):
            held = getattr(layer, name).detach()
            delattr(layer, name)
            layer.register_buffer(name, held)
    assert found(block) == TOLD


def test_a_trial_does_not_keep_the_model() -> None:
    class Block(Gated):
        def touch(self, x: Tensor) -> None:
            self.kept(x)

    def build() -> Gated:
        block = Block()
        block.inner = nn.Identity()
        block.kept = lambda x: block.inner(x)
        return block

    block = build()
    assert found(block)["omega"] == "down"
    gone = weakref.ref(block)
    del block
    gc.collect()
    assert gone() is None


# -- the process --------------------------------------------------------------------------------------


def test_no_generator_moves() -> None:
    def touch(block: Any, x: Tensor) -> Any:
        torch.rand(1), random.random(), np.random.rand()

    def numbers() -> list[float]:
        return [float(torch.rand(1)), random.random(), float(np.random.rand())]

    block = with_touch(touch)
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    wanted = numbers()
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    assert found(block) == TOLD
    assert numbers() == wanted


def test_a_hook_of_all_modules_sees_no_copy() -> None:
    seen: list[nn.Module] = []
    block = with_touch(lambda block, x: None)
    handle = register_module_forward_hook(lambda module, args, y: seen.append(module))
    try:
        assert found(block) == TOLD
        assert seen == []
        block(torch.randn(2, 6))
        assert len(seen) == 4
    finally:
        handle.remove()


@contextmanager
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "around",
    [
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode,
        torch.no_grad,
        default_dtype,
    ],
    ids=["default device", "autocast", "inference", "no grad", "default dtype"],
)
def test_the_same_is_found_whatever_is_switched_on(around: Callable[[], Any]) -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T + self.bias + torch.zeros(1)

    block = with_touch(lambda block, x: x + torch.zeros(x.shape[-1], dtype=x.dtype))
    block.omega = Own(10, 6)
    with around():
        assert found(block) == TOLD


# -- the module itself --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parametrized",
    [parametrizations.spectral_norm, parametrizations.weight_norm, parametrizations.orthogonal],
)
def test_a_weight_that_is_computed_is_not_read(parametrized: Callable[[nn.Module], nn.Module]) -> None:
    block = with_touch(lambda block, x: None).train()
    parametrized(block.alpha)
    calls: list[Any] = []
    for each in block.alpha.parametrizations["weight"]:
        each.register_forward_hook(lambda *args: calls.append(args))
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    assert found(block)["alpha"] in ("gate", "other")
    assert calls == []
    assert all(tensor.equal(before[name]) for name, tensor in block.state_dict().items())
    with pytest.raises(ValueError, match=r"block.alpha: its weight is no parameter"):
        lowrank.plan_model(nn.ModuleDict({"block": block}), presets.lora(rank=2, target="alpha"))


def test_an_embedding_with_a_forward_of_its_own_is_tried_as_a_copy() -> None:
    class Noted(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            self.kept.append(ids)
            torch.rand(1)
            return super().forward(ids) * 2

    class Bent(Noted):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids).tanh()

    for cls in (Noted, Bent):
        layer = cls(8, 4)
        layer.kept = []  # type: ignore[assignment]
        layer.register_forward_hook(lambda module, args, y: module.kept.append(y))
        model = nn.ModuleDict({"block": layer, "body": nn.Linear(4, 4)})
        torch.manual_seed(0)
        policy = presets.lora(rank=2, target="block")
        if cls is Noted:
            assert [p.module for p in lowrank.plan_model(model, policy)] == ["block"]
        else:
            with pytest.raises(ValueError, match="not linear in its weight"):
                lowrank.plan_model(model, policy)
        after = torch.rand(3)
        torch.manual_seed(0)
        assert layer.kept == [] and after.equal(torch.rand(3))


@pytest.mark.gpu
def test_blocks_of_a_gpu_are_tried_on_the_cpu() -> None:
    """A wrong guess there, such as an index out of range, would end all work on the device."""

    class Indexed(Gated):
        def touch(self, x: Tensor) -> None:
            table = torch.zeros(3, device=x.device)
            self.kept = table[(x * 1000).long().flatten()]

    block = Indexed().cuda()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    states = torch.cuda.get_rng_state_all()
    assert set(found(block).values()) == {"other"}
    assert torch.cuda.max_memory_allocated() == held
    torch.cuda.synchronize()
    assert all(a.equal(b) for a, b in zip(states, torch.cuda.get_rng_state_all(), strict=True))
    assert found(with_touch(lambda block, x: None).cuda()) == TOLD
