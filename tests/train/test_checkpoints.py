"""Checkpoints: what continues, what is refused, what a fault leaves, and what is deleted."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import lowrank
from lowrank import presets
from lowrank.train import (
    CheckpointError,
    DamagedCheckpointWarning,
    EarlyStopping,
    History,
    KeepBest,
    NonFiniteLoss,
    Record,
    Stopped,
    fit,
)
from lowrank.train.callbacks import Callback, Watched
from lowrank.train.checkpoints import Checkpoints
from tests import zoo


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.Linear(4, 2))
    return lowrank.wrap_model(model, presets.lora(rank=2, train=("2",), target=("0",)), progress=False)


DATA = list(torch.randn(8, 3, 4, generator=torch.Generator().manual_seed(1)))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return F.mse_loss(model(batch), torch.ones(3, 2))


def run(folder: Path, model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, History]:
    model = model or network()
    options = {"lr": 1e-2, "every": 2, "progress": False, "batches": DATA, "loss": loss} | options
    return model, fit(model, checkpoint=folder, **options)


class Interrupt(Callback):
    """Raises after a step."""

    def __init__(self, step: int, error: Callable[[], None]) -> None:
        self.step, self.error = step, error

    def after_step(self, run: Watched, record: Record) -> None:
        if record.step == self.step:
            self.error()


class Broken(Exception):
    pass


def fail() -> None:
    raise Broken


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def bare(history: History) -> list[tuple[int, float, float]]:
    return [(record.step, record.loss, record.grad_norm) for record in history]


def broken_off(folder: Path, step: int = 5, **options: Any) -> None:
    with pytest.raises(Broken):
        run(folder, callbacks=[Interrupt(step, fail)], **options)


def test_the_last_few_are_kept_and_nothing_of_others_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "step-00000099").mkdir()
    (tmp_path / "step-00000099" / "mine.txt").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    run(tmp_path, every=1, keep=3)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["notes.txt", *(f"step-0000000{n}" for n in (6, 7, 8)), "step-00000099"]
    assert (tmp_path / "step-00000099" / "mine.txt").read_text() == "mine"


def test_a_run_that_is_over_returns_at_once(tmp_path: Path) -> None:
    one, history = run(tmp_path)
    other, again = run(tmp_path, loss=lambda model, batch: pytest.fail("it trains"))
    assert same(one, other) and again == history


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 2e-2}, r"learning rates: it was '\[0.01\]', it is '\[0.02\]'"),
        ({"clip": None}, "clip: it was 1.0, it is None"),
        ({"batches": DATA[:6]}, "batches in an epoch: it was 8, it is 6"),
        ({"accumulate": 2}, "accumulate: it was 1, it is 2"),
        ({"weight_decay": 0.1}, "optimizer: it was .*weight_decay"),
        ({"seed": 3}, "seed: it was 0, it is 3"),
    ],
)
def test_changed_options_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    broken_off(tmp_path)
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        run(tmp_path, model, callbacks=[Interrupt(9, fail)], **options)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_another_policy_and_other_data_are_refused(tmp_path: Path) -> None:
    broken_off(tmp_path)
    torch.manual_seed(0)
    other = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.Linear(4, 2))
    lowrank.wrap_model(other, presets.lora(rank=2, alpha=4, train=("2",), target=("0",)), progress=False)
    with pytest.raises(CheckpointError, match="layer, 0.*scaling=8.*scaling=2"):
        run(tmp_path, other, callbacks=[Interrupt(9, fail)])
    with pytest.raises(ValueError, match="batch 4 of epoch 1 is not what it was"):
        run(tmp_path, callbacks=[Interrupt(9, fail)], batches=DATA[::-1])


def test_resume_false_starts_anew(tmp_path: Path) -> None:
    broken_off(tmp_path)
    _, history = run(tmp_path, resume=False, steps=2)
    assert len(history) == 2 and Checkpoints(tmp_path).steps == [2]


@pytest.mark.parametrize("damage", ["flip", "cut", "manifest", "missing"])
def test_a_damaged_checkpoint_falls_back_and_says_so(damage: str, tmp_path: Path) -> None:
    whole, history = run(tmp_path / "whole", callbacks=[Interrupt(9, fail)])
    broken_off(tmp_path / "run")
    newest = tmp_path / "run" / "step-00000004"
    file = newest / ("manifest.json" if damage == "manifest" else "process-0.pt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:100] if damage in ("cut", "manifest") else content)
    with pytest.warns(DamagedCheckpointWarning, match="step-00000004.*using that of step 2"):
        model, again = run(tmp_path / "run", callbacks=[Interrupt(9, fail)])
    assert same(whole, model) and bare(again) == bare(history)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step(number: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, _ = run(tmp_path / "whole", callbacks=[Interrupt(9, fail)])
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Stopped, match="after step 3 of 8; it is saved in .*step-00000003") as caught:
        run(tmp_path / "run", callbacks=[Interrupt(3, lambda: os.kill(os.getpid(), number))])
    assert caught.value.code == 128 + number and len(caught.value.history) == 3
    (notice,) = caplog.records
    assert notice.name == "lowrank" and notice.levelname == "WARNING"
    assert "the same call continues" in notice.message
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    model, _ = run(tmp_path / "run", callbacks=[Interrupt(9, fail)])
    assert same(whole, model)


# -- faults -----------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run(tmp_path / "whole")
    write, lost = Path.write_bytes, []

    def full(path: Path, content: Any) -> int:
        if "00000006" in str(path):
            lost.append(content)
            write(path, bytes(content)[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    with monkeypatch.context() as patch, pytest.raises(CheckpointError) as caught:
        patch.setattr(Path, "write_bytes", full)
        run(tmp_path / "run")
    assert "step 6 cannot be written" in str(caught.value) and "No space left on device" in str(caught.value)
    assert "the last good one is" in str(caught.value) and "step-00000004" in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step-00000002", "step-00000004"]
    with pytest.raises(ValueError, match="released"):  # else Python 3.13 fails to close its buffer, later
        len(lost[0])
    assert same(whole, run(tmp_path / "run")[0])


def test_a_folder_that_cannot_be_written_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="no checkpoint can be written into .*file"):
        run(tmp_path / "file", loss=lambda model, batch: pytest.fail("it trains"))

    def denied(path: Path, *rest: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(CheckpointError, match="no checkpoint can be written into .*Permission denied"):
        run(tmp_path, loss=lambda model, batch: pytest.fail("it trains"))


def test_nan_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    calls = []

    def bad(model: nn.Module, batch: Tensor) -> Tensor:
        calls.append(1)
        return loss(model, batch) * (float("nan") if len(calls) == 6 else 1)

    with pytest.raises(NonFiniteLoss, match="at step 6"):
        run(tmp_path, loss=bad)
    assert Checkpoints(tmp_path).steps == [2, 4]
    assert same(run(tmp_path)[0], run(tmp_path / "whole")[0])


class Dying(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        if index == 5:
            os._exit(1)
        return DATA[index]


def test_a_worker_that_dies_is_an_error_that_says_where(tmp_path: Path) -> None:
    loader = DataLoader(Dying(), batch_size=None, num_workers=1, prefetch_factor=1)
    with pytest.raises(RuntimeError, match="exited unexpectedly") as caught:
        run(tmp_path, batches=loader)
    assert "from batch" in caught.value.__notes__[0] and "epoch 1" in caught.value.__notes__[0]
    assert Checkpoints(tmp_path).steps


# -- callbacks, optimizers, rates ---------------------------------------------------------------------------


def scores(values: list[float]) -> Callable[[nn.Module], dict[str, float]]:
    source = iter(values)
    return lambda model: {"score": next(source)}


def test_early_stopping_and_the_best_come_back(tmp_path: Path) -> None:
    kept: list[dict[str, Tensor]] = []

    class Watch(Callback):
        def after_step(self, run: Watched, record: Record) -> None:
            kept.append({name: p.detach().clone() for name, p in run.trained.parameters.items()})

    def go(values: list[float]) -> tuple[nn.Module, History]:
        callbacks = [KeepBest("score"), EarlyStopping("score", patience=2), Watch()]
        return run(tmp_path, evaluate=scores(values), evaluate_every=1, callbacks=callbacks)

    model, history = go([1, 3, 2, 2.5])
    assert len(history) == 4
    named = dict(model.named_parameters())
    assert all(torch.equal(named[name], tensor) for name, tensor in kept[1].items())
    again, repeated = go([])
    assert repeated == history and same(model, again)


def test_a_metric_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluate gives \['score'\], and not 'accuracy'"):
        run(tmp_path, evaluate=scores([1.0]), callbacks=[KeepBest("accuracy")])


def test_an_optimizer_of_the_users_own_resumes(tmp_path: Path) -> None:
    def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, momentum=0.9)

    whole, history = run(tmp_path / "whole", optimizer=sgd, callbacks=[Interrupt(9, fail)])
    broken_off(tmp_path / "run", optimizer=sgd)
    model, again = run(tmp_path / "run", optimizer=sgd, callbacks=[Interrupt(9, fail)])
    assert same(whole, model) and bare(history) == bare(again)
    with pytest.raises(ValueError, match="expected one that trains all parameters of the groups"):
        run(tmp_path / "other", optimizer=lambda groups: torch.optim.SGD([nn.Parameter(torch.ones(1))]))


class Quantizer(nn.Module):
    """Moves its buffers past autograd and versions, as a vector quantizer does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("steps", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.data.lerp_(x.detach().mean(0), 0.1)
            self.steps.data.add_(1)
        return x - self.mean


def test_buffers_that_are_written_without_a_trace_are_continued(tmp_path: Path) -> None:
    def train(folder: Path, at: int = 99) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), Quantizer(), nn.Linear(6, 3))
        batches = [torch.randn(4, 6) for _ in range(6)]
        lowrank.wrap_model(model, presets.lora(rank=2), progress=False)
        with suppress(Broken):
            fit(
                model, batches, lambda model, x: model(x).square().mean(), lr=1e-2, epochs=2, every=3,
                checkpoint=folder, callbacks=[Interrupt(at, fail)], progress=False,
            )  # fmt: skip
        return model

    whole = train(tmp_path / "whole")
    train(tmp_path / "run", at=7)
    again = train(tmp_path / "run")
    assert float(whole[1].steps) == 12 and bool(whole[1].mean.any())
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), again.buffers(), strict=True))
    assert same(whole, again)


class Counting(torch.optim.SGD):
    """Counts in its groups, as Prodigy and the schedule-free optimizers do, and goes by the count."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, momentum=0.9)
        for group in self.param_groups:
            group["k"] = 0

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            group["momentum"] = 0.9 / group["k"]
        super().step()


def tensor_rate(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{**group, "lr": torch.tensor(group["lr"])} for group in groups])


@pytest.mark.parametrize("optimizer", [Counting, tensor_rate])
def test_an_optimizer_with_more_in_its_groups_is_continued(optimizer: Any, tmp_path: Path) -> None:
    whole, history = run(tmp_path / "whole", optimizer=optimizer)
    broken_off(tmp_path / "run", optimizer=optimizer)
    model, again = run(tmp_path / "run", optimizer=optimizer, callbacks=[Interrupt(9, fail)])
    assert same(whole, model) and bare(history) == bare(again)
    with pytest.raises(CheckpointError, match="optimizer: it was"):
        run(tmp_path / "run", optimizer=lambda groups: torch.optim.SGD(groups, momentum=0.5))


def test_lora_plus_gives_b_a_rate_of_its_own() -> None:
    model = network()
    slow, fast = lowrank.lora_plus(model, 1e-3, ratio=8)
    assert fast["lr"] == 8e-3 and slow["lr"] == 1e-3
    (adapter,) = (m for m in model.modules() if isinstance(m, lowrank.layers.adapter.Adapter))
    assert fast["params"] == [adapter.B] and any(p is adapter.A for p in slow["params"])
    assert len(slow["params"]) == 3  # and the head
    assert fit(model, DATA, loss, parameters=[slow, fast], progress=False)[0].lr == 1e-3
    with pytest.raises(ValueError, match="no factor B that requires grad"):
        lowrank.lora_plus(nn.Linear(2, 2), 1e-3)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_recomputed_activations_and_a_compiled_model_train_alike() -> None:
    histories = []
    for options in ({}, {"gradient_checkpointing": True}, {"compile": {"backend": "eager"}}):
        torch.manual_seed(0)
        model = lowrank.wrap_model(zoo.build("llama"), presets.lora(rank=2), progress=False)
        ids = torch.randint(zoo.VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(1))
        histories.append(
            fit(model, [{"input_ids": ids, "labels": ids}] * 3, lr=1e-2, progress=False, **options).losses
        )
        assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    assert histories[1] == pytest.approx(histories[0], rel=1e-4)
    assert histories[2] == pytest.approx(histories[0], rel=1e-4)
    with pytest.raises(ValueError, match="has no gradient_checkpointing_enable"):
        fit(network(), DATA, loss, gradient_checkpointing=True, progress=False)


@pytest.mark.soak
def test_five_thousand_steps_need_no_more_memory_or_files(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    class Measure(Callback):
        def after_step(self, run: Watched, record: Record) -> None:
            if record.step % 1000 == 0:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                seen.append((len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGE_SIZE")))

    run(tmp_path, steps=5000, every=50, callbacks=[Measure()], log=tmp_path / "log.jsonl")
    assert len(seen) == 5 and seen[0][0] == seen[-1][0]
    assert seen[-1][1] - seen[1][1] < 20e6  # the history, and what the allocator keeps
