"""Which types a tensor may get in a budget, and what each is predicted to cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping

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
