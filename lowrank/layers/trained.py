"""A module trained in full: copies that learn, beside the original that does not change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, cast

from torch import Tensor, nn

from lowrank.layers.acting import Acting
from lowrank.layers.bases import master_dtype
from lowrank.layers.loading import move_below_base
from lowrank.layers.masters import keep_masters


class TrainedModule(nn.Module):
    """Calls the trainable copy of ``base`` whose name acts; where none does, ``base`` itself.

    A copy's parameters are fp32 also on a half-precision base, and compute in the base's dtype: see
    `keep_masters`. Before they change, the output is the base's.

    What it does not define itself is looked up on the module in use, so that code that asks a head for
    its ``out_features`` still gets an answer.

    Args:
        base: the module to copy; it stays as it is.
        name: of the first copy.
        acting: which names act, shared with other layers; by default ``name`` does.
    """

    is_layer = True  # messages about its parameters name it as a whole

    def __init__(self, base: nn.Module, name: str = "default", acting: Acting | None = None) -> None:
        super().__init__()
        self.base = base
        self.copies = nn.ModuleDict()  # by adapter name
        self.acting = Acting((name,)) if acting is None else acting
        self.put(name, base)
        self.training = base.training

    def put(self, name: str, original: nn.Module) -> None:
        """Makes the copy of ``name``; ``original`` is the base without adapters."""
        made = deepcopy(original).requires_grad_(True)
        made.zero_grad()  # of the base, from before
        keep_masters(made, original)
        self.copies[name] = made

    @property
    def copy(self) -> nn.Module:
        """The copy, where there is one; raises ValueError where there are several."""
        held = self._copies()
        if len(held) > 1:
            raise ValueError(f"expected one copy, got those of {list(held)}; see .copies")
        return next(iter(held.values()))

    def _copies(self) -> dict[str, nn.Module]:
        return cast("dict[str, nn.Module]", self._modules["copies"]._modules)  # type: ignore[union-attr]

    @property
    def why_idle(self) -> str:
        """What a message says of parameters here that got no gradient; see `Acting.why_idle`."""
        return self.acting.why_idle(self._copies())

    @property
    def in_use(self) -> nn.Module:
        return next((copy for copy, _ in self.acting.among(self._copies())), self.base)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.in_use(*args, **kwargs)

    # A Sequential may be indexed or walked, for which Python looks on the class alone.

    def __getitem__(self, index: Any) -> Any:
        return self.in_use[index]  # type: ignore[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.in_use)  # type: ignore[call-overload]

    def __len__(self) -> int:
        return len(self.in_use)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return True  # as any module without a length

    def load_copy(self, state: Mapping[str, Tensor], name: str) -> None:
        """Gives the copy of ``name`` the values in ``state``, in its own dtypes, also on the meta device."""
        own = self._copies()[name].state_dict()
        state = {key: tensor.to(own[key].dtype) for key, tensor in state.items()}
        self._copies()[name].load_state_dict(state, assign=any(tensor.is_meta for tensor in own.values()))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        moved = move_below_base(state_dict, prefix, ("base.", "copies."))
        for owner, copy in self._copies().items():
            waiting = {name for name, tensor in copy.state_dict().items() if tensor.is_meta}
            trained = {name for name, _ in copy.named_parameters(remove_duplicate=False)}
            for name in waiting.intersection(moved):
                tensor = state_dict[f"{prefix}base.{name}"]
                dtype = master_dtype(tensor.dtype) if name in trained else tensor.dtype
                state_dict.setdefault(f"{prefix}copies.{owner}.{name}", tensor.to(dtype, copy=True))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_modules" not in self.__dict__ or "copies" not in self._modules:
                raise  # still being built or unpickled
            return getattr(self.in_use, name)
