"""Train an adapter with Lightning.

    python examples/with_lightning.py           # SmolLM2-135M-Instruct, WordNet's definitions
    python examples/with_lightning.py --tiny    # a small random model and made-up data

An adapted model is an ordinary module, so a LightningModule holds it as any other. The model and the data are
those of finetune_llm.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from finetune_llm import Conversations, definitions, padded, smollm2, sums, tiny  # type: ignore
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lowrank
from lowrank import presets


class Adapted(pl.LightningModule):
    """Trains what requires grad in a wrapped model: the adapters."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: dict[str, Tensor], index: int) -> Any:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # B of LoRA+ learns faster than A; lowrank.adapter_parameters(model) would give one rate to all.
        return torch.optim.AdamW(lowrank.lora_plus(self.model, lr=self.lr, ratio=8.0), weight_decay=0.0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Only what trains is kept: a checkpoint without the base takes megabytes, not gigabytes."""
        learning = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in learning}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a small random model and made-up data")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=Path(".cache/data"), help="where WordNet is")
    parser.add_argument("--out", type=Path, default=Path("out/with-lightning"), help="where results go")
    options = parser.parse_args()

    model, tokenizer = tiny() if options.tiny else smollm2()
    train, _ = sums() if options.tiny else definitions(options.data)
    lowrank.wrap_model(model, presets.lora(rank=4 if options.tiny else 16))
    loader = DataLoader(
        Conversations(train, tokenizer, length=128),
        batch_size=8,
        shuffle=True,
        collate_fn=lambda examples: padded(examples, tokenizer.pad_token_id or 0),
    )
    trainer = pl.Trainer(
        max_steps=options.steps,
        default_root_dir=str(options.out),
        gradient_clip_val=1.0,
        logger=False,
        log_every_n_steps=1,
        enable_model_summary=False,
    )
    trainer.fit(Adapted(model, lr=2e-4), loader)
    lowrank.save_adapter(model, options.out / "adapter")
    print(f"{trainer.global_step} steps; adapter in {options.out}/adapter")


if __name__ == "__main__":
    main()
