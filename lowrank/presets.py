"""The methods by name: each is a `Policy`, and any field can be overridden by keyword."""

from __future__ import annotations

from typing import Any

from lowrank.allocate import ExplainedVariance, Sensitivity
from lowrank.init import (
    ActivationPrincipal,
    ByRole,
    CovarianceOriented,
    FrozenA,
    GradientAligned,
    Kaiming,
    Minor,
    Orthogonal,
    Principal,
    TaskAligned,
)
from lowrank.models.projections import Role
from lowrank.policy import Policy


def lora(**overrides: Any) -> Policy:
    """LoRA (2106.09685): A Kaiming-uniform, B zero; rsLoRA (2312.03732) with ``scaling="alpha/sqrt(r)"``."""
    return _policy({"init": Kaiming()}, overrides)


def rslora(**overrides: Any) -> Policy:
    """rsLoRA (2312.03732): LoRA with the scaling ``alpha / √r``, so that high ranks learn as fast."""
    return _policy({"scaling": "alpha/sqrt(r)"}, overrides)


def lora_fa(**overrides: Any) -> Policy:
    """LoRA-FA (2308.03303): A random and frozen, B trained; backward keeps x·Aᵀ and not x."""
    return _policy({"init": FrozenA()}, overrides)


def dora(**overrides: Any) -> Policy:
    """DoRA (2402.09353): LoRA that trains the magnitude of each output row apart from its direction.

    ``dora=True`` does the same to any other preset.
    """
    return _policy({"dora": True}, overrides)


def pissa(**overrides: Any) -> Policy:
    """PiSSA (2404.02948): the principal singular triplets of each weight are what is trained."""
    return _policy({"init": Principal()}, overrides)


def milora(**overrides: Any) -> Policy:
    """MiLoRA (2406.09044): the minor singular triplets are what is trained."""
    return _policy({"init": Minor()}, overrides)


def olora(**overrides: Any) -> Policy:
    """OLoRA (2406.01775): the factors start from W = QR."""
    return _policy({"init": Orthogonal()}, overrides)


def ailora(**overrides: Any) -> Policy:
    """AILoRA (2510.08034): principal triplets for queries, minor ones for values; targets only these."""
    init = ByRole({Role.QUERY: Principal(), Role.VALUE: Minor()}, otherwise=Kaiming())
    return _policy({"target": ("query", "value"), "init": init}, overrides)


def tlora(**overrides: Any) -> Policy:
    """TLoRA (2604.18124): A from the covariance of each input, frozen; rank where the loss is sensitive.

    Needs calibration batches; the authors use 256 training examples.
    """
    return _policy({"init": TaskAligned(), "allocate": Sensitivity()}, overrides)


def eva(**overrides: Any) -> Policy:
    """EVA (2410.07170): A from the inputs' principal directions, and rank where they explain most.

    Needs calibration batches, without labels.
    """
    return _policy({"init": ActivationPrincipal(), "allocate": ExplainedVariance()}, overrides)


def corda(**overrides: Any) -> Policy:
    """CorDA (2406.05223), instruction-previewed.

    With ``init=CovarianceOriented(preserve=True)`` it preserves what the batches ask instead.
    Needs calibration batches, without labels.
    """
    return _policy({"init": CovarianceOriented()}, overrides)


def lora_ga(**overrides: Any) -> Policy:
    """LoRA-GA (2407.05000): the first step follows the gradient of the whole weight.

    Needs calibration batches with labels. A rank is at most ``min(in, out) / 2``.
    """
    return _policy({"init": GradientAligned()}, overrides)


def _policy(defaults: dict[str, Any], overrides: dict[str, Any]) -> Policy:
    return Policy(**{**defaults, **overrides})
