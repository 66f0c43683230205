"""`AdapterCallback`: the adapter in every checkpoint of a transformers Trainer, and back when it resumes.

It trains nothing and leaves the Trainer's own files alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from lowrank.adapters import one_name
from lowrank.checkpoint import save_adapter
from lowrank.swapping import restore_adapter

STATE = "trainer_state.json"


class AdapterCallback(TrainerCallback):
    """Saves the adapter of the wrapped model in each checkpoint folder, and restores it on resuming.

    ``Trainer(..., callbacks=[AdapterCallback()])``; then ``load_adapter(base, "output/checkpoint-500")``
    reads any checkpoint. Resuming puts the saved values into the tensors that are trained, bit for bit,
    whatever the Trainer did with its own file. For models that every process holds whole: one process, DDP.

    Args:
        name: of the adapter; it may be left out where the model has one.
        resume_from: the checkpoint folder, where ``trainer.train(resume_from_checkpoint=...)`` names one
            outside of ``args.output_dir``: a callback is not told.
    """

    def __init__(self, resume_from: str | Path | None = None, *, name: str | None = None) -> None:
        self.resume_from, self.name = resume_from, name

    def on_save(self, args: Any, state: Any, control: Any, *, model: nn.Module, **rest: Any) -> None:
        """Writes the adapter beside what the Trainer has just written."""
        if state.is_world_process_zero:
            save_adapter(model, _folder(args, state), self.name)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **rest: Any) -> None:
        """Restores the adapter of the checkpoint that the Trainer resumes from.

        Raises:
            ValueError: the model is not wrapped, or no adapter, or more than one, is meant; that checkpoint
                is not found. An AdapterError: it is there, and its adapter does not belong to this model.
        """
        one_name(model, self.name)
        if state.global_step:
            restore_adapter(model, self._resumed(args, state), self.name)

    def _resumed(self, args: Any, state: Any) -> Path:
        named = self.resume_from or args.resume_from_checkpoint
        folder = Path(named) if isinstance(named, str | Path) else _folder(args, state)
        saved = json.loads((folder / STATE).read_text()) if (folder / STATE).is_file() else {}
        if (saved.get("global_step"), saved.get("log_history")) != (state.global_step, state.log_history):
            raise ValueError(
                f"expected the checkpoint of step {state.global_step} that training resumes from in {folder}"
                ", and it is not there: name it with AdapterCallback(resume_from=folder)"
            )
        return folder


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
