"""Running statistics of a frozen base stand still, as its weights do.

A batch norm in training mode normalizes by the batch and moves its statistics: buffers of the base, which
no adapter holds. While the base is wrapped it stays in evaluation mode instead, and computes the same in
training as afterwards. A copy in ``Policy(train=...)`` moves its own.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from lowrank.layers.tree import hung_modules, original

COUNTING = _NormBase, _SpectralNorm  # batch norms, instance norms that track; vectors of a power iteration
TRAIN = "train"


class _Held:
    """Stands for ``module.train``, on the instance: whatever mode is asked for, it stays in evaluation."""

    def __init__(self, module: nn.Module, root: nn.Module) -> None:
        self.module, self.before = module, module.training
        self.follows = module.training == root.training  # or is its mode one of its own?
        module.training = False

    def __call__(self, mode: bool = True) -> nn.Module:
        self.follows = True
        self.module.training = False
        return self.module

    def release(self, root: nn.Module) -> None:
        del self.module.__dict__[TRAIN]
        self.module.training = root.training if self.follows else self.before


def hold_statistics(root: nn.Module) -> None:
    """Keeps what counts statistics in the base in evaluation mode. Undone by `release_statistics`."""
    for module in map(original, hung_modules(root)):
        if _counts(module) and TRAIN not in module.__dict__:
            module.__dict__[TRAIN] = _Held(module, root)


def release_statistics(root: nn.Module) -> None:
    """Undoes `hold_statistics`; a module that followed the modes of ``root`` has the present one then."""
    for module in map(original, hung_modules(root)):
        held: Any = module.__dict__.get(TRAIN)
        if isinstance(held, _Held):
            held.release(root)


def _counts(module: nn.Module) -> bool:
    # The older spectral_norm hooks its power iteration onto the layer.
    if any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values()):
        return True
    return isinstance(module, COUNTING) and any(buffer is not None for buffer in module._buffers.values())
