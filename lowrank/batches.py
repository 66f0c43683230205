"""What calibration and training both ask of a user's batches: loss, mask, counts, the move to a device.

A batch is whatever the user's loss understands; only the defaults here want a mapping. No adapter is known.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Any], Tensor]
"""``loss(model, batch)`` runs the model and gives a scalar."""

Mask = Callable[[Any], Tensor]
"""``mask(batch)`` says which tokens count: (batch, tokens), bool."""

IGNORED_LABEL = -100  # cross_entropy's ignore_index


def output_loss(model: nn.Module, batch: Any) -> Tensor:
    """The default loss: ``model(**batch).loss``, for mapping batches that hold labels.

    Raises ValueError where the batch is no mapping or the output has no loss.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"the default loss calls model(**batch): expected a mapping, got {type(batch).__name__}; "
            "pass loss=, a function (model, batch) -> scalar"
        )
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(
            f"{type(model).__name__} returned no loss for a batch with keys {sorted(map(str, batch))}; "
            "add labels to the batch, or pass loss=, a function (model, batch) -> scalar"
        )
    return loss


def scalar_loss(loss: Loss, model: nn.Module, batch: Any) -> Tensor:
    """``loss(model, batch)``; ValueError where that is no scalar tensor. It may still be NaN or infinite."""
    value = loss(model, batch)
    if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
        tensor = isinstance(value, Tensor)
        got = f"{value.dtype} of shape {tuple(value.shape)}" if tensor else type(value).__name__
        raise ValueError(f"expected a scalar floating-point loss, such as a mean, got {got}")
    return value


def attention_mask(batch: Any) -> Tensor | None:
    """Which tokens are real, (batch, tokens) bool, from a mapping batch's ``attention_mask``; None where it
    has none.

    Raises ValueError for a mask of another shape, which cannot say which tokens are padding.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask is {shape} but expected (batch, tokens), to tell padding; "
            "pass mask=, a function batch -> (batch, tokens) bool"
        )
    return mask > 0


def to_device(batch: Any, device: torch.device) -> Any:
    """The same batch with its tensors on ``device``; the one given is left as it was.

    Mappings (a tokenizer's BatchEncoding too), lists, tuples and named tuples are walked and keep their type.
    Anything else moves by its own ``.to``; what has none, dataclasses included, is passed on as it is.

    A copy to CUDA is not waited for: tensors in pinned memory must not be overwritten right after.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=device.type == "cuda")
    if isinstance(batch, Mapping):
        moved = {key: to_device(value, device) for key, value in batch.items()}
        if not isinstance(batch, MutableMapping):
            return moved
        same = copy.copy(batch)
        same.update(moved)
        return same
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if type(batch) in (list, tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def count_tokens(batch: Any) -> int:
    """How many tokens a batch has, padding apart; examples, where it has no tokens. For reports of speed."""
    if isinstance(batch, Mapping):
        mask, ids, embedded = (batch.get(key) for key in ("attention_mask", "input_ids", "inputs_embeds"))
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return int((mask > 0).sum())
        if isinstance(ids, Tensor):
            return ids.numel()
        if isinstance(embedded, Tensor):
            return embedded.shape[:-1].numel()
    return count_examples(batch)


# Tensors whose leading size is the number of examples, most telling first. Others may lead with something
# else: position ids of shape (3, batch, tokens), patches of all images in one row, boundaries of a packing.
BY_EXAMPLE = (
    "input_ids",
    "inputs_embeds",
    "input_features",
    "input_values",
    "pixel_values",
    "attention_mask",
    "labels",
)


def count_examples(batch: Any) -> int:
    """How many examples a batch has: the leading size of a tensor; 1 where it has none.

    In a mapping the tensor is the first of `BY_EXAMPLE` that is there; else, as in other batches, the first.
    """
    named = [batch.get(key) for key in BY_EXAMPLE] if isinstance(batch, Mapping) else []
    found = (tensor for tensor in [*named, *_tensors(batch)] if isinstance(tensor, Tensor) and tensor.ndim)
    return next((len(tensor) for tensor in found), 1)


def count_targets(batch: Any) -> int:
    """How many terms a mean loss averages over, as far as the batch alone says.

    That is: integer labels, of any shape, that are not ignored (-100); without such labels, examples. A loss
    that shifts the labels, as a causal language model's, counts fewer.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        return int((labels != IGNORED_LABEL).sum())
    return count_examples(batch)


def count_terms(model: nn.Module, batch: Any) -> int:
    """`count_targets`, without the first label of each row where ``model`` is one of transformers' causal
    language models, by the ``loss_type`` that they carry: their loss shifts the labels."""
    kind, config = getattr(model, "loss_type", None), getattr(model, "config", None)
    decoder = not getattr(config, "is_encoder_decoder", False)
    if kind == "ForCausalLM" or (kind == "ForConditionalGeneration" and decoder):
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if isinstance(labels, Tensor) and labels.ndim:
            return int((labels[..., 1:] != IGNORED_LABEL).sum())
    return count_targets(batch)


def model_device(model: nn.Module) -> torch.device:
    """Where a model's inputs go: the device of its first parameter or buffer; the CPU where it has none.

    What accelerate has offloaded is on the meta device until it is called: the device then is that which its
    hooks execute on, else that of the first tensor that is there.
    """
    first = next(_stored(model), None)
    if first is None:
        return torch.device("cpu")
    if not first.is_meta:
        return first.device
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    executed = next(chain.from_iterable(map(_execution_devices, hooks)), None)
    return executed or next((tensor.device for tensor in _stored(model) if not tensor.is_meta), first.device)


def in_float16(model: nn.Module) -> bool:
    """Is anything computed in float16, whose smallest numbers gradients fall below?

    A quantized layer may compute in it whatever it stores; it says so by its ``compute_dtype``. Autocast to
    float16 around the call counts too.
    """
    kind = model_device(model).type
    return (
        any(tensor.dtype is torch.float16 for tensor in _stored(model))
        or any(getattr(module, "compute_dtype", None) is torch.float16 for module in model.modules())
        or (
            kind != "meta"
            and torch.is_autocast_enabled(kind)
            and torch.get_autocast_dtype(kind) is torch.float16
        )
    )


def _stored(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())


def _execution_devices(hook: Any) -> Iterator[torch.device]:
    """Where a hook of accelerate, or the hooks in it, bring a module's tensors for a call."""
    for each in getattr(hook, "hooks", ()):
        yield from _execution_devices(each)
    device = getattr(hook, "execution_device", None)
    if device is not None:
        yield torch.device(device)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        yield from chain.from_iterable(map(_tensors, batch.values()))
    elif isinstance(batch, list | tuple):
        yield from chain.from_iterable(map(_tensors, batch))
