"""`fit` in two processes: what one process gives with all their batches, under DDP and FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lowrank
from lowrank import presets
from lowrank.processes import whole
from lowrank.train import fit
from tests import zoo
from tests.helpers import perturb
from tests.parallel.processes import refusal, sharded, together

FAMILIES = ("llama", "bert")
OPTIONS: dict[str, Any] = {"lr": 1e-2, "progress": False, "warmup": 0}


def adapted(family: str, dropout: float = 0.0) -> nn.Module:
    model = zoo.build(family)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # of the base, which would differ by rank
    lowrank.wrap_model(model, presets.lora(rank=4, dropout=dropout), progress=False)
    return perturb(model)


def batches(family: str) -> list[dict[str, Tensor]]:
    """Five, of different sizes; one of a language model has no label, so that its own loss is NaN."""
    found = [zoo.batch(family, seed=seed) for seed in range(5)]
    found[2] = {key: value[:1] for key, value in found[2].items()}
    if family == "llama":
        found[1]["labels"] = torch.full_like(found[1]["labels"], -100)
        found[3]["labels"][:, 4:] = -100
    return found


def with_copies(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def with_whole_adapters(model: nn.Module) -> nn.Module:
    return sharded(model, ignored=set(lowrank.adapter_parameters(model)))


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": with_copies,
    "FSDP2": sharded,
    "FSDP2, adapters whole": with_whole_adapters,
}


def trained(model: nn.Module) -> list[Tensor]:
    return [whole(p).detach().clone() for p in lowrank.adapter_parameters(model)]


def runs(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, made in KINDS.items():
        for family in FAMILIES:
            mine = batches(family)[rank::2]  # three and two
            for accumulate in (1, 2):
                model = adapted(family)
                history = fit(made(model), mine, epochs=2, accumulate=accumulate, **OPTIONS)
                norms = [record.grad_norm for record in history]
                found[kind, family, accumulate] = history.losses, norms, trained(model)
                if accumulate == 2:
                    path = folder / f"{kind}-{family}"
                    if kind != "DDP" or rank == 0:
                        lowrank.save_adapter(model, path)
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[Any, Any]]]:
    folder = tmp_path_factory.mktemp("fit")
    return folder, together(runs, folder, folder)


@pytest.mark.filterwarnings("ignore:a step's batches have no label")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_as_one_process_with_all_batches(kind: str, family: str, accumulate: int, done: Any) -> None:
    """Losses, gradient norms before clipping and final weights. The last step has a batch in one rank."""
    model = adapted(family)
    history = fit(model, batches(family), epochs=2, accumulate=2 * accumulate, **OPTIONS)
    for found in done[1]:
        losses, norms, weights = found[kind, family, accumulate]
        assert losses == pytest.approx(history.losses, rel=1e-5)
        assert norms == pytest.approx([record.grad_norm for record in history], rel=1e-4)
        for got, wanted in zip(weights, trained(model), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    one, two = (found[kind, family, accumulate] for found in done[1])
    assert one[:2] == two[:2] and all(map(torch.equal, one[2], two[2]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_adapter_loads_in_one_process(kind: str, family: str, done: Any) -> None:
    folder, (one, _) = done
    model = lowrank.load_adapter(zoo.build(family), folder / f"{kind}-{family}")
    for got, wanted in zip(trained(model), one[kind, family, 2][2], strict=True):
        assert torch.equal(got, wanted)


# -- faults -----------------------------------------------------------------------------------------------


def faulty_loss(rank: int, fault: str) -> Callable[[nn.Module, Any], Tensor]:
    calls = [0]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls[0] += 1
        value = model(**batch).loss
        if rank == 1 and calls[0] == 2:
            if fault == "NaN":
                return value * float("nan")
            if fault == "loss":
                raise RuntimeError("the loss gave up")
        return value

    return loss


class Data:
    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        yield zoo.batch("llama")
        if self.fails:
            raise OSError("the disk gave up")
        yield zoo.batch("llama")
        yield zoo.batch("llama")


def faults(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    data = [zoo.batch("llama", seed=seed) for seed in range(3)]

    def run(name: str, kind: str, batches: Any = data, **more: Any) -> None:
        model = KINDS[kind](adapted("llama"))
        found[name, kind] = refusal(lambda: fit(model, batches, **{**OPTIONS, **more}))

    run("NaN", "DDP", loss=faulty_loss(rank, "NaN"))
    run("loss", "DDP", loss=faulty_loss(rank, "loss"))
    run("NaN", "FSDP2", loss=faulty_loss(rank, "NaN"))
    for kind in ("DDP", "FSDP2"):
        run("data", kind, Data(rank == 1))
        run("option", kind, clip=-1.0 if rank == 1 else 1.0)
        run("empty", kind, [] if rank == 1 else data)
        run("evaluate", kind, evaluate=lambda model: 1 / (1 - rank) and {})

        model = adapted("llama")
        model.register_parameter("spare", nn.Parameter(torch.ones(4)))
        model = KINDS[kind](model)
        found["unused", kind] = refusal(lambda model=model: fit(model, data, **OPTIONS))
    model = adapted("llama")
    found["neither", ""] = refusal(lambda: fit(model, data, **OPTIONS))
    return found


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("faults")
    return together(faults, folder, folder)


@pytest.mark.parametrize(
    ("fault", "kind", "raised", "message"),
    [
        ("NaN", "DDP", "NonFiniteLoss", "the loss is nan at step 2, in batch 2"),
        ("NaN", "FSDP2", "NonFiniteLoss", "the loss is nan at step 2, in batch 2"),
        ("loss", "DDP", "RuntimeError", "the loss gave up"),
        *(
            row
            for kind in ("DDP", "FSDP2")
            for row in (
                ("data", kind, "RuntimeError", "the disk gave up"),
                ("empty", kind, "ValueError", "there are no batches"),
                ("evaluate", kind, "RuntimeError", "division by zero"),
            )
        ),
    ],
)
def test_what_fails_in_one_rank_fails_in_both(
    fault: str, kind: str, raised: str, message: str, failed: list[dict[Any, Any]]
) -> None:
    (one_kind, one_message), (_, two_message) = (found[fault, kind] for found in failed)
    assert one_kind == raised
    assert "failed in rank 1" in one_message and message in one_message
    assert message in two_message


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_unused_parameters_are_named_in_both(kind: str, failed: list[dict[Any, Any]]) -> None:
    one, two = (found["unused", kind] for found in failed)
    assert one == two and one[0] == "ValueError"
    assert "gives no gradient to 1 of what is to train: spare" in one[1]


def test_a_model_that_no_engine_holds_is_refused(failed: list[dict[Any, Any]]) -> None:
    for found in failed:
        kind, message = found["neither", ""]
        assert kind == "ValueError" and "DistributedDataParallel(model), or call fully_shard" in message
