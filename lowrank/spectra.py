"""Singular values of weights, updates and inputs, as a picture: how much of each a rank holds."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank.adapters import adapters_of, plan_of, wrapped_root
from lowrank.calibration.source import Source
from lowrank.calibration.statistics import ProjectionStatistics, Statistics
from lowrank.formats.layers import layer_of
from lowrank.linalg import closest_product
from lowrank.models.projections import Projection
from lowrank.peft_format.pairs import Pair, plain
from lowrank.plan import Plan
from lowrank.plots import spectra
from lowrank.wrapping.install import bare

Matrices = Literal["weight", "update", "input"]

TITLES = {
    "weight": "Singular values of the frozen weights; a dot is the rank",
    "update": "Singular values of ΔW; a dot is the rank",
    "input": "Singular values of the centred inputs; a dot is the rank",
}


@torch.no_grad()
def plot_spectrum(
    model: nn.Module,
    plan: Plan | None = None,
    path: str | PathLike[str] | None = None,
    *,
    of: Matrices = "weight",
    name: str | None = None,
    statistics: Statistics | None = None,
    progress: bool = True,
) -> Any:
    """A picture for each role: the singular values of its projections, and the share that the first k hold.

    The share is of the sum of squares: of ‖W‖², of ‖ΔW‖², or of an input's variance. There is a line for
    each projection, darker in early layers, and a dot at its rank. Axes of k are logarithmic.

    Args:
        model: wrapped or not. It is left as it is.
        plan: the projections and their ranks. For a wrapped model None: the plan of its adapter ``name``.
        path: where it is written, in the format that its ending says. The figure is returned in any case.
        of: "weight": W, frozen, without adapters; takes an eigendecomposition in fp64 of each, unless
            ``statistics`` hold its spectrum. "update": ΔW of the adapter as it is now, from its factors;
            magnitudes (DoRA) do not count. "input": what entered during calibration, from ``statistics``.
        name: of the adapter of a wrapped model that has several.
        statistics: what was measured on this model, by `measure`. For "input" a covariance or a moment, as
            the methods tlora, eva and corda need them.
        progress: show a bar where weights take more than two seconds.

    Raises:
        ValueError: the model is not wrapped and there is no plan, or an update is asked for; ``statistics``
            are missing, another model's, or do not hold what is needed; all matrices are zero.
        ImportError: matplotlib is not installed.
    """
    if of not in TITLES:
        raise ValueError(f"of: expected one of {', '.join(map(repr, TITLES))}, got {of!r}")
    wrapped = any("_lowrank" in module.__dict__ for module in model.modules())
    if not wrapped and of == "update":
        raise ValueError('the model is not wrapped, so it has no update: wrap it, or ask for of="weight"')
    if wrapped and (plan is None or of == "update"):
        plan = plan_of(model, name)
    if plan is None:
        raise ValueError("the model is not wrapped: give the plan that it is to get, as plan_model makes it")
    if of == "update":
        held = adapters_of(model, name)
        values = {p: update_spectrum(plain(adapter, torch.float64)) for p, adapter in held.items()}
    else:
        with bare(wrapped_root(model) if wrapped else model):
            if of == "weight":
                source = Source(statistics=statistics, progress=progress)
                values = _of_weights(model, plan, source)
            else:
                values = _of_inputs(model, plan, statistics)
    return spectrum_figure(plan, values, path, of=of)


def spectrum_figure(
    plan: Plan,
    values: Mapping[Projection, Tensor],
    path: str | PathLike[str] | None = None,
    *,
    of: Matrices,
) -> Any:
    """The picture of singular values that are known: descending, of projections of ``plan``.

    A matrix that is zero has no line. Raises ValueError where all are.
    """
    rows: dict[str, list[tuple[str, list[float], int]]] = {}
    for p, each in values.items():
        if each.numel() and each[0] > 0:
            marked = min(plan[p].rank, each.numel())
            rows.setdefault(p.role.value, []).append((layer_of(p), each.tolist(), marked))
    if not rows:
        helps = ': train first, or ask for of="weight"' if of == "update" else ""
        raise ValueError(f"every {of} is zero, so there is nothing to draw{helps}")
    return spectra(rows, path, title=TITLES[of])


def update_spectrum(pair: Pair) -> Tensor:
    """The singular values of ``scaling · B·A``, descending, in fp64; at most as many as ΔW has."""
    found = abs(pair.scaling) * closest_product(pair.B.double(), pair.A.double(), 0)[2]
    return found[: min(pair.B.shape[0], pair.A.shape[1])]


def _of_weights(model: nn.Module, plan: Plan, source: Source) -> dict[Projection, Tensor]:
    measured = source.measure(model, dict.fromkeys(plan.adapted, frozenset({"spectrum"})))
    found = {p: measured[p].spectrum for p in plan.adapted}
    return {p: spectrum for p, spectrum in found.items() if spectrum is not None}


def _of_inputs(model: nn.Module, plan: Plan, statistics: Statistics | None) -> dict[Projection, Tensor]:
    if statistics is None:
        raise ValueError('of="input" needs statistics=: lowrank.measure(model, presets.eva(), batches)')
    statistics.check(model, plan.adapted)
    found, by_input = {}, {}
    for p in plan.adapted:
        each = statistics[p] if p in statistics else ProjectionStatistics()
        covariance = each.covariance if each.token_covariance is None else each.token_covariance
        if covariance is None:
            raise ValueError(f"{p.name}: statistics= hold neither a covariance nor a moment of its input")
        if id(covariance) not in by_input:  # projections that read one input share it
            variances = torch.linalg.eigvalsh(covariance.double().cpu()).flip(0).clamp_min(0)
            by_input[id(covariance)] = variances.sqrt()
        found[p] = by_input[id(covariance)]
    return found
