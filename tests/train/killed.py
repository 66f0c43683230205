"""A run that is killed: `python -m tests.train.killed` reads jobs, forks a process for each and waits for it.

A job is a line of JSON: folder, kill (the event at which the process kills itself, 0 for never), kind (only
events of that kind count), workers, without (a piece of state that is not restored).
Events are what a run does one after another: loss, update, evaluate, sync, rename, remove.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lowrank
from lowrank import presets
from lowrank.train import EarlyStopping, KeepBest, checkpoints, data, fit, run, state
from lowrank.train.checkpoints import Checkpoints

STEPS_BETWEEN = 3


class Network(nn.Module):
    """Half-precision linear layers with adapters, dropout, a trained head, running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2)).bfloat16()
        self.statistics = nn.BatchNorm1d(8, affine=False)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.statistics(self.body(x.bfloat16()).float()))


def noisy(rows: list[Any]) -> tuple[Tensor, ...]:
    """Batches that Python's and NumPy's random numbers change."""
    x, y = (torch.stack(column) for column in zip(*rows, strict=True))
    return x + 0.1 * random.random() + 0.1 * numpy.random.rand(), y


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def evaluate(model: nn.Module) -> dict[str, float]:
    torch.rand(3)
    return {"error": F.mse_loss(model(torch.ones(2, 6)), torch.zeros(2, 2)).item()}


def train(folder: Path, workers: int = 0) -> None:
    torch.manual_seed(0)
    random.seed(5)
    numpy.random.seed(6)
    policy = presets.pissa(rank=2, target=("body.0",), dropout=0.1, train=("head",))
    model = lowrank.wrap_model(Network(), policy, progress=False)
    loader = DataLoader(
        TensorDataset(torch.randn(26, 6), torch.randn(26, 2)), 4, True, num_workers=workers, collate_fn=noisy
    )
    fit(
        model,
        loader,
        loss,
        epochs=3,
        lr=1e-2,
        accumulate=2,
        evaluate=evaluate,
        evaluate_every=5,
        callbacks=[KeepBest("error", smaller=True), EarlyStopping("error", smaller=True, patience=9)],
        checkpoint=folder,
        every=STEPS_BETWEEN,
        progress=False,
    )
    finished = {name: digest(t) for name, t in model.state_dict().items()}
    (folder / "finished.json").write_text(json.dumps(finished))


def parts(folder: Path) -> dict[str, Any]:
    """What the last checkpoint holds, piece by piece, times apart, and the model at the end."""
    checkpoint = Checkpoints(folder)
    (_, saved) = next(checkpoint.load())
    history = [json.loads(line) for line in saved["history"]]
    for record in history:
        del record["seconds"], record["tokens_per_second"]
    del saved["run"]["seconds"]
    found = {name: digest(value) for name, value in saved.items()} | {"history": history}
    return found | {"model": json.loads((folder / "finished.json").read_text())}


def digest(value: Any) -> str:
    if isinstance(value, Tensor):
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(f"{value.dtype}{tuple(value.shape)}".encode() + raw).hexdigest()
    if isinstance(value, dict):
        return repr({key: digest(each) for key, each in value.items()})
    if isinstance(value, list | tuple):
        return repr([digest(each) for each in value])
    return repr(value)


class Events:
    def __init__(self, kill: int, kind: str | None) -> None:
        self.kill, self.kind, self.counts = kill, kind, dict.fromkeys(("loss", "update"), 0)
        self.count = 0

    def watch(self, owner: Any, name: str, kind: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            self.counts[kind] = self.counts.get(kind, 0) + 1
            self.count += 1
            if self.kill == (self.counts[kind] if self.kind == kind else 0 if self.kind else self.count):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(owner, name, watched)


def leave_out(piece: str) -> None:
    """Make resuming forget one piece of state."""
    nothing = {
        "optimizer": (run, "load_optimizer"),
        "generators": (run, "set_generators"),
        "trained": (state.Trained, "load_state_dict"),
        "place": (data.Cursor, "_again"),
        "order": (data.Cursor, "_set_generators"),
    }
    owner, name = nothing[piece]
    setattr(owner, name, lambda *arguments, **options: None)


def job(folder: str, kill: int = 0, kind: str | None = None, workers: int = 0, without: str = "") -> None:
    this, events = sys.modules[__name__], Events(kill, kind)
    events.watch(this, "loss", "loss")
    events.watch(torch.optim.AdamW, "step", "update")
    events.watch(this, "evaluate", "evaluate")
    events.watch(checkpoints, "sync", "sync")
    events.watch(Path, "rename", "rename")
    events.watch(checkpoints, "_remove", "remove")
    if without:
        leave_out(without)
    train(Path(folder), workers)
    (Path(folder) / "events.json").write_text(json.dumps({**events.counts, "all": events.count}))


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                job(**json.loads(line))
            except Exception:
                os._exit(1)
            os._exit(0)
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main()
