"""Weights that no quantizer can take, said in one line that names the tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from homeinfer.errors import HomeinferError
from homeinfer.model.header import printable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def require_finite(source: str, tensor: str, weights: npt.NDArray[np.float32]) -> None:
    """Raise HomeinferError when some of the tensor's weights (float32, any shape) are NaN or infinite.

    For code that reads weights itself; llama_model_quantize looks at every tensor that it reads.
    """
    # a sum is finite only where all terms are, and reads the weights once without a copy
    if not bool(abs(weights.sum(dtype="float64")) < float("inf")):
        raise broken_tensor(source, tensor)


def broken_tensor(source: str, tensor: str) -> HomeinferError:
    """The error for a tensor of the source with NaN, infinite or otherwise impossible values."""
    return HomeinferError(
        f"{source}: tensor '{printable(tensor)}' has NaN or infinite values: the file is damaged; "
        "download or convert the model again"
    )


def unwritable_tensor(source: str, tensor: str) -> HomeinferError:
    """The error for a tensor whose weights are finite but beyond what the new type can hold."""
    return HomeinferError(
        f"{source}: tensor '{printable(tensor)}' has values that are too large for its new type; keep it with "
        f"--tensor '{printable(tensor)}=F32'"
    )
