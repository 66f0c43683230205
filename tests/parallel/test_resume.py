"""Two processes that were stopped continue with the same bits; another number of processes is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from lowrank.train import fit
from lowrank.train.callbacks import Callback
from lowrank.train.history import Record
from tests import zoo
from tests.parallel.processes import refusal, together
from tests.parallel.test_fit import KINDS, OPTIONS, adapted, trained


class Stop(Callback):
    """Raises after a step; it is the same callback where it does not, so that runs compare."""

    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, run: Any, record: Record) -> None:
        if record.step == self.step:
            raise RuntimeError("stopped")


def loader() -> DataLoader[Any]:
    """Seven examples of one batch each, shuffled anew in each epoch: four for each of two processes."""
    data = [zoo.batch("llama", seed=seed) for seed in range(7)]
    sampler = DistributedSampler(data, shuffle=True)  # type: ignore[arg-type]
    return DataLoader(data, batch_size=None, sampler=sampler)  # type: ignore[arg-type]


def run(kind: str, folder: Path | None = None, stop: int = 0) -> Any:
    model = adapted("llama", dropout=0.3)
    found: list[Any] = []

    def train() -> None:
        options = {} if folder is None else {"checkpoint": folder, "every": 1}
        callbacks = [Stop(stop)]
        found.append(fit(KINDS[kind](model), loader(), epochs=2, callbacks=callbacks, **options, **OPTIONS))

    raised = refusal(train)
    records = [(r.step, r.epoch, r.loss, r.lr, r.grad_norm) for r in found[0]] if found else raised
    return records, trained(model) if found else []


def runs(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in ("DDP", "FSDP2"):
        found[kind] = {
            "whole": run(kind),
            "stopped": run(kind, folder / kind, stop=3),
            "continued": run(kind, folder / kind),
        }
    model = KINDS["DDP"](adapted("llama", dropout=0.3))
    model.train()
    torch.manual_seed(0)
    found["epochs"] = []
    data = loader()

    class Epochs(Callback):
        def after_step(self, run: Any, record: Record) -> None:
            found["epochs"].append(data.sampler.epoch)  # type: ignore[attr-defined]

    fit(model, data, epochs=2, callbacks=[Epochs()], **OPTIONS)

    drawn: list[float] = []

    class Draw(Callback):
        def after_step(self, run: Any, record: Record) -> None:
            drawn.append(float(torch.rand(())))

    fit(model, data, callbacks=[Draw()], **OPTIONS)
    found["drawn"] = drawn
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("resume")
    return folder, together(runs, folder, folder)


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_two_processes_continue_with_the_same_bits(kind: str, done: Any) -> None:
    """Dropout, a shuffling sampler, two epochs; stopped before the checkpoint of the third step of eight."""
    for found in done[1]:
        records, weights = found[kind]["whole"]
        assert found[kind]["stopped"][0] == ("RuntimeError", "stopped")
        continued, again = found[kind]["continued"]
        assert len(records) == 8 and continued == records
        assert all(map(torch.equal, again, weights))


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_another_number_of_processes_is_refused(kind: str, done: Any) -> None:
    folder, _ = done
    data = [zoo.batch("llama", seed=seed) for seed in range(4)]
    with pytest.raises(ValueError, match="processes: it was 2, it is 1"):
        fit(adapted("llama", dropout=0.3), data, epochs=2, checkpoint=folder / kind, every=1, **OPTIONS)


def test_the_sampler_knows_the_epoch(done: Any) -> None:
    for found in done[1]:
        assert found["epochs"] == [0] * 4 + [1] * 4


def test_each_rank_draws_its_own_numbers(done: Any) -> None:
    one, two = (found["drawn"] for found in done[1])
    assert len(one) == 4 and not set(one) & set(two)
