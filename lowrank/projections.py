"""Finds the linear projections of a model and says what each is for.

The only file that knows model families: their names, their fused weights, their output heads, and
the modules that read a weight without calling the layer that holds it. It changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)


class Role(StrEnum):
    """What a projection does in its block."""

    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    OUTPUT = "output"
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    OTHER = "other"


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
    """True for a Conv1D, which keeps its weight as ``(in, out)``: told by shape and attributes."""
    weight = getattr(module, "weight", None)
    out = getattr(module, "nf", None)
    return (
        isinstance(out, int) and isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[1] == out
    )


# -- names ------------------------------------------------------------------------------------------

ROLES_BY_NAME = {
    name: role
    for role, names in {
        Role.QUERY: "query q_proj q_lin query_proj q wq to_q q_attn linear_q",
        Role.KEY: "key k_proj k_lin key_proj k wk to_k linear_k",
        Role.VALUE: "value v_proj v_lin value_proj v wv to_v linear_v",
        Role.GATE: "gate_proj wi_0 w1",
        Role.UP: "up_proj wi_1 wi w3 fc1 lin1 linear1 c_fc dense_h_to_4h",
        Role.DOWN: "down_proj wo w2 fc2 lin2 linear2 c_proj dense_4h_to_h",
    }.items()
    for name in names.split()
}
ATTENTION_OUTPUTS = frozenset("o_proj out_proj o out_lin wo to_out c_proj dense proj".split())
DENSE_ROLES = {"intermediate": Role.UP, "output": Role.DOWN}  # BERT: intermediate.dense, output.dense
HEADS = frozenset(
    "lm_head classifier pre_classifier score head heads head_dist fc qa_outputs embed_out cls logits "
    "output_layer output_projection proj_out".split()
)
THIRDS = frozenset("c_attn qkv qkv_proj wqkv w_pack in_proj in_proj_weight to_qkv".split())
GATED = frozenset("gate_up_proj gate_up".split())

# These split a fused weight by heads, so that no block of rows is the query's.
INTERLEAVED = ("GPTNeoX", "Bloom", "Persimmon", "CodeGen")

# These read `child.weight` in some path of theirs instead of calling the child.
READ_BY_WEIGHT = {
    "MultiheadAttention": ("out_proj",),
    "TransformerEncoderLayer": ("linear1", "linear2"),
    "MambaMixer": ("x_proj", "dt_proj", "out_proj"),
}


def role_of(path: str) -> Role:
    """The role that a dotted module path tells by itself."""
    *above, leaf = [part for part in path.lower().split(".") if not part.isdigit()] or [path]
    if leaf in ATTENTION_OUTPUTS and any("att" in part for part in above):
        return Role.OUTPUT
    if leaf == "dense":
        return DENSE_ROLES.get(above[-1], Role.OTHER) if above else Role.OTHER
    return ROLES_BY_NAME.get(leaf, Role.OTHER)


def matches(path: str, pattern: str) -> bool:
    """Does the dotted-suffix ``pattern``, with ``*`` inside its parts, name ``path``?"""
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) >= len(wanted) and all(map(fnmatchcase, parts[-len(wanted) :], wanted))


# -- the scan ---------------------------------------------------------------------------------------


def find_projections(
    model: nn.Module, fused: Mapping[str, Mapping[str, int]] | None = None
) -> list[Projection]:
    """Every linear projection of ``model``, in its own order; shared modules once, heads included.

    A fused weight whose blocks cannot be told is listed whole, as ``Role.OTHER``; choosing it as a
    target is an error that says why (`undivided`).

    Args:
        fused: rows by role of fused weights that shapes alone cannot tell, by dotted-suffix pattern:
            ``{"qkv_proj": {"query": 4096, "key": 1024, "value": 1024}}``.
    """
    return [projection for projection, _ in _scan(model, fused or {})]


def undivided(model: nn.Module, fused: Mapping[str, Mapping[str, int]]) -> dict[Projection, str]:
    """The fused weights of ``model`` that cannot be divided, each with the reason."""
    return {projection: reason for projection, reason in _scan(model, fused) if reason}


def output_heads(model: nn.Module) -> set[str]:
    """Paths of the linear modules that turn hidden states into scores, and of tied weights."""
    tied = {id(p) for m in model.modules() if is_embedding(m) for p in m.parameters(recurse=False)}
    heads = {
        path
        for path, module in model.named_modules()
        if not is_embedding(module) and any(id(p) in tied for p in module.parameters(recurse=False))
    }
    for around, part in model.named_modules():  # a transformers model may sit in another module
        get_output = getattr(part, "get_output_embeddings", None)
        if part is not model and not callable(get_output):
            continue
        output = get_output() if callable(get_output) else None
        for path, module in part.named_modules(prefix=around):
            below = path.removeprefix(f"{around}.") if around else path
            if (output is not None and module is output) or below.split(".")[0] in HEADS:
                heads.add(path)
    return heads


def is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def read_by_weight(model: nn.Module, path: str) -> bool:
    """Does the parent of ``path`` use its weight without calling it?"""
    parent, _, leaf = path.rpartition(".")
    kinds = type(model.get_submodule(parent)).__mro__
    return any(leaf in READ_BY_WEIGHT.get(kind.__name__, ()) for kind in kinds)


def _scan(model: nn.Module, fused: Mapping[str, Mapping[str, int]]) -> Iterator[tuple[Projection, str]]:
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
    if stored_transposed(module):
        return True
    shape = getattr(module, "out_features", None), getattr(module, "in_features", None)
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and tuple(weight.shape) == shape


def _linear(
    model: nn.Module, path: str, module: nn.Module, fused: Mapping[str, Mapping[str, int]]
) -> Iterator[tuple[Projection, str]]:
    if stored_transposed(module):
        columns, rows = module.weight.shape  # type: ignore[misc]
    else:
        columns, rows = int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    blocks = _blocks(model, path, rows, columns, fused)
    if isinstance(blocks, str):
        yield Projection(path, "weight", (0, rows), Role.OTHER, columns, rows), blocks
        return
    start = 0
    for role, size in blocks:
        block = role.value if len(blocks) > 1 else ""
        yield Projection(path, "weight", (start, start + size), role, columns, size, block), ""
        start += size


def _blocks(
    model: nn.Module, path: str, rows: int, columns: int, fused: Mapping[str, Mapping[str, int]]
) -> list[tuple[Role, int]] | str:
    """Roles and row counts of the blocks of one weight, or the reason why they cannot be told."""
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    leaf = name.lower()
    kind = type(parent).__name__
    query, key, value = Role.QUERY, Role.KEY, Role.VALUE

    if leaf in THIRDS or leaf == "query_key_value":
        by_heads = kind.startswith(INTERLEAVED)
        if kind.startswith("GPTBigCode"):
            by_heads = not getattr(parent, "multi_query", False)
        if kind.startswith("Falcon"):
            by_heads = not getattr(parent, "multi_query", False) or bool(
                getattr(parent, "new_decoder_architecture", False)
            )
        if by_heads:
            return (
                f"{path}: {kind} interleaves query, key and value head by head, so no block of rows is the "
                f"query's; leave it out with exclude=({name!r},)"
            )
    for pattern, sizes in fused.items():
        if matches(path, pattern):
            if sum(sizes.values()) != rows or min(sizes.values(), default=0) < 1:
                said = f"fused[{pattern!r}] = {dict(sizes)}"
                raise ValueError(f"{said} must add up to the {rows} rows of {path}")
            return [(Role(role), size) for role, size in sizes.items()]
    if leaf == "in_proj" and not any("att" in part for part in parent_path.lower().split(".")):
        return [(Role.OTHER, rows)]  # a state-space block's
    if leaf in THIRDS:
        if rows == 3 * columns:
            return [(query, columns), (key, columns), (value, columns)]
        if leaf == "c_attn" and rows == 2 * columns:  # GPT-2's cross-attention
            return [(key, columns), (value, columns)]
        return _ask_for_rows(path, name, rows)
    if leaf == "query_key_value":
        head = getattr(parent, "head_dim", None)
        if kind.startswith("Falcon") and isinstance(head, int):
            return [(query, rows - 2 * head), (key, head), (value, head)]
        return _ask_for_rows(path, name, rows)
    if leaf in GATED and rows % 2 == 0:
        return [(Role.GATE, rows // 2), (Role.UP, rows // 2)]
    if leaf == "wi":
        output = getattr(parent, "Wo", None)
        if getattr(output, "in_features", None) == rows // 2:
            return [(Role.GATE, rows // 2), (Role.UP, rows // 2)]
    return [(role_of(path), rows)]


def _ask_for_rows(path: str, name: str, rows: int) -> str:
    return (
        f"{path}: its shape does not tell where query, key and value lie in its {rows} rows; say it with "
        f'Policy(fused={{"{name}": {{"query": rows, "key": rows, "value": rows}}}}), as they are stored, '
        f"or leave it out with exclude=({name!r},)"
    )


def _attention(path: str, module: nn.MultiheadAttention) -> Iterator[tuple[Projection, str]]:
    width, roles = module.embed_dim, (Role.QUERY, Role.KEY, Role.VALUE)
    for i, role in enumerate(roles):
        if module.in_proj_weight is not None:
            rows = (i * width, (i + 1) * width)
            yield Projection(path, "in_proj_weight", rows, role, width, width, role.value), ""
        else:
            param = f"{role.value[0]}_proj_weight"
            columns = getattr(module, param).shape[1]
            yield Projection(path, param, (0, width), role, columns, width), ""


def _experts(path: str, module: nn.Module) -> Iterator[tuple[Projection, str]]:
    """Stacks of experts: ``gate_up_proj`` (experts, 2·hidden, in) and ``down_proj`` (experts, in, hidden)."""
    up, down = (module._parameters.get(param) for param in ("gate_up_proj", "down_proj"))
    if up is None or down is None or up.dim() != 3 or down.dim() != 3:
        return
    experts, rows, columns = up.shape
    if down.shape != (experts, columns, rows // 2) or torch.is_complex(up):
        reason = f"{path}: its experts are not stored as (experts, out, in) with the gate's rows first"
        flat = up.shape[0] * up.shape[1]
        yield Projection(path, "gate_up_proj", (0, flat), Role.OTHER, up.shape[2], flat), reason
        return
    half = rows // 2
    for e in range(experts):
        for role, start in ((Role.GATE, e * rows), (Role.UP, e * rows + half)):
            block = f"{e}.{role.value}"
            yield Projection(path, "gate_up_proj", (start, start + half), role, columns, half, block), ""
    for e in range(experts):
        rows_of_one = (e * columns, (e + 1) * columns)
        yield Projection(path, "down_proj", rows_of_one, Role.DOWN, half, columns, f"{e}.down"), ""
