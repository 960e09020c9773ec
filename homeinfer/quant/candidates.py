"""Which types a tensor may get in a budget, and what each is predicted to cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, TensorInfo
from homeinfer.quant.allocate import Item, Option
from homeinfer.quant.error_tables import TypeError_
from homeinfer.quant.output_header import padded
from homeinfer.quant.tensor_types import ALWAYS_IMATRIX_TYPES, keeps_type, tensor_bytes

WIDE = ("IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", "IQ4_NL", "Q4_K", "Q4_1", "Q5_0", "Q5_K", "Q5_1", "Q6_K", "Q8_0")
"""For rows of whole 256-blocks. Q2_K, Q3_K and Q4_0 are left out: on every tensor measured IQ2_S, IQ3_S and IQ4_NL
have less error at no more bytes."""
NARROW = ("IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""For rows of whole 32-blocks."""
TINY = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS")
"""Only where the budget asks for them: their search is slow, and they are rounded as llama.cpp rounds them."""
TINY_BELOW_BPW = 3.2


def candidate_types(width: int, bpw: float, has_importance: bool) -> tuple[str, ...]:
    """The types for rows of `width` weights when the whole model may have `bpw` bits per weight."""
    if width % 32:
        return ()
    if width % 256:
        return NARROW
    types = (*TINY, *WIDE) if bpw < TINY_BELOW_BPW else WIDE
    return tuple(name for name in types if has_importance or name not in ALWAYS_IMATRIX_TYPES)


def free_tensors(header: Header, fixed: Mapping[str, str]) -> tuple[TensorInfo, ...]:
    """Those whose type is to be chosen: llama.cpp would quantize them, a 32-wide type fits, no rule decides."""
    return tuple(
        tensor
        for tensor in header.tensors
        if not keeps_type(tensor, header.architecture) and tensor.name not in fixed and tensor.shape[0] % 32 == 0
    )


def narrow_note(header: Header, free: Sequence[TensorInfo]) -> tuple[str, ...]:
    """One line on tensors whose rows K-quants can't take, if there are any."""
    changeable = [tensor for tensor in header.tensors if not keeps_type(tensor, header.architecture)]
    narrow = sum(tensor.shape[0] % 256 != 0 for tensor in free)
    odd = [tensor.name for tensor in changeable if tensor.shape[0] % 32]
    notes = []
    if narrow:
        notes.append(
            f"{narrow} tensors have rows that are no multiple of 256 wide: they get 32-wide types, 4.5 bits up"
        )
    if odd:
        notes.append(f"{len(odd)} tensors have rows that are no multiple of 32 wide and stay as they are: {odd[0]}…")
    return tuple(notes)


def bpw_left(free: Sequence[TensorInfo], left_bytes: int) -> float:
    """Bits per weight that the free tensors may have; where some have only 32-wide types, which end at 4.5 bits, those
    that are left to the others if that is less."""
    wide = sum(tensor.n_weights for tensor in free if tensor.shape[0] % 256 == 0)
    narrow = [tensor for tensor in free if tensor.shape[0] % 256]
    bpw = 8 * left_bytes / max(wide + sum(tensor.n_weights for tensor in narrow), 1)
    least = sum(_least_bytes(tensor) for tensor in narrow)
    return min(bpw, 8 * (left_bytes - least) / wide) if wide else bpw


def require_reachable(free: Sequence[TensorInfo], limit_bytes: int, overhead: int) -> None:
    """Raise HomeinferError when no types make the free tensors fit beside `overhead` bytes of all else."""
    least = sum(_least_bytes(tensor) for tensor in free)
    if overhead + least > limit_bytes:
        raise HomeinferError(
            f"a file of at most {limit_bytes:,} bytes is out of reach: {overhead:,} are taken by its header and by "
            f"tensors whose type is fixed, and the others need at least {least:,}; ask for more"
        )


def _least_bytes(tensor: TensorInfo) -> int:
    types = candidate_types(tensor.shape[0], 0.0, has_importance=True)
    return min(padded(nbytes) for nbytes in (tensor.nbytes, *(tensor_bytes(tensor, name) for name in types)))


def item_of(
    tensor: TensorInfo, types: tuple[str, ...], error: Callable[[str, str], TypeError_], sensitivity: float
) -> Item:
    """The tensor's options: each type's predicted KLD is the sensitivity times weights' and activations' error.

    The source's own type costs no error, only bytes.
    """
    options = [Option(tensor.type, padded(tensor.nbytes), 0.0)]
    for type_name in types:
        if type_name != tensor.type:
            found = error(tensor.name, type_name)
            kld = sensitivity * (found.rounded + found.noise)
            options.append(Option(type_name, padded(tensor_bytes(tensor, type_name)), kld))
    return Item(tensor.name, tuple(options))
