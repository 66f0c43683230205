"""The choice among candidates: what is timed and when, when nothing is, and that training never notices."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank import notices, presets
from lowrank.layers import functional, tuning, tuning_cache
from lowrank.layers.block import Block
from lowrank.layers.functional import fused_lora
from lowrank.layers.tuning import REPEATS, WARM_UP, Tuned, case_of, switched
from tests.layers.test_functional import IN, OUT, Count, make_blocks

ROOT = Path(__file__).parents[2]


class Clock:
    """Time that passes only where a candidate says so; `marks` counts how often it is looked at."""

    def __init__(self) -> None:
        self.now, self.marks = 0.0, 0

    def mark(self) -> float:
        self.marks += 1
        return self.now

    def taking(self, seconds: float, calls: list[str], name: str) -> Callable[..., str]:
        def run(*arguments: Any) -> str:
            self.now += seconds
            calls.append(name)
            return name

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tuning, "clock_of", lambda device: (clock.mark, lambda start, end: end - start))
    return clock


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of its own for each test, nothing known and nothing said."""
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning_cache, "_here", {})
    monkeypatch.setattr(notices, "_said", set())
    monkeypatch.setattr(tuning, "_on", False)
    monkeypatch.setattr(functional.ORDERS, "chosen", {})


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets what only memory knows."""
    monkeypatch.setattr(tuning_cache, "_here", {})
    functional.ORDERS.chosen.clear()


def tensors(tokens: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.ones(tokens, IN, dtype=dtype), torch.ones(OUT, IN, dtype=dtype)


def choose(tuned: Tuned, tokens: int = 8, **kw: Any) -> str:
    x, weight = tensors(tokens, **kw)
    return tuned.choice(case_of(x, weight, None, 4, False), (x, weight))


def racing(clock: Clock, first: float, second: float) -> tuple[Tuned, list[str]]:
    calls: list[str] = []
    both = {"first": clock.taking(first, calls, "first"), "second": clock.taking(second, calls, "second")}
    return Tuned("test", both), calls


@pytest.mark.parametrize(
    ("second", "choice"), [(0.5, "second"), (0.97, "second"), (0.99, "first"), (1.0, "first"), (2.0, "first")]
)
def test_the_fastest_is_kept_if_it_saves_two_percent(clock: Clock, second: float, choice: str) -> None:
    tuned, calls = racing(clock, 1e-3, second * 1e-3)
    assert choose(tuned) == choice
    assert calls.count("first") == calls.count("second") == WARM_UP + REPEATS
    marks = clock.marks
    assert [choose(tuned) for _ in range(3)] == [choice] * 3
    assert len(calls) == 2 * (WARM_UP + REPEATS) and clock.marks == marks  # decided: nothing runs, no clock


def test_long_products_are_timed_once(clock: Clock) -> None:
    tuned, calls = racing(clock, 3.0, 1.0)
    assert choose(tuned) == "second" and len(calls) == 2 * (WARM_UP + 1)


def test_the_first_calls_and_a_disturbed_one_do_not_count(clock: Clock) -> None:
    calls: list[str] = []
    base = clock.taking(1e-3, calls, "first")

    def warming_up(*arguments: Any) -> None:
        turn = calls.count("second")
        clock.taking(0.1 if turn < WARM_UP or turn == WARM_UP + 2 else 5e-4, calls, "second")()

    assert choose(Tuned("test", {"first": base, "second": warming_up})) == "second"


def test_each_case_is_decided_for_itself(clock: Clock) -> None:
    tuned, _ = racing(clock, 1e-3, 5e-4)
    x, weight = tensors(8)
    base: dict[str, Any] = {"x": x, "weight": weight, "bias": None, "rank": 4, "anchored": False}
    same = [{"x": x[:5]}, {"x": x.view(2, 4, IN)}]
    others = [
        {"x": x[:4]},
        {"x": torch.ones(9, IN)},
        {"weight": weight[:-1]},
        {"weight": torch.ones(IN, OUT).t()},
        {"bias": torch.ones(OUT)},
        {"rank": 5},
        {"anchored": True},
        {"x": x.double(), "weight": weight.double()},
        {"x": x.to("meta")},
    ]
    assert {case_of(**{**base, **change}) for change in same} == {case_of(**base)}
    assert len({case_of(**{**base, **change}) for change in [{}, *others]}) == 1 + len(others)
    for change in [{}, *others[:-1]]:
        given = {**base, **change}
        assert tuned.choice(case_of(**given), (given["x"], given["weight"])) == "second"
    assert len(lowrank.tuning_report().rows) == len(others)


def test_a_failing_candidate_is_dropped_and_told_once(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[str] = []

    def failing(*arguments: Any) -> None:
        raise RuntimeError("no such kernel")

    tuned = Tuned("test", {"failing": failing, "other": clock.taking(1e-3, calls, "other")})
    assert choose(tuned) == choose(tuned, 100) == "other"
    assert [record.message for record in caplog.records] == [
        "test: 'failing' failed on cpu and is not used: no such kernel"
    ]
    assert not list(tuning_cache.folder().glob("*"))  # it may work next time


def test_where_all_fail_or_the_clock_does_it_is_the_first(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*arguments: Any) -> None:
        raise RuntimeError("broken")

    assert choose(Tuned("test", {"one": failing, "two": failing})) == "one"
    monkeypatch.setattr(tuning, "clock_of", failing)
    tuned = Tuned("other", {"one": print, "two": print})
    assert choose(tuned) == choose(tuned) == "one"
    assert len(caplog.records) == 3 and "tuning of the product for 20×24" in caplog.records[-1].message


def test_an_interrupt_is_not_swallowed(clock: Clock) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    tuned = Tuned("test", {"one": interrupted})
    with pytest.raises(KeyboardInterrupt):
        choose(tuned)
    tuned.candidates["one"] = clock.taking(1.0, [], "one")
    assert choose(tuned) == "one" and tuned.chosen  # the lock was given back


def test_random_numbers_and_grad_mode_are_as_before(clock: Clock) -> None:
    modes = []

    def drawing(*arguments: Any) -> None:
        modes.append(torch.is_grad_enabled())
        torch.rand(3)

    state = torch.get_rng_state()
    choose(Tuned("test", {"one": drawing, "two": drawing}))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() and set(modes) == {False}


def test_a_second_thread_does_not_wait(clock: Clock) -> None:
    """While one thread measures, another gets the first candidate at once, also one that asks from within."""
    tuned, inside = Tuned("test", {"one": print, "two": print}), []

    def asking(*arguments: Any) -> None:
        thread = threading.Thread(target=lambda: inside.append(choose(tuned)))
        thread.start()
        thread.join(60)
        assert not thread.is_alive()

    tuned.candidates = {"one": asking, "two": clock.taking(0.0, [], "two")}
    tuned.candidates["one"] = lambda *arguments: (asking(), setattr(clock, "now", clock.now + 1e-3))
    assert choose(tuned) == "two"
    assert set(inside) == {"one"}


# What is kept


def test_a_later_process_takes_what_was_found(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, calls = racing(clock, 1e-3, 5e-4)
    choose(tuned)
    new_process(monkeypatch)
    again, more = racing(clock, 1e-3, 1.0)
    assert choose(again) == "second" and not more and calls
    for attribute, value in ((torch, "9.9"), (lowrank, "9.9")):
        new_process(monkeypatch)
        with monkeypatch.context() as patched:
            patched.setattr(attribute, "__version__", value)
            tuned, calls = racing(clock, 1e-3, 5e-4)
            assert choose(tuned) == "second" and calls  # another version tries for itself
            assert len(lowrank.tuning_report().rows) == 1
    new_process(monkeypatch)
    (row,) = lowrank.tuning_report().rows  # and what this version has found is still there
    assert row.choice == "second" and row.times == pytest.approx({"first": 1e-3, "second": 5e-4})


def test_other_candidates_are_tried(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(racing(clock, 1e-3, 5e-4)[0])
    new_process(monkeypatch)
    tuned, calls = racing(clock, 1e-3, 5e-4)
    tuned.candidates["third"] = clock.taking(1e-4, calls, "third")
    assert choose(tuned) == "third"


def good() -> str:
    """The content of the one file of the cache."""
    (path,) = tuning_cache.folder().iterdir()
    return path.read_text()


HOSTILE: dict[str, Callable[[str], str]] = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "no object": lambda text: "[1, 2]",
    "another program's": lambda text: '{"a": 1}',
    "another format": lambda text: text.replace("tuning 1", "tuning 2"),
    "another device": lambda text: text.replace('"device": "', '"device": "x'),
    "unknown choice": lambda text: text.replace('"choice": "second"', '"choice": "rm"'),
    "choice is no text": lambda text: text.replace('"choice": "second"', '"choice": ["second"]'),
    "times are text": lambda text: text.replace('"first": ', '"first": "1", "third": '),
    "a time is not finite": lambda text: text.replace('"first": ', '"first": NaN, "third": '),
    "a time is negative": lambda text: text.replace('"first": ', '"first": -'),
    "no times": lambda text: text.replace('"times"', '"items"'),
    "nested": lambda text: "[" * 100_000,
    "bytes": lambda text: "\x00\ud800" + text,
}


@pytest.mark.parametrize("change", HOSTILE)
def test_a_bad_file_is_ignored_told_once_and_replaced(
    change: str, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    choose(racing(clock, 1e-3, 5e-4)[0])
    before = good()
    (path,) = tuning_cache.folder().iterdir()
    bad = HOSTILE[change](before)
    assert bad != before
    path.write_bytes(bad.encode(errors="surrogatepass"))
    new_process(monkeypatch)
    tuned, calls = racing(clock, 1e-3, 5e-4)
    assert choose(tuned) == "second" and calls
    assert len(caplog.records) == 1 and "is ignored, and replaced" in caplog.text
    new_process(monkeypatch)
    tuned, calls = racing(clock, 1e-3, 5e-4)
    assert choose(tuned) == "second" and not calls
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "kind", ["a file is in the way", "cannot be written", "a folder is in the way", "no home"]
)
def test_a_folder_that_cannot_be_used_is_told_once(
    kind: str, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tuning_cache.folder()
    if kind == "a file is in the way":
        folder.parent.write_text("")
    elif kind == "cannot be written":  # for root every folder can be

        def read_only(*arguments: Any) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(tuning_cache.files, "write", read_only)
    elif kind == "a folder is in the way":
        tuning_cache.path_of(tuning.device_name(torch.device("cpu"))).mkdir(parents=True)
    else:
        monkeypatch.delenv("LOWRANK_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    tuned, calls = racing(clock, 1e-3, 5e-4)
    assert choose(tuned) == choose(tuned, 100) == "second"
    assert len(calls) == 4 * (WARM_UP + REPEATS)
    assert sum("cannot be kept" in record.message for record in caplog.records) == 1
    assert len(lowrank.tuning_report().rows) == 2  # this process knows it


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tuning_cache.folder() == tmp_path / "cache" / "tuning"
    monkeypatch.delenv("LOWRANK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning_cache.folder() == tmp_path / "lowrank" / "tuning"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert tuning_cache.folder() == Path.home() / ".cache" / "lowrank" / "tuning"
    path = tuning_cache.path_of("../../NVIDIA H100 80GB\x00/etc")
    assert path.parent == tuning_cache.folder() and path.name == "NVIDIA-H100-80GB-etc.json"


def test_what_others_write_meanwhile_stays(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(racing(clock, 1e-3, 5e-4)[0], 8)
    new_process(monkeypatch)
    choose(racing(clock, 1e-3, 5e-4)[0], 100)
    new_process(monkeypatch)
    assert len(lowrank.tuning_report().rows) == 2


def test_the_report_is_a_table(clock: Clock) -> None:
    assert str(lowrank.tuning_report()).startswith("Nothing has been tuned yet")
    choose(racing(clock, 1e-3, 5e-4)[0], dtype=torch.bfloat16)
    device, head, _, row = str(lowrank.tuning_report()).splitlines()
    assert device == tuning.device_name(torch.device("cpu"))
    assert head.split() == ["µs", "first", "second", "choice"]
    assert row.split("  ") == ["test, 20×24, rank 4, bfloat16, up to 8 tokens", "1,000.0", " 500.0", "second"]


# When nothing is tried


def counted(monkeypatch: pytest.MonkeyPatch, faster: str = "update first") -> list[str]:
    """The candidates of the fused product that are run to be timed, of which one is ten times as fast."""
    calls: list[str] = []
    clock = Clock()
    monkeypatch.setattr(tuning, "clock_of", lambda device: (clock.mark, lambda start, end: end - start))

    def timed(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        passing = clock.taking(1e-4 if name == faster else 1e-3, calls, name)
        return lambda *arguments: (passing(), run(*arguments))[1]

    candidates = {name: timed(name, run) for name, run in functional.ORDERS.candidates.items()}
    monkeypatch.setattr(functional.ORDERS, "candidates", candidates)
    return calls


def one_pair(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, list[Block]]:
    x = torch.randn(2, 5, IN, dtype=dtype, requires_grad=True)
    return x, torch.randn(OUT, IN, dtype=dtype), make_blocks("one", start=True)


class Order:
    """Which of the two orders `fused_lora` takes: the update first is one addition to an (N, out) less."""

    def __call__(self, *arguments: Any, **kw: Any) -> str:
        taken: list[bool] = []
        apply = functional.SingleProduct.apply
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(
                functional.SingleProduct, "apply", lambda *given: (taken.append(given[-1]), apply(*given))[1]
            )
            fused_lora(*arguments, **kw)
        return "base first" if taken[-1] else "update first"


order = Order()


@pytest.mark.parametrize("faster", ["base first", "update first"])
@pytest.mark.parametrize("layout", ["one", "anchored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_product_of_one_adapter_takes_the_faster_order(
    faster: str, layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch, faster)
    x = torch.randn(2, 5, IN, dtype=dtype, requires_grad=True)
    weight, (block,) = torch.randn(OUT, IN, dtype=dtype), make_blocks(layout)
    leaves = [x, block.A, block.B]
    with switched(True):
        assert order(x, weight, None, [block]) == faster
        assert len(calls) == 2 * (WARM_UP + REPEATS)
        y = fused_lora(x, weight, None, [block])
        assert len(calls) == 2 * (WARM_UP + REPEATS)
    wanted = fused_lora(x, weight, None, [block], exact=faster == "base first")
    assert torch.equal(y, wanted)
    dY = torch.randn_like(y)
    for got, reference in zip(
        torch.autograd.grad(y, leaves, dY), torch.autograd.grad(wanted, leaves, dY), strict=True
    ):
        assert torch.equal(got, reference)


def test_the_default_on_the_cpu_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    x, weight, blocks = one_pair()
    assert order(x, weight, None, blocks) == "base first"
    assert torch.equal(fused_lora(x, weight, None, blocks), F.linear(x, weight)) and not calls
    for exact in (True, False):
        with switched(True):  # what is asked for stays
            assert order(x, weight, None, blocks, exact=exact) == ("base first" if exact else "update first")
    assert not calls


def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def off() -> Iterator[None]:
    with switched(False):
        yield


def recorded() -> Iterator[None]:
    with Count():
        yield


@pytest.mark.parametrize("kind", [deterministic, off, recorded])
@pytest.mark.parametrize("decided", [False, True])
def test_the_base_is_first_where_tuning_is_off(
    kind: Callable[[], Iterator[None]], decided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    x, weight, blocks = one_pair()
    with switched(True):
        if decided:
            assert order(x, weight, None, blocks) == "update first"
        known = len(calls)
        for _ in kind():
            assert order(x, weight, None, blocks) == "base first"
        assert len(calls) == known
        assert order(x, weight, None, blocks) == "update first"


def test_without_grad_and_under_transforms_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    x, weight, blocks = one_pair()
    with switched(True):
        with torch.no_grad():
            assert torch.equal(fused_lora(x, weight, None, blocks), F.linear(x, weight))
            assert order(x, weight, None, blocks, dropout=0.5) == "base first"
        with torch.inference_mode():
            fused_lora(x, weight, None, blocks)
        torch.func.grad(lambda x: fused_lora(x, weight, None, blocks).sum())(x)
        torch.func.vmap(lambda x: fused_lora(x, weight, None, blocks))(x)
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(t) for t in (x, weight, *blocks[0][1:3])]
            block = blocks[0]._replace(A=fake[2], B=fake[3])
            assert fused_lora(fake[0], fake[1], None, [block]).shape == (2, 5, OUT)
        assert fused_lora(fake[0], fake[1], None, [block]).shape == (2, 5, OUT)  # outside its mode too
        fused_lora(x[:0], weight, None, blocks)
        empty = [tensor.to("meta") for tensor in (x, weight)]
        assert functional.ORDERS.choice(case_of(*empty, None, 4, False), tuple(empty)) == "base first"
    assert not calls and not list(tuning_cache.folder().glob("*"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # its own, of instances of Function
def test_compiled_code_has_the_base_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    x, weight, blocks = one_pair()
    torch.compiler.reset()
    with switched(True):
        step = torch.compile(lambda x: fused_lora(x, weight, None, blocks), backend="eager", fullgraph=True)
        step(x).sum().backward()
    assert not calls


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_may_meet_another_order(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decided between forward and its recomputation: the gradients are right."""
    calls = counted(monkeypatch)
    x, weight, blocks = one_pair()
    leaves = [x, blocks[0].A, blocks[0].B]
    y = checkpoint(lambda x: fused_lora(x, weight, None, blocks).square(), x, use_reentrant=reentrant)
    with switched(True):
        y.sum().backward()
    assert calls
    got = [leaf.grad for leaf in leaves]
    wanted = torch.autograd.grad(fused_lora(x, weight, None, blocks).square().sum(), leaves)
    for gradient, reference in zip(got, wanted, strict=True):
        torch.testing.assert_close(gradient, reference)


def test_hooks_on_saved_tensors_do_not_see_the_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    x, weight, blocks = one_pair()
    packed: list[int] = []
    counts: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(1)
        return tensor

    with switched(True):
        for tried in (True, False):
            packed.clear()
            before = len(calls)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                fused_lora(x, weight, None, blocks)
            assert (len(calls) > before) == tried
            counts.append(len(packed))
    assert counts[0] == counts[1] > 0


def test_training_draws_the_same_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with dropout, tuned or not: the same losses but for rounding."""
    counted(monkeypatch)
    losses = {}
    for on in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(IN, OUT), nn.Dropout(0.5), nn.Linear(OUT, 4))
        model = lowrank.wrap_model(net, presets.lora(rank=2, dropout=0.3), progress=False)
        with switched(on):
            history = lowrank.train.fit(
                model,
                [torch.randn(6, IN) for _ in range(4)],
                lambda model, x: model(x).square().mean(),
                lr=1e-2,
                progress=False,
            )
        losses[on] = [record.loss for record in history]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert "update first" in functional.ORDERS.chosen.values()


@pytest.mark.parametrize(("value", "on"), [("0", False), ("1", True), ("", False), ("yes", False)])
def test_the_environment(
    value: str, on: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOWRANK_TUNE", value)
    assert tuning._from_environment() is on
    assert caplog.messages == ["LOWRANK_TUNE is ignored: expected 0 or 1, got 'yes'"] * (value == "yes")


def test_from_the_environment_to_the_file(tmp_path: Path) -> None:
    code = """
import torch, lowrank
from torch import nn
model = lowrank.wrap_model(nn.Sequential(nn.Linear(32, 16)), lowrank.presets.lora(rank=2), progress=False)
model(torch.randn(4, 32)).sum().backward()
print(lowrank.tuning_report())
"""
    for value, rows in (("0", 0), ("1", 1), ("1", 1)):
        environment = {**os.environ, "LOWRANK_TUNE": value, "LOWRANK_CACHE": str(tmp_path)}
        command = [sys.executable, "-W", "error", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("one adapter, 16×32, rank 2, float32, up to 4 tokens, bias") == rows


@pytest.mark.gpu
def test_on_cuda_it_never_waits_once_decided() -> None:
    x = torch.randn(64, IN, device="cuda", requires_grad=True)
    weight, blocks = torch.randn(OUT, IN, device="cuda"), make_blocks("one", device="cuda")
    state = torch.cuda.get_rng_state()
    with switched(True):
        fused_lora(x, weight, None, blocks)
    assert len(functional.ORDERS.chosen) == 1 and torch.equal(torch.cuda.get_rng_state(), state)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with switched(True):
            fused_lora(x, weight, None, blocks).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_capture_is_not_disturbed() -> None:
    x = torch.randn(64, IN, device="cuda", requires_grad=True)
    weight, blocks = torch.randn(OUT, IN, device="cuda"), make_blocks("one", device="cuda")
    with switched(False):
        fused_lora(x, weight, None, blocks)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with switched(True), torch.cuda.graph(graph):
        y = fused_lora(x, weight, None, blocks)
    graph.replay()
    assert not functional.ORDERS.chosen
    torch.testing.assert_close(y, fused_lora(x, weight, None, blocks, exact=True))
