"""`calibrate`: runs the model over the batches and leaves it as it was.

Mode, random state, gradients and hooks are as before, also after an error. What is measured on the way is
`meter`'s affair, how it is seen is `hooks`'.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lowrank.batches import Loss, Mask, model_device, output_loss, scalar_loss, to_device
from lowrank.calibrate.hooks import watched
from lowrank.calibrate.meter import Meter
from lowrank.pretrained import kept_unpacked
from lowrank.projections import Projection, Role
from lowrank.statistics import KINDS, Statistics

SHARING = ({Role.QUERY, Role.KEY, Role.VALUE}, {Role.GATE, Role.UP})  # as a rule these read one input


def calibrate(
    model: nn.Module,
    projections: Sequence[Projection],
    needs: Collection[str],
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    mask: Mask | None = None,
    steps: int | None = None,
    device: torch.device | str | None = None,
    columns: Mapping[Projection, torch.Tensor] | None = None,
    progress: bool = True,
) -> Statistics:
    """Statistics of ``projections`` over ``batches``, each of which is used once.

    Covariance is ``C = mean over examples of (X − x̄)ᵀ(X − x̄)``, ``(in, in)``, X an example's ``(tokens,
    in)`` input without padding; an input without a token dimension is centred over its batch. Sensitivity
    is ``mean over examples of mean |W ⊙ ∇W L|`` where L is the batch's mean loss counted for that example
    alone, and ∇W that of all uses of a module that is called several times (if each shows the examples
    apart, as position embeddings common to all do not); the gradient is the mean over examples of ∇W L. The
    input weights of `nn.MultiheadAttention`, and experts, are measured a batch at a time, which is the same
    for batches of one; an expert sees only the tokens routed to it. (TLoRA, 2604.18124, section 3; the
    moment is CorDA's, 2406.05223.)

    Everything is accumulated in fp32 (fp64 for fp64 models), from products that are as exact as their
    inputs; only the sensitivity's may round, to TF32 (CUDA) or bf16 (CPU). The model is in evaluation mode
    for the while. Peak extra memory: `predicted_bytes`, the inputs of one batch while gradients are asked
    for, and one ``(out, in)`` gradient at a time. Under `torch.distributed` the processes' sums are added,
    so that every rank gets the same statistics.

    Args:
        needs: of {"covariance", "moment", "sensitivity", "gradient"}.
        loss: ``loss(model, batch) -> scalar``; by default the ``.loss`` of the model's output, and where only
            inputs are measured a call of the model.
        mask: ``mask(batch) -> (batch, tokens)`` bool, True where a token counts; by default the batch's
            ``attention_mask``, where it has one; in a decoder beside an encoder, ``decoder_attention_mask``
            or what comes after an example's last label.
        steps: use so many batches at most.
        device: where the statistics are kept; by default where each projection's input is.
        columns: (in, q) for each projection, where "sketch" is needed: what the covariance is multiplied by.
        progress: say what it will take, and show a bar after two seconds.

    Raises:
        ValueError: no batch, a loss that is not a finite scalar, or NaN/Inf in the input of a projection.
    """
    unknown = set(needs) - KINDS
    if unknown:
        raise ValueError(f"unknown statistics {sorted(unknown)}; there are {sorted(KINDS)}")
    if isinstance(batches, Mapping | torch.Tensor | str):
        raise ValueError(f"batches= is one {type(batches).__name__}: pass a list of batches, or a DataLoader")
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1: {steps}")
    if not needs or not projections:
        return Statistics({})
    if "sketch" in needs and (columns is None or set(projections) - set(columns)):
        raise ValueError(
            "a sketch is of the covariance times given columns=: TaskAligned(sketch=8) gives them"
        )
    home_of_sums = None if device is None else torch.device(device)
    meter = Meter(model, projections, frozenset(needs), home_of_sums, columns)
    home = model_device(model)
    if progress:
        size = predicted_bytes(projections, needs, columns)
        tqdm.write(f"calibrating {len(projections)} projections: {size / 2**20:.0f} MiB of statistics")
    with _undisturbed(model), kept_unpacked(model), watched(model, meter):
        bar = tqdm(islice(batches, steps), "calibrating", disable=not progress, delay=2, leave=False)
        for number, batch in enumerate(bar):
            batch = to_device(batch, home)
            meter.begin(number, batch, mask)
            with torch.set_grad_enabled(meter.needs_backward):
                if meter.needs_backward or loss is not None:
                    value = scalar_loss(loss or output_loss, model, batch)
                    if not torch.isfinite(value):
                        raise ValueError(
                            f"the loss of calibration batch {number} is not finite: {value.item()}"
                        )
                    if value.requires_grad:
                        meter.in_backward = True
                        value.backward()
                    del value  # else its graph, whose hooks hold the inputs, lives through the next forward
                else:  # only inputs are asked for, so labels are not needed
                    model(**batch) if isinstance(batch, Mapping) else model(batch)
            meter.end()
    if not meter.batches:
        raise ValueError(
            "calibration needs batches, and got none: the loader is empty or was consumed before"
        )
    meter.all_reduce()
    return meter.statistics()


def predicted_bytes(
    projections: Sequence[Projection],
    needs: Collection[str],
    columns: Mapping[Projection, torch.Tensor] | None = None,
) -> int:
    """The memory that the statistics will take, where projections share inputs as is usual."""
    inputs = {
        (p.module.rpartition(".")[0], _reads(p), p.in_features, p.block.split(".")[0]) for p in projections
    }
    if not any(p.block for p in projections):
        inputs = {(parent, reads, width, "") for parent, reads, width, _ in inputs}
    matrices = sum(width * width for _, _, width, _ in inputs)
    size = matrices * len({"covariance", "moment"} & set(needs))
    if "gradient" in needs:
        size += sum(p.in_features * p.out_features for p in projections)
    if "sketch" in needs and columns is not None:
        size += 2 * sum(columns[p].numel() for p in projections)  # and what they become
    return 4 * size


def _reads(p: Projection) -> str:
    """A name for the input of ``p`` among its siblings."""
    return next((str(sorted(roles)) for roles in SHARING if p.role in roles), p.name)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and frozen parameters inside; modes, flags and random state as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    learning = [p for p in model.parameters() if p.requires_grad]
    fast = torch.backends.mha.get_fastpath_enabled()
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    try:
        with torch.random.fork_rng(devices=[d for d in devices if d is not None]):
            model.eval()
            torch.backends.mha.set_fastpath_enabled(False)  # it reads weights past every hook
            for parameter in learning:
                parameter.requires_grad_(False)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for parameter in learning:
            parameter.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode
