"""How PEFT keeps the adapters of a tensor of experts (``target_parameters``): names, shapes and order.

A is ``(experts·rank, in)``, expert by expert, and B ``(out, rank·experts)``, rank by rank. It knows no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor, nn

from lowrank.files import FLOATS, AdapterError, Entry
from lowrank.layers.tree import base_modules, without_copies
from lowrank.linalg.rows import Rows, shifted
from lowrank.models.experts import Stack, stacks_of
from lowrank.models.projections import Projection, Role
from lowrank.peft_format.config import PeftConfig
from lowrank.peft_format.pairs import Pair, stacked

VERSION = "0.19.0"  # the first PEFT that has this layout


@dataclass(frozen=True)
class Experts:
    """A tensor of experts where PEFT adapts it.

    Args:
        key: what the names of its factors begin with. PEFT nests one wrapper for each parameter of a module,
            the first one innermost: ``experts.base_layer`` is gate_up_proj, ``experts`` down_proj.
        marked: the module says ``is_transposed``. Without that PEFT takes what is stored for (out, in).
    """

    key: str
    stack: Stack
    marked: bool

    def turned(self, old: bool) -> bool:
        """Does PEFT take in for out? PEFT before 0.19 (``old``) took what is stored for (in, out)."""
        return self.stack.transposed == (not self.marked and not old)

    def shapes(self, rank: int, old: bool) -> dict[str, tuple[int, ...]]:
        """The shapes of both factors in the file."""
        width, height = self.stack.columns, self.stack.out
        if self.turned(old):
            width, height = height, width
        return {"A": (self.stack.experts * rank, width), "B": (height, rank * self.stack.experts)}

    def written(self, pair: Pair) -> dict[str, Tensor]:
        """Both factors by the ends of their names, of a pair with A ``(experts, rank, in)``."""
        A, B = (pair.B.mT, pair.A.mT) if self.turned(False) else (pair.A, pair.B)
        return {
            "lora_A.weight": rearrange(A, "e r i -> (e r) i").contiguous(),
            "lora_B.weight": rearrange(B, "e o r -> o (r e)").contiguous(),
        }

    def read(self, pair: Pair, old: bool) -> Pair:
        """The pair with A ``(experts, rank, in)`` of one as it is in the file."""
        A = rearrange(pair.A, "(e r) i -> e r i", e=self.stack.experts)
        B = rearrange(pair.B, "o (r e) -> e o r", e=self.stack.experts)
        return Pair(B.mT, A.mT, pair.scaling) if self.turned(old) else Pair(A, B, pair.scaling)


def parameters(model: nn.Module, config: PeftConfig) -> dict[str, str]:
    """The parameters that PEFT would adapt, each with what the names of its factors begin with."""
    found: dict[str, str] = {}
    if not config.parameters:
        return found
    for path, hung in base_modules(model).items():
        held = without_copies(hung)._parameters.items()
        names = [name for name, p in held if p is not None and config.adapts_parameter(f"{path}.{name}")]
        for depth, name in enumerate(reversed(names)):
            found[f"{path}.{name}"] = path + ".base_layer" * depth
    return found


def experts_in(model: nn.Module, config: PeftConfig) -> dict[str, Experts]:
    """The tensors of experts that PEFT would adapt, by their names.

    Raises AdapterError where ``target_parameters`` names nothing, or something else.
    """
    modules, found, keys = base_modules(model), {}, parameters(model, config)
    for place, key in keys.items():
        path, _, param = place.rpartition(".")
        module = without_copies(modules[path])
        stack = stacks_of(module).get(param)
        if stack is None:
            raise AdapterError(f"target_parameters = {place!r}: this is no tensor of experts of known layout")
        found[place] = Experts(key, stack, bool(getattr(module, "is_transposed", False)))
    for target in sorted(config.parameters):
        if not any(place == target or place.endswith(f".{target}") for place in keys):
            raise AdapterError(f"target_parameters = {target!r}: the model has no such tensor of experts")
    return found


def names_of_factors(experts: Mapping[str, Experts]) -> dict[str, str]:
    """The name of each factor in the file → its name by that of the tensor."""
    return {
        f"{each.key}.lora_{factor}.weight": f"{place}.lora_{factor}.weight"
        for place, each in experts.items()
        for factor in "AB"
    }


def place_of(p: Projection) -> str:
    """What PEFT's patterns match: a module's path, or that of a parameter."""
    return p.module if p.param == "weight" else f"{p.module}.{p.param}"


def within(rows: Rows, out: int) -> tuple[int, Rows]:
    """The expert that ``rows`` of the whole tensor belong to, and the rows within it."""
    expert = rows[0] // out
    return expert, shifted(rows, -expert * out)


def of_all(blocks: Sequence[tuple[Rows, Pair]], stack: Stack) -> Pair:
    """One pair, A ``(experts, rank, in)`` and B ``(experts, out, rank)``, of blocks of the whole tensor.

    PEFT has one rank for all experts: the largest, to which the others are padded with zeros. An expert's
    blocks add up, as those of a fused weight.
    """
    each: dict[int, list[tuple[Rows, Pair]]] = {}
    for rows, pair in blocks:
        expert, own = within(rows, stack.out)
        each.setdefault(expert, []).append((own, pair))
    pairs = {expert: stacked(held, stack.out) for expert, held in each.items()}
    rank = max(pair.rank for pair in pairs.values())
    scaling = max((pair.scaling for pair in pairs.values()), key=abs)
    like = blocks[0][1].A
    A = like.new_zeros(stack.experts, rank, stack.columns)
    B = like.new_zeros(stack.experts, stack.out, rank)
    for expert, pair in pairs.items():
        A[expert, : pair.rank] = pair.A
        B[expert, :, : pair.rank] = pair.B * (pair.scaling / scaling)
    return Pair(A, B, scaling)


def problem(experts: Experts) -> str:
    """Why PEFT would compute something else; empty where it does not."""
    if experts.stack.flat:
        return "PEFT takes a tensor of experts in two dimensions for one matrix"
    if experts.stack.experts == 1 and experts.stack.transposed:
        return "PEFT adds the update of a single expert the wrong way round"
    return ""


def mismatch(experts: Experts, entries: Mapping[str, Entry], rank: int, old: bool) -> str:
    """Why these factors cannot be read; empty where they can."""
    wanted = experts.shapes(rank, old)
    shapes = {factor: entry.shape for factor, entry in sorted(entries.items())}
    if shapes != wanted:
        return f"expected factors {wanted}, got {shapes}"
    if any(entry.dtype not in FLOATS for entry in entries.values()):
        return "its factors are not floating point"
    return problem(experts)


# -- which PEFT wrote a folder --------------------------------------------------------------------------


def written_by_old(
    config: PeftConfig, experts: Mapping[str, Experts], layers: Mapping[str, Mapping[str, Entry]]
) -> bool:
    """Was it PEFT before 0.19, which had in and out the other way round?

    The configuration tells, or else the shapes of any tensor for which the two differ. Raises AdapterError
    where nothing tells.
    """
    told = _by_version(config.version)
    doubtful = [place for place, each in experts.items() if place in layers and not each.marked]
    if told is not None or not doubtful:
        return bool(told)
    for place in doubtful:
        shapes = {factor: entry.shape for factor, entry in layers[place].items()}
        fits = [old for old in (False, True) if shapes == experts[place].shapes(config.rank(place), old)]
        if len(fits) == 1:
            return fits[0]
    raise AdapterError(
        f"{doubtful[0]}: PEFT before 0.19 kept the factors of experts the other way round. Neither the "
        f"shapes nor peft_version = {config.version!r} tell which way these are. Set peft_version in "
        'adapter_config.json to the version that saved this folder, such as "0.18.1" or "0.19.0"'
    )


def _by_version(version: str | None) -> bool | None:
    """Before 0.19? None where that is not known: no version, or a state in development before 0.19."""
    found = re.match(r"(\d+)\.(\d+)(.*)", version or "", re.DOTALL)
    if found is None:
        return None
    numbers = int(found[1]), int(found[2])
    if "dev" in found[3] and numbers in ((0, 18), (0, 19)):
        return None
    return numbers < (0, 19)


def expert_pairs(pair: Pair) -> list[Pair]:
    """The pair of each expert."""
    return [Pair(a, b, pair.scaling) for a, b in zip(pair.A.unbind(), pair.B.unbind(), strict=True)]


def blocks_of_experts(place: str, stack: Stack, pair: Pair) -> Iterator[tuple[Projection, Pair]]:
    """All rows of each expert as one projection; an expert whose factors are both zero has none."""
    path, _, param = place.rpartition(".")
    role = stack.bands[0][0] if len(stack.bands) == 1 else Role.OTHER
    for expert, own in enumerate(expert_pairs(pair)):
        if own.A.any() or own.B.any():
            rows = shifted((0, stack.out), expert * stack.out)
            yield Projection(path, param, rows, role, stack.columns, stack.out, str(expert)), own
