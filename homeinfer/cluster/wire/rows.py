"""Hidden states between devices: what they become on the wire, and what of them is believed."""

from __future__ import annotations

from typing import Any

from homeinfer import _native
from homeinfer.cluster.planning.plan import Wire
from homeinfer.errors import HomeinferError

_KINDS: dict[Wire, int] = {"f32": 0, "f16": 1, "bf16": 2, "q8": 3}


def pack(wire: Wire, rows: Any, width: int) -> Any:
    """Rows of float32 as they travel. f32 as they are; of the others each row by itself: f16 has a power of two in
    front (float32) that makes the row's largest number fit, so that nothing overflows; bf16; q8 has blocks of 32
    numbers, a scale (float16) and 32 int8 each.
    """
    return rows if wire == "f32" else _native.rows_pack(_KINDS[wire], rows, width)


def unpack(wire: Wire, rows: Any, n: int, width: int) -> Any:
    """n rows of float32 from what came. Raises HomeinferError for another size, and for what is not a number."""
    try:
        return _native.rows_unpack(_KINDS[wire], rows, n, width)
    except ValueError as problem:
        raise HomeinferError(str(problem)) from None
