"""Rows of an embedding that train alone, such as those of new tokens: which ones, and what they need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lowrank.models.embeddings import embedding_problem
from lowrank.models.listing import nearest
from lowrank.models.patterns import matches
from lowrank.models.projections import Projection
from lowrank.models.storage import is_embedding, is_linear, weight_shape
from lowrank.notices import few

SHOWN = 5  # ids in a message or a table


@dataclass(frozen=True)
class TokenRows:
    """The rows ``ids`` of the embedding at the path ``module``, each of ``width`` numbers.

    Other modules with the same weight, such as a tied output head, use the same rows.
    """

    module: str
    ids: tuple[int, ...]  # ascending
    width: int

    @property
    def parameters(self) -> int:
        return len(self.ids) * self.width

    def __str__(self) -> str:
        more = ", …" if len(self.ids) > SHOWN else ""
        return f"{self.module}: {len(self.ids)} rows ({', '.join(map(str, self.ids[:SHOWN]))}{more})"


def find_rows(model: nn.Module, said: Mapping[str, Sequence[int]]) -> tuple[TokenRows, ...]:
    """The rows that a policy's ``rows`` means. An embedding whose weight several modules share is one.

    Raises:
        ValueError: a name matches nothing, or something that is no embedding; ids that it does not have; two
            names mean one weight and have other ids.
    """
    paths = {path: module for path, module in model.named_modules() if path}
    found: dict[int, TokenRows] = {}
    for pattern, ids in said.items():
        hits = [path for path in paths if matches(path, pattern)]
        if not hits:
            raise ValueError(f"rows={pattern!r} names no module{nearest(pattern, list(paths))}")
        for path in hits:
            module = paths[path]
            if not isinstance(module, nn.Embedding):
                raise ValueError(
                    f"rows={pattern!r} names {path}, a {type(module).__name__}: expected an embedding; a "
                    "head that is tied to one follows it; other modules can be trained in full with train="
                )
            rows = TokenRows(path, tuple(sorted(ids)), module.embedding_dim)
            first = found.setdefault(id(module.weight), rows)
            if first.ids != rows.ids:
                raise ValueError(f"rows: {first.module} and {path} share a weight, and have other ids")
    rows_ = tuple(found.values())
    problems = row_problems(model, rows_)
    if problems:
        raise ValueError("these rows cannot be trained:\n  " + "\n  ".join(problems))
    return rows_


def row_problems(model: nn.Module, rows: Iterable[TokenRows]) -> list[str]:
    """A line for each of ``rows`` that ``model``, which is not wrapped, does not have or cannot train."""
    paths = dict(model.named_modules())
    problems, weights = [], set()
    for each in rows:
        module = paths.get(each.module)
        if not isinstance(module, nn.Embedding):
            problems.append(f"{each.module}: the model has no such embedding")
            continue
        size, ids = module.num_embeddings, each.ids
        outside = [i for i in ids if not 0 <= i < size]
        if module.embedding_dim != each.width:
            problems.append(
                f"{each.module}: expected rows of {each.width} numbers, got {module.embedding_dim}"
            )
        elif outside:
            problems.append(
                f"{each.module}: it has the rows 0 to {size - 1}, got {few(outside, SHOWN)}; for new tokens "
                "call model.resize_token_embeddings first"
            )
        elif not ids or list(ids) != sorted(set(ids)):
            problems.append(
                f"{each.module}: expected ids in ascending order, each once, got {few(ids, SHOWN)}"
            )
        elif module.padding_idx in ids:
            problems.append(f"{each.module}: {module.padding_idx} is its padding_idx, which gets no gradient")
        elif problem := embedding_problem(module):
            problems.append(f"{each.module}: {problem}")
        elif id(module.weight) in weights:
            problems.append(f"{each.module}: it shares its weight with another embedding that has rows")
        weights.add(id(module.weight))
        for path, other in paths.items():
            if _holds(other, module.weight) and (problem := _cannot_follow(other, module)):
                problems.append(f"{each.module}: {path} has the same weight, and {problem}")
    return problems


def check_rows(rows: Iterable[TokenRows], projections: Iterable[Projection], train: Iterable[str]) -> None:
    """Raises ValueError where an embedding is also adapted or trained in full, by the same adapter."""
    adapted = {p.module for p in projections}
    for each in rows:
        if each.module in adapted:
            raise ValueError(
                f"{each.module}: rows of it are to train, and it is adapted too: leave one of them out, or "
                "have them in two adapters"
            )
        if any(f"{each.module}.".startswith(f"{path}.") for path in train):
            raise ValueError(f"{each.module}: rows of it are to train, and train= trains all of it")


def sharing(model: nn.Module, module: nn.Module) -> list[nn.Module]:
    """The modules of ``model``, which is not wrapped, that have the weight of ``module``; also itself."""
    weight = module._parameters["weight"]
    return [other for other in model.modules() if _holds(other, weight)]


def _holds(module: nn.Module, weight: Tensor | None) -> bool:
    return any(parameter is weight for parameter in module._parameters.values())


def _cannot_follow(other: nn.Module, embedding: nn.Embedding) -> str:
    """Why moved rows could not act in ``other``, which has the same weight; empty where they can."""
    if is_embedding(other):
        return embedding_problem(other) if other is not embedding else ""
    fits = is_linear(other) and weight_shape(other, "weight") == tuple(embedding.weight.shape)
    if fits and other._parameters.get("weight") is embedding.weight:
        return ""
    return f"{type(other).__name__} is neither an embedding nor a linear layer"
