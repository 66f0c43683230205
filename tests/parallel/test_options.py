"""What `fit` offers, in two processes: keeping the best, checkpointed activations, compiling, signals."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lowrank.train import KeepBest, fit
from lowrank.train.callbacks import Callback
from lowrank.train.history import History, Record
from lowrank.train.signals import Stopped
from tests import zoo
from tests.parallel.processes import refusal, together
from tests.parallel.test_fit import KINDS, OPTIONS, adapted, batches, trained

TESTED = ("DDP", "FSDP2")


class Worse:
    """A score that rises in the first process and falls faster in the second, as the mean does."""

    def __init__(self, rank: int) -> None:
        self.rank, self.calls = rank, 0

    def __call__(self, model: nn.Module) -> dict[str, float]:
        self.calls += 1
        return {"score": float(self.calls if self.rank == 0 else -3 * self.calls)}


class End(Callback):
    """Ends the run in one process."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def after_step(self, run: Any, record: Record) -> None:
        if self.rank == 1:
            run.stop = "enough"


class Send(Callback):
    """A signal to this process, in its second step."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def after_step(self, run: Any, record: Record) -> None:
        if record.step == 2 and self.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class Kept(Callback):
    """What is trained, after each step."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.found = model, []

    def after_step(self, run: Any, record: Record) -> None:
        self.found.append(trained(self.model))


def best(rank: int, kind: str) -> Any:
    model = adapted("llama")
    kept = Kept(model)
    callbacks = [kept, KeepBest("score")]
    history = fit(
        KINDS[kind](model),
        batches("llama")[rank::2],
        evaluate=Worse(rank),
        evaluate_every=1,
        callbacks=callbacks,
        **OPTIONS,
    )
    return trained(model), kept.found, [dict(scores) for scores in history.evaluations.values()]


def options(rank: int, kind: str, **more: Any) -> tuple[list[float], list[Tensor]]:
    model = adapted("llama")
    history = fit(KINDS[kind](model), batches("llama")[rank::2], **more, **OPTIONS)
    return history.losses, trained(model)


def stopped(rank: int, kind: str, folder: Path) -> Any:
    data = [zoo.batch("llama", seed=seed) for seed in range(8)][rank::2]

    def run(**more: Any) -> History:
        model = adapted("llama", dropout=0.3)
        return fit(KINDS[kind](model), data, every=4, callbacks=[Send(rank)], **more, **OPTIONS)

    try:
        run(checkpoint=folder / f"stopped-{kind}")
    except Stopped as error:
        code, message, steps = error.code, str(error), len(error.history)  # type: ignore[attr-defined]
    return code, message, steps, run(checkpoint=folder / f"stopped-{kind}").losses


def tensor_parallel() -> tuple[str, str]:
    model = zoo.build("llama")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model.model.layers[0].mlp, mesh, {"up_proj": ColwiseParallel()})
    return refusal(lambda: fit(model, [zoo.batch("llama")], **OPTIONS))


def runs(rank: int, folder: Path) -> dict[Any, Any]:
    found: dict[Any, Any] = {"tensor parallel": tensor_parallel()}
    for kind in TESTED:
        found[kind, "best"] = best(rank, kind)
        found[kind, "ended"] = options(rank, kind, callbacks=[End(rank)])
        found[kind, "other scores"] = refusal(
            lambda kind=kind: options(rank, kind, evaluate=lambda model: {f"of {rank}": 1.0})
        )
        found[kind, "recomputed"] = options(rank, kind, gradient_checkpointing=True)
        found[kind, "stopped"] = stopped(rank, kind, folder)
    return found


def compiles(rank: int) -> dict[str, Any]:
    compile = {"backend": "eager"}
    refused = refusal(lambda: options(rank, "FSDP2", compile=compile))
    return {"DDP": options(rank, "DDP", compile=compile), "FSDP2": refused}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[Any, Any]]]:
    folder = tmp_path_factory.mktemp("options")
    return folder, together(runs, folder, folder)


@pytest.mark.parametrize("kind", TESTED)
def test_the_best_is_that_of_all_processes(kind: str, done: Any) -> None:
    """Each measures another score; their mean decides, and what is put back is the same in both."""
    for found in done[1]:
        ended, steps, scores = found[kind, "best"]
        assert scores == [{"score": -1.0}, {"score": -2.0}, {"score": -3.0}]
        assert not torch.equal(ended[1], steps[-1][1])
        assert all(map(torch.equal, ended, steps[0]))


def agrees(found: Any) -> None:
    """Losses and weights are those of one process without the option."""
    model = adapted("llama")
    history = fit(model, batches("llama"), accumulate=2, **OPTIONS)
    losses, weights = found
    assert losses == pytest.approx(history.losses, rel=1e-5)
    torch.testing.assert_close(weights, trained(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", TESTED)
def test_checkpointed_activations_leave_what_is_computed_alone(kind: str, done: Any) -> None:
    for found in done[1]:
        agrees(found[kind, "recomputed"])


@pytest.mark.slow
def test_compiling_leaves_what_is_computed_alone(tmp_path: Path) -> None:
    for found in together(compiles, tmp_path, timeout=280):
        agrees(found["DDP"])
        assert found["FSDP2"][0] == "ValueError" and "sharded by FSDP2" in found["FSDP2"][1]


@pytest.mark.parametrize("kind", TESTED)
def test_what_one_process_ends_is_ended_in_both(kind: str, done: Any) -> None:
    for found in done[1]:
        assert len(found[kind, "ended"][0]) == 1
        assert found[kind, "other scores"][0] == "ValueError"
        assert "evaluate must give the same scores in all processes" in found[kind, "other scores"][1]


@pytest.mark.parametrize("kind", TESTED)
def test_a_signal_to_one_process_stops_both(kind: str, done: Any) -> None:
    for found in done[1]:
        code, message, steps, losses = found[kind, "stopped"]
        assert code == 128 + signal.SIGTERM and "after step 2 of 4" in message
        assert steps == 2 and len(losses) == 4
    one, two = (found[kind, "stopped"] for found in done[1])
    assert one == two


def test_tensor_parallelism_is_refused(done: Any) -> None:
    for found in done[1]:
        kind, message = found["tensor parallel"]
        assert kind == "ValueError"
        assert "model.layers.0.mlp.up_proj.weight is spread over processes by tensor parallelism" in message
