"""A stand-in of a model, with shapes and no numbers, and a training step on it that counts every storage.

It knows no family of models and no adapter.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only

from lowrank.batches import Loss, model_device, scalar_loss
from lowrank.train.grouped_shapes import GroupedShapes
from lowrank.train.known_integers import MOST, KnownIntegers, is_known
from lowrank.train.memory_table import MemoryReport
from lowrank.train.storages import Storages, bytes_of, free_bytes

Optimizers = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class StandIn:
    """A copy of a model whose tensors have shape, dtype and device, and no numbers.

    Args:
        model: is not changed.
        device: where what is on the meta device will be; by default the model's, or the CPU.
    """

    def __init__(self, model: nn.Module, device: torch.device | None = None) -> None:
        # Importing this takes a second.
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.mode: Any = FakeTensorMode(allow_non_fake_inputs=True)
        self.device = model_device(model) if device is None else device
        if self.device.type == "meta":
            self.device = torch.device("cpu")
        self.of: dict[int, Any] = {}  # by the id of the real tensor
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            known = type(tensor) in (nn.Parameter, Tensor, *_bitsandbytes())
            if known or is_traceable_wrapper_subclass(tensor):
                self.of[id(tensor)] = self._made(tensor)
            else:
                raise ValueError(
                    f"{type(model).__name__}: the memory of a step cannot be told from shapes alone, since "
                    f"{name} is stored as {type(tensor).__name__} of {tensor.dtype}"
                )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Outside the mode: a tensor that is neither parameter nor buffer keeps its numbers.
            self.model: nn.Module = deepcopy(model, dict(self.of))

    @contextmanager
    def inside(self) -> Iterator[None]:
        """For whatever makes tensors or copies modules of the stand-in."""
        # What cannot be told from shapes is raised; PyTorch logs its traceback besides.
        log = logging.getLogger("torch._subclasses.fake_tensor")
        before, log.disabled = log.disabled, True
        try:
            with self.mode, GroupedShapes(), KnownIntegers(), warnings.catch_warnings():
                # Models warn of what matters in a real run.
                warnings.simplefilter("ignore")
                yield
        finally:
            log.disabled = before

    def _made(self, tensor: Tensor) -> Tensor:
        if is_known(tensor) and tensor.numel() <= MOST:
            return tensor.detach().clone()
        made: Any
        if type(tensor) in _bitsandbytes():  # numbers, and beside them how they are to be read
            made = nn.Parameter(self._made(tensor.data.as_subclass(Tensor)), requires_grad=False)
            made.__dict__.update((key, held) for key, held in vars(tensor).items() if key != "module")
            return made
        if type(tensor) not in (nn.Parameter, Tensor):  # made of plain ones
            made = self.mode.from_tensor(tensor.detach())
            wrapped = isinstance(tensor, nn.Parameter)
            return nn.Parameter(made, requires_grad=tensor.requires_grad) if wrapped else made
        device = self.device if tensor.is_meta else tensor.device
        with self.mode:
            made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
        return made

    def step(
        self,
        batch: Any,
        loss: Loss,
        *,
        autocast: torch.dtype | None,
        optimizer: Optimizers,
        beside: Iterable[Tensor] = (),
        accumulate: bool = False,
        available: int | None = None,
        title: str = "a training step",
    ) -> MemoryReport:
        """See `step_memory`. Of what is frozen only ``beside`` counts among the adapters."""
        model, device = self.model, self.device
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        frozen = [t for t in chain(model.parameters(), model.buffers()) if not t.requires_grad]
        added = [self.of.get(id(tensor), tensor) for tensor in beside]
        kept_beside = {id(tensor) for tensor in added}
        with ExitStack() as scope:
            scope.enter_context(self.inside())
            scope.enter_context(torch.random.fork_rng(devices=[]))
            batch = tree_map_only(
                Tensor,
                lambda t: t.detach().to(device) if is_known(t) else torch.empty_like(t, device=device),
                plain(batch),
            )
            model.train()
            updates = optimizer(trained)
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            updates.step()
            updates.zero_grad()
            storages = scope.enter_context(Storages())
            for parameter in trained if accumulate else ():
                parameter.grad = torch.zeros_like(parameter)
            try:
                with torch.autocast(device.type, autocast, enabled=autocast is not None):
                    value = scalar_loss(loss, model, batch)
                before = [parameter.grad for parameter in trained if parameter.grad is not None]
                kept = storages.alive() - storages.numbers(before)
                value.backward()
                del value
            except Exception as error:
                raise ValueError(
                    f"{type(model).__name__}: the memory of a step cannot be told from shapes alone: {error}"
                ) from error
            gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
            own = storages.numbers(gradients)
            updates.step()
        state = (value for held in updates.state.values() for value in held.values())
        held = {
            "weights": bytes_of(tensor for tensor in frozen if id(tensor) not in kept_beside),
            "adapters": bytes_of([*trained, *(t for t in frozen if id(t) in kept_beside)]),
            "optimizer": bytes_of(value for value in state if isinstance(value, Tensor)),
        }
        at_peak = storages.at_peak({"gradients": own, "activations": kept - own})
        return MemoryReport(
            weights=held["weights"],
            adapters=held["adapters"],
            optimizer=held["optimizer"],
            gradients=bytes_of(gradients),
            activations=storages.size(kept),
            at_peak={**held, **at_peak},
            free=free_bytes(device) if available is None else available,
            title=title,
        )


def plain(batch: Any) -> Any:
    """A mapping as a dict, which is walked whatever kind it was."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def _bitsandbytes() -> tuple[type, ...]:
    """Its classes of parameters, where it is loaded."""
    loaded = sys.modules.get("bitsandbytes.nn")
    return () if loaded is None else (loaded.Params4bit, loaded.Int8Params)
