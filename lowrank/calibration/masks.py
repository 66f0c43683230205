"""Which tokens of an input count, for each projection: padding does not. It measures nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowrank.batches import IGNORED_LABEL, Mask, attention_mask
from lowrank.models.projections import Projection, Role

CROSS_ATTENTION = frozenset({"EncDecAttention", "encoder_attn", "multihead_attn"})
OTHER_SENSES = ("vision", "visual", "image", "audio")


def token_mask(batch: Any, mask: Mask | None, number: int) -> Tensor | None:
    """(batch, tokens) bool of calibration batch ``number``: the user's, or the one that it carries.

    Raises ValueError for a mask that is not (batch, tokens), or says that no token counts.
    """
    tokens = attention_mask(batch) if mask is None else _checked(mask(batch))
    if tokens is not None and not tokens.any():
        raise ValueError(f"the mask of calibration batch {number} selects no token")
    return tokens


@dataclass(frozen=True, eq=False)
class Routed:
    """Which tokens an expert gets: ``tokens`` (rows,), of ``number`` in all; 0 where that is not known."""

    tokens: Tensor
    number: int


class Masks:
    """The masks of what the model is called with: ``tokens`` (batch, tokens), and the decoder's own.

    ``own`` says that the user gave it: then it is for every input. `fitted` tells whether it fitted any.
    """

    def __init__(self, batch: Any, tokens: Tensor | None, own: bool, encoder_decoder: bool) -> None:
        self.tokens, self.own, self.encoder_decoder = tokens, own, encoder_decoder
        self.decoder = None if own else _decoder_mask(batch)
        self.fitted = False

    def kept(
        self, name: str, held: Collection[Projection], rows: int, routed: Routed | None
    ) -> Tensor | None:
        """Which of the ``rows`` of an input count, (rows,) bool; None where no mask fits it, and all do.

        ``name`` is that of the input, which the projections ``held`` read. Its rows are the tokens in their
        order, unless ``routed`` says which they are.
        """
        mask = self._of(name, held)
        if mask is None:
            return None
        mask = mask.reshape(-1)
        if len(mask) != (rows if routed is None else routed.number):
            return None
        self.fitted = True
        return mask if routed is None else mask[routed.tokens.to(mask.device)]

    def _of(self, name: str, held: Collection[Projection]) -> Tensor | None:
        """The mask of the sequence that is read: in a decoder it is the encoder's only across."""
        parts = name.partition("[")[0].split(".")
        if not self.own and any(part.startswith(OTHER_SENSES) for part in parts):
            return None  # an attention_mask is of the text
        if not (self.encoder_decoder and "decoder" in parts):
            return self.tokens
        crosses = any("cross" in part.lower() or part in CROSS_ATTENTION for part in parts)
        reads_keys = {p.role for p in held} <= {Role.KEY, Role.VALUE}
        return self.tokens if crosses and reads_keys else self.decoder


def _checked(said: Any) -> Tensor | None:
    if said is None:
        return None
    if not isinstance(said, Tensor) or said.dim() != 2:
        got = tuple(said.shape) if isinstance(said, Tensor) else type(said).__name__
        raise ValueError(f"mask=: expected (batch, tokens) bool, True where a token counts, got {got}")
    return said > 0


def _decoder_mask(batch: Any) -> Tensor | None:
    """Which of the decoder's tokens are real: as the batch says, or up to each example's last label."""
    if not isinstance(batch, Mapping):
        return None
    said, labels = batch.get("decoder_attention_mask"), batch.get("labels")
    if isinstance(said, Tensor):
        return said > 0
    if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        return (labels != IGNORED_LABEL).flip(1).cumsum(1).flip(1) > 0
    return None
