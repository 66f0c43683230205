"""Statistics measured once and used again, in parts where memory is short, for experts, across processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import Policy, Statistics, presets
from lowrank.allocate import EnergyRank, ExplainedVariance, StableRank, Uniform
from lowrank.calibration import calibrate, predicted_bytes
from lowrank.calibration.source import Source
from lowrank.init import Kaiming, TaskAligned
from lowrank.models.projections import Projection, Role
from lowrank.models.targets import select
from tests import zoo
from tests.helpers import frozen_logits, logits

ALL = ("covariance", "moment", "sensitivity", "gradient")
QUERY = Projection("q_proj", "weight", (0, 4), Role.QUERY, 4, 4)


def batches(family: str = "llama", count: int = 3) -> list[dict[str, Tensor]]:
    return [zoo.batch(family, seed=seed) for seed in range(count)]


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_the_moment_is_of_all_tokens_and_not_centred() -> None:
    model, batch = zoo.build("bert"), zoo.batch("bert")
    projections = select(model, "query").projections
    seen: dict[str, Tensor] = {}
    for p in projections:
        model.get_submodule(p.module).register_forward_pre_hook(
            lambda m, args, path=p.module: seen.__setitem__(path, args[0].detach())
        )
    got = calibrate(model, projections, ["moment"], [batch], progress=False)
    model(**batch)
    for p in projections:
        tokens = seen[p.module][batch["attention_mask"].bool()]
        tokens = tokens.double()
        torch.testing.assert_close(got[p].moment, tokens.T @ tokens / len(tokens), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[p].mean, tokens.mean(0), rtol=1e-4, atol=1e-5)


def test_no_more_batches_than_asked_for() -> None:
    model, many = zoo.build("llama"), batches(count=3)
    projections = select(model, "query").projections
    two = calibrate(model, projections, ALL, iter(many), steps=2, progress=False)
    wanted = calibrate(model, projections, ALL, many[:2], progress=False)
    for p in projections:
        assert torch.equal(two[p].covariance, wanted[p].covariance)
        assert two[p].sensitivity == wanted[p].sensitivity
    with pytest.raises(ValueError, match="steps: expected at least 1"):
        calibrate(model, projections, ALL, many, steps=0)


def test_inputs_alone_need_no_labels() -> None:
    model = zoo.build("llama")
    unlabelled = [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in batches()]
    lowrank.wrap_model(model, presets.eva(rank=2), batches=unlabelled, progress=False)
    usual = lowrank.wrap_model(zoo.build("llama"), presets.eva(rank=2), batches=batches(), progress=False)
    assert same(model, usual)


def test_what_it_takes_is_predicted_and_said(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    model = zoo.build("llama")
    projections = select(model, "all-linear").projections
    with caplog.at_level("INFO", logger="lowrank"):
        got = calibrate(model, projections, ["covariance"], batches(), progress=True)
    distinct = {id(each.covariance): each.covariance for each in got.values()}
    taken = sum(c.numel() * c.element_size() for c in distinct.values())
    assert predicted_bytes(projections, ["covariance"]) == taken
    assert caplog.messages == ["calibrating 14 projections: 0 MiB of statistics"]
    assert capsys.readouterr().out == ""


# -- used again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_statistics_survive_a_file_and_serve_other_policies(family: str, tmp_path: Path) -> None:
    policy = presets.tlora(rank=2)
    measured = lowrank.measure(zoo.build(family), policy, batches(family), progress=False)
    measured.save(tmp_path / "statistics.safetensors")
    again = Statistics.load(tmp_path / "statistics.safetensors")
    assert list(again) == list(measured) and [p.name for p in again] == [p.name for p in measured]
    direct = lowrank.wrap_model(zoo.build(family), policy, batches=batches(family), progress=False)
    reused = lowrank.wrap_model(zoo.build(family), policy, statistics=again, progress=False)
    assert same(direct, reused)
    half = lowrank.plan_model(zoo.build(family), presets.tlora(budget=900), statistics=again)
    assert half.trainable_parameters <= 900


def test_shared_covariances_are_written_once(tmp_path: Path) -> None:
    measured = lowrank.measure(zoo.build("llama"), presets.tlora(), batches(), progress=False)
    measured.save(tmp_path / "s.safetensors")
    distinct = {id(each.covariance): each.covariance.numel() for each in measured.values()}
    assert (tmp_path / "s.safetensors").stat().st_size < 4 * sum(distinct.values()) + 20_000
    loaded = Statistics.load(tmp_path / "s.safetensors")
    assert len({id(each.covariance) for each in loaded.values()}) == len(distinct)


def test_only_what_is_missing_is_measured() -> None:
    model = zoo.build("llama")
    sensitivities = lowrank.measure(
        model, Policy(allocate=lowrank.allocate.Sensitivity()), batches(), progress=False
    )
    passes: list[bool] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        passes.append(torch.is_grad_enabled())
        return model(**batch).loss

    lowrank.wrap_model(
        model, presets.tlora(rank=2), batches=batches(), loss=loss, statistics=sensitivities, progress=False
    )
    assert passes == [False] * 9, "the sensitivities were measured again"


def test_statistics_that_lack_something_ask_for_batches() -> None:
    with pytest.raises(ValueError, match="measures covariance: pass calibration batches="):
        measured = lowrank.measure(
            zoo.build("llama"), Policy(allocate=lowrank.allocate.Sensitivity()), batches(), progress=False
        )
        lowrank.wrap_model(zoo.build("llama"), presets.tlora(rank=2), statistics=measured)


def test_a_file_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="does not hold whole statistics"):
        Statistics.load(tmp_path / "x")


def test_an_unknown_need() -> None:
    with pytest.raises(ValueError, match="unknown statistics"):
        Source(batches=batches()).measure(zoo.build("llama"), {QUERY: frozenset({"luck"})})


# -- in parts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [presets.tlora, presets.corda, presets.lora_ga])
def test_short_memory_means_more_passes_and_the_same_start(preset: Any) -> None:
    calls = 0

    def loss(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return model(**batch).loss

    def wrapped(memory: int | None) -> nn.Module:
        return lowrank.wrap_model(
            zoo.build("llama"), preset(rank=2), batches=batches(), loss=loss, memory=memory, progress=False
        )

    whole, once = wrapped(None), calls
    calls = 0
    parts = wrapped(4 * 3 * 48 * 48)
    assert same(whole, parts)
    assert once == 9 and calls >= 2 * once, "three batches of three examples"


def test_what_can_be_read_once_does_not_go_in_parts() -> None:
    model = zoo.build("llama")
    with pytest.raises(ValueError, match="must be read several times: pass a list"):
        lowrank.wrap_model(model, presets.tlora(rank=2), batches=iter(batches()), memory=1000, progress=False)
    assert not lowrank.adapted_layers(model)


def test_parts_hold_no_more_than_the_memory() -> None:
    model = zoo.build("llama")
    projections = select(model, "all-linear").projections
    source = Source(batches=batches(), memory=4 * 3 * 48 * 48, progress=False)
    sizes = []
    for part, _ in source.parts(model, dict.fromkeys(projections, frozenset({"covariance"}))):
        sizes.append(predicted_bytes(part, {"covariance"}))
    assert max(sizes) <= source.memory and len(sizes) >= 2


def test_statistics_can_be_kept_elsewhere() -> None:
    model = zoo.build("llama")
    got = calibrate(model, select(model, "query").projections, ALL, batches(), device="cpu", progress=False)
    assert all(each.covariance.device.type == "cpu" for each in got.values())


# -- experts -------------------------------------------------------------------------------------------


def test_an_expert_is_measured_on_the_tokens_routed_to_it() -> None:
    model, batch = zoo.build("mixtral"), zoo.batch("mixtral")
    batch = {key: value[:1] for key, value in batch.items()}  # several: tests/calibration/test_per_example.py
    experts = model.model.layers[0].mlp.experts
    routed: dict[str, Tensor] = {}
    experts.register_forward_pre_hook(lambda m, args: routed.update(x=args[0].detach(), to=args[1].detach()))
    projections = [p for p in select(model, "experts.*").projections if "layers.0" in p.module]
    got = calibrate(model, projections, ALL, [batch], progress=False)

    model.set_experts_implementation("eager")
    model(**batch).loss.backward()
    for p in projections:
        gradient = getattr(experts, p.param).grad.reshape(-1, p.in_features)[slice(*p.rows)]
        torch.testing.assert_close(got[p].gradient, gradient, rtol=1e-3, atol=1e-6)
        expected = float((gradient * p.weight(model)).abs().mean())
        assert got[p].sensitivity == pytest.approx(expected, rel=1e-3, abs=1e-9)
        if p.param == "gate_up_proj":
            expert = int(p.block.split(".")[0])
            tokens = routed["x"][(routed["to"] == expert).any(-1)]
            moment = (tokens.T @ tokens / len(tokens)).double()
            torch.testing.assert_close(got[p].moment, moment, rtol=1e-4, atol=1e-5)
            centred = tokens - tokens.mean(0)
            torch.testing.assert_close(got[p].covariance, centred.T @ centred, rtol=1e-4, atol=1e-5)


def test_the_experts_kernel_is_as_before() -> None:
    model = zoo.build("mixtral")
    before = model.config._experts_implementation
    calibrate(
        model, select(model, "experts.*").projections, ["moment"], [zoo.batch("mixtral")], progress=False
    )
    assert model.config._experts_implementation == before
    assert "forward" not in model.model.layers[0].mlp.experts.__dict__


@pytest.mark.parametrize("preset", [presets.tlora, presets.eva, presets.corda, presets.lora_ga])
def test_experts_take_every_start(preset: Any) -> None:
    model, batch = zoo.build("mixtral"), zoo.batch("mixtral")
    base = frozen_logits(model, batch)
    lowrank.wrap_model(model, preset(rank=2), batches=batches("mixtral"), progress=False)
    assert torch.equal(logits(model, batch), base)


def test_experts_that_show_nothing_are_refused() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(2, 8, 4))
            self.down_proj = nn.Parameter(torch.randn(2, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("nh,eoh->no", x, self.gate_up_proj)

    model = nn.Sequential(Experts())
    with pytest.raises(
        ValueError, match="0 cannot be calibrated: it has no product with its weights that is known"
    ):
        calibrate(
            model, select(model, "all-linear").projections, ["moment"], [torch.randn(3, 4)], progress=False
        )


# -- several processes ----------------------------------------------------------------------------------


def _one_process(rank: int, world: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29611")
    torch.distributed.init_process_group(
        "gloo", rank=rank, world_size=world, init_method=f"file://{folder}/sync"
    )
    model = zoo.build("llama")
    lowrank.wrap_model(model, presets.tlora(rank=2), batches=batches(count=4)[rank::world], progress=False)
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_agree_with_one_that_sees_all_batches(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_one_process, (2, str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    alone = lowrank.wrap_model(
        zoo.build("llama"), presets.tlora(rank=2), batches=batches(count=4), progress=False
    )
    for key, tensor in alone.state_dict().items():
        assert one[key].shape == tensor.shape
        if key.endswith(".A"):
            overlap = torch.linalg.svdvals(one[key] @ tensor.T)
            torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=1e-3, atol=1e-3)


# -- free combinations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("allocate", [Uniform(), ExplainedVariance(), StableRank(), EnergyRank()], ids=repr)
@pytest.mark.parametrize("init", [Kaiming(), TaskAligned()], ids=repr)
def test_initializers_and_allocators_combine(init: Any, allocate: Any) -> None:
    policy = Policy(init=init, allocate=allocate, rank=2)
    model = lowrank.wrap_model(zoo.build("llama"), policy, batches=batches(), progress=False)
    plan = lowrank.plan_of(model)
    spent = sum(p.numel() for p in lowrank.adapter_parameters(model))
    whole = 2 * sum(plan.costs.values())
    assert plan.trainable_parameters == spent <= whole
    growable = [
        plan.costs[p]
        for p, a in plan.items()
        if a.rank < (4 if isinstance(allocate, ExplainedVariance) else min(p.shape))
    ]
    assert isinstance(allocate, Uniform) or not growable or whole - spent < min(growable)


def test_spectra_need_no_batches() -> None:
    plan = lowrank.plan_model(zoo.build("llama"), Policy(allocate=StableRank(), budget=2000), progress=False)
    assert 0 < plan.trainable_parameters <= 2000
