"""Serve several adapters on one base: each request of a batch has its own; one is exchanged.

    python examples/serve_many_adapters.py          # SmolLM2-135M-Instruct; adapters trained for a moment
    python examples/serve_many_adapters.py --tiny   # a small random model

The base is in memory once. A row without an adapter gets exactly the base.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from finetune_llm import Conversations, padded, smollm2, sums, tiny  # type: ignore
from torch import nn

import lowrank
from lowrank import presets

NAMES = ("sums", "polite", "short")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a small random model")
    parser.add_argument("--steps", type=int, default=20, help="for each adapter (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/serving"), help="where adapters go")
    options = parser.parse_args()

    model, tokenizer = tiny() if options.tiny else smollm2()
    model.config.use_cache = False
    pairs, _ = sums()
    answers = {
        "sums": pairs,
        "polite": [(asked, f"It is {answer[:-1]}, thank you.") for asked, answer in pairs],
        "short": [(asked, "Yes.") for asked, _ in pairs],
    }
    for name in NAMES:  # one adapter after the other, on the same frozen base
        add = lowrank.wrap_model if name == NAMES[0] else lowrank.add_adapter
        add(model, presets.lora(rank=4), name=name)
        lowrank.set_adapters(model, name)
        data = Conversations(answers[name][:32], tokenizer, length=64)
        batches = [padded([data[i] for i in range(j, j + 8)], 0) for j in range(0, 32, 8)]
        own = list(lowrank.adapter_parameters(model, name))
        history = lowrank.train.fit(model, batches, steps=options.steps, lr=5e-3, parameters=own)
        lowrank.save_adapter(model, options.out / name, name)
        print(f"{name}: loss {history.losses[0]:.2f} → {history.losses[-1]:.2f}")

    batch = padded([Conversations(pairs, tokenizer, length=64)[0]] * 4, 0)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    rows = [*NAMES, None]
    with lowrank.adapters_for_rows(model, rows):
        mixed = logits(model, inputs)
    for row, served in enumerate(rows):
        with lowrank.use_adapters(model, served or ()):
            alone = logits(model, inputs)
        print(f"row {row}, {served or 'the base'}: differs from serving it alone by "
              f"{float((mixed[row] - alone[row]).abs().max()):.1e}")  # fmt: skip

    lowrank.swap_adapter(model, options.out / "polite", "short")  # new values in the same tensors
    with lowrank.adapters_for_rows(model, ["polite", "short", None, None]):
        exchanged = logits(model, inputs)
    print(f"after the exchange both give the same: {torch.equal(exchanged[0], exchanged[1])}")


@torch.inference_mode()
def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(rows, tokens, vocabulary)."""
    made: torch.Tensor = model.eval()(**inputs).logits
    return made


if __name__ == "__main__":
    main()
