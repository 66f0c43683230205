"""Which tokens of a batch count, for the input of each projection: padding does not. It measures nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from lowrank.batches import IGNORED_LABEL, Mask, attention_mask
from lowrank.projections import Projection, Role

CROSS_ATTENTION = frozenset({"EncDecAttention", "encoder_attn", "multihead_attn"})
OTHER_SENSES = ("vision", "visual", "image", "audio")


class Masks:
    """The masks of one batch: the user's, or those that it carries.

    Raises ValueError for a mask that is not (batch, tokens), or says that no token counts.
    """

    def __init__(self, batch: Any, mask: Mask | None, number: int, encoder_decoder: bool) -> None:
        self.own, self.number, self.encoder_decoder = mask is not None, number, encoder_decoder
        self.tokens = attention_mask(batch) if mask is None else _checked(mask(batch))
        if self.tokens is not None and not self.tokens.any():
            raise ValueError(f"the mask of calibration batch {number} says that none of its tokens counts")
        self.decoder = None if self.own else _decoder_mask(batch)
        self.fitted = self.tokens is None

    @property
    def examples(self) -> int:
        """How many examples the batch has; 0 where no mask tells."""
        return 0 if self.tokens is None else len(self.tokens)

    def by_example(self, name: str, held: Collection[Projection], x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``x`` (examples, ..., features) as ``(examples, tokens, features)``, and the mask where one fits.

        ``name`` is that of the input which the projections ``held`` read.
        """
        mask = self._of(name, held)
        if mask is not None and mask.numel() == x.shape[:-1].numel():
            if x.dim() == 2 or len(x) in (1, len(mask)):
                self.fitted = True
                return x.reshape(*mask.shape, x.shape[-1]), mask
        if x.dim() < 3:
            return x.reshape(1, -1, x.shape[-1]), None
        return x.reshape(x.shape[0], -1, x.shape[-1]), None

    def check_used(self) -> None:
        """Raises ValueError where the user's mask fitted nothing: what it was to leave out was counted."""
        if self.own and not (self.fitted or self.encoder_decoder):
            shape = None if self.tokens is None else tuple(self.tokens.shape)
            raise ValueError(
                f"mask= gives {shape} for calibration batch {self.number}, which is not the (batch, tokens) "
                "of any projection's input"
            )

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
        raise ValueError(f"mask= is to give (batch, tokens) bool, True where a token counts, and gives {got}")
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
