"""A policy: which projections to adapt, how much to spend, and how to start. Pure data."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import isfinite, sqrt
from typing import Any

from lowrank.allocate import Allocator, Uniform
from lowrank.formats.strategies import decode, encode
from lowrank.formats.values import are_ids, is_number, is_rows, is_whole
from lowrank.init import Initializer, Kaiming
from lowrank.models.projections import Role
from lowrank.models.targets import Target

FORMAT, VERSION = "lowrank-policy", 1
SCALINGS = ("alpha/r", "alpha/sqrt(r)")
EXPERT_RANKS, EXPERTS = ("rank", "rank/active"), ("each", "shared")


@dataclass(frozen=True)
class Policy:
    """What `wrap_model` is asked to do. Checked when it is made; the presets are policies.

    Args:
        target: ``"all-linear"`` (all but embeddings, heads and what ``train`` names), a role such as
            ``"query"``, a dotted-suffix pattern with ``*`` (``"layers.1*.mlp.up_proj"``, and of rows
            of a weight as plans print them, ``"c_attn[query]"``), several of these, or a predicate of a
            `Projection`. ``part:target`` means it in a part of the model only:
            ``"vision:all-linear"``, ``"language:query"``, ``"projector:all-linear"``, ``"audio:value"``, or
            in a module, ``"visual.blocks:query"``.
        exclude: names of projections, or of modules around them, to leave out.
        rank: the reference rank where ``budget`` is None; the budget is then what this rank costs everywhere.
        budget: trainable adapter parameters: a count, or a fraction of the model's parameters (0 < f < 1), a
            quantized weight counted by its shape. The reference rank is then the one that the uniform
            allocation of this budget gives, and ``rank`` is not used.
        alpha: over r or √r it is the scaling; not used where ``scaling`` is a number.
        scaling: the reference scaling: ``"alpha/r"``; ``"alpha/sqrt(r)"`` (rsLoRA, 2312.03732); or a number,
            the scaling itself. r is the reference rank for every allocator, whatever rank a projection gets.
            `Sensitivity` multiplies it projection by projection, the other allocators take it as it is.
        init: how the factors start.
        allocate: how the budget is spent.
        dropout: on the adapters' inputs, in training.
        layers: numbers of the repeated blocks to adapt: ``range(8, 24)``, ``(0, 5)``, ``7``, or ``"8:24"``,
            of which either end may be missing. The number of a block is the first one in a projection's path.
        ranks, alphas: by name, pattern or role, for projections with a rank or alpha of their own:
            ``{"q_proj": 32}``. Of several that match, the longest counts. Their scaling is that of their own
            alpha and rank. Ranks and a budget exclude each other.
        expert_rank: of experts: ``"rank"``, as of any projection, or ``"rank/active"``: divided by the number
            of experts that act on a token, and at least 1. Their scaling is that of the divided rank. Not
            beside a budget.
        experts: ``"each"``: every expert has an adapter of its own; ``"shared"``: all experts of a tensor
            have one, which may start from the inputs or gradients of all of them, but not from a weight.
        dora: train the magnitude of each output row apart from its direction (DoRA, 2402.09353). Such an
            adapter acts alone, with weight 1. Its magnitudes, ``out`` for each projection, count in a budget.
        train: modules trained in full and saved with the adapter, such as a new classifier head.
        fused: rows by role of a fused weight that its shape alone cannot tell, by name:
            ``{"qkv_proj": {"query": 4096, "key": 1024, "value": 1024}}``. Where heads are interleaved, the
            rows of one group, and how many there are: ``{"wqkv": {"groups": 8, "query": 512, "key": 128,
            "value": 128}}``.
        rows: token ids by embedding, such as those of new tokens: ``{"embed_tokens": [32000, 32001]}``. Only
            these rows of it train, beside the budget. A head that is tied to the embedding follows.
        roles: of weights whose names do not tell it, or tell it wrongly, by dotted-suffix pattern:
            ``{"mixer.theta": "query"}``. The longest pattern counts. `ByRole` and targets by role follow it.
        seed: of every random draw in wrapping.

    Raises:
        ValueError: a value out of range; the message says which.
    """

    target: Target = "all-linear"
    exclude: Sequence[str] = ()
    rank: int = 8
    budget: int | float | None = None
    alpha: float = 16.0
    scaling: str | float = "alpha/r"
    init: Initializer = field(default_factory=Kaiming)
    allocate: Allocator = field(default_factory=Uniform)
    dropout: float = 0.0
    train: Sequence[str] = ()
    fused: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    seed: int = 0
    roles: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, Sequence[int]] = field(default_factory=dict)
    dora: bool = False
    layers: str | int | Sequence[int] | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    expert_rank: str = "rank"
    experts: str = "each"

    def __post_init__(self) -> None:
        for name in ("target", "exclude", "train"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_overrides()
        if not is_whole(self.rank) or self.rank < 1:
            raise ValueError(f"rank: expected a whole number of at least 1, got {self.rank!r}")
        if not is_number(self.alpha) or not isfinite(self.alpha) or self.alpha <= 0:
            raise ValueError(f"alpha: expected a positive number, got {self.alpha!r}")
        if self.scaling not in SCALINGS and not (
            is_number(self.scaling) and isfinite(self.scaling) and self.scaling > 0  # type: ignore[arg-type,operator]
        ):
            choices = ", ".join(f'"{name}"' for name in SCALINGS)
            raise ValueError(f"scaling: expected {choices} or a positive number, got {self.scaling!r}")
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a number from 0 to below 1, got {self.dropout!r}")
        if not isinstance(self.dora, bool):
            raise ValueError(f"dora: expected True or False, got {self.dora!r}")
        if not is_whole(self.seed):
            raise ValueError(f"seed: expected a whole number, got {self.seed!r}")
        counted = is_whole(self.budget) and self.budget >= 1  # type: ignore[operator]
        fraction = isinstance(self.budget, float) and 0 < self.budget < 1
        if not (self.budget is None or counted or fraction):
            raise ValueError(
                "budget: expected a count of trainable parameters (a whole number) or a fraction of the "
                f"model's (between 0 and 1), got {self.budget!r}"
            )
        if not isinstance(self.fused, Mapping) or not all(map(is_rows, self.fused.values())):
            raise ValueError(
                'fused: expected the rows of each role by name, such as {"qkv_proj": {"query": 64, "key": '
                f'16, "value": 16}}}}, got {self.fused!r}'
            )
        if not isinstance(self.roles, Mapping) or not all(
            isinstance(name, str) and name and role in set(Role) for name, role in self.roles.items()
        ):
            raise ValueError(
                f'roles: expected a role by name, such as {{"mixer.theta": "query"}}, one of '
                f"{', '.join(Role)}, got {self.roles!r}"
            )
        if not isinstance(self.rows, Mapping) or not all(map(are_ids, self.rows, self.rows.values())):
            raise ValueError(
                'rows: expected ids by embedding, each once, such as {"embed_tokens": [7, 8]}, '
                f"got {self.rows!r:.200}"
            )
        object.__setattr__(self, "rows", {name: tuple(ids) for name, ids in self.rows.items()})
        for name in ("init", "allocate"):
            choice = getattr(self, name)
            if not callable(choice) or isinstance(choice, type) or not hasattr(choice, "needs"):
                example = "Kaiming()" if name == "init" else "Uniform()"
                raise ValueError(f"{name}: expected an instance, such as {name}={example}, got {choice!r}")
        if self.budget is not None and getattr(self.allocate, "unit", "parameters") == "ranks":
            raise ValueError(
                f'{self.allocate!r} counts ranks and not parameters: with unit="ranks" give rank=, '
                "and leave budget=None"
            )

    def _check_overrides(self) -> None:
        """Brings ``layers`` into one form, and raises ValueError where it, ranks or alphas are wrong."""
        layers: Any = (self.layers,) if is_whole(self.layers) else self.layers
        if isinstance(layers, str):
            right = re.fullmatch(r"\d*:\d*", layers) is not None and layers != ":"
        else:
            right = layers is None or (
                isinstance(layers, Sequence) and bool(layers) and all(is_whole(n) and n >= 0 for n in layers)
            )
            object.__setattr__(self, "layers", tuple(layers) if right and layers is not None else layers)
        if not right:
            raise ValueError(f'layers: expected numbers, range(8, 24) or "8:24", got {self.layers!r}')
        for name, fits in (("ranks", is_whole), ("alphas", is_number)):
            said = getattr(self, name)
            if not isinstance(said, Mapping) or not all(
                isinstance(key, str) and key and fits(n) and 0 < n < float("inf") for key, n in said.items()
            ):
                raise ValueError(
                    f'{name}: expected positive numbers by name, such as {{"q_proj": 32}}, got {said!r}'
                )
        for name, choices in (("expert_rank", EXPERT_RANKS), ("experts", EXPERTS)):
            if getattr(self, name) not in choices:
                one, other = choices
                raise ValueError(f'{name}: expected "{one}" or "{other}", got {getattr(self, name)!r}')
        if self.expert_rank != "rank" and self.budget is not None:
            raise ValueError('expert_rank="rank/active" does not go with a budget: leave one of them out')
        if self.ranks and self.budget is not None:
            raise ValueError("ranks= does not go with a budget: leave one of them out")
        if self.alphas and self.scaling not in SCALINGS:
            raise ValueError(f"alphas has no effect with scaling={self.scaling!r}: leave one of them out")

    def reference_scaling(self, rank: int) -> float:
        """The scaling that ``scaling`` and ``alpha`` say for the reference rank."""
        if self.scaling == "alpha/r":
            return self.alpha / rank
        return self.alpha / sqrt(rank) if self.scaling == "alpha/sqrt(r)" else float(self.scaling)

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that must be measured before this policy can be applied."""
        return self.init.needs | self.allocate.needs

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` makes an equal policy of it.

        Raises:
            ValueError: a target that is a function, or an initializer or allocator that is not lowrank's.
        """
        data: dict[str, Any] = {"format": FORMAT, "version": VERSION}
        for each in fields(self):
            value = getattr(self, each.name)
            try:
                data[each.name] = encode(value, strict=True)
            except ValueError as error:
                raise ValueError(
                    f"{each.name}={value!r} cannot be written as JSON: names, numbers, and what lowrank.init "
                    "and lowrank.allocate offer can"
                ) from error
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Policy:
        """The policy that `to_json` wrote; a field that is not there has its default.

        Raises:
            ValueError: ``data`` is no policy, or one of another version, or a value is out of range.
        """
        try:
            if data["format"] != FORMAT or data["version"] != VERSION:
                raise ValueError(f"expected {FORMAT} {VERSION}, got {data['format']} {data['version']}")
            known = {each.name for each in fields(cls)}
            said = {key: value for key, value in data.items() if key not in ("format", "version")}
            if unknown := sorted(said.keys() - known):
                raise ValueError(
                    f"a policy has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}"
                )
            said = {key: decode(value) for key, value in said.items()}
            for name in said.keys() & {"init", "allocate"}:
                if not type(said[name]).__module__.startswith(f"lowrank.{name}."):
                    raise ValueError(f"{name}: expected one of lowrank.{name}, got {said[name]!r:.80}")
            return cls(**said)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is not a policy: {type(error).__name__}: {error}") from error
