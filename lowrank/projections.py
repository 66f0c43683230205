"""Finds the linear projections of a model and says what each is for.

What is known by name is in `families`; what names do not tell is tried out on copies by `trials`. It changes
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from lowrank.families import (
    FUSED_NAMES,
    GATED_NAMES,
    HEAD_LAYERS,
    HEADS,
    INDEXERS,
    LATENT,
    ROUTERS,
    Blocks,
    Role,
    in_attention,
    layout_of,
    likely_blocks,
    role_of,
)
from lowrank.trials import divides, try_layer

FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)


@dataclass(frozen=True)
class Projection:
    """One logical matrix ``(out_features, in_features)`` of a model; a fused qkv weight is three of them.

    ``rows`` are the output rows that it owns in the tensor ``param`` of ``module``, counted over the
    tensor laid out as ``(rows, in_features)``: a stack of experts ``(experts, out, in)`` is read as
    ``(experts · out, in)``. ``block`` only labels it among its siblings.
    """

    module: str
    param: str
    rows: tuple[int, int]
    role: Role
    in_features: int
    out_features: int
    block: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """Readable and unique in its model: ``h.0.attn.c_attn[query]``."""
        path = self.module if self.param == "weight" else f"{self.module}.{self.param}".lstrip(".")
        return f"{path}[{self.block}]" if self.block else path

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def weight(self, model: nn.Module) -> Tensor:
        """The matrix as ``(out, in)``: a view where the model stores it plainly, else dequantized."""
        rows = as_rows(model.get_submodule(self.module), self.param)
        return rows[self.rows[0] : self.rows[1]]


@dataclass(frozen=True)
class Doubt:
    """What is not known of a projection, or speaks against adapting it.

    Args:
        reason: in words; it begins with the module's path.
        roles: what may lie in it, where it is a fused weight that cannot be divided.
        adaptable: can it be adapted as a whole?
        routes: it chooses experts or tokens; it is adapted where it is named.
    """

    reason: str
    roles: frozenset[Role] = frozenset()
    adaptable: bool = True
    routes: bool = False


def as_rows(module: nn.Module, param: str) -> Tensor:
    """The tensor ``param`` of ``module``, as ``(rows, in)``, whatever the layout it is stored in.

    Raises ValueError where it is quantized in a way that is not known.
    """
    stored = module._parameters.get(param)
    tensor = _dequantized(module, param, getattr(module, param) if stored is None else stored)
    if stored_transposed(module):
        return tensor.T
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() == 3 else tensor


def packed(stored: Tensor) -> bool:
    """Can the tensor not be added to, because it is packed, of integers, or in fp8?"""
    # A floating-point number of one byte is fp8, in one of its formats.
    return (
        not stored.is_floating_point()
        or stored.itemsize == 1
        or type(stored).__module__.partition(".")[0] == "torchao"
    )


def quantized(stored: Tensor) -> bool:
    """Is the parameter more than its numbers, as tensor subclasses may be, or `packed`?"""
    return type(stored) is not nn.Parameter or packed(stored)


def _dequantized(module: nn.Module, param: str, stored: Tensor) -> Tensor:
    state = getattr(stored, "quant_state", None)
    if state is not None:  # bitsandbytes packs two weights in a byte
        if getattr(state, "packing_format_for_cpu", False):
            return _packed_for_inference(stored.data, state)
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(stored.data, state)
    if type(stored).__module__.startswith("torchao."):  # its dtype is that of what it stands for
        if type(stored).dequantize is not Tensor.dequantize:
            return stored.detach().dequantize()
        # Some know their product only, and the product with the identity is the weight.
        identity = torch.eye(stored.shape[-1], dtype=stored.dtype, device=stored.device)
        return nn.functional.linear(identity, stored.detach()).T
    scale = getattr(stored, "SCB", None)
    if scale is None:
        scale = getattr(getattr(module, "state", None), "SCB", None)
    if stored.dtype == torch.int8 and scale is not None:  # bitsandbytes: 127 is the largest of each row
        return stored.data.float() * (scale.float() / 127).unsqueeze(1)
    if not stored.is_floating_point() and not stored.is_complex():
        raise ValueError(
            f"{type(module).__name__} keeps its weight as {stored.dtype}, in a way that is not known"
        )
    if stored.is_floating_point() and stored.itemsize == 1:
        return _from_fp8(module, param, stored.detach())
    return stored.detach()


def _packed_for_inference(stored: Tensor, state: Any) -> Tensor:
    """bitsandbytes' 4 bits as it arranges them at the first call in evaluation mode, with AVX512-BF16.

    Blocks of 32 rows, column after column, in each of them two columns side by side: of 64 such numbers the
    first 32 are the low halves of 32 bytes, the others the high halves
    (``bitsandbytes.functional._convert_weight_packed_for_cpu``). Scales are bf16, ``(in / block, out)``.

    Raises ValueError where the sizes are not those.
    """
    rows, columns = state.shape
    scales = state.absmax
    if tuple(scales.shape) != (columns // state.blocksize, rows) or stored.numel() * 2 != rows * columns:
        raise ValueError(
            "bitsandbytes has packed its 4 bits anew for inference on this CPU, in a layout that is not "
            "known: wrap, save and merge before the first call in evaluation mode"
        )
    bytes_ = stored.reshape(-1, 32)
    codes = torch.stack([bytes_ & 15, bytes_ >> 4], dim=1)
    codes = rearrange(codes.flatten(), "(n k r two) -> (n r) (k two)", r=32, k=columns // 2, two=2)
    factors = scales.T.to(state.code.dtype).repeat_interleave(state.blocksize, dim=1)
    return (state.code[codes.long()] * factors).to(state.original_dtype)


def _from_fp8(module: nn.Module, param: str, stored: Tensor) -> Tensor:
    """fp8 numbers in fp32, times the scales that the module keeps beside them, where it keeps any.

    Scales are ``<param>_scale_inv`` (transformers' FP8Linear, which multiplies by it) or ``<param>_scale``:
    one for the tensor, one for each row ``(rows,)``, or one for each block, of the size ``module.block_size``
    where that is said.

    Raises ValueError where scales have another name or shape.
    """
    kind = f"{type(module).__name__} keeps its {param} as {stored.dtype}"
    if stored.dtype not in FP8:
        raise ValueError(f"{kind}, in a way that is not known")
    others = ("activation", "input", *(f"{name}_" for name in module._parameters if name != param))
    held = {**module._parameters, **module._buffers, **vars(module)}
    scales = {
        name: tensor
        for name, tensor in held.items()
        if isinstance(tensor, Tensor) and "scale" in name and not name.startswith(others)
    }
    if not scales:
        return stored.float()
    scale = scales.get(f"{param}_scale_inv", scales.get(f"{param}_scale"))
    if scale is None or len(scales) > 1:
        raise ValueError(f"{kind} with the scales {sorted(scales)}, and how they act on it is not known")
    # A byte is an exponent: 127 stands for 1.
    factors = (scale.detach().float() - 127).exp2() if scale.dtype == torch.uint8 else scale.detach().float()
    if factors.numel() > 1:
        spread = _spread(factors, stored.shape, getattr(module, "block_size", None))
        if spread is None:
            shapes = f"{tuple(stored.shape)} with scales of shape {tuple(scale.shape)}"
            raise ValueError(f"{kind} {shapes}, expected one, one for each row, or one for each block")
        factors = spread
    return stored.float() * factors


def _spread(scales: Tensor, shape: torch.Size, block: Sequence[int] | None) -> Tensor | None:
    """One factor for each number of a tensor of ``shape``, from one for each block; None if that fails."""
    if scales.dim() == 1 and len(shape) == 2:
        scales = scales.unsqueeze(1)
    if scales.dim() != len(shape) or scales.shape[:-2] != shape[:-2]:
        return None
    for dim in (-2, -1):
        blocks, size = scales.shape[dim], shape[dim]
        length = size // blocks if block is None or blocks in (1, size) else int(block[dim])
        if not (blocks - 1) * length < size <= blocks * length:
            return None
        scales = scales.repeat_interleave(length, dim=dim).narrow(dim, 0, size)
    return scales


def stored_transposed(module: nn.Module) -> bool:
    """Does ``module`` keep its weight as ``(in, out)`` and multiply by it, as a Conv1D does?

    The shape tells it, and of a square weight a trial, where the layer has a forward of its own.
    """
    shape = declared_shape(module)
    if shape is None or type(module).forward is nn.Linear.forward:
        return False
    stored = tuple(module.weight.shape)  # type: ignore[arg-type]
    if stored != shape[::-1]:
        return False
    if stored != shape:
        return True
    tried = try_layer(module, *shape).transposed
    return hasattr(module, "nf") if tried is None else tried


def declared_shape(module: nn.Module) -> tuple[int, int] | None:
    """``(out, in)`` as a module with a weight declares it; None where it declares nothing."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    out, columns = getattr(module, "out_features", None), getattr(module, "in_features", None)
    nf = getattr(module, "nf", None)
    if out is None and columns is None and weight.dim() == 2 and nf in weight.shape:  # a Conv1D
        out, columns = nf, weight.shape[0] if weight.shape[1] == nf else weight.shape[1]
    if not isinstance(out, int) or not isinstance(columns, int):
        return None
    return out, columns


# -- names ------------------------------------------------------------------------------------------

# These read `child.weight` in some path of theirs instead of calling the child.
READ_BY_WEIGHT = {
    "MultiheadAttention": ("out_proj",),
    "TransformerEncoderLayer": ("linear1", "linear2"),
    "MambaMixer": ("x_proj", "dt_proj", "out_proj"),
}


def matches(path: str, pattern: str) -> bool:
    """Does the dotted-suffix ``pattern``, with ``*`` inside its parts, name ``path``?"""
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) >= len(wanted) and all(map(fnmatchcase, parts[-len(wanted) :], wanted))


# -- the scan ---------------------------------------------------------------------------------------


Fused = Mapping[str, Mapping[str, int]]
Found = tuple[Projection, Doubt | None]


def find_projections(model: nn.Module, fused: Fused | None = None) -> list[Projection]:
    """Every linear projection of ``model``, in its own order; shared modules once, heads included.

    A fused weight whose blocks cannot be told is listed whole, as ``Role.OTHER``; `scan` says why.

    Args:
        fused: rows by role of fused weights that nothing else tells, by dotted-suffix pattern:
            ``{"qkv_proj": {"query": 4096, "key": 1024, "value": 1024}}``. Of several patterns that name a
            weight, the longest counts.
    """
    return list(scan(model, fused))


def scan(model: nn.Module, fused: Fused | None = None) -> dict[Projection, Doubt | None]:
    """The projections of `find_projections`, each with what speaks against adapting it.

    Raises:
        ValueError: ``fused`` does not add up to the rows of a weight, or divides one that interleaves heads.
    """
    return dict(_scan(model, fused or {}))


def output_heads(model: nn.Module) -> dict[str, str]:
    """Paths of the linear modules that turn hidden states into scores, and of tied weights: each with why.

    Output embeddings and tied weights are told by what they do, others by their name: a few linear layers
    without attention. Names alone do not count where they would leave nothing else of the model.
    """
    tied = {id(p) for m in model.modules() if is_embedding(m) for p in m.parameters(recurse=False)}
    certain = {
        path: "its weight is tied to an embedding"
        for path, module in model.named_modules()
        if not is_embedding(module) and any(id(p) in tied for p in module.parameters(recurse=False))
    }
    named: dict[str, str] = {}
    for around, part in model.named_modules():  # a transformers model may sit in another module
        get_output = getattr(part, "get_output_embeddings", None)
        if part is not model and not callable(get_output):
            continue
        output = get_output() if callable(get_output) else None
        for path, module in part.named_modules(prefix=around):
            if output is not None and module is output:
                certain.setdefault(path, "the model's output embeddings")
        for name, child in part.named_children():
            if name in HEADS and _is_small(child):
                prefix = f"{around}.{name}" if around else name
                named |= {path: f"called {name!r}" for path, _ in child.named_modules(prefix=prefix)}
    linear = {
        path
        for path, module in model.named_modules()
        if is_linear(module) or isinstance(module, nn.MultiheadAttention)
    }
    return certain if linear <= certain.keys() | named.keys() else named | certain


def _is_small(head: nn.Module) -> bool:
    linear = [path for path, module in head.named_modules() if is_linear(module)]
    attends = any(in_attention(path) for path in linear) or any(
        isinstance(module, nn.MultiheadAttention) for module in head.modules()
    )
    return len(linear) <= HEAD_LAYERS and not attends


def is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def read_by_weight(model: nn.Module, path: str) -> bool:
    """Does the parent of ``path`` use its weight without calling it?"""
    parent, _, leaf = path.rpartition(".")
    kinds = type(model.get_submodule(parent)).__mro__
    return any(leaf in READ_BY_WEIGHT.get(kind.__name__, ()) for kind in kinds)


def _scan(model: nn.Module, fused: Fused) -> Iterator[Found]:
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            yield from _attention(path, module)
        elif is_linear(module):
            yield from _linear(model, path, module, fused)
        else:
            yield from _experts(path, module)


def is_linear(module: nn.Module) -> bool:
    """A Linear, a subclass of one, or a module that declares itself as ``(out_features, in_features)``."""
    if isinstance(module, nn.Linear):
        return True
    shape = declared_shape(module)
    if shape is None:
        return False
    return tuple(module.weight.shape) in (shape, shape[::-1])  # type: ignore[arg-type]


def _linear(model: nn.Module, path: str, module: nn.Module, fused: Fused) -> Iterator[Found]:
    shape = declared_shape(module)
    assert shape is not None
    rows, columns = shape
    problem = "" if read_by_weight(model, path) else try_layer(module, rows, columns).problem
    if problem:
        doubt = Doubt(f"{path}: the forward of {type(module).__name__} {problem}", adaptable=False)
        yield Projection(path, "weight", (0, rows), Role.OTHER, columns, rows), doubt
        return
    blocks = _blocks(model, path, rows, columns, fused)
    if isinstance(blocks, Doubt):
        yield Projection(path, "weight", (0, rows), Role.OTHER, columns, rows), blocks
        return
    start = 0
    routes = _routes(model, path)
    for role, size in blocks:
        block = role.value if len(blocks) > 1 else ""
        role = Role.OTHER if routes else role
        yield Projection(path, "weight", (start, start + size), role, columns, size, block), routes
        start += size


def _routes(model: nn.Module, path: str) -> Doubt | None:
    parts = path.split(".")
    if any(part in INDEXERS for part in parts):
        return Doubt(f"{path}: it chooses tokens, and no gradient reaches it", routes=True)
    for i, part in enumerate(parts):
        if part in ROUTERS and hasattr(model.get_submodule(".".join(parts[:i])), "experts"):
            return Doubt(f"{path}: it chooses experts", routes=True)
    return None


def _blocks(model: nn.Module, path: str, rows: int, columns: int, fused: Fused) -> Blocks | Doubt:
    """Roles and row counts of the blocks of one weight, or why they cannot be told."""
    parent_path, _, name = path.rpartition(".")
    parent, leaf = model.get_submodule(parent_path), name.lower()
    layout, told = layout_of(parent, leaf), _told(path, rows, fused)
    try:
        known = layout(parent, rows) if layout else None
    except AttributeError:  # another version of the class
        layout = known = None
    kind, why = type(parent).__name__, ""
    if layout and known is None:
        order = "interleaves query, key and value head by head"
        why = f"{path}: {kind} {order}, so no block of rows is the query's"
    elif leaf in LATENT:
        why = f"{path}: {kind} has key and value of one latent, so no block of rows is the value's"
    if why and told:
        raise ValueError(f"{why}: fused= cannot divide it, leave it out of fused")
    if why:
        return Doubt(why, frozenset(FUSED_NAMES.get(leaf, (Role.KEY, Role.VALUE))))
    if told:
        return told
    if known and sum(size for _, size in known) == rows:
        return known
    if leaf == "in_proj" and not in_attention(parent_path):
        return [(Role.OTHER, rows)]  # a state-space block's
    if leaf in FUSED_NAMES:
        holds = FUSED_NAMES[leaf]
        for likely in likely_blocks(parent, leaf, rows):
            if divides(parent, name, columns, likely):
                return likely
        return Doubt(_ask_for_rows(model, path, rows, holds), frozenset(holds))
    if leaf in GATED_NAMES and rows % 2 == 0:
        return [(Role.GATE, rows // 2), (Role.UP, rows // 2)]
    if leaf == "wi":
        output = getattr(parent, "Wo", None)
        if getattr(output, "in_features", None) == rows // 2:
            return [(Role.GATE, rows // 2), (Role.UP, rows // 2)]
    return [(role_of(path), rows)]


def _told(path: str, rows: int, fused: Fused) -> Blocks | None:
    patterns = [pattern for pattern in fused if matches(path, pattern)]
    if not patterns:
        return None
    pattern = max(patterns, key=lambda each: (each.count("."), len(each)))
    sizes = fused[pattern]
    if sum(sizes.values()) != rows or min(sizes.values(), default=0) < 1:
        said = f"fused[{pattern!r}] = {dict(sizes)}"
        raise ValueError(
            f"{said} must add up to the {rows} rows of {path}; a longer pattern can name it alone"
        )
    return [(Role(role), size) for role, size in sizes.items()]


def _ask_for_rows(model: nn.Module, path: str, rows: int, roles: tuple[Role, ...]) -> str:
    """The reason, with the shortest pattern that names no weight of another height."""
    parts = path.split(".")
    patterns = [".".join(parts[-i:]) for i in range(1, len(parts) + 1)]
    others = [
        other
        for other, module in model.named_modules()
        if other and is_linear(module) and (declared_shape(module) or (rows,))[0] != rows
    ]
    pattern = next((each for each in patterns if not any(matches(other, each) for other in others)), path)
    said = ", ".join(f'"{role}": rows' for role in roles)
    return (
        f"{path}: nothing tells where {' and '.join(roles)} lie in its {rows} rows; say it with "
        f'fused={{"{pattern}": {{{said}}}}}, as they are stored'
    )


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
    """Stacks of experts: ``gate_up_proj`` (experts, 2·hidden, in) and ``down_proj`` (experts, in, hidden)."""
    up, down = (module._parameters.get(param) for param in ("gate_up_proj", "down_proj"))
    if up is None or down is None or up.dim() != 3 or down.dim() != 3:
        return
    experts, rows, columns = up.shape
    if down.shape != (experts, columns, rows // 2) or torch.is_complex(up):
        reason = f"{path}: its experts are not stored as (experts, out, in) with the gate's rows first"
        flat = up.shape[0] * up.shape[1]
        doubt = Doubt(reason, frozenset({Role.GATE, Role.UP, Role.DOWN}), adaptable=False)
        yield Projection(path, "gate_up_proj", (0, flat), Role.OTHER, up.shape[2], flat), doubt
        return
    half = rows // 2
    for e in range(experts):
        for role, start in ((Role.GATE, e * rows), (Role.UP, e * rows + half)):
            block = f"{e}.{role.value}"
            yield Projection(path, "gate_up_proj", (start, start + half), role, columns, half, block), None
    for e in range(experts):
        rows_of_one = (e * columns, (e + 1) * columns)
        yield Projection(path, "down_proj", rows_of_one, Role.DOWN, half, columns, f"{e}.down"), None
