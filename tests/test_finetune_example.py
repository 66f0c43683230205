"""The example that fine-tunes a language model runs without downloads, and goes on where it stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank.train import History

ROOT = Path(__file__).parents[1]


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(out: Path, *options: str, launcher: tuple[str, ...] = ()) -> str:
    script = str(ROOT / "examples/finetune_llm.py")
    command = [sys.executable, *launcher, script, "--tiny", "--every", "3", "--batch", "4"]
    done = subprocess.run(
        [*command, "--rank", "4", "--out", str(out), *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_it_trains_saves_and_continues(tmp_path: Path) -> None:
    printed = run(tmp_path, "--steps", "6")
    assert "at the peak" in printed and "test loss" in printed
    assert [record.step for record in History.load(tmp_path / "log.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "adapter" / "adapter.json").exists() and (tmp_path / "checkpoints").is_dir()
    losses = History.load(tmp_path / "log.jsonl").losses
    adapter = (tmp_path / "adapter" / "adapter.json").read_bytes()
    run(tmp_path, "--steps", "6")  # nothing is left to do
    assert History.load(tmp_path / "log.jsonl").losses == losses
    assert (tmp_path / "adapter" / "adapter.json").read_bytes() == adapter


@pytest.mark.slow
def test_two_processes_share_the_examples(tmp_path: Path) -> None:
    printed = run(tmp_path, "--steps", "4", launcher=TORCHRUN)
    assert printed.count("at the peak") == printed.count("test loss") == 1  # of the first process
    history = History.load(tmp_path / "log.jsonl")
    assert [record.step for record in history] == [1, 2, 3, 4] and list(history.evaluations) == [3, 4]
    assert (tmp_path / "adapter" / "adapter.json").exists()


def test_only_answers_have_labels() -> None:
    from examples.finetune_llm import IGNORED, Bytes, Conversations, padded

    pairs = [("What is 1 + 1?", "2."), ("What is 10 + 11?", "21.")]
    data = Conversations(pairs, Bytes(), length=128)
    ids, labels = data[1]
    answer = [token for token in labels if token != IGNORED]
    assert bytes(token - 1 for token in answer) == b"21.\n"
    assert ids[-len(answer) :] == answer and len(ids) == len(labels)
    batch = padded([data[0], data[1]], 0)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
