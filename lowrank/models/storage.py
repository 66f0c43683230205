"""How a module stores a weight: as rows, transposed, packed, in fp8; its logical shape, and its numbers.

The one place that knows. It reads modules and changes nothing; what a weight is for, `projections` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from lowrank.linalg.rows import Rows, shifted, take
from lowrank.models.experts import Stack, stack_of
from lowrank.models.held import held_weight
from lowrank.models.kinds import kind_of
from lowrank.models.packing import packed
from lowrank.models.trials import try_layer
from lowrank.processes import whole

FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)


def as_rows(module: nn.Module, param: str) -> Tensor:
    """The tensor ``param`` of ``module``, as ``(rows, in)``, whatever the layout it is stored in.

    A sharded one is gathered, which every process must ask for.

    Raises ValueError where it is quantized in a way that is not known.
    """
    stored = module._parameters.get(param)
    tensor = _dequantized(module, param, whole(getattr(module, param) if stored is None else stored))
    kind = kind_of(module)
    if kind is not None:
        return kind.rows(tensor)
    stack = stack_of(module, param)
    tensor = tensor if stack is None else stack.matrices(tensor)
    if tensor.dim() == 3:
        tensor = tensor.mT if stack is not None and stack.transposed else tensor
        return tensor.reshape(-1, tensor.shape[-1])
    return tensor.T if stored_transposed(module) else tensor


def rows_of(module: nn.Module, param: str, rows: Rows) -> Tensor:
    """Some rows of `as_rows`: a view, or a copy where they are interleaved or quantized."""
    stored, stack = module._parameters.get(param), stack_of(module, param)
    if stored is None or stack is None or packed(stored):
        return take(as_rows(module, param), rows)
    expert = rows[0] // stack.out
    own = one_expert(whole(stored).detach(), stack, expert)
    return take(own, shifted(rows, -expert * stack.out))


def one_expert(stored: Tensor, stack: Stack, expert: int) -> Tensor:
    """``(out, in)`` of one expert, a view of ``stored``."""
    own = stack.matrices(stored)[expert]
    return own.T if stack.transposed else own


def quantized(stored: Tensor) -> bool:
    """Is the parameter more than its numbers, as tensor subclasses may be, or `packed`?"""
    return type(stored) is not nn.Parameter or packed(stored)


def weight_shape(module: nn.Module, param: str) -> tuple[int, int]:
    """``(rows, in)`` of a weight as `as_rows` would give it, also where it is stored packed."""
    if param == "weight" and isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    tensor = getattr(module, param)
    kind = kind_of(module)
    if kind is not None:
        rows, columns = kind.rows(tensor).shape
        return rows, columns
    if param == "weight" and stored_transposed(module):
        return tensor.shape[1], tensor.shape[0]
    if (stack := stack_of(module, param)) is not None:
        return stack.experts * stack.out, stack.columns
    return tensor.numel() // tensor.shape[-1], tensor.shape[-1]


def stored_transposed(module: nn.Module) -> bool:
    """Does ``module`` keep its weight as ``(in, out)`` and multiply by it, as a Conv1D does?

    The shape tells it, and of a square weight a trial, where the layer has a forward of its own.
    """
    shape = declared_shape(module)
    if shape is None or type(module).forward is nn.Linear.forward:
        return False
    held = held_weight(module)
    stored = () if held is None else tuple(held.shape)
    if stored != shape[::-1]:
        return False
    if stored != shape:
        return True
    tried = try_layer(module, *shape).transposed
    return hasattr(module, "nf") if tried is None else tried


def declared_shape(module: nn.Module) -> tuple[int, int] | None:
    """``(out, in)`` as a module with a weight declares it; None where it declares nothing."""
    weight = held_weight(module)
    if weight is None:
        return None
    out, columns = getattr(module, "out_features", None), getattr(module, "in_features", None)
    nf = getattr(module, "nf", None)
    if out is None and columns is None and weight.dim() == 2 and nf in weight.shape:  # a Conv1D
        out, columns = nf, weight.shape[0] if weight.shape[1] == nf else weight.shape[1]
    if not isinstance(out, int) or not isinstance(columns, int):
        return None
    return out, columns


def is_linear(module: nn.Module) -> bool:
    """A Linear, a subclass of one, or a module that declares itself as ``(out_features, in_features)``."""
    if isinstance(module, nn.Linear):
        return True
    shape = declared_shape(module)
    if shape is None:
        return False
    held = held_weight(module)
    return held is not None and tuple(held.shape) in (shape, shape[::-1])


def is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


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


@contextmanager
def kept_unpacked(model: nn.Module) -> Iterator[None]:
    """Inside, calls in evaluation mode do not make bitsandbytes pack 4-bit weights anew for this CPU.

    What is packed so passes no gradient, and stays packed.
    """
    flag = "support_avx512bf16_for_cpu"
    layers = [module for module in model.modules() if getattr(module, flag, False)]
    before = [getattr(layer, flag) for layer in layers]
    try:
        for layer in layers:
            setattr(layer, flag, False)
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            setattr(layer, flag, value)
