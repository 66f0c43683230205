"""`calibrate`: runs the model over the batches and leaves it as it was.

Mode, random state, gradients and hooks are as before, also after an error. What is measured on the way is
`meter`'s affair, how it is seen is `hooks`', what an example is, `examples`'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowrank.batches import Loss, Mask, in_float16, model_device, output_loss, scalar_loss, to_device
from lowrank.calibration.examples import Example, divide, has_no_label
from lowrank.calibration.hooks import watched
from lowrank.calibration.masks import token_mask
from lowrank.calibration.meter import Meter
from lowrank.calibration.needs import Needs, by_projection, predicted_bytes
from lowrank.calibration.statistics import KINDS, Statistics
from lowrank.calibration.undisturbed import undisturbed
from lowrank.models.fingerprint import of_projections
from lowrank.models.projections import Projection
from lowrank.models.storage import kept_unpacked
from lowrank.notices import few, logger
from lowrank.processes import Processes
from lowrank.progress import bar

NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST_SCALE = 2.0**15  # of the loss in float16, where small gradients are zero; the smallest is its inverse
END = object()  # what an iterator gives that has no more batches


def calibrate(
    model: nn.Module,
    projections: Sequence[Projection],
    needs: Needs,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    mask: Mask | None = None,
    steps: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Statistics:
    """Statistics of ``projections`` over ``batches``, each of which is used once.

    Each example is run alone, as a batch of its own, so that neither batching nor what the loss averages
    over matters. Covariance is ``mean over examples of (X − x̄)ᵀ(X − x̄)``, ``(in, in)``, X an example's
    ``(tokens, in)`` input without padding; an input that never has more than one token an example is centred
    over all examples. Sensitivity is ``mean over examples of mean |W ⊙ ∇W L|`` and the gradient ``mean over
    examples of ∇W L``, L the loss of the example alone and ∇W the sum over all uses of a module. An expert
    sees the tokens routed to it. (TLoRA, 2604.18124, section 3.) The moment is a mean over all tokens (CorDA,
    2406.05223; EVA, 2410.07170): where nothing else is measured and no token is masked, a batch is run whole.

    What an example is: `examples.divide`. One without a label counts for its inputs only. A loss that
    compares the examples of a batch, as contrastive ones do, has no gradient for one alone: where no example
    of the first batch of several has one, but the batch has, each batch counts as one example for sensitivity
    and gradient.

    Everything is accumulated in fp32 (fp64 for fp64 models), from products that are as exact as their
    inputs; only the sensitivity's may round, to TF32 (CUDA) or bf16 (CPU). In float16 the loss is scaled
    for the backward pass, so that small gradients are not zero. The model is in evaluation mode
    meanwhile. Peak extra memory: `predicted_bytes`, the inputs of one example while gradients are asked for,
    and one ``(out, in)`` gradient at a time. Under `torch.distributed` every rank gets the statistics of
    all ranks' batches, of which they may have different numbers; what fails in one rank fails in all.

    Args:
        needs: of {"covariance", "moment", "sensitivity", "gradient"}, for all or by projection.
        loss: ``loss(model, batch) -> scalar``; by default the ``.loss`` of the model's output, and where only
            inputs are measured a call of the model.
        mask: ``mask(batch) -> (batch, tokens)`` bool, True where a token counts; by default the batch's
            ``attention_mask``, where it has one; in a decoder beside an encoder, ``decoder_attention_mask``
            or what comes after an example's last label.
        steps: use so many batches at most.
        device: where the statistics are kept; by default where each projection's input is.
        progress: show a bar after two seconds. What it will take is logged as INFO.

    Raises:
        ValueError: no batch, one that cannot be divided into examples, a loss that is not a finite scalar, no
            example with a label, or NaN/Inf in the input of a projection.
    """
    wanted = by_projection(projections, needs)
    unknown = frozenset(needs if not isinstance(needs, Mapping) else ()).union(*wanted.values()) - KINDS
    if unknown:
        raise ValueError(f"unknown statistics {sorted(unknown)}; there are {sorted(KINDS)}")
    if isinstance(batches, Mapping | Tensor | str):
        raise ValueError(
            f"batches=: expected a list of batches or a DataLoader, got one {type(batches).__name__}"
        )
    if steps is not None and steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if not wanted:
        return Statistics({})
    home = model_device(model)
    meter = Meter(model, wanted, None if device is None else torch.device(device))
    processes = Processes(home)
    progress = progress and processes.first
    if processes.first:
        size = predicted_bytes(projections, needs) / 2**20
        logger.info("calibrating %d projections: %.0f MiB of statistics", len(wanted), size)
    with undisturbed(model), kept_unpacked(model), watched(model, meter):
        run = _Run(model, meter, loss, mask, home)
        _each(_read(batches, steps, progress), run.measure, processes)
    meter.reduce(processes)
    return Statistics(meter.statistics(), of_projections(model, list(wanted)))


def _read(batches: Iterable[Any], steps: int | None, progress: bool) -> Iterator[Any]:
    yield from bar(islice(batches, steps), "calibrating", shown=progress, delay=2, leave=False)


def _each(remaining: Iterator[Any], measure: Callable[[int, Any], None], processes: Processes) -> None:
    """Measures all batches, in step with the other processes; an error of any one is raised in all."""
    number, done = 0, False
    error: Exception | None = None
    while not processes.all_done(done, error):
        if done:
            continue
        try:
            batch = next(remaining, END)
            if batch is END and not number:
                raise ValueError(
                    "calibration needs batches, and got none: the loader is empty or was used up before"
                )
            if batch is END:
                done = True
            else:
                measure(number, batch)
                number += 1
        except Exception as found:
            if processes.number == 1:
                raise
            error = found


class _Run:
    """Calls the model, and runs the backward passes, on one batch after the other."""

    def __init__(
        self, model: nn.Module, meter: Meter, loss: Loss | None, mask: Mask | None, device: torch.device
    ) -> None:
        self.model, self.meter, self.loss, self.mask, self.device = model, meter, loss, mask, device
        if in_float16(model):
            meter.gradients.scale = LARGEST_SCALE
        self.compares: bool | None = None  # does it compare examples? Told by the first batch of several

    def measure(self, number: int, batch: Any) -> None:
        """All that batch ``number`` adds to the meter's sums."""
        meter, batch = self.meter, to_device(batch, self.device)
        tokens = token_mask(batch, self.mask, number)
        whole = Example(batch, tokens)
        alone = [whole]
        if meter.by_example or not (tokens is None or tokens.all()):
            alone = divide(batch, tokens, number)
        alone = [example for example in alone if example.tokens is None or example.tokens.any()]
        before = meter.gradients.examples
        for example in alone:
            self._example(example, number, whole, backward=not self.compares)
        if self.mask is not None:
            meter.check_mask(tokens)
        if meter.needs_backward and len(alone) > 1 and self.compares is not False:
            self._compare(number, whole, before)

    def _compare(self, number: int, whole: Example, before: int) -> None:
        """Counts the batch as one example if none had a gradient alone; ``before`` it there were so many."""
        gradients = self.meter.gradients
        if self.compares is None and not gradients.nothing:
            self.compares = False
        elif not has_no_label(whole.batch, shifted=True):
            alone, gradients.examples = gradients.examples, before
            self._example(whole, number, whole, inputs=False)
            self.compares = self.compares or not gradients.nothing or None
            if not self.compares:  # the loss reaches nothing, so far
                gradients.examples = alone

    def _example(
        self, example: Example, number: int, whole: Example, *, backward: bool = True, inputs: bool = True
    ) -> None:
        """Calls the model on ``example`` of the batch ``whole``, with a backward pass if it has a loss."""
        meter, batch = self.meter, example.batch
        meter.begin(example, number, self.mask is not None, inputs=inputs)
        backward = backward and meter.needs_backward and not has_no_label(batch)
        with torch.set_grad_enabled(backward):
            value = self._call(batch)
            finite = value is None or bool(torch.isfinite(value))
            if value is not None and not finite and not self._averages_nothing(example, whole):
                why = _spoilt(self.model)
                raise ValueError(f"the loss of calibration batch {number} is not finite: {value.item()}{why}")
            if value is not None and backward and finite and value.requires_grad:
                self._backward(value, batch, number)
            del value  # else its graph, whose hooks hold the inputs, lives through the next forward
        meter.end(has_loss=backward and finite)

    def _backward(self, value: Tensor, batch: Any, number: int) -> None:
        """The backward pass of the loss ``value``; where its scale is too large for float16, once more."""
        meter, gradients = self.meter, self.meter.gradients
        counts_inputs = meter.counts_inputs
        while True:
            meter.sleeps = True
            (value if gradients.scale == 1 else value * gradients.scale).backward()
            gradients.finish()
            meter.counts_inputs = counts_inputs
            if not gradients.overflow:
                return
            gradients.scale /= 4
            if gradients.scale < 1 / LARGEST_SCALE:
                raise ValueError(
                    f"a gradient of calibration batch {number} overflows in float16: measure on the model in "
                    "bfloat16 or float32"
                )
            del value
            gradients.repeat()
            meter.sleeps = meter.counts_inputs = False
            value = cast("Tensor", self._call(batch))

    def _call(self, batch: Any) -> Tensor | None:
        """The loss; where only inputs are asked for none, and no label is needed."""
        if self.loss is not None or self.meter.needs_backward:
            return scalar_loss(self.loss or output_loss, self.model, batch)
        self.model(**batch) if isinstance(batch, Mapping) else self.model(batch)
        return None

    def _averages_nothing(self, example: Example, whole: Example) -> bool:
        """Is a loss that is not finite a mean over no label?

        It is where the whole batch has a finite one: what is not finite of the example alone did not count.
        """
        if has_no_label(example.batch, shifted=True):
            return True
        if whole.batch is example.batch:
            return False
        self.meter.sleeps = True
        with torch.no_grad():
            value = self._call(whole.batch)
        return value is not None and bool(torch.isfinite(value))


def _spoilt(model: nn.Module) -> str:
    """Which parameters hold NaN or Inf, as the end of a message; empty where none does."""
    plain = [(name, p) for name, p in model.named_parameters() if type(p) is nn.Parameter and not p.is_meta]
    names = [name for name, p in plain if p.dtype in NUMBERS and not p.isfinite().all()]
    return f"; these weights hold NaN or Inf: {few(names)}" if names else ""
