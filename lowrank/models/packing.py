"""Which stored weights cannot be added to."""

from __future__ import annotations

from torch import Tensor


def packed(stored: Tensor) -> bool:
    """Can the tensor not be added to, because it is packed, of integers, or in fp8?"""
    # A floating-point number of one byte is fp8, in one of its formats.
    return (
        not stored.is_floating_point()
        or stored.itemsize == 1
        or type(stored).__module__.partition(".")[0] == "torchao"
    )
