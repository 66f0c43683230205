"""One pass over the user's batches measures what a policy needs: covariance, sensitivity, gradient.

It runs the model as it is and leaves it so: mode, random state, gradients and hooks are as before, also
after an error. What it measures is data of `statistics`; what that is for, it does not know.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.batches import Loss, Mask, attention_mask, model_device, output_loss, scalar_loss, to_device
from lowrank.projections import Projection, Role, is_linear, read_by_weight
from lowrank.statistics import ProjectionStatistics

KINDS = frozenset({"covariance", "sensitivity", "gradient"})


def calibrate(
    model: nn.Module,
    projections: Sequence[Projection],
    needs: Collection[str],
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    mask: Mask | None = None,
    progress: bool = True,
) -> dict[Projection, ProjectionStatistics]:
    """Statistics of ``projections`` over ``batches``, each of which is used once.

    Covariance is ``C = mean over examples of (X − x̄)ᵀ(X − x̄)``, ``(in, in)``, X an example's ``(tokens,
    in)`` input without padding; an input without a token dimension is centred over its batch. Sensitivity
    is ``mean over examples of mean |W ⊙ ∇W L|`` where L is the batch's mean loss counted for that example
    alone; the gradient is the mean over examples of ∇W L. A tensor that no Linear holds is measured a batch
    at a time, which is the same for batches of one. (TLoRA, 2604.18124, section 3.)

    Everything is accumulated in fp32 (fp64 for fp64 models) on the projection's device. The model is in
    evaluation mode for the while. Peak extra memory: one ``(in, in)`` matrix for each distinct input, the
    inputs of one batch while gradients are asked for, and one ``(out, in)`` gradient at a time.

    Args:
        needs: of {"covariance", "sensitivity", "gradient"}.
        loss: ``loss(model, batch) -> scalar``; by default the ``.loss`` of the model's output.
        mask: ``mask(batch) -> (batch, tokens)`` bool, True where a token counts; by default the batch's
            ``attention_mask``, where it has one.

    Raises:
        ValueError: no batch, a loss that is not a finite scalar, or NaN/Inf in the input of a projection.
    """
    unknown = set(needs) - KINDS
    if unknown:
        raise ValueError(f"unknown statistics {sorted(unknown)}; there are {sorted(KINDS)}")
    if not needs:
        return {}
    session = _Session(model, projections, frozenset(needs))
    loss = loss or output_loss
    device = model_device(model)
    with _undisturbed(model), session:
        for number, batch in enumerate(
            tqdm(batches, "calibrating", disable=not progress, delay=2, leave=False)
        ):
            batch = to_device(batch, device)
            session.begin(number, batch, mask)
            with torch.set_grad_enabled(session.needs_backward):
                value = scalar_loss(loss, model, batch)
                if not torch.isfinite(value):
                    raise ValueError(f"the loss of calibration batch {number} is not finite: {value.item()}")
                if session.needs_backward and value.requires_grad:
                    session.in_backward = True
                    value.backward()
            session.end()
    if not session.batches:
        raise ValueError(
            "calibration needs batches, and got none: the loader is empty or was consumed before"
        )
    return session.statistics()


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and frozen parameters inside; modes, flags and random state as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    learning = [p for p in model.parameters() if p.requires_grad]
    fast = torch.backends.mha.get_fastpath_enabled()
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    try:
        with torch.random.fork_rng(devices=[d for d in devices if d is not None]):
            model.eval()
            torch.backends.mha.set_fastpath_enabled(False)  # it reads weights past every hook
            for parameter in learning:
                parameter.requires_grad_(False)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for parameter in learning:
            parameter.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode


@dataclass
class _Measured:
    """What one projection has shown so far; ``input`` is the key of its covariance among the session's."""

    sensitivity: float = 0.0
    gradient: Tensor | None = None
    input: str = ""


@dataclass
class _Input:
    """A running covariance, and which input tensor it has seen in the present batch."""

    total: Tensor
    seen: list[tuple[Any, ...]] = field(default_factory=list)


class _Session:
    """Hooks on the modules that hold the projections, for as long as it is entered."""

    def __init__(self, model: nn.Module, projections: Sequence[Projection], needs: frozenset[str]) -> None:
        self.model = model
        self.needs = needs
        self.needs_backward = bool(needs & {"sensitivity", "gradient"})
        self.measured = {p: _Measured() for p in projections}
        self.inputs: dict[str, _Input] = {}
        self.leaders: dict[str, str] = {}
        self.examples = self.batches = 0
        self.in_backward = False
        self.masks: dict[str, Tensor | None] = {}
        self.by_module: dict[str, list[Projection]] = {}
        for p in projections:
            self.by_module.setdefault(p.module, []).append(p)
        self.encoder_decoder = any(path.split(".")[-1] == "encoder" for path, _ in model.named_modules())
        self.stack = ExitStack()

    def __enter__(self) -> _Session:
        with ExitStack() as stack:
            for path, held in self.by_module.items():
                module = self.model.get_submodule(path)
                above = self.model.get_submodule(path.rpartition(".")[0])
                if isinstance(module, nn.MultiheadAttention):
                    self._watch_attention(stack, path, module, held)
                elif read_by_weight(self.model, path) and isinstance(above, nn.MultiheadAttention):
                    self._watch_attention_output(stack, path, above, held)
                elif is_linear(module):
                    self._watch_linear(stack, path, module, held)
                else:
                    raise ValueError(
                        f"{held[0].name} cannot be calibrated: its module does not show what enters it; "
                        f"choose an initializer and an allocator that need no statistics, or leave it out"
                    )
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    def begin(self, number: int, batch: Any, mask: Mask | None) -> None:
        self.in_backward = False
        self.number = number
        self.masks = {"tokens": (mask or attention_mask)(batch), "decoder": None}
        if mask is None and isinstance(batch, Mapping) and "decoder_attention_mask" in batch:
            self.masks["decoder"] = batch["decoder_attention_mask"].bool()
        tokens = self.masks["tokens"]
        self.batch_size = 0 if tokens is None else len(tokens)
        for each in self.inputs.values():
            each.seen.clear()

    def end(self) -> None:
        self.batches += 1
        self.examples += self.batch_size

    def statistics(self) -> dict[Projection, ProjectionStatistics]:
        examples = max(self.examples, 1)
        covariances = {name: each.total / examples for name, each in self.inputs.items()}
        return {
            p: ProjectionStatistics(
                covariance=self._covariance(p, m, covariances) if "covariance" in self.needs else None,
                sensitivity=m.sensitivity / examples if "sensitivity" in self.needs else None,
                gradient=self._gradient(p, m, examples) if "gradient" in self.needs else None,
            )
            for p, m in self.measured.items()
        }

    def _covariance(self, p: Projection, m: _Measured, covariances: Mapping[str, Tensor]) -> Tensor:
        if m.input not in covariances:
            raise ValueError(f"{p.name} was never called on the calibration batches, so its input is unknown")
        return covariances[m.input]

    def _gradient(self, p: Projection, m: _Measured, examples: int) -> Tensor:
        if m.gradient is not None:
            return m.gradient / examples
        weight = p.weight(self.model)
        return torch.zeros(p.shape, dtype=_wide(weight), device=weight.device)

    # -- linear layers ------------------------------------------------------------------------------

    def _watch_linear(
        self, stack: ExitStack, path: str, module: nn.Module, held: Sequence[Projection]
    ) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            x = args[0]
            self._see_input(path, held, x)
            return self._see_output(path, held, x, output)

        handle = module.register_forward_hook(hook)
        stack.callback(handle.remove)

    def _see_input(self, path: str, held: Sequence[Projection], x: Tensor) -> None:
        self.batch_size = self.batch_size or len(x)
        if "covariance" not in self.needs or self.in_backward:  # recomputed by gradient checkpointing
            return
        key = (x.data_ptr(), x.storage_offset(), x.shape, x.stride(), x._version, x.dtype)
        first = all(not self.measured[p].input for p in held)
        leader = self.leaders.get(path)
        if first:
            same = [name for name, each in self.inputs.items() if key in each.seen and _siblings(name, path)]
            leader = self.leaders[path] = same[0] if same else path
            for p in held:
                self.measured[p].input = leader
        assert leader is not None
        if leader == path:
            self._add_covariance(path, x, key)
        elif key not in self.inputs[leader].seen:
            raise ValueError(
                f"{path} and {leader} read the same input at first, but not in batch {self.number}: their "
                f"covariance cannot be shared; calibrate them apart, with exclude="
            )

    def _add_covariance(self, path: str, x: Tensor, key: tuple[Any, ...]) -> None:
        width = x.shape[-1]
        if path not in self.inputs:
            total = torch.zeros(width, width, dtype=_wide(x), device=x.device)
            self.inputs[path] = _Input(total)
        running = self.inputs[path]
        running.seen.append(key)
        before = running.total.diagonal().sum()
        for tokens in self._tokens(path, x.detach()):
            centred = tokens - tokens.mean(0, keepdim=True)
            running.total.addmm_(centred.T, centred)
        if not torch.isfinite(running.total.diagonal().sum() - before):
            raise ValueError(f"NaN or Inf in the input of {path} in calibration batch {self.number}")

    def _tokens(self, path: str, x: Tensor) -> Iterator[Tensor]:
        """The inputs of each example, ``(tokens, in)`` in fp32 or better, without padding."""
        x, mask = self._by_example(path, x)
        for i, example in enumerate(x):
            tokens = example.to(_wide(x))
            if mask is not None:
                tokens = tokens[mask[i]]
            if len(tokens):
                yield tokens

    def _by_example(self, path: str, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x as ``(examples, tokens, features)``, and the mask of its tokens where one fits."""
        if self._tokens_first(x):
            x = x.transpose(0, 1)
        mask = self._mask(path)
        if mask is not None and mask.numel() == x.shape[:-1].numel():
            return x.reshape(*mask.shape, x.shape[-1]), mask
        if x.dim() < 3:
            return x.reshape(1, -1, x.shape[-1]), None
        return x.reshape(x.shape[0], -1, x.shape[-1]), None

    def _tokens_first(self, x: Tensor) -> bool:
        return x.dim() == 3 and x.shape[1] == self.batch_size != x.shape[0]

    def _mask(self, path: str) -> Tensor | None:
        parts = path.split(".")
        if self.encoder_decoder and "decoder" in parts:
            crosses = any(
                "cross" in part.lower() or part in ("EncDecAttention", "encoder_attn") for part in parts
            )
            keys = all(p.role in (Role.KEY, Role.VALUE) for p in self.by_module[path])
            return self.masks["tokens"] if crosses and keys else self.masks["decoder"]
        return self.masks["tokens"]

    def _see_output(self, path: str, held: Sequence[Projection], x: Tensor, output: Tensor) -> Tensor | None:
        if not self.needs_backward or not torch.is_grad_enabled():
            return None
        changed = None
        if not output.requires_grad:
            # The graph starts here: a zero that requires grad, and not the output itself, so that code
            # which then writes into the output still may.
            anchor = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            output = changed = output + anchor
        x = x.detach()
        output.register_hook(lambda dy: self._see_gradient(path, held, x, dy.detach()))
        return changed

    @torch.no_grad()
    def _see_gradient(self, path: str, held: Sequence[Projection], x: Tensor, dy: Tensor) -> None:
        if self._tokens_first(x):
            dy = dy.transpose(0, 1)
        x, _ = self._by_example(path, x)
        dy = dy.reshape(*x.shape[:-1], dy.shape[-1])
        examples = self.batch_size
        for p in held:
            measured = self.measured[p]
            weight = p.weight(self.model).to(_wide(x))
            for inputs, outputs in zip(x, dy[..., p.rows[0] : p.rows[1]], strict=True):
                inputs, outputs = inputs.to(weight.dtype), outputs.to(weight.dtype)
                if len(x) == 1 and len(inputs) == examples:
                    # An example a row: |dy xᵀ| is |dy||x|ᵀ, so none of their gradients is needed.
                    apart = torch.einsum("no,oi,ni->", outputs.abs(), weight.abs(), inputs.abs())
                    size = float(apart) * examples / weight.numel()
                    gradient = outputs.T @ inputs if "gradient" in self.needs else None
                else:
                    gradient = outputs.T @ inputs
                    size = float((weight * gradient).abs().mean()) * examples
                measured.sensitivity += size
                if gradient is not None and "gradient" in self.needs:
                    scaled = gradient * examples
                    measured.gradient = (
                        scaled if measured.gradient is None else measured.gradient.add_(scaled)
                    )

    # -- attention, whose weights no Linear holds ----------------------------------------------------

    def _watch_attention(
        self, stack: ExitStack, path: str, module: nn.MultiheadAttention, held: Sequence[Projection]
    ) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            self.batch_size = self.batch_size or named["query"].shape[0 if module.batch_first else 1]
            for p in held:
                self._see_block_input(p, named[p.role.value])

        handle = module.register_forward_pre_hook(before, with_kwargs=True)
        stack.callback(handle.remove)
        if self.needs_backward:
            for param in {p.param for p in held}:
                self._watch_weight(stack, module, param, [p for p in held if p.param == param])

    def _watch_attention_output(
        self, stack: ExitStack, path: str, attention: nn.MultiheadAttention, held: Sequence[Projection]
    ) -> None:
        """The output projection is read by its weight: with the identity there, its input comes out."""
        original, own = attention.forward, attention.out_proj._parameters
        weight, bias = own["weight"], own["bias"]
        assert weight is not None

        def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
            own["weight"], own["bias"] = nn.Parameter(identity, requires_grad=False), None
            try:
                x, attention_weights = original(*args, **kwargs)
            finally:
                own["weight"], own["bias"] = weight, bias
            y = nn.functional.linear(x, weight, bias)
            self._see_input(path, held, x)
            seen = self._see_output(path, held, x, y)
            return y if seen is None else seen, attention_weights

        attention.__dict__["forward"] = forward
        stack.callback(attention.__dict__.pop, "forward")

    def _see_block_input(self, p: Projection, x: Tensor) -> None:
        if "covariance" not in self.needs or self.in_backward:
            return
        key = (x.data_ptr(), x.storage_offset(), x.shape, x.stride(), x._version, x.dtype)
        measured = self.measured[p]
        if not measured.input:
            same = [n for n, each in self.inputs.items() if key in each.seen and n.startswith(p.module + "[")]
            measured.input = same[0] if same else f"{p.module}[{p.role}]"
        if measured.input == f"{p.module}[{p.role}]":
            self._add_covariance(measured.input, x, key)

    def _watch_weight(
        self, stack: ExitStack, module: nn.Module, param: str, held: Sequence[Projection]
    ) -> None:
        """Puts a copy of the parameter that requires grad in its place; its gradient is reduced at once."""
        original = module._parameters[param]
        assert original is not None
        stand_in = nn.Parameter(original.detach(), requires_grad=True)

        @torch.no_grad()
        def reduce(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            rows = gradient.reshape(-1, gradient.shape[-1])
            for p in held:
                weight = p.weight(self.model)
                own = rows[p.rows[0] : p.rows[1]].to(_wide(weight)) * self.batch_size
                measured = self.measured[p]
                measured.sensitivity += float((weight.to(own.dtype) * own).abs().mean())
                if "gradient" in self.needs:
                    measured.gradient = (
                        own.clone() if measured.gradient is None else measured.gradient.add_(own)
                    )

        stand_in.register_post_accumulate_grad_hook(reduce)
        module._parameters[param] = stand_in
        stack.callback(module._parameters.__setitem__, param, original)


def _siblings(path: str, other: str) -> bool:
    return path.rpartition(".")[0] == other.rpartition(".")[0]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
