"""The optimizer and its learning rate over time: AdamW over what requires grad, warm-up, then a decay.

It knows parameters, not what they are part of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowrank.processes import is_sharded

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class Schedule:
    """The share of the peak learning rate at each step, a factor in (0, 1].

    It rises linearly over ``warmup`` steps (an int), or over that fraction of all (a float), and then falls
    towards zero: ``(1 + cos πt)/2`` or ``1 − t``, with t the share of the other steps that are done. Neither
    the first step nor the last has a rate of zero, so that none is wasted.
    """

    kind: str
    steps: int
    warmup: int | float = 0.03

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(
                f"schedule: expected one of {', '.join(map(repr, SCHEDULES))}, got {self.kind!r}"
            )
        if isinstance(self.warmup, float):
            if not 0 <= self.warmup <= 1:
                raise ValueError(f"warmup: expected a fraction of the steps, from 0 to 1, got {self.warmup}")
        elif (
            isinstance(self.warmup, bool)
            or not isinstance(self.warmup, int)
            or not 0 <= self.warmup <= self.steps
        ):
            raise ValueError(
                f"warmup: expected a fraction, or an int from 0 to {self.steps} steps, got {self.warmup!r}"
            )

    @property
    def warmup_steps(self) -> int:
        return round(self.warmup * self.steps) if isinstance(self.warmup, float) else self.warmup

    def __call__(self, step: int) -> float:
        """The factor of a step, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        done = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        return 1 - done if self.kind == "linear" else (1 + math.cos(math.pi * done)) / 2


def make_optimizer(
    model: nn.Module,
    parameters: Iterable[nn.Parameter] | Iterable[Mapping[str, Any]] | None = None,
    factory: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
    **options: Any,
) -> torch.optim.Optimizer:
    """`adamw`, or what ``factory`` makes of the groups that it would have.

    Raises ValueError as `adamw` does, and where ``factory`` gives no optimizer of just these parameters.
    """
    usual = adamw(model, parameters, **options)
    if factory is None:
        return usual
    if not callable(factory):
        raise ValueError(
            f"optimizer: expected a function from parameter groups to an optimizer, such as "
            f"lambda groups: torch.optim.SGD(groups, momentum=0.9), got {type(factory).__name__}"
        )
    groups = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in usual.param_groups]
    made = factory(groups)
    if not isinstance(made, torch.optim.Optimizer):
        raise ValueError(
            f"optimizer: expected a function to a torch.optim.Optimizer, got {type(made).__name__}"
        )
    if _ids(made) != _ids(usual):
        raise ValueError(
            "optimizer: expected one that trains all parameters of the groups that it gets, and no others"
        )
    return made


def _ids(optimizer: torch.optim.Optimizer) -> list[int]:
    return sorted(id(parameter) for group in optimizer.param_groups for parameter in group["params"])


def adamw(
    model: nn.Module,
    parameters: Iterable[nn.Parameter] | Iterable[Mapping[str, Any]] | None = None,
    *,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.AdamW:
    """AdamW over ``parameters``, or over everything in ``model`` that requires grad.

    ``parameters`` are parameters, or groups as torch.optim takes them, which may have an ``lr`` and a
    ``weight_decay`` of their own, or an ``lr_ratio`` that multiplies ``lr``. The fused kernel is used where
    there is one. Raises ValueError where an option is bad, where nothing is to be trained, or where what is
    named does not require grad or is float16.
    """
    _check_options(lr, weight_decay, betas)
    groups = parameter_groups(model, parameters)
    for group in groups:
        if "lr_ratio" in group:
            group["lr"] = lr * group.pop("lr_ratio")
        _check_options(
            group.get("lr", lr), group.get("weight_decay", weight_decay), group.get("betas", betas)
        )
    groups = [part for group in groups for part in _by_kind(group)]
    every = [parameter for group in groups for parameter in group["params"]]
    if not every:
        raise ValueError(
            "nothing requires grad, so there is nothing to train; wrap the model or unfreeze a part"
        )
    frozen = [tuple(parameter.shape) for parameter in every if not parameter.requires_grad]
    if frozen:
        raise ValueError(
            f"{len(frozen)} of the parameters to train do not require grad; their shapes are {frozen}"
        )
    half = sum(p.dtype is torch.float16 for p in every)
    if half:
        raise ValueError(
            f"{half} of the parameters to train are torch.float16, in which small updates are lost; make "
            "them float32, and compute in half precision by autocast=torch.float16 if you wish"
        )
    if len(set(every)) < len(every):
        raise ValueError("a parameter is named twice in parameters; leave one of the two out")
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in every)
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, betas=betas, fused=fused)


def parameter_groups(
    model: nn.Module, parameters: Iterable[nn.Parameter] | Iterable[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """Groups as `adamw` takes them, which can be gone over again; those without a parameter are left out.

    Raises ValueError for what are no groups, and for an ``lr_ratio`` that is no positive number or that
    stands beside an ``lr``.
    """
    given: list[Any] = (
        [p for p in model.parameters() if p.requires_grad] if parameters is None else list(parameters)
    )
    return _groups(given)


def _groups(parameters: list[Any]) -> list[dict[str, Any]]:
    if all(isinstance(item, Mapping) and "params" in item for item in parameters):
        shared = [dict(item) for item in parameters]
        for group in shared:
            group["params"] = (
                [group["params"]] if isinstance(group["params"], nn.Parameter) else list(group["params"])
            )
            _check_ratio(group)
        return [group for group in shared if group["params"]]
    if all(isinstance(item, nn.Parameter) for item in parameters):
        return [{"params": parameters}]
    kinds = sorted({type(item).__name__ for item in parameters})
    raise ValueError(f"parameters: expected nn.Parameters, or dicts with 'params', not both, got {kinds}")


def _check_ratio(group: Mapping[str, Any]) -> None:
    ratio = group.get("lr_ratio", 1.0)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < math.inf:
        raise ValueError(f"lr_ratio: expected a positive number, got {ratio!r}")
    if "lr" in group and "lr_ratio" in group:
        raise ValueError(
            "a group: expected an lr of its own or an lr_ratio, which multiplies fit's lr, got both"
        )


def _by_kind(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Sharded parameters apart from whole ones, since no kernel takes both at once."""
    kinds = [[p for p in group["params"] if is_sharded(p) is sharded] for sharded in (False, True)]
    return [{**group, "params": held} for held in kinds if held]


def _check_options(lr: float, weight_decay: float, betas: tuple[float, float]) -> None:
    if not 0 < lr < math.inf:
        raise ValueError(f"lr: expected a positive number, got {lr}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay: expected zero or more, got {weight_decay}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: expected two numbers from 0 to below 1, got {betas}")
