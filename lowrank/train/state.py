"""What training changes in a model and an optimizer, as data that can be saved and put back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.processes import fill, spread_as


class Trained:
    """The tensors of ``model`` that a run changes: ``parameters``, and the buffers that go with them.

    These are the buffers of a module that holds one of the parameters, those that count running statistics,
    and those that have been written to since this object was made: their version says so, or where that was
    passed by (``.data``) the sum of what they hold.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        names = {parameter: _plain(name) for name, parameter in model.named_parameters()}
        self.model = model
        self.parameters = {names.get(p, f"parameter {i}"): p for i, p in enumerate(parameters)}
        self._before = {name: _marks(buffer) for name, _, _, buffer in self._buffers()}

    def described(self) -> list[str]:
        """A line for each parameter: its name, shape and dtype."""
        return [f"{name} {tuple(p.shape)} {p.dtype}" for name, p in self.parameters.items()]

    def layers(self) -> dict[str, str]:
        """How the modules that hold the parameters describe themselves, by path."""
        ids = set(map(id, self.parameters.values()))
        return {
            _plain(path): repr(module)
            for path, module in self.model.named_modules()
            if any(id(p) in ids for p in module.parameters(recurse=False))
        }

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The tensors themselves, not copies."""
        return {
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "buffers": {name: buffer.detach() for name, _, _, buffer in self._changing()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The shapes are those of `described`, which is for the caller to have compared."""
        for name, saved in state["parameters"].items():
            fill(self.parameters[name], saved)
        held = {name: (module, key, buffer) for name, module, key, buffer in self._buffers()}
        for name, saved in state["buffers"].items():
            if name not in held:
                raise ValueError(f"the checkpoint has a buffer {name} that the model does not have")
            module, key, buffer = held[name]
            if buffer.shape == saved.shape and buffer.dtype == saved.dtype:
                buffer.copy_(saved)
            else:  # a module may exchange its buffer for another
                setattr(module, key, saved.to(buffer.device))

    def _changing(self) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
        ids = set(map(id, self.parameters.values()))
        changing = {
            id(module)
            for name, module, _, buffer in self._buffers()
            if self._before.get(name) != _marks(buffer)
            or getattr(module, "track_running_stats", False)
            or any(id(p) in ids for p in module.parameters(recurse=False))
        }
        yield from (found for found in self._buffers() if id(found[1]) in changing)

    def _buffers(self) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
        """Name, owner, name there, buffer; each once."""
        for path, module in self.model.named_modules():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    yield _plain(f"{path}.{key}"), module, key, buffer


def _marks(buffer: Tensor) -> tuple[int, int, float]:
    """What tells whether it is another one, or holds something else."""
    counts = buffer.is_floating_point() and not buffer.is_meta and buffer.itemsize > 1
    total = float(buffer.detach().sum(dtype=torch.float64)) if counts else 0.0
    return id(buffer), 0 if buffer.is_inference() else buffer._version, total


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """As ``optimizer.load_state_dict``, which gives state the parameter's dtype; here it keeps its own."""
    optimizer.load_state_dict(dict(state))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, saved in state["state"].items():
        held = optimizer.state[parameters[index]]
        for key, value in saved.items():
            if isinstance(value, Tensor) and held[key].dtype != value.dtype:
                held[key] = value.to(held[key].device)
            if isinstance(value, Tensor) and value.shape == parameters[index].shape:
                held[key] = spread_as(parameters[index], held[key])


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two descriptions of a run do not agree in, a line for each option."""
    found = []
    for key in [*saved, *(key for key in now if key not in saved)]:
        old, new = saved.get(key), now.get(key)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += [f"{key}, {line}" for line in _few(differences(old, new))]
        elif isinstance(old, list) and isinstance(new, list):
            lines = [f"{key}: {line} was there" for line in old if line not in new]
            lines += [f"{key}: {line} is new" for line in new if line not in old]
            found += _few(lines or [f"{key}: the order is another"])
        else:
            found.append(f"{key}: it was {old!r}, it is {new!r}")
    return found


def _few(lines: list[str], most: int = 4) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most} more"]


def _plain(name: str) -> str:
    """Without what torch.compile puts into names."""
    return name.replace("_orig_mod.", "")
