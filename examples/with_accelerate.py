"""Train an adapter in a loop of your own, on whatever accelerate finds: one GPU, several, or none.

    accelerate launch examples/with_accelerate.py          # SmolLM2-135M-Instruct, WordNet's definitions
    python examples/with_accelerate.py --tiny              # a small random model and made-up data

Adapt first, then `prepare`: the optimizer gets the parameters of the adapters. The model and the data are
those of finetune_llm.py.
"""

from __future__ import annotations

import argparse
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from accelerate import Accelerator
from finetune_llm import Conversations, definitions, padded, smollm2, sums, tiny  # type: ignore
from torch.utils.data import DataLoader

import lowrank
from lowrank import presets


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a small random model and made-up data")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=Path(".cache/data"), help="where WordNet is")
    parser.add_argument("--out", type=Path, default=Path("out/with-accelerate"), help="where results go")
    options = parser.parse_args()

    base, tokenizer = tiny() if options.tiny else smollm2()
    train, _ = sums() if options.tiny else definitions(options.data)
    lowrank.wrap_model(base, presets.lora(rank=4 if options.tiny else 16))
    loader = DataLoader(
        Conversations(train, tokenizer, length=128),
        batch_size=8,
        shuffle=True,
        collate_fn=lambda examples: padded(examples, tokenizer.pad_token_id or 0),
    )

    accelerator = Accelerator()
    optimizer = torch.optim.AdamW(lowrank.adapter_parameters(base), lr=5e-4, weight_decay=0.0)
    model, optimizer, loader = accelerator.prepare(base, optimizer, loader)
    model.train()
    for step, batch in enumerate(islice(chain.from_iterable(repeat(loader)), options.steps), start=1):
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, options.steps):
            accelerator.print(f"step {step}: loss {loss.item():.3f}")
    accelerator.wait_for_everyone()
    lowrank.save_adapter(accelerator.unwrap_model(model), options.out / "adapter")  # the first process writes
    accelerator.print(f"adapter in {options.out}/adapter")


if __name__ == "__main__":
    main()
