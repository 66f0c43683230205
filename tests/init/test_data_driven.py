"""EVA, CorDA and LoRA-GA against their definitions and against PEFT on the same model and batch."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

import lowrank
from lowrank import presets
from lowrank.allocate import ExplainedVariance, Uniform
from lowrank.calibration.statistics import ProjectionStatistics
from lowrank.init import ActivationPrincipal, CovarianceOriented, GradientAligned
from lowrank.models.projections import Role
from tests import zoo

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's

RANK = 3


def data(family: str = "llama") -> dict[str, Tensor]:
    """One batch without padding, so that all agree on what a token is."""
    batch = zoo.batch(family)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    batch["labels"] = batch["input_ids"].clone()
    return batch


def start(
    init: Any, weight: Tensor, statistics: ProjectionStatistics, rank: int = RANK, scaling: float = 2.0
) -> Any:
    draw = torch.Generator().manual_seed(0)
    return init(weight, rank, scaling, role=Role.OTHER, statistics=statistics, generator=draw)


def same_space(a: Tensor, b: Tensor, tolerance: float = 1e-3) -> None:
    """The rows of a and b span the same space."""
    overlap = torch.linalg.svdvals(torch.linalg.qr(a.T.double()).Q.T @ torch.linalg.qr(b.T.double()).Q)
    torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=0, atol=tolerance)


def adapters(model: nn.Module) -> dict[str, Any]:
    return {path: layer.adapters["default"][0] for path, layer in lowrank.adapted_layers(model).items()}


def peft_layers(model: nn.Module) -> dict[str, Any]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }


TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.mark.filterwarnings("ignore:lora with eva")
def test_eva_as_peft() -> None:
    batch = data()
    config = peft.LoraConfig(
        r=RANK, lora_alpha=16, target_modules=TARGETS, init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0, tau=0.99, use_label_mask=False),
    )  # fmt: skip
    theirs = peft.get_peft_model(zoo.build("llama"), config)
    peft.initialize_lora_eva_weights(theirs, [batch], show_progress_bar=False)
    policy = presets.eva(rank=RANK, target=TARGETS, allocate=ExplainedVariance(unit="ranks"))
    ours = lowrank.wrap_model(zoo.build("llama"), policy, batches=[batch], progress=False)
    ranks = {p.module: a.rank for p, a in lowrank.plan_of(ours).items()}
    found = peft_layers(theirs)
    assert {path: layer.r["default"] for path, layer in found.items()} == {
        p: r for p, r in ranks.items() if r
    }
    for path, adapter in adapters(ours).items():
        same_space(adapter.A.detach(), found[path].lora_A["default"].weight.detach(), 2e-2)
        assert adapter.scaling == pytest.approx(found[path].scaling["default"])


@pytest.mark.parametrize("preserve", [False, True])
def test_corda_as_peft(preserve: bool) -> None:
    batch = {key: value[:1] for key, value in data().items()}  # PEFT takes the first example's tokens only
    config = peft.LoraConfig(
        r=RANK, lora_alpha=16, target_modules=TARGETS, init_lora_weights="corda",
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method="kpm" if preserve else "ipm"),
    )  # fmt: skip
    base = zoo.build("llama")
    preprocess_corda(base, config, run_model=lambda: base(**batch))
    theirs = peft_layers(peft.get_peft_model(base, config))
    policy = presets.corda(rank=RANK, target=TARGETS, init=CovarianceOriented(preserve=preserve))
    ours = lowrank.wrap_model(zoo.build("llama"), policy, batches=[batch], progress=False)
    for path, adapter in adapters(ours).items():
        A, B = (factor.detach() for factor in adapter.factors())
        layer = theirs[path]
        their_delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        ours_delta = adapter.scaling * (B @ A)
        theirs_delta = layer.scaling["default"] * their_delta.detach()
        assert (ours_delta - theirs_delta).norm() < 0.02 * theirs_delta.norm().clamp_min(1e-6)


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_lora_ga_as_peft() -> None:
    batch = data()
    config = peft.LoraConfig(
        r=RANK, lora_alpha=16, target_modules=TARGETS, init_lora_weights="lora_ga",
        lora_ga_config=peft.tuners.lora.config.LoraGAConfig(),
    )  # fmt: skip
    base = zoo.build("llama")

    def train_step() -> None:
        base(**batch).loss.backward()

    preprocess_loraga(base, config, train_step)
    theirs = peft_layers(peft.get_peft_model(base, config))
    policy = presets.lora_ga(rank=RANK, target=TARGETS)
    ours = lowrank.wrap_model(zoo.build("llama"), policy, batches=[batch], progress=False)
    for path, adapter in adapters(ours).items():
        A, B = (factor.detach() for factor in adapter.factors())
        same_space(A, theirs[path].lora_A["default"].weight.detach())
        same_space(B.T, theirs[path].lora_B["default"].weight.detach().T)


# -- definitions -----------------------------------------------------------------------------------------


def moment_of(x: Tensor) -> ProjectionStatistics:
    mean = x.mean(0, dtype=torch.float64)
    centred = (x - mean).to(x.dtype)
    return ProjectionStatistics(token_covariance=centred.T @ centred / len(x), mean=mean)


def test_eva_takes_principal_directions() -> None:
    x = torch.randn(200, 12) @ torch.randn(12, 12) + 3
    factors = start(ActivationPrincipal(), torch.randn(8, 12), moment_of(x))
    same_space(factors.A, torch.linalg.svd(x - x.mean(0)).Vh[:RANK])
    torch.testing.assert_close(factors.A @ factors.A.T, torch.eye(RANK), rtol=0, atol=1e-5)
    assert not factors.B.any() and not factors.frozen


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
def test_corda_holds_its_part_of_the_weight(preserve: bool, shape: tuple[int, int]) -> None:
    weight, x = torch.randn(shape), torch.randn(300, shape[1]) @ torch.randn(shape[1], shape[1])
    statistics = moment_of(x)
    factors = start(CovarianceOriented(preserve=preserve), weight, statistics)
    C = statistics.moment.double()
    C = C + 0.01 * C.diagonal().mean() * torch.eye(len(C))
    U, S, Vh = torch.linalg.svd(weight.double() @ C, full_matrices=False)
    k = slice(len(S) - RANK, None) if preserve else slice(RANK)
    part = (U[:, k] * S[k]) @ Vh[k] @ torch.linalg.inv(C)
    torch.testing.assert_close(2.0 * (factors.B @ factors.A).double(), part, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("preserve", [False, True])
def test_corda_without_inputs_holds_the_weights_own_triplets(preserve: bool) -> None:
    """As of an expert that no token was routed to."""
    weight = torch.randn(8, 12)
    factors = start(CovarianceOriented(preserve=preserve), weight, moment_of(torch.zeros(5, 12)))
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    k = slice(8 - RANK, 8) if preserve else slice(RANK)
    torch.testing.assert_close(2.0 * factors.B @ factors.A, (U[:, k] * S[k]) @ Vh[k], rtol=1e-4, atol=1e-4)


def test_lora_ga_starts_in_the_gradients_directions() -> None:
    weight, gradient = torch.randn(16, 12), torch.randn(16, 12)
    factors = start(GradientAligned(), weight, ProjectionStatistics(gradient=gradient))
    U, S, Vh = torch.linalg.svd(gradient)
    same_space(factors.A, Vh[:RANK])
    same_space(factors.B.T, U[:, RANK : 2 * RANK].T)
    scale = 16**0.25 / 4
    torch.testing.assert_close(factors.A @ factors.A.T, scale**2 * torch.eye(RANK), rtol=0, atol=1e-4)
    assert factors.energy == pytest.approx(float(S[:RANK].square().sum() / S.square().sum()), rel=1e-3)


def test_a_gradient_of_zero_still_starts_somewhere() -> None:
    factors = start(
        GradientAligned(), torch.randn(16, 12), ProjectionStatistics(gradient=torch.zeros(16, 12))
    )
    scale = (16**0.25 / 4) ** 2 * torch.eye(RANK)
    torch.testing.assert_close(factors.A @ factors.A.T, scale, rtol=0, atol=1e-4)
    torch.testing.assert_close(factors.B.T @ factors.B, scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize("init", [ActivationPrincipal(), CovarianceOriented(), GradientAligned()], ids=repr)
def test_what_was_not_measured_is_asked_for(init: Any) -> None:
    for statistics in (None, ProjectionStatistics()):
        with pytest.raises(ValueError, match="pass batches="):
            start(init, torch.randn(8, 12), statistics)  # type: ignore[arg-type]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="gamma: expected a positive number, got"):
        GradientAligned(gamma=0)
    with pytest.raises(ValueError, match=r"takes 2·rank directions"):
        start(
            GradientAligned(), torch.randn(8, 12), ProjectionStatistics(gradient=torch.randn(8, 12)), rank=5
        )
    with pytest.raises(ValueError, match="rho: expected at least 1, got"):
        ExplainedVariance(rho=0.5)


def test_budgets_in_ranks_and_in_parameters_differ_where_shapes_do() -> None:
    batch = data()
    plans = {
        unit: lowrank.plan_model(
            zoo.build("llama"),
            presets.eva(rank=2, allocate=ExplainedVariance(unit=unit)),
            batches=[batch],
            progress=False,
        )
        for unit in ("ranks", "parameters")
    }
    uniform = lowrank.plan_model(zoo.build("llama"), presets.eva(rank=2, allocate=Uniform()))
    assert sum(a.rank for a in plans["ranks"].values()) == 2 * len(uniform)
    assert plans["parameters"].trainable_parameters <= uniform.trainable_parameters
    assert max(a.rank for plan in plans.values() for a in plan.values()) <= 4
