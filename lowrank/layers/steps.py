"""Steps of optimizers, which may change parameters and leave no trace in them."""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook


class OptimizerSteps:
    """Counts the steps of all optimizers in the process, from the first `watched` on.

    Torch's fused optimizers, and many others, write to a parameter and leave its version as it is.
    """

    def __init__(self) -> None:
        self.count = 0
        self._counts = False

    def watched(self) -> int:
        if not self._counts:
            self._counts = True
            register_optimizer_step_post_hook(self._add)
        return self.count

    def _add(self, *_: Any) -> None:
        self.count += 1


steps = OptimizerSteps()
