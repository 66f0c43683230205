"""What calibration measures, as data: no hooks, no model. `calibrate` fills it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ProjectionStatistics:
    """What one projection showed on the calibration batches; what was not asked for is None.

    covariance: (in, in), fp32 or better; mean over examples of the input tokens' scatter, each
        example centred by itself (TLoRA, section 3). Projections that read the same input share it.
    sensitivity: mean over examples of mean |W ⊙ ∇W| (TLoRA, section 3).
    gradient: (out, in), fp32; mean over examples of ∇W.
    """

    covariance: Tensor | None = None
    sensitivity: float | None = None
    gradient: Tensor | None = None
