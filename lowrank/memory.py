"""`memory_report`: what training a planned model will hold, before anything is loaded twice or wrapped.

`train.stand_in` follows the step itself; here the plan's adapters are put into a stand-in of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters import added_parameters, plan_of
from lowrank.batches import Loss, model_device, output_loss
from lowrank.init import Kaiming
from lowrank.init.base import frozen_factors, starts_anchored
from lowrank.layers.adapter import Adapter
from lowrank.layers.bases import master_dtype
from lowrank.layers.expert_stack import ExpertStack
from lowrank.layers.magnitude import Magnitude
from lowrank.plan import Plan
from lowrank.train.known_integers import is_known
from lowrank.train.memory import optimizer_factory
from lowrank.train.memory_helps import lighter, with_helps
from lowrank.train.memory_table import MemoryReport
from lowrank.train.stand_in import Optimizers, StandIn, plain
from lowrank.wrapping.install import bare
from lowrank.wrapping.planning import fitted_plan
from lowrank.wrapping.rows import weight_of

PRECISIONS: dict[Any, tuple[torch.dtype | None, torch.dtype | None]] = {  # dtype of the base, autocast
    **{dtype: (dtype, None) for dtype in (torch.float32, torch.bfloat16, torch.float16)},
    **{str(d).removeprefix("torch."): (d, None) for d in (torch.float32, torch.bfloat16, torch.float16)},
    "bfloat16-mixed": (None, torch.bfloat16),
    "float16-mixed": (None, torch.float16),
    None: (None, None),
}


def memory_report(
    model: nn.Module,
    plan: Plan | None,
    *,
    batch: Any,
    tokens: int | None = None,
    precision: torch.dtype | str | None = None,
    optimizer: str | Optimizers = "adamw",
    loss: Loss | None = None,
    available: int | None = None,
) -> MemoryReport:
    """What a training step of ``model`` with the adapters of ``plan`` holds, in bytes, part by part.

    The step is followed on a stand-in of the model, with shapes and without numbers: it takes seconds and
    hardly any memory, also for a model on the meta device. ``model`` is left as it is. Where the step does
    not fit, `MemoryReport.helps` says what it would take with other choices.

    Args:
        model: wrapped or not.
        plan: what is to be adapted. For a wrapped model None, or the plan that it was wrapped by.
        batch: how many examples a batch has, or a batch as the loss takes it, of which shapes and integers
            count: masks, and where packed sequences begin.
        tokens: in each example, where ``batch`` is a number.
        precision: torch.float32, torch.bfloat16, torch.float16, or their names: the base in that dtype.
            "bfloat16-mixed", "float16-mixed": the base as it is, under autocast. None: the base as it is.
        optimizer: "adamw", "adam", "sgd", or a function from parameters to an optimizer.
        loss: as for `fit`.
        available: the bytes that it must fit into, say of another device; by default what is free.

    Raises:
        ValueError: an option is not known, the plan is another model's, or sizes depend on numbers, as
            where experts are called one by one with the tokens that a router gives them
            (``model.set_experts_implementation("grouped_mm")`` changes that), or a tensor is of an unknown
            class.
    """
    if precision not in PRECISIONS:
        known = ", ".join(key for key in PRECISIONS if isinstance(key, str))
        raise ValueError(f"precision: expected a torch.dtype, None, or one of {known}, got {precision!r}")
    factory = optimizer_factory(optimizer)
    wrapped = any("_lowrank" in module.__dict__ for module in model.modules())
    if not isinstance(plan, Plan | None):
        raise ValueError(f"plan: expected a Plan, as plan_model makes it, or None, got {type(plan).__name__}")
    if wrapped and plan is not None and plan != plan_of(model):
        raise ValueError(
            "the model is wrapped by another plan: give plan=None, or a model that is not wrapped"
        )
    if not wrapped and plan is None:
        raise ValueError("the model is not wrapped: give the plan that it is to get, as plan_model makes it")
    if not wrapped:
        assert plan is not None
        plan = fitted_plan(model, plan)

    title = _title(model, batch, tokens, precision)
    batch = _inputs(model, batch, tokens) if isinstance(batch, int) else plain(batch)

    def measured(
        batch: Any,
        precision: Any,
        change: Callable[[nn.Module], object] | None = None,
        accumulate: bool = False,
    ) -> MemoryReport:
        dtype, autocast = PRECISIONS[precision]
        outline = _outline(model, dtype, keep=_beside(model))
        if not wrapped:
            assert plan is not None
            _install(outline, plan)
        if change is not None:
            change(outline)
        return StandIn(outline, model_device(model)).step(
            batch,
            loss or output_loss,
            autocast=autocast,
            optimizer=factory,
            beside=_beside(outline),
            accumulate=accumulate,
            available=available,
            title=title,
        )

    return with_helps(measured(batch, precision), _tries(measured, model, batch, precision))


def _tries(
    measured: Callable[..., MemoryReport], model: nn.Module, batch: Any, precision: Any
) -> Iterator[tuple[str, Callable[[], MemoryReport]]]:
    """Other choices, the least intrusive first."""
    for what, smaller, change in lighter(model, batch):
        yield what, partial(measured, smaller, precision, change, smaller is not batch)
    if PRECISIONS[precision] == (torch.float32, None) or precision is None:
        yield "the base in bfloat16", partial(measured, batch, torch.bfloat16)
    yield "A frozen, as in presets.tlora()", partial(measured, batch, precision, _freeze_A)


def _freeze_A(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (Adapter, ExpertStack)):
            module.A.requires_grad_(False)
            module.A0 = module.B0 = None


def _outline(model: nn.Module, dtype: torch.dtype | None, keep: Iterable[Tensor]) -> nn.Module:
    """A copy on the meta device; what is plain and floating-point is in ``dtype``, but for ``keep``."""
    kept = {id(tensor) for tensor in keep}
    made: dict[int, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        if type(tensor) in (nn.Parameter, Tensor) and not is_known(tensor):
            cast = dtype is not None and tensor.is_floating_point() and tensor.itemsize > 1
            to = dtype if cast and id(tensor) not in kept else None
            held = torch.empty_like(tensor, dtype=to, device="meta")
            if isinstance(tensor, nn.Parameter):
                held = nn.Parameter(held, requires_grad=tensor.requires_grad)
            made[id(tensor)] = held
        else:
            made[id(tensor)] = tensor  # nothing is written into it
    return deepcopy(model, made)


def _install(model: nn.Module, plan: Plan) -> None:
    """The adapters of ``plan``, on the meta device too."""
    init = plan.init or Kaiming()
    adapters = {}
    for p in plan.adapted:
        weight = model.get_submodule(p.module)._parameters[p.param]
        assert weight is not None
        where: dict[str, Any] = {"dtype": master_dtype(weight.dtype), "device": "meta"}
        state = {"A": torch.empty(plan[p].rank, p.in_features, **where)}
        state["B"] = torch.empty(p.out_features, plan[p].rank, **where)
        if starts_anchored(init, p.role):
            state |= {"A0": torch.empty_like(state["A"]), "B0": torch.empty_like(state["B"])}
        frozen = frozen_factors(init, p.role)
        adapters[p] = Adapter.from_state(state, plan[p].scaling, rows=p.rows, frozen=frozen)
        if plan.dora:
            adapters[p].magnitude = Magnitude(torch.empty(p.out_features, **where))
    with bare(model) as fittings:
        offsets = {
            rows.module: torch.empty(
                len(rows.ids), rows.width, dtype=master_dtype(weight_of(model, rows).dtype), device="meta"
            )
            for rows in plan.rows
        }
        fittings.install("default", plan, adapters, offsets)


def _beside(model: nn.Module) -> Iterable[Tensor]:
    """All that wrapping put beside the base: factors, their anchors, magnitudes, modules trained in full."""
    anchors = (module.buffers() for module in model.modules() if isinstance(module, Adapter))
    return chain(added_parameters(model), chain.from_iterable(anchors))


def _inputs(model: nn.Module, batch: int, tokens: int | None) -> Mapping[str, Tensor]:
    """Token ids and labels of such a batch, as transformers' models take them."""
    if tokens is None or batch < 1 or tokens < 1:
        raise ValueError(f"batch and tokens: expected numbers of at least 1, got {batch} and {tokens}")
    kind = type(model).__name__
    ids = torch.zeros(batch, tokens, dtype=torch.long)
    if kind.endswith(("ForSequenceClassification", "ForMultipleChoice")):
        labels = torch.zeros(batch, dtype=torch.long)
    else:
        labels = ids
    return {"input_ids": ids, "labels": labels}


def _title(model: nn.Module, batch: Any, tokens: int | None, precision: Any) -> str:
    size = f"{batch} × {tokens} tokens" if isinstance(batch, int) else "the given batch"
    how = "as loaded" if precision is None else str(precision).removeprefix("torch.")
    return f"a training step: {type(model).__name__}, {size}, {how}"
