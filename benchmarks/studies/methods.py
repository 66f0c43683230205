"""The study's methods: what each makes of a pretrained model, and which parameters it trains at which rate.

Everything but the adapters is the same for all: the new head is trained in full at a rate of its own, so that
the rate that is swept is the adapters' alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

import lowrank
from benchmarks.studies.candidates import RaisedMinor, RandomDirections, Released
from lowrank import Policy, Role, presets
from lowrank.allocate import Sensitivity, Uniform
from lowrank.init import (
    ByRole,
    CovarianceOriented,
    FrozenA,
    GradientAligned,
    Kaiming,
    Minor,
    Principal,
    TaskAligned,
)

HEAD_LR = 1e-3
ALPHA = 16.0


@dataclass(frozen=True)
class Method:
    """How one method adapts a model.

    Args:
        policy: keyword arguments → `Policy`; None for what is not an adapter of this library.
        guess: where its best learning rate is looked for first.
        b_rate: the rate of B over that of A (LoRA+).
        peft: keyword arguments of `peft.LoraConfig`, to train with PEFT instead.
        trains: "adapters", "everything" or "head".
        cheaper: it trains fewer parameters than LoRA at equal rank, so that both comparisons are worth a run.
    """

    policy: Callable[..., Policy] | None = None
    guess: float = 1e-3
    b_rate: float = 1.0
    peft: dict[str, Any] | None = None
    trains: str = "adapters"
    cheaper: bool = False

    @property
    def has_rank(self) -> bool:
        return self.trains == "adapters"


def _with(**fixed: Any) -> Callable[..., Policy]:
    return lambda **options: Policy(**{**fixed, **options})


METHODS: dict[str, Method] = {
    "lora": Method(presets.lora, guess=3e-3),
    "rslora": Method(_with(scaling="alpha/sqrt(r)"), guess=1e-3),
    "lora+": Method(presets.lora, guess=1e-3, b_rate=16.0),
    "pissa": Method(presets.pissa, guess=1e-3),
    "milora": Method(presets.milora, guess=1e-3),
    "olora": Method(presets.olora, guess=1e-3),
    "ailora": Method(presets.ailora, guess=1e-3, cheaper=True),
    "tlora": Method(presets.tlora, guess=1e-3, cheaper=True),
    "tlora-uniform": Method(_with(init=TaskAligned(), allocate=Uniform()), guess=1e-3, cheaper=True),
    "tlora-ranks": Method(_with(init=Kaiming(), allocate=Sensitivity()), guess=3e-3),
    "frozen-a": Method(presets.lora_fa, guess=3e-3, cheaper=True),
    "eva": Method(presets.eva, guess=1e-3),
    "corda": Method(presets.corda, guess=1e-3),
    "lora-ga": Method(presets.lora_ga, guess=3e-4),
    "ailora-mirror": Method(
        _with(
            target=("query", "value"),
            init=ByRole({Role.QUERY: Minor(), Role.VALUE: Principal()}, otherwise=Kaiming()),
        ),
        guess=1e-3,
    ),
    "pissa-qv": Method(_with(target=("query", "value"), init=Principal()), guess=1e-3),
    "milora-qv": Method(_with(target=("query", "value"), init=Minor()), guess=1e-3),
    "lora-qv": Method(_with(target=("query", "value")), guess=3e-3),
    "pissa-random": Method(_with(init=RandomDirections()), guess=1e-3),
    "frozen-a-rs": Method(_with(init=FrozenA(), scaling="alpha/sqrt(r)"), guess=1e-3),
    "ailora-raised": Method(
        _with(
            init=ByRole({Role.QUERY: CovarianceOriented(), Role.VALUE: RaisedMinor()}, otherwise=Kaiming())
        ),
        guess=1e-3,
    ),
    "tlora-slow-a": Method(_with(init=Released(TaskAligned())), guess=1e-4, b_rate=16.0),
    "lora-ga-ranks": Method(_with(init=GradientAligned(), allocate=Sensitivity()), guess=3e-4),
    "peft-lora": Method(peft={"init_lora_weights": True}, guess=3e-3),
    "peft-pissa": Method(peft={"init_lora_weights": "pissa"}, guess=1e-3),
    "full": Method(guess=1e-4, trains="everything"),
    "head": Method(guess=1e-3, trains="head"),
}


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to train: groups for the optimizer, and what was spent."""

    model: nn.Module
    groups: list[dict[str, Any]]
    trainable: int  # adapters; everything, for full fine-tuning


def prepare(
    model: nn.Module,
    method: Method,
    *,
    rank: int,
    budget: int | None,
    lr: float,
    seed: int,
    head: tuple[str, ...],
    calibration: list[Any],
) -> Prepared:
    """``model`` as ``method`` trains it, with the adapters at ``lr`` and the head at `HEAD_LR`.

    Args:
        budget: trainable adapter parameters, where methods are compared at equal parameters; ``rank`` is then
            what it is reckoned from and nothing else.
    """
    heads = [parameter for name in head for parameter in model.get_submodule(name).parameters()]
    if method.trains != "adapters":
        inside = {id(parameter) for parameter in heads}
        rest = [p for p in model.parameters() if id(p) not in inside] if method.trains == "everything" else []
        for parameter in model.parameters():
            parameter.requires_grad_(method.trains == "everything" or id(parameter) in inside)
        groups = [
            {"params": rest, "lr": lr},
            {"params": heads, "lr": lr if method.trains == "head" else HEAD_LR},
        ]
        return Prepared(model, groups, sum(p.numel() for p in rest))
    if method.peft is not None:
        return _with_peft(model, method.peft, rank, lr, seed, head)
    assert method.policy is not None
    policy = method.policy(rank=rank, budget=budget, alpha=ALPHA, train=head, seed=seed)
    lowrank.wrap_model(model, policy, batches=calibration if policy.needs else None, progress=False)
    adapters = {id(p) for p in lowrank.adapter_parameters(model)}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if id(p) in adapters and n.endswith(".A")], "lr": lr},
        {"params": [p for n, p in named if id(p) in adapters and n.endswith(".B")], "lr": lr * method.b_rate},
        {"params": [p for _, p in named if id(p) not in adapters], "lr": HEAD_LR},
    ]
    return Prepared(model, groups, lowrank.plan_of(model).trainable_parameters)


def _with_peft(
    model: nn.Module, options: dict[str, Any], rank: int, lr: float, seed: int, head: tuple[str, ...]
) -> Prepared:
    import peft
    import torch

    config = peft.LoraConfig(
        r=rank,
        lora_alpha=ALPHA,
        target_modules=[p.module for p in lowrank.find_projections(model) if not p.module.startswith(head)],
        modules_to_save=list(head) or None,
        **options,
    )
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, config)
    named = [(name, p) for name, p in wrapped.named_parameters() if p.requires_grad]
    adapters = [p for name, p in named if "lora_" in name]
    groups = [
        {"params": adapters, "lr": lr},
        {"params": [p for name, p in named if "lora_" not in name], "lr": HEAD_LR},
    ]
    return Prepared(wrapped, groups, sum(p.numel() for p in adapters))
