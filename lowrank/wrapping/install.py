"""Puts ready-made adapters into a model, and takes them out again. It decides nothing and checks nothing.

A model that holds adapters already is meanwhile brought back to its base: planning, calibration and
initialization then meet nothing but the base, whatever hangs beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowrank.adapters import Adaptation
from lowrank.layers.acting import Acting
from lowrank.layers.adapter import Adapter
from lowrank.layers.bases import master_dtype
from lowrank.layers.copied import renew_copies
from lowrank.layers.expert_stack import Layout, trained_within
from lowrank.layers.layer import AdaptedLayer
from lowrank.layers.offsets import TokenOffsets
from lowrank.layers.trained import TrainedModule
from lowrank.layers.tree import hung_by_name, hung_modules, original, without_copies
from lowrank.layers.weight import AdaptedWeight, WeightAdapters, adapt_weights, release_weights
from lowrank.layers.wrapped import adapted_layer
from lowrank.models.experts import stacks_of
from lowrank.models.kinds import kind_of
from lowrank.models.projections import Projection, on_weight
from lowrank.models.storage import stored_transposed, weight_shape
from lowrank.models.tokens import TokenRows, sharing
from lowrank.plan import Plan
from lowrank.wrapping.exchange import Exchange
from lowrank.wrapping.pretrained import attach, detach
from lowrank.wrapping.running import hold_statistics, release_statistics
from lowrank.wrapping.unsaved import samples_of_buffers
from lowrank.wrapping.unused import warn_at_first_backward


def make_adapter(
    model: nn.Module, p: Projection, A: Tensor, B: Tensor, scaling: float, frozen: Iterable[str] = ()
) -> Adapter:
    """An adapter for ``p`` with the full factors A, B, beside its weight."""
    weight = model.get_submodule(p.module)._parameters[p.param]
    assert weight is not None
    kind = kind_of(model.get_submodule(p.module))
    if kind is not None:
        A = kind.start(model.get_submodule(p.module), A)
    adapter = Adapter(A, B, scaling, rows=p.rows, frozen=frozenset(frozen), dtype=master_dtype(weight.dtype))
    return adapter.to(device_beside(model, p))


def device_beside(model: nn.Module, p: Projection) -> torch.device:
    """Where an adapter of ``p`` belongs: where its weight is, or, from the meta device, where it will be."""
    module = model.get_submodule(p.module)
    weight = module._parameters[p.param]
    assert weight is not None
    return _device(module, weight)


def _device(module: nn.Module, weight: Tensor) -> torch.device:
    if not weight.is_meta:
        return weight.device
    # accelerate brings an offloaded weight to this device for each call.
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return torch.device("cpu" if device is None else device)


class Fittings:
    """What hangs beside the base's modules, by the module that it belongs to. See `bare`."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.layers: dict[nn.Module, AdaptedLayer] = {}
        self.trained: dict[nn.Module, TrainedModule] = {}
        self.weights: dict[nn.Module, WeightAdapters] = {}
        self.installed: str | None = None

    @property
    def state(self) -> Adaptation | None:
        return self.root.__dict__.get("_lowrank")

    def take_off(self) -> None:
        """Brings the root back to its base."""
        detach(self.root)
        release_statistics(self.root)
        replacements: dict[nn.Module, nn.Module] = {}
        for hung in hung_modules(self.root):
            layer, base = without_copies(hung), original(hung)
            if isinstance(layer, AdaptedLayer):
                self.layers[base] = layer
            elif isinstance(layer, AdaptedWeight):
                self.weights[base] = release_weights(layer)
            if isinstance(hung, TrainedModule):
                self.trained[base] = hung
            if hung is not base:
                replacements[hung] = base
        _exchange(self.root, replacements)

    def put_on(self) -> None:
        """Undoes `take_off`, with what was changed here in between."""
        replacements: dict[nn.Module, nn.Module] = dict(self.layers)
        for module, trained in self.trained.items():
            trained.base = self.layers.get(module, module)
            replacements[module] = trained
        _exchange(self.root, replacements)
        for module, adapters in self.weights.items():
            adapt_weights(module, adapters)
        if self.state is not None:
            attach(self.root, bare)
            hold_statistics(self.root)
        renew_copies()

    def install(
        self,
        name: str,
        plan: Plan,
        adapters: dict[Projection, Adapter],
        offsets: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Hangs up the adapters of ``name``, and copies of the modules that it trains. The first one acts.

        ``adapters`` is empty afterwards: those of experts are copied into stacks, and let go one module after
        the other. ``offsets`` are those of the rows that it trains, by module path; zero where they are not
        given.
        """
        root, state = self.root, self.state
        if state is None:
            required_grad = frozenset(path for path, p in root.named_parameters() if p.requires_grad)
            root.requires_grad_(False)
            state = Adaptation({}, Acting((name,)), required_grad, samples_of_buffers(root))
            root.__dict__["_lowrank"] = state
        state.plans[name], self.installed = plan, name
        layers: dict[nn.Module, list[Adapter]] = {}
        weights: dict[nn.Module, dict[str, list[Adapter]]] = {}
        shared = {(root.get_submodule(p.module), p.param) for p in adapters if p.shared > 1}
        for p in list(adapters):
            module, adapter = root.get_submodule(p.module), adapters.pop(p)
            if on_weight(root, p):
                weights.setdefault(module, {}).setdefault(p.param, []).append(adapter)
                continue
            layers.setdefault(module, []).append(adapter)
        tokens = self._tokens(plan.rows, offsets or {})
        for module in {**layers, **tokens}:
            if module not in self.layers:
                rows, columns = weight_shape(module, "weight")
                self.layers[module] = adapted_layer(
                    module,
                    in_features=columns,
                    out_features=rows,
                    acting=state.acting,
                    transposed=stored_transposed(module),
                )
            held, moved = layers.get(module, []), tokens.get(module)
            self.layers[module].put(name, held, plan.dropout, moved)
        adapted = list(weights)
        for module in adapted:
            by_param = weights.pop(module)
            layouts = {
                param: Layout(stack.experts, stack.out, stack.transposed, (module, param) in shared)
                for param, stack in stacks_of(module).items()
            }
            self.weights.setdefault(module, WeightAdapters(state.acting)).put(name, by_param, layouts)
        for module in map(root.get_submodule, plan.train):
            if module in self.trained:
                self.trained[module].put(name, module)
            else:
                self.trained[module] = TrainedModule(module, name, state.acting)
        hung = [self.layers[module].adapters[name] for module in {**layers, **tokens}]
        hung += [self.weights[module][name] for module in adapted]
        warn_at_first_backward(root, name, dict.fromkeys(p for held in hung for p in trained_within(held)))

    def _tokens(
        self, rows: Iterable[TokenRows], offsets: Mapping[str, Tensor]
    ) -> dict[nn.Module, TokenOffsets]:
        """The rows that train, by each module that has their weight."""
        found: dict[nn.Module, TokenOffsets] = {}
        for each in rows:
            module = self.root.get_submodule(each.module)
            weight = module._parameters["weight"]
            assert weight is not None
            start = offsets.get(each.module)
            if start is None:
                where = _device(module, weight)
                start = torch.zeros(len(each.ids), each.width, dtype=master_dtype(weight.dtype), device=where)
            elif not start.is_meta:
                start = start.to(_device(module, weight))
            found |= dict.fromkeys(sharing(self.root, module), TokenOffsets(each.ids, start))
        return found

    def load_copies(self, name: str, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Gives the copies of ``name`` the values in ``states``, by path."""
        for path, tensors in states.items():
            self.trained[self.root.get_submodule(path)].load_copy(tensors, name)

    def drop(self, names: Iterable[str]) -> None:
        """Takes the adapters of ``names`` away; with the last ones goes what was noted of the base."""
        state = self.state
        assert state is not None
        for name in list(names):
            del state.plans[name]
            for held in (self.layers, self.weights, self.trained):
                for module, fitting in list(held.items()):
                    own = hung_by_name(fitting)
                    own.pop(name, None)
                    if not own:
                        del held[module]
        acting = state.acting
        acting.choose(
            [name for name in acting.names if name in state.plans],
            {name: weight for name, weight in acting.weights.items() if name in state.plans},
        )
        if not state.plans:
            for path, parameter in self.root.named_parameters():
                parameter.requires_grad_(path in state.required_grad)
            del self.root.__dict__["_lowrank"]


@contextmanager
def bare(root: nn.Module) -> Iterator[Fittings]:
    """Inside, ``root`` is its base, and what hung there is in `Fittings`; afterwards it hangs there again.

    After an error too, and then without what was installed.
    """
    fittings = Fittings(root)
    fittings.take_off()
    try:
        yield fittings
    except BaseException:
        if fittings.installed is not None:
            fittings.drop([fittings.installed])
        raise
    finally:
        fittings.put_on()


def _exchange(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replaces modules wherever ``model`` holds them, so that a shared one stays shared."""
    if not replacements:
        return
    exchange = Exchange(replacements)
    for parent in map(original, hung_modules(model)):
        if parent not in replacements:
            exchange.inside(vars(parent))
        elif any(child in replacements for child in parent.modules() if child is not parent):
            # What it holds of itself it keeps.
            others = {old: new for old, new in replacements.items() if old is not parent}
            Exchange(others).inside(vars(parent))
