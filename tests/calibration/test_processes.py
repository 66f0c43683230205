"""Two processes calibrate as one: the same statistics in both, and an error of either ends both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank.calibration import calibrate
from lowrank.calibration.accumulators import Covariance, Rows
from lowrank.calibration.inputs import Inputs
from lowrank.models.projections import Projection
from lowrank.models.targets import select
from lowrank.processes import Processes
from tests import zoo

ALL = ("covariance", "moment", "sensitivity", "gradient")
FAMILIES = ("bert", "mixtral")


def batches(family: str, rank: int) -> list[dict[str, Tensor]]:
    """Rank 0 has three, rank 1 has one."""
    seeds = (0, 1, 2) if rank == 0 else (3,)
    return [zoo.batch(family, torch.float64, seed=seed) for seed in seeds]


def plain(statistics: Any) -> dict[str, dict[str, Any]]:
    return {p.name: {**vars(each), "moment": each.moment} for p, each in statistics.items()}


def loss_of(fault: str, rank: int) -> Any:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        value = model(**batch).loss
        if rank == 1 and fault == "NaN":
            value = value * float("nan")
        if rank == 1 and fault == "exception":
            raise RuntimeError("the loss gave up")
        return value

    return loss


def given(fault: str, rank: int) -> list[Any]:
    many = batches("bert", rank) * 4
    if rank == 1 and fault == "empty":
        return []
    if rank == 1 and fault == "input":
        many[1]["attention_mask"] = torch.zeros_like(many[1]["attention_mask"])
    return many


FAULTS = {
    "NaN": "the loss of calibration batch 0 is not finite",
    "exception": "the loss gave up",
    "empty": "calibration needs batches, and got none",
    "input": "selects no token",
}


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/sync")
    found: dict[str, Any] = {}
    for family in FAMILIES:
        model = zoo.build(family, torch.float64)
        projections = select(model, "all-linear").projections
        found[family] = plain(calibrate(model, projections, ALL, batches(family, rank), progress=False))
    model = zoo.build("bert", torch.float64)
    query: list[Projection] = select(model, "query").projections
    for fault in FAULTS:
        try:
            calibrate(model, query, ALL, given(fault, rank), loss=loss_of(fault, rank), progress=False)
        except (ValueError, RuntimeError) as error:
            found[fault] = type(error).__name__, str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, (str(folder),), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_one_process_with_all_batches(
    both: list[dict[str, Any]], family: str
) -> None:
    """Ranks have different numbers of batches, and experts may be idle in one of them."""
    model = zoo.build(family, torch.float64)
    projections = select(model, "all-linear").projections
    alone = plain(calibrate(model, projections, ALL, batches(family, 0) + batches(family, 1), progress=False))
    one, two = (found[family] for found in both)
    assert one.keys() == two.keys() == alone.keys()
    for name, wanted in alone.items():
        for kind in (*ALL, "token_covariance", "mean"):
            if kind == "sensitivity":
                assert one[name][kind] == two[name][kind]
                assert one[name][kind] == pytest.approx(wanted[kind], rel=1e-9)
            else:
                assert torch.equal(one[name][kind], two[name][kind])
                torch.testing.assert_close(one[name][kind], wanted[kind], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_of_one_process_ends_all(both: list[dict[str, Any]], fault: str) -> None:
    (kind, message), (own_kind, own_message) = (found[fault] for found in both)
    assert kind == own_kind == ("RuntimeError" if fault == "exception" else "ValueError")
    assert FAULTS[fault] in own_message and "rank" not in own_message
    assert f"calibration failed in rank 1: {own_kind}: {own_message}" == message


def test_projections_that_share_an_input_in_one_process_only() -> None:
    query, key = select(zoo.build("bert"), ["query", "key"]).projections[:2]

    class Two(Processes):
        def gathered(self, value: Any) -> list[Any]:
            return [value, {query: query.module, key: key.module}]

    inputs = Inputs(Covariance, [query, key])
    x = torch.randn(3, 32)
    for p in (query, key):
        inputs.see(p.module, [p], x, lambda: Rows(x, half=False, home=x.device), 0)
    with pytest.raises(
        ValueError, match=r"key reads the input of .*query in one process and that of .*key in another"
    ):
        inputs.reduce(Two(torch.device("cpu")), lambda p: torch.zeros(32, 32))
