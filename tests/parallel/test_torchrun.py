"""The same script under torchrun: a rank that fails inside a sharded model ends all, with its message."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = r"""
import os
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import lowrank
from tests import zoo
from tests.parallel.processes import sharded

torch.set_num_threads(1)
dist.init_process_group("gloo")
kind = os.environ["KIND"]
calls = 0

def loss(model, batch):
    global calls
    calls += 1
    if kind == "fails" and dist.get_rank() == 1 and calls == 2:
        raise RuntimeError("the loss of rank 1 gave up")
    return model(**batch).loss

model = lowrank.wrap_model(zoo.build("llama"), lowrank.presets.lora(rank=2), progress=False)
model = DistributedDataParallel(model) if kind == "DDP" else sharded(model)
batches = [zoo.batch("llama", seed=seed) for seed in range(4)][dist.get_rank()::2]
history = lowrank.train.fit(model, batches, loss, log=os.environ["LOG"])
sys.stdout.write(f"done {dist.get_rank()} {len(history)}\n")  # at once: both write to one pipe
sys.stdout.flush()
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # threads of torch can end a process that is over with "terminate called"
"""


@pytest.mark.parametrize("kind", ["DDP", "fails"])
def test_torchrun(kind: str, tmp_path: Path) -> None:
    script, log = tmp_path / "train.py", tmp_path / "log.jsonl"
    script.write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "KIND": kind, "LOG": str(log)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    if kind == "fails":
        assert ended.returncode != 0
        assert "the loss of rank 1 gave up" in ended.stderr
        return
    assert ended.returncode == 0, ended.stderr
    assert "done 0 2" in ended.stdout and "done 1 2" in ended.stdout
    assert len(log.read_text().splitlines()) == 2
    assert ended.stderr.count("| 0/2 [") == 1  # one bar; a slow one shows its end twice
