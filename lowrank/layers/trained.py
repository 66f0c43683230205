"""A module trained in full: a copy that learns, beside the original that does not change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from lowrank.layers.linear import master_dtype
from lowrank.layers.loading import move_below_base
from lowrank.layers.masters import keep_masters


class TrainedModule(nn.Module):
    """Calls a trainable copy of ``base``; while it is not enabled, ``base`` itself.

    The copy's parameters are fp32 also on a half-precision base, and compute in the base's dtype: see
    `keep_masters`. Before they change, the output is the base's.

    What it does not define itself is looked up on the module in use, so that code that asks a head for
    its ``out_features`` still gets an answer.
    """

    is_layer = True  # messages about its parameters name it as a whole

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.copy = deepcopy(base).requires_grad_(True)
        self.copy.zero_grad()  # of the base, from before
        keep_masters(self.copy, base)
        self.enabled = True
        self.training = base.training

    @property
    def in_use(self) -> nn.Module:
        return self.copy if self.enabled else self.base

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

    def load_copy(self, state: Mapping[str, Tensor]) -> None:
        """Gives the copy the values in ``state``, in its own dtypes, also where it is on the meta device."""
        own = self.copy.state_dict()
        state = {name: tensor.to(own[name].dtype) for name, tensor in state.items()}
        self.copy.load_state_dict(state, assign=any(tensor.is_meta for tensor in own.values()))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        waiting = {name for name, tensor in self.copy.state_dict().items() if tensor.is_meta}
        trained = {name for name, _ in self.copy.named_parameters(remove_duplicate=False)}
        for name in waiting.intersection(move_below_base(state_dict, prefix, ("base.", "copy."))):
            tensor = state_dict[f"{prefix}base.{name}"]
            dtype = master_dtype(tensor.dtype) if name in trained else tensor.dtype
            state_dict.setdefault(f"{prefix}copy.{name}", tensor.to(dtype, copy=True))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_modules" not in self.__dict__ or "copy" not in self._modules:
                raise  # still being built or unpickled
            return getattr(self.in_use, name)
