"""What a census asks of one model: wrap, compare, train, save, reload, unwrap; roles and what is left out."""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowrank
from benchmarks.censuses.sources import Made
from lowrank import presets
from lowrank.models.projections import Role

# Below an attention or a feed-forward block every projection has a role, but for these: they weight heads,
# positions or time steps, and choose experts or tokens.
BLOCK = re.compile(r"(^|\.)(\w*attn|\w*attention|mlp|ffn?|feed_?forward)\.", re.IGNORECASE)
WITHOUT_ROLE = re.compile(
    r"(rel|pos|bias|gate|gating|router|wg|weight|scale|lora|decay|time|conv|sampling|offset|indexer|index|"
    r"x_proj|dt_proj|in_proj|kv_a|kv_b|kv_proj|latent|adaln|modulation|ada|cpb|norm|talking|head|relative|"
    r"hash|cond|embed|[fgb]_proj|[abg]_?proj|[fg]_[ab]|in_proj_[ab]|score|r_net|coef|"
    r"r_proj|sink|expert_proj|proj_[lw]$|^attn$|query_key$)",
    re.IGNORECASE,
)
ROUTER = re.compile(r"(^|[._])router([._]|$)|(^|\.)(wg|shared_expert_gate|indexer)(\.|$)")


def check(make: Callable[[], Made]) -> dict[str, Any]:
    """Outcomes by name, "" for one that is right, else what was seen; and what the plan says.

    Raises whatever ``make`` raises.
    """
    model, batch = make()
    found: dict[str, Any] = {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    linear = lowrank.find_projections(model)
    found["projections"] = len(linear)
    if not linear:
        return found
    base = copy.deepcopy(model).requires_grad_(False)
    before = outputs(base, batch)
    found["deterministic"] = not unlike(outputs(base, batch), before)
    checks: dict[str, str] = {}
    found["checks"] = checks
    try:
        lowrank.wrap_model(model, presets.lora(rank=2), progress=False)
    except Exception as error:
        checks["wraps"] = _said(error)
        return found
    checks["wraps"] = ""
    plan = lowrank.plan_of(model)
    found["roles"] = _roles(plan)
    found["notes"] = list(plan.notes)
    checks["same bits"] = unlike(outputs(model, batch), before) if found["deterministic"] else ""
    checks["trains"] = _attempt(lambda: trains(model, batch, before))
    if checks["trains"]:  # some keep a state in evaluation that autograd does not bear
        checks["trains"] = _attempt(lambda: trains(_training(model), batch, before))
        model.eval()
    checks["reloads"] = _attempt(lambda: reloads(model, base, batch))
    checks["unwraps"] = _attempt(
        lambda: unwraps(model, base, batch, before if found["deterministic"] else None)
    )
    checks["roles"] = ", ".join(without_role(plan))
    checks["no routers"] = ", ".join(sorted({_pattern(p.module) for p in plan if ROUTER.search(p.module)}))
    checks["named"] = ", ".join(not_named(base, plan))
    return found


def outputs(model: nn.Module, batch: Mapping[str, Any]) -> list[Tensor]:
    """Every tensor of the output, in order; the same random numbers each time."""
    with torch.no_grad():
        torch.manual_seed(0)
        return list(tensors(model(**batch)))


def tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors(value)


def unlike(here: list[Tensor], there: list[Tensor]) -> str:
    """What differs, bit for bit; NaN equals NaN."""
    if len(here) != len(there):
        return f"{len(here)} tensors, expected {len(there)}"
    for i, (a, b) in enumerate(zip(here, there, strict=True)):
        if a.shape != b.shape:
            return f"tensor {i}: {tuple(a.shape)}, expected {tuple(b.shape)}"
        equal = (a == b) | (a.isnan() & b.isnan()) if a.is_floating_point() else a == b
        if not equal.all():
            return f"tensor {i}: {int((~equal).sum())} of {a.numel()} numbers differ"
    return ""


def trains(model: nn.Module, batch: Mapping[str, Any], before: list[Tensor]) -> str:
    """Two steps change the output, and reach an adapter."""
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        torch.manual_seed(0)
        loss = sum(
            (t.float().nan_to_num().clamp(-1e4, 1e4) * _weights(t)).mean()
            for t in tensors(model(**batch))
            if t.is_floating_point() and t.requires_grad
        )
        if not isinstance(loss, Tensor):
            return "no output depends on an adapter"
        loss.backward()
        grads = [p.grad for p in learning if p.grad is not None]
        size = sum(float(g.float().pow(2).sum()) for g in grads) ** 0.5
        if not size > 0:
            return "no gradient reaches an adapter"
        for g in grads:
            g.mul_(1.0 / size).nan_to_num_()
        optimizer.step()
    model.eval()
    return "" if unlike(outputs(model, batch), before) else "the output is as before"


def _training(model: nn.Module) -> nn.Module:
    """In training mode, but for running means, which would move."""
    model.train()
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.eval()
    return model


def _weights(t: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(t.numel())
    return torch.randn(t.shape, generator=draw)


def reloads(model: nn.Module, base: nn.Module, batch: Mapping[str, Any]) -> str:
    """A saved adapter on another copy of the base gives the same output."""
    trained = outputs(model, batch)
    if unlike(outputs(model, batch), trained):
        trained = []
    with tempfile.TemporaryDirectory() as folder:
        lowrank.save_adapter(model, Path(folder) / "adapter")
        again = lowrank.load_adapter(copy.deepcopy(base), Path(folder) / "adapter")
    return unlike(outputs(again, batch), trained) if trained else ""


def unwraps(model: nn.Module, base: nn.Module, batch: Mapping[str, Any], before: list[Tensor] | None) -> str:
    """The weights, their names and the output are the base's again."""
    lowrank.unwrap(model)
    here, there = model.state_dict(), base.state_dict()
    if list(here) != list(there):
        return "other names"
    for name, tensor in here.items():
        if not torch.equal(tensor.nan_to_num(), there[name].nan_to_num()):
            return f"{name} differs"
    return "" if before is None else unlike(outputs(model.requires_grad_(False), batch), before)


# -- roles and what is left out -------------------------------------------------------------------------


def without_role(plan: lowrank.Plan) -> list[str]:
    """Adapted projections in an attention or a feed-forward block whose role is not known."""
    paths = {_pattern(p.module) for p in plan if p.role == Role.OTHER and BLOCK.search(p.module)}
    return sorted(
        path
        for path in paths
        if not WITHOUT_ROLE.search(path.rpartition(".")[2]) and not re.search("position|cpb", path)
    )


def not_named(base: nn.Module, plan: lowrank.Plan) -> list[str]:
    """Matrices above 1 % of the parameters that are neither adapted nor in the plan's list; no embeddings."""
    adapted = {(p.module, p.param) for p in plan.adapted}
    whole, found = sum(p.numel() for p in base.parameters()), []
    said = set(plan.left_out)
    for path, module in base.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}".lstrip(".")
            matrix = sum(size > 1 for size in parameter.shape) > 1
            if isinstance(module, nn.Embedding) or not matrix or parameter.numel() <= 0.01 * whole:
                continue
            if (path, name) not in adapted and path not in said and full not in said:
                found.append(_pattern(full))
    return sorted(set(found))


def _roles(plan: lowrank.Plan) -> dict[str, list[str]]:
    roles: dict[str, set[str]] = {}
    for p in plan:
        roles.setdefault(p.role.value, set()).add(_pattern(p.name))
    return {role: sorted(paths)[:12] for role, paths in sorted(roles.items())}


def _pattern(path: str) -> str:
    return re.sub(r"(?<![\w])\d+(?!\w)", "*", path)


def _attempt(attempt: Callable[[], str]) -> str:
    try:
        return attempt()
    except Exception as error:
        return _said(error)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]
