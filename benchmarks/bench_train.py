"""What the training loop costs: beside a bare loop, HF Trainer and Lightning, and what a checkpoint stalls.

    python benchmarks/bench_train.py [--quick]

All contenders take the same steps of AdamW on the same adapted model and batches; before anything is timed,
one run of each must end with the same loss. Also measured: two processes (DDP, gloo) against one. Writes JSON
and Markdown to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from models import MODELS
from timing import result_name, surroundings, verdict, write_results
from torch import Tensor, nn

import lowrank
from lowrank import presets

RESULTS = Path(__file__).parent / "results"
OVERHEAD_TARGET = 2.0  # percent of a bare loop's step, with MiniLM
LR = 1e-4
BARE, OURS, HF, LIGHTNING = "bare loop", "fit", "HF Trainer", "Lightning"

LEGEND = """\
Milliseconds of a step: the median over runs of a run's time over its steps, all contenders in turn; set-up is
in it, as it is in a user's run. Over bare: what a contender takes beyond the bare PyTorch loop, as a share
and in µs a step. The bare loop clips the gradient and reads the loss at each step, as fit does. Stall: what
saving one checkpoint adds to a run."""


@dataclass(frozen=True)
class Row:
    contender: str
    seconds: float  # of a step
    p10: float
    p90: float
    over: float  # share of the bare loop's step
    microseconds: float  # a step, over the bare loop's


def minilm() -> nn.Module:
    return MODELS["MiniLM-L6"][0](6, 6)


def tiny() -> nn.Module:
    """So small that what is timed is the loop."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=1000
    )
    return transformers.BertForSequenceClassification(config)


def batches(model: Any, count: int, examples: int, tokens: int) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        ids = torch.randint(100, model.config.vocab_size, (examples, tokens), generator=draw)
        labels = torch.randint(2, (examples,), generator=draw)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def bare(model: nn.Module, data: list[dict[str, Tensor]], folder: Path) -> float:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
    model.train()
    value = 0.0
    for batch in data:
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        value = loss.item()
        optimizer.step()
        optimizer.zero_grad()
    return value


def ours(model: nn.Module, data: list[dict[str, Tensor]], folder: Path, **options: Any) -> float:
    history = lowrank.train.fit(
        model, data, lr=LR, schedule="constant", warmup=0, progress=False, seed=None, **options
    )
    return history.losses[-1]


def hf_trainer(model: Any, data: list[dict[str, Tensor]], folder: Path) -> float:
    rows = [
        {key: value[i] for key, value in batch.items()} for batch in data for i in range(len(batch["labels"]))
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=len(data[0]["labels"]),
        num_train_epochs=1,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        weight_decay=0.0,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        optim="adamw_torch_fused",
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry)


def lightning(model: nn.Module, data: list[dict[str, Tensor]], folder: Path) -> float:
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.value = model.train(), 0.0

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            loss = self.model(**batch).loss
            self.value = loss.item()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            trained = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)

    module = Module()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        default_root_dir=str(folder),
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    return module.value


CONTENDERS: dict[str, Callable[..., float]] = {BARE: bare, OURS: ours, HF: hf_trainer, LIGHTNING: lightning}


def fresh(build: Callable[[], nn.Module]) -> nn.Module:
    """Without dropout, so that all contenders come to the same loss."""
    model = lowrank.wrap_model(build(), presets.lora(rank=8), progress=False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return model


def check(build: Callable[[], nn.Module], data: list[dict[str, Tensor]], folder: Path) -> None:
    """Stops where the contenders do not come to the same loss: they would not do the same work."""
    found = {name: run(fresh(build), data, folder) for name, run in CONTENDERS.items()}
    for name, loss in found.items():
        if not abs(loss - found[BARE]) <= 2e-3 * abs(found[BARE]):
            raise SystemExit(f"{name} comes to a loss of {loss:.5f}, the bare loop to {found[BARE]:.5f}")


def compare(
    build: Callable[[], nn.Module], data: list[dict[str, Tensor]], repeats: int, folder: Path
) -> list[Row]:
    check(build, data[: min(3, len(data))], folder)
    models = {name: fresh(build) for name in CONTENDERS}
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(repeats):
        for name, run in CONTENDERS.items():
            start = time.perf_counter()
            run(models[name], data, folder)
            times[name].append((time.perf_counter() - start) / len(data))
    base = statistics.median(times[BARE])
    rows = []
    for name, taken in times.items():
        taken.sort()
        median = statistics.median(taken)
        p10, p90 = taken[len(taken) // 10], taken[min(int(0.9 * len(taken)), len(taken) - 1)]
        rows.append(Row(name, median, p10, p90, median / base - 1, 1e6 * (median - base)))
    return rows


def stall(data: list[dict[str, Tensor]], repeats: int, folder: Path) -> float:
    """Seconds that one checkpoint of MiniLM's adapters adds."""
    model, found = fresh(minilm), []
    for i in range(repeats):
        taken = []
        for options in ({}, {"checkpoint": folder / f"checkpoints-{i}", "every": 1}):
            start = time.perf_counter()
            ours(model, data, folder, **options)
            taken.append(time.perf_counter() - start)
        found.append((taken[1] - taken[0]) / len(data))
    return statistics.median(found)


def scaling(steps: int, folder: Path) -> float:
    """The throughput of two processes over that of one, each with a thread of its own."""
    seconds = []
    for count in (1, 2):
        store = folder / f"store-{count}"
        command = [sys.executable, __file__, "--worker", str(store), "--worker-steps", str(steps)]
        environment = {**os.environ, "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
        workers = [
            subprocess.Popen(
                command, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True
            )
            for rank in range(count)
        ]
        outputs = [worker.communicate(timeout=600)[0] for worker in workers]
        if any(worker.returncode for worker in workers):
            raise SystemExit(f"a worker of {count} failed")
        seconds.append(max(float(output.split()[-1]) for output in outputs))
    return 2 * seconds[0] / seconds[1]


def work(store: Path, steps: int) -> None:
    """One process of `scaling`: a bare loop under DDP. Prints its seconds."""
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    model = fresh(minilm)
    data = batches(model, steps, 8, 32)
    parallel = nn.parallel.DistributedDataParallel(model)
    bare(parallel, data[:1], store)
    start = time.perf_counter()
    bare(parallel, data, store)
    print(time.perf_counter() - start)
    torch.distributed.destroy_process_group()


def markdown(facts: dict[str, str], cases: dict[str, list[Row]], once: dict[str, float], quick: bool) -> str:
    lines = ["# The training loop", "", LEGEND, "", *(f"- {name}: {value}" for name, value in facts.items())]
    lines += [
        f"- stall of a checkpoint, MiniLM, rank 8: {1e3 * once['stall']:.1f} ms",
        f"- two processes over one (DDP, gloo, a bare loop): {once['scaling']:.2f} × the examples",
    ]
    for title, rows in cases.items():
        lines += ["", f"## {title}", "", "| | ms a step | p10–p90 | over bare | µs a step | target |"]
        lines += ["|---|---|---|---|---|---|"]
        for r in rows:
            aimed = r.contender == OURS and title.startswith("MiniLM") and not quick
            target = verdict(100 * r.over, OVERHEAD_TARGET if aimed else None, " %")
            span = f"{1e3 * r.p10:.2f}–{1e3 * r.p90:.2f}"
            lines.append(
                f"| {r.contender} | {1e3 * r.seconds:.2f} | {span} | {100 * r.over:.1f} % | "
                f"{r.microseconds:.0f} | {target} |"
            )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps and repeats: does it run?")
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own number by default")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker-steps", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in ("transformers", "pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if options.worker:
        work(options.worker, options.worker_steps)
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    steps, repeats = (3, 2) if options.quick else (30, options.repeats)
    small = tiny()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = batches(fresh(minilm), steps, 16, 32)
        cases = {
            f"MiniLM-L6, 16×32 tokens, {steps} steps": compare(minilm, data, repeats, folder),
            f"A tiny model, {10 * steps} steps": compare(
                tiny, batches(small, 10 * steps, 4, 8), repeats, folder
            ),
        }
        once = {"stall": stall(data[:3], max(2, repeats // 3), folder), "scaling": scaling(steps, folder)}
    facts = surroundings(options.device)
    report = markdown(facts, cases, once, options.quick)
    name = result_name("train", options)
    data = {"surroundings": facts, "once": once, "cases": cases}
    write_results(options.out, name, report, data)
    print(f"\n{report}\nwritten to {options.out / name}.md and .json")


if __name__ == "__main__":
    main()
