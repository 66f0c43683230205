"""Finds the linear projections of a model and says what each is for.

What is known by name is in `families`; what names do not tell is tried out on copies by `trials`. It changes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch import Tensor, nn

from lowrank.linalg.rows import Rows, height, shifted
from lowrank.models.experts import GATED, stacks_of
from lowrank.models.families import INDEXERS, ROUTERS, Role
from lowrank.models.fused import Doubt, Fused, attending, blocks_of, heights
from lowrank.models.fused_beside import fused_beside
from lowrank.models.patterns import SHARED, matches, matches_label, parts
from lowrank.models.storage import declared_shape, is_linear, rows_of
from lowrank.models.trials import try_layer


@dataclass(frozen=True)
class Projection:
    """One logical matrix ``(out_features, in_features)`` of a model; a fused qkv weight is three of them.

    ``rows`` are the output rows that it owns in the tensor ``param`` of ``module``, counted over the
    tensor laid out as ``(rows, in_features)``: a stack of experts ``(experts, out, in)`` is read as
    ``(experts · out, in)``. They are ``(start, stop)``, or, where heads are interleaved,
    ``(start, stop, size, stride)``: see `linalg.rows`. ``block`` only labels it among its siblings.
    ``shared`` is how many experts share one adapter: its rows are then those of the first.
    """

    module: str
    param: str
    rows: Rows
    role: Role
    in_features: int
    out_features: int
    block: str = field(default="", compare=False)
    shared: int = 1

    @property
    def path(self) -> str:
        """Of the module, or of the tensor where that is no ``weight``."""
        return self.module if self.param == "weight" else f"{self.module}.{self.param}".lstrip(".")

    @property
    def name(self) -> str:
        """Readable and unique in its model: ``h.0.attn.c_attn[query]``."""
        return f"{self.path}[{self.block}]" if self.block else self.path

    def is_labelled(self, pattern: str) -> bool:
        """Does ``pattern`` name these rows of a weight, as in ``c_attn[query]``?"""
        return matches_label(self.path, self.block, pattern)

    def is_called(self, pattern: str) -> bool:
        """Does ``pattern`` name it: the end of its module's path, of its tensor's, or of its name?"""
        paths = self.module, f"{self.module}.{self.param}"
        return any(matches(path, pattern) for path in paths) or self.is_labelled(pattern)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def weight(self, model: nn.Module) -> Tensor:
        """The matrix as ``(out, in)``: a view of the model's, a copy where it is interleaved or quantized.

        Raises ValueError where experts share the adapter, since there is no one weight then.
        """
        if self.shared > 1:
            text = 'experts share an adapter; experts="each" gives each its own'
            raise ValueError(f"{self.name} has no one weight: {self.shared} {text}")
        return rows_of(model.get_submodule(self.module), self.param, self.rows)

    def apart(self, out: int) -> list[Projection]:
        """The projection of each expert, of ``out`` rows, that shares this one; itself where none does."""
        if self.shared == 1:
            return [self]
        each = (f"{e}.{self.block.removeprefix(SHARED)}" for e in range(self.shared))
        rows = (shifted(self.rows, e * out) for e in range(self.shared))
        return [replace(self, rows=r, block=b, shared=1) for r, b in zip(rows, each, strict=True)]


# -- names ------------------------------------------------------------------------------------------

# These read `child.weight` in some path of theirs and call the child in others. The child is adapted on the
# weight then. Whatever else reads a weight needs no entry: `LoRALinear.weight` is W + ΔW.
READ_BY_WEIGHT = {
    "MultiheadAttention": ("out_proj",),
    "TransformerEncoderLayer": ("linear1", "linear2"),
    "MambaMixer": ("x_proj", "dt_proj", "out_proj"),
}


# -- the scan ---------------------------------------------------------------------------------------


Found = tuple[Projection, Doubt | None]
Roles = Mapping[str, str]  # dotted-suffix pattern → role


def find_projections(
    model: nn.Module, fused: Fused | None = None, roles: Roles | None = None
) -> list[Projection]:
    """Every linear projection of ``model``, in its own order; shared modules once, heads included.

    A fused weight whose blocks cannot be told is listed whole, as ``Role.OTHER``; `scan` says why.

    Args:
        fused: rows by role of fused weights that nothing else tells, by dotted-suffix pattern:
            ``{"qkv_proj": {"query": 4096, "key": 1024, "value": 1024}}``. Where heads are interleaved, the
            rows of one group, and ``"groups"``: how many there are. Of several patterns that name a weight,
            the longest counts.
        roles: by dotted-suffix pattern, of weights of one role, ``{"mixer.theta": "query"}``, or of rows by
            their label, ``{"c_attn[query]": "key"}``. It goes before what names tell. A router stays one.
    """
    return list(scan(model, fused, roles))


def scan(
    model: nn.Module, fused: Fused | None = None, roles: Roles | None = None
) -> dict[Projection, Doubt | None]:
    """The projections of `find_projections`, each with what speaks against adapting it.

    Raises:
        ValueError: ``fused`` does not add up to the rows of a weight, or is not how a family that is known to
            interleave heads does so.
    """
    return {said(p, roles or {}): doubt for p, doubt in _scan(model, fused or {})}


def said(p: Projection, roles: Roles) -> Projection:
    """``p`` with the role that ``roles`` say, where they name it."""
    pattern = telling(p, roles)
    return p if pattern is None else replace(p, role=Role(roles[pattern]))


def telling(p: Projection, roles: Iterable[str]) -> str | None:
    """The pattern of ``roles`` that says the role of ``p``: of several the longest.

    Rows of a fused weight keep their own role, but where a pattern names these rows: ``c_attn[query]``.
    """
    called = p.is_labelled if p.block else p.is_called
    return max(filter(called, roles), key=lambda each: (len(parts(each)), len(each)), default=None)


def read_by_weight(model: nn.Module, path: str) -> bool:
    """Does the parent of ``path`` use its weight without calling it?"""
    parent, _, leaf = path.rpartition(".")
    kinds = type(model.get_submodule(parent)).__mro__
    return any(leaf in READ_BY_WEIGHT.get(kind.__name__, ()) for kind in kinds)


def on_weight(model: nn.Module, p: Projection) -> bool:
    """Is ``p`` adapted on the weight itself, because nothing calls a layer that holds it?"""
    return p.param != "weight" or read_by_weight(model, p.module)


def _scan(model: nn.Module, fused: Fused) -> Iterator[Found]:
    attends, rows_named = attending(model), heights(model)
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # its layers are not Python's
            continue
        if isinstance(module, nn.MultiheadAttention):
            yield from _attention(path, module)
        elif is_linear(module):
            yield from _linear(model, path, module, fused, attends, rows_named)
        else:
            yield from _experts(path, module)


def _linear(
    model: nn.Module,
    path: str,
    module: nn.Module,
    fused: Fused,
    attends: Callable[[str], bool],
    rows_named: Callable[[], Mapping[str, set[int]]],
) -> Iterator[Found]:
    shape = declared_shape(module)
    assert shape is not None
    rows, columns = shape
    problem = "" if read_by_weight(model, path) else try_layer(module, rows, columns).problem
    if problem:
        doubt = Doubt(f"{path}: the forward of {type(module).__name__} {problem}", adaptable=False)
        yield Projection(path, "weight", (0, rows), Role.OTHER, columns, rows), doubt
        return
    parent, _, leaf = path.rpartition(".")
    if instead := fused_beside(model.get_submodule(parent), leaf):
        doubt = Doubt(f"{path}: {instead} is called instead", adaptable=False)
        yield Projection(path, "weight", (0, rows), Role.OTHER, columns, rows), doubt
        return
    blocks = blocks_of(model, path, rows, columns, fused, attends, rows_named)
    if isinstance(blocks, Doubt):
        doubt = _routes(model, path) or blocks
        yield Projection(path, "weight", (0, rows), Role.OTHER, columns, rows), doubt
        return
    routes = _routes(model, path)
    for role, own in blocks:
        block = role.value if len(blocks) > 1 else ""
        role = Role.OTHER if routes else role
        yield Projection(path, "weight", own, role, columns, height(own), block), routes


def _routes(model: nn.Module, path: str) -> Doubt | None:
    parts = path.split(".")
    if any(part in INDEXERS for part in parts):
        return Doubt(f"{path}: it chooses tokens, and no gradient reaches it", routes=True)
    for i, part in enumerate(parts):
        if part == "router" or (
            part in ROUTERS and hasattr(model.get_submodule(".".join(parts[:i])), "experts")
        ):
            return Doubt(f"{path}: it chooses experts", routes=True)
    return None


def _attention(path: str, module: nn.MultiheadAttention) -> Iterator[Found]:
    width, roles = module.embed_dim, (Role.QUERY, Role.KEY, Role.VALUE)
    for i, role in enumerate(roles):
        if module.in_proj_weight is not None:
            rows = (i * width, (i + 1) * width)
            yield Projection(path, "in_proj_weight", rows, role, width, width, role.value), None
        else:
            param = f"{role.value[0]}_proj_weight"
            columns = getattr(module, param).shape[1]
            yield Projection(path, param, (0, width), role, columns, width), None


def _experts(path: str, module: nn.Module) -> Iterator[Found]:
    """Stacks of experts: of each expert what its rows are for. See `experts.stacks_of`."""
    for param, stack in stacks_of(module).items():
        for e, (role, rows) in product(range(stack.experts), stack.bands):
            own = shifted(rows, e * stack.out)
            yield Projection(path, param, own, role, stack.columns, height(own), f"{e}.{role.value}"), None
    up, down = (module._parameters.get(param) for param in GATED)
    if up is None or down is None or up.dim() != 3 or down.dim() != 3 or stacks_of(module):
        return
    reason = f"{path}: its experts are stored neither as (experts, out, in) nor as (experts, in, out)"
    flat = up.shape[0] * up.shape[1]
    doubt = Doubt(reason, frozenset({Role.GATE, Role.UP, Role.DOWN}), adaptable=False)
    yield Projection(path, "gate_up_proj", (0, flat), Role.OTHER, up.shape[2], flat), doubt
