"""The memory that a training step takes, told before one is run.

The step runs on stand-ins, which have shapes and no numbers, and every storage is counted while it lives. It
knows no family of models and no adapter.
"""

from __future__ import annotations

import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only

from lowrank.batches import Loss, model_device, output_loss, scalar_loss
from lowrank.notices import show
from lowrank.train.grouped_shapes import GroupedShapes
from lowrank.train.known_integers import MOST, KnownIntegers, is_known
from lowrank.train.memory_helps import lighter, with_helps
from lowrank.train.memory_table import MemoryReport
from lowrank.train.storages import Storages, bytes_of, free_bytes

Optimizers = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Optimizers] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
}


def step_memory(
    model: nn.Module,
    batch: Any,
    loss: Loss | None = None,
    *,
    autocast: torch.dtype | None = None,
    optimizer: str | Optimizers = "adamw",
    accumulate: bool = False,
    available: int | None = None,
    title: str = "a training step",
) -> MemoryReport:
    """What a step of training ``model`` on ``batch`` holds: forward, backward, and the optimizer's update.

    Nothing is computed and ``model`` is left as it is. Counted is what PyTorch's allocator is asked for; what
    a kernel needs inside itself and what the allocator keeps in reserve are not. The result is that of the
    CPU's kernels for a model on the CPU, and of CUDA's on CUDA, where two cases were measured.

    Args:
        batch, loss, autocast: as for `fit`.
        optimizer: "adamw", "adam", "sgd", or a function from parameters to an optimizer.
        accumulate: is the batch one of several of a step? Then the gradients of those before it are held.
        available: the bytes that it must fit into; by default what the device has free.

    Raises:
        ValueError: nothing is to be trained, the optimizer is not known, or the step cannot be told from
            shapes alone, as where a router decides about sizes, or of a tensor of an unknown class.
    """
    factory = optimizer_factory(optimizer)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("nothing requires grad, so there is nothing to train: wrap the model first")

    def measured(batch: Any, accumulate: bool, change: Callable[[nn.Module], object] | None) -> MemoryReport:
        stand_in = StandIn(model)
        if change is not None:
            change(stand_in.model)
        return stand_in.step(
            batch,
            loss or output_loss,
            autocast=autocast,
            optimizer=factory,
            accumulate=accumulate,
            available=available,
            title=title,
        )

    batch = plain(batch)
    tries = (
        (what, partial(measured, smaller, accumulate or smaller is not batch, change))
        for what, smaller, change in lighter(model, batch)
    )
    return with_helps(measured(batch, accumulate, None), tries)


def told(
    model: nn.Module,
    batch: Any,
    loss: Loss | None,
    autocast: torch.dtype | None,
    optimizer: torch.optim.Optimizer,
    accumulate: bool,
) -> MemoryReport | None:
    """Shows `step_memory` for an optimizer of this class and its groups, or why there is none."""
    cls: Any = type(optimizer)

    def made(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return cls(list(parameters), **{k: v for k, v in optimizer.defaults.items() if k in _arguments(cls)})

    try:
        report = step_memory(model, batch, loss, autocast=autocast, optimizer=made, accumulate=accumulate)
    except (ValueError, TypeError) as error:
        show(f"no report of memory: {error}")
        return None
    show(str(report))
    return report


def _arguments(cls: type) -> set[str]:
    return set(inspect.signature(cls).parameters)


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


def optimizer_factory(optimizer: str | Optimizers) -> Optimizers:
    """What makes the optimizer; raises ValueError for a name that is not known."""
    if callable(optimizer):
        return optimizer
    if optimizer not in OPTIMIZERS:
        raise ValueError(
            f"optimizer: expected one of {sorted(OPTIMIZERS)}, or a function from parameters to an "
            f"optimizer, got {optimizer!r}"
        )
    return OPTIMIZERS[optimizer]


def _bitsandbytes() -> tuple[type, ...]:
    """Its classes of parameters, where it is loaded."""
    loaded = sys.modules.get("bitsandbytes.nn")
    return () if loaded is None else (loaded.Params4bit, loaded.Int8Params)
