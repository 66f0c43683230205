"""What is measured: fed with inputs and gradients, an example at a time. It hooks nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from lowrank.calibration.accumulators import Covariance, Rows, Spread
from lowrank.calibration.examples import Example
from lowrank.calibration.gradients import Gradients
from lowrank.calibration.inputs import Inputs
from lowrank.calibration.masks import Masks, Routed
from lowrank.calibration.statistics import ProjectionStatistics, Statistics
from lowrank.linalg.precision import is_half, symmetric, wide
from lowrank.models.experts import stack_of
from lowrank.models.projections import Projection
from lowrank.processes import Processes


class Meter:
    """Running sums of what ``needs`` names for each projection; `statistics` turns them into means.

    The caller says `begin`, runs the model and, unless the example has no loss, a backward pass, then `end`.
    While it ``sleeps`` it sees no inputs: in a backward pass, where checkpointing runs a forward again.
    """

    def __init__(
        self, model: nn.Module, needs: Mapping[Projection, frozenset[str]], device: torch.device | None = None
    ) -> None:
        self.model, self.needs, self.device = model, needs, device
        self.gradients = Gradients(model, needs, device)
        readers = {kind: [p for p in needs if kind in needs[p]] for kind in ("covariance", "moment")}
        self.covariances, self.moments = (
            Inputs(Covariance, readers["covariance"]),
            Inputs(Spread, readers["moment"]),
        )
        self.examples = self.number = 0
        self.sleeps = self.fitted = False
        self.counts_inputs = True
        self.masks: Masks
        names = {path.split(".")[-1] for path, _ in model.named_modules()}
        self.encoder_decoder = {"encoder", "decoder"} <= names

    @property
    def needs_backward(self) -> bool:
        return self.gradients.wants(list(self.needs))

    @property
    def by_example(self) -> bool:
        """Is anything asked for that is not a mean over tokens?"""
        return any(needs - {"moment"} for needs in self.needs.values())

    def begin(self, example: Example, number: int, own_mask: bool, *, inputs: bool = True) -> None:
        """An example of batch ``number``; ``inputs=False`` where its inputs are not to be counted."""
        self.number, self.sleeps, self.counts_inputs = number, False, inputs
        self.masks = Masks(example.batch, example.tokens, own_mask, self.encoder_decoder)
        for each in (self.gradients, self.covariances, self.moments):
            each.begin()

    def end(self, *, has_loss: bool) -> None:
        """The example is over."""
        self.fitted |= self.masks.fitted
        self.examples += self.counts_inputs
        if has_loss:
            self.gradients.end()

    def check_mask(self, tokens: Tensor | None) -> None:
        """Raises ValueError where the user's mask of a batch fitted nothing: what it left out was counted."""
        sees = self.covariances.projections | self.moments.projections
        if sees and tokens is not None and not (self.fitted or self.encoder_decoder):
            raise ValueError(
                f"mask= gives {tuple(tokens.shape)} for calibration batch {self.number}, which is not the "
                "(batch, tokens) of any projection's input"
            )
        self.fitted = False

    @torch.no_grad()
    def see_input(
        self,
        name: str,
        held: Sequence[Projection],
        x: Tensor,
        routed: Routed | None = None,
        *,
        uses: int = 1,
    ) -> None:
        """``x`` (..., in) is what the projections ``held`` read; ``name`` is theirs alone.

        ``routed`` says which of the example's tokens the rows of x are, where these are not all in order;
        in the backward pass their gradient comes in ``uses`` parts.
        Raises ValueError for NaN or Inf, and for siblings that no longer read the same tensor.
        """
        if self.sleeps:
            return
        self.gradients.uses[name] += uses
        if not self.counts_inputs:
            return

        @cache
        def rows() -> Rows:
            values = x.reshape(-1, x.shape[-1]).to(wide(x))
            kept = self.masks.kept(name, held, len(values), routed)
            values = values if kept is None else values[kept.to(values.device)]
            if not torch.isfinite(values.sum()):
                raise ValueError(f"NaN or Inf in the input of {name} in calibration batch {self.number}")
            return Rows(values, is_half(x), self.device or values.device)

        for inputs in (self.covariances, self.moments):
            inputs.see(name, held, x, rows, self.number)

    # -- the end --------------------------------------------------------------------------------------

    def reduce(self, processes: Processes) -> None:
        """Adds the sums of all processes, where there are several."""
        if processes.number == 1:
            return
        self.examples = int(processes.added(torch.tensor(self.examples)))
        for inputs in (self.covariances, self.moments):
            inputs.reduce(processes, self._zeros)
        self.gradients.reduce(processes)

    def statistics(self) -> Statistics:
        """The means. Raises ValueError where a projection was never called, or no example has a loss."""
        if self.needs_backward and not self.gradients.examples:
            raise ValueError("no example of the calibration batches has a label, so none has a loss")
        for covariance in self.covariances.sums.values():
            if covariance.matrix is not None:
                symmetric(covariance.matrix).div_(self.examples)
        for moment in self.moments.sums.values():
            if isinstance(moment, Spread) and moment.matrix is not None:
                symmetric(moment.matrix).div_(max(moment.count, 1))
        return Statistics({p: self._statistics_of(p, needs) for p, needs in self.needs.items()})

    def _statistics_of(self, p: Projection, needs: frozenset[str]) -> ProjectionStatistics:
        covariance = moment = mean = sensitivity = gradient = None
        if "covariance" in needs:
            read = self.covariances.of(p)
            covariance = self._nothing(p) if read is None or read.matrix is None else read.matrix
        if "moment" in needs:
            spread = self.moments.of(p)
            if isinstance(spread, Spread) and spread.matrix is not None:
                moment, mean = spread.matrix, spread.mean
            else:
                moment = self._nothing(p)
                mean = moment.new_zeros(p.in_features, dtype=torch.float64)
        if "sensitivity" in needs:
            sensitivity = float(self.gradients.sensitivity.get(p, 0)) / self.gradients.examples
        if "gradient" in needs:
            total = self.gradients.gradient.get(p)
            gradient = (self.gradients.zeros(p) if total is None else total).div_(self.gradients.examples)
        return ProjectionStatistics(
            covariance=covariance,
            token_covariance=moment,
            mean=mean,
            sensitivity=sensitivity,
            gradient=gradient,
        )

    def _nothing(self, p: Projection) -> Tensor:
        """What an expert reads that no token was routed to."""
        if stack_of(self.model.get_submodule(p.module), p.param) is None:
            raise ValueError(
                f"{p.name} was never called on the calibration batches, so its input is unknown "
                "(another module may read its weight instead of calling it): leave it out with exclude="
            )
        return self._zeros(p)

    def _zeros(self, p: Projection) -> Tensor:
        return self.gradients.zeros(p, (p.in_features, p.in_features))
