"""Two processes that wrap their copies of a base get one plan and one set of factors, or the same error."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import lowrank
from lowrank import Policy, presets
from lowrank.init import Factors, Kaiming
from tests import zoo
from tests.parallel.processes import refusal, together


@dataclass(frozen=True)
class Rounded(Kaiming):
    """Kaiming as a processor with another rounding would draw it, or fail to."""

    fails: bool = False

    def __call__(self, weight: Any, rank: int, scaling: float, **given: Any) -> Factors:
        made = super().__call__(weight, rank, scaling, **given)
        if self.fails and dist.get_rank() == 1:
            raise RuntimeError("no factors today")
        return Factors(made.A * (1 + 0.01 * dist.get_rank()), made.B)


def wraps(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    model = lowrank.wrap_model(zoo.build("bert"), Policy(rank=2, init=Rounded()), progress=False)
    found["rounding"] = [p.detach().clone() for p in lowrank.adapter_parameters(model)]
    mine = [zoo.batch("bert", seed=seed) for seed in ((0, 1) if rank == 0 else (2,))]
    for name in ("tlora", "eva", "corda", "lora_ga"):
        policy = getattr(presets, name)(rank=2)
        model = lowrank.wrap_model(zoo.build("bert"), policy, batches=mine, progress=False)
        factors = [
            tensor
            for module in lowrank.adapted_layers(model).values()
            for tensor in module.adapters.state_dict().values()
        ]  # type: ignore[union-attr]
        found[name] = str(lowrank.plan_of(model)), factors
    for name, policy in {
        "plans": Policy(rank=2 + rank, init=Kaiming()),
        "fails": Policy(rank=2, init=Rounded(fails=True)),
    }.items():
        model = zoo.build("bert")
        found[name] = refusal(lambda m=model, p=policy: lowrank.wrap_model(m, p, progress=False))
        found[f"{name}, left"] = lowrank.adapter_names(model)
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(wraps, Path(tmp_path_factory.mktemp("agreement")))


def test_factors_are_those_of_rank_0(done: list[dict[str, Any]]) -> None:
    alone = lowrank.wrap_model(zoo.build("bert"), presets.lora(rank=2), progress=False)
    for found in done:
        for got, wanted in zip(found["rounding"], lowrank.adapter_parameters(alone), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("preset", ["tlora", "eva", "corda", "lora_ga"])
def test_calibrated_starts_are_the_same(preset: str, done: list[dict[str, Any]]) -> None:
    (one, factors), (two, others) = (found[preset] for found in done)
    assert one == two and factors
    assert all(map(torch.equal, factors, others))


def test_different_plans_are_refused_in_both(done: list[dict[str, Any]]) -> None:
    one, two = (found["plans"] for found in done)
    assert one == two and one[0] == "ValueError"
    assert "the processes made different plans" in one[1] and "rank 0 has (2, 8.0) and rank 1" in one[1]
    assert [found["plans, left"] for found in done] == [[], []]


def test_a_failed_start_fails_in_both(done: list[dict[str, Any]]) -> None:
    one, two = (found["fails"] for found in done)
    assert one[0] == two[0] == "ValueError"
    assert "adapting the model failed in rank 1" in one[1] and "no factors today" in two[1]
    assert [found["fails, left"] for found in done] == [[], []]


# -- magnitudes ---------------------------------------------------------------------------------------


def with_magnitudes(rank: int) -> dict[str, Any]:
    base = zoo.build("llama")
    if rank:
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.mul_(1 + 1e-6)
    model = lowrank.wrap_model(base, presets.pissa(rank=2, dora=True), progress=False)
    tensors = {
        f"{p.name}.{key}": tensor.detach().clone()
        for p, adapter in lowrank.adapters.adapters_of(model).items()
        for key, tensor in (*adapter.named_parameters(), *adapter.named_buffers())
    }
    policy = presets.lora(rank=2, dora=rank == 1)
    return {
        "tensors": tensors,
        "plans": refusal(lambda: lowrank.wrap_model(zoo.build("llama"), policy, progress=False)),
    }


def test_magnitudes_are_those_of_rank_0(tmp_path: Path) -> None:
    """Also what is not saved: the start is exact only where they are the norms that it was made from."""
    one, two = together(with_magnitudes, tmp_path)
    assert one["tensors"].keys() == two["tensors"].keys()
    assert any(key.endswith("magnitude.norms") for key in one["tensors"])
    for key, tensor in one["tensors"].items():
        assert torch.equal(tensor, two["tensors"][key]), key
    for kind, message in (one["plans"], two["plans"]):
        assert kind == "ValueError"
        assert "for dora, rank 0 has False and rank 1 has True" in message
