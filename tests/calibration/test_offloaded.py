"""A base whose parameters are offloaded: inputs can be measured, what needs the weights says so."""

from __future__ import annotations

import accelerate
import pytest
import torch
from torch import nn

from lowrank.calibration import calibrate
from lowrank.models.projections import find_projections
from lowrank.models.targets import select
from tests import zoo


def offloaded() -> nn.Module:
    return accelerate.cpu_offload(zoo.build("llama"), execution_device=torch.device("cpu"))


def test_inputs_are_those_of_the_base_in_memory() -> None:
    model = zoo.build("llama")
    projections = select(model, "all-linear").projections
    needs, batches = ["covariance", "moment", "gradient"], [zoo.batch("llama")]
    wanted = calibrate(model, projections, needs, batches, progress=False)
    got = calibrate(offloaded(), projections, needs, batches, progress=False)
    for p, each in wanted.items():
        torch.testing.assert_close(got[p].covariance, each.covariance)
        torch.testing.assert_close(got[p].moment, each.moment)
        torch.testing.assert_close(got[p].gradient, each.gradient)


def test_a_sensitivity_needs_the_weight() -> None:
    model = offloaded()
    projections = select(model, "query").projections
    with pytest.raises(ValueError, match=r"q_proj: its weight is offloaded, and its sensitivity needs it"):
        calibrate(model, projections, ["sensitivity"], [zoo.batch("llama")], progress=False)


def test_what_no_gradient_reaches_is_zero_and_not_offloaded() -> None:
    model = zoo.build("llama")
    model.unused = nn.Linear(4, 4)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    unused = [p for p in find_projections(model) if p.module == "unused"]
    got = calibrate(model, unused, ["gradient"], [zoo.batch("llama")], progress=False)
    assert torch.equal(got[unused[0]].gradient, torch.zeros(4, 4))
