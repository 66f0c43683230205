"""Train an adapter with the Trainer of transformers, and continue from one of its checkpoints.

    python examples/with_transformers_trainer.py           # SmolLM2-135M-Instruct, WordNet's definitions
    python examples/with_transformers_trainer.py --tiny    # a small random model and made-up data

`AdapterCallback` puts the adapter into every checkpoint. The model and the data are those of finetune_llm.py.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from finetune_llm import Conversations, definitions, padded, smollm2, sums, tiny  # type: ignore
from transformers import Trainer, TrainingArguments

import lowrank
from lowrank import presets
from lowrank.integrations.transformers import AdapterCallback


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a small random model and made-up data")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=Path(".cache/data"), help="where WordNet is")
    parser.add_argument("--out", type=Path, default=Path("out/with-trainer"), help="where results go")
    options = parser.parse_args()
    # The Trainer writes the wrapped model too, which only it can read. The adapter lies beside it.
    warnings.simplefilter("ignore", lowrank.SavePretrainedWarning)

    def trainer(steps: int) -> Any:
        model, tokenizer = tiny() if options.tiny else smollm2()
        train, _ = sums() if options.tiny else definitions(options.data)
        lowrank.wrap_model(model, presets.pissa(rank=4 if options.tiny else 16))
        arguments = TrainingArguments(
            str(options.out),
            max_steps=steps,
            save_steps=max(1, options.steps // 2),
            learning_rate=5e-4,
            report_to=[],
            remove_unused_columns=False,  # a conversation is a pair of lists, not columns
            dataloader_pin_memory=False,
        )
        return Trainer(
            model=model,
            args=arguments,
            train_dataset=Conversations(train, tokenizer, length=128),
            data_collator=lambda examples: padded(examples, tokenizer.pad_token_id or 0),
            callbacks=[AdapterCallback()],
        )

    half = max(1, options.steps // 2)
    trainer(half).train()
    continued = trainer(options.steps)
    result = continued.train(resume_from_checkpoint=str(options.out / f"checkpoint-{half}"))
    lowrank.save_adapter(continued.model, options.out / "adapter")
    print(
        f"loss {result.training_loss:.3f} after {result.global_step} steps; adapter in {options.out}/adapter"
    )


if __name__ == "__main__":
    main()
