"""A new method in twenty lines: an initializer is a frozen dataclass with a call.

    python examples/own_initializer.py --tiny

This one, which is made up, makes A of the rows of the weight with the largest norm, and leaves B zero.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from finetune_llm import Conversations, padded, smollm2, sums, tiny  # type: ignore
from torch import Tensor

import lowrank
from lowrank import Factors, Policy, Role


@dataclass(frozen=True)
class LargestRows:
    """A: the ``rank`` rows of W with the largest norm, each of norm ``size``. B: zero."""

    size: float = 1.0
    needs: frozenset[str] = frozenset()  # {"covariance"}, say, asks for a calibration pass over batches=

    def __call__(self, weight: Tensor, rank: int, scaling: float, *, role: Role, **rest: Any) -> Factors:
        """weight: (out, in), only read. Returns A (rank, in) and B (out, rank), fp32."""
        W = weight.detach().float()
        rows = W.norm(dim=1).topk(rank).indices
        A = self.size * torch.nn.functional.normalize(W[rows], dim=1)
        return Factors(A=A, B=W.new_zeros(len(W), rank))

    def largest_rank(self, shape: tuple[int, int], role: Role) -> int:
        return min(shape)

    def anchored(self, role: Role) -> bool:
        return False  # B starts at zero, so nothing of the start must be kept


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a small random model, not SmolLM2")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps (default: %(default)s)")
    options = parser.parse_args()

    for init in (lowrank.init.Kaiming(), LargestRows()):
        model, tokenizer = tiny() if options.tiny else smollm2()
        data = Conversations(sums()[0], tokenizer, length=64)
        batches = [padded([data[i] for i in range(j, j + 8)], 0) for j in range(0, 128, 8)]
        lowrank.wrap_model(model, Policy(rank=4, init=init))
        history = lowrank.train.fit(model, batches, steps=options.steps, lr=5e-3)
        print(f"{init}: loss {history.losses[0]:.3f} → {history.losses[-1]:.3f}")


if __name__ == "__main__":
    main()
