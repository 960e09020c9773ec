"""What is known of the inputs of each weight, and what an error of the weight does to its output."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from homeinfer.quant.moments import Moments
from homeinfer.quant.rounding import Factor, factor, output_error

Floats = npt.NDArray[np.float32]
Activation = Literal["Q8_K", "Q8_0"]

_UNROUNDED = frozenset(("F32", "F16", "BF16"))
_NARROW = frozenset(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"))


def activation_of(type_name: str) -> Activation | None:
    """What ggml's CPU kernels round a weight's inputs to when it has this type (ggml-cpu's vec_dot_type)."""
    if type_name in _UNROUNDED:
        return None
    return "Q8_0" if type_name in _NARROW else "Q8_K"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Of one weight: the mean of x·xᵀ (float32 [n, n]) or only its diagonal ([n]), both None where nothing was seen,
    and the mean squared rounding error of x per channel for both ways of rounding activations ([n] each)."""

    hessian: Floats | None = None
    importance: Floats | None = None
    noise: Mapping[str, Floats] = dataclasses.field(default_factory=dict)
    key: str = ""
    """The same for weights that have the same inputs."""

    def _energy(self, matrix: Floats) -> float:
        if self.hessian is not None:
            return output_error(matrix, self.hessian)
        scale = np.ones(matrix.shape[1]) if self.importance is None else self.importance
        return float(np.einsum("ij,ij,j->", matrix, matrix, scale, dtype=np.float64))

    def relative_error(self, changed: Floats, weights: Floats) -> float:
        """Energy of the error over the energy of the output; 0 for weights that give no output."""
        energy = self._energy(weights)
        return self._energy(changed - weights) / energy if energy > 0 else 0.0

    def relative_noise(self, type_name: str, weights: Floats) -> float:
        """The same for what rounding the activations does, which the weight's type decides."""
        activation = activation_of(type_name)
        energy = self._energy(weights)
        if activation is None or activation not in self.noise or energy <= 0:
            return 0.0
        squares = np.einsum("ij,ij->j", weights, weights, dtype=np.float64)
        return float(squares @ self.noise[activation]) / energy


class Known(Protocol):
    """Where Inputs come from."""

    def of(self, weight: str, width: int) -> Inputs:
        """Read what there is of a weight whose rows are `width` wide."""
        ...

    def method(self, weight: str) -> str:
        """How the weight is rounded, as the report calls it: "hessian", "imatrix" or "plain"."""
        ...


class FromMoments:
    """Everything that was observed."""

    def __init__(self, moments: Moments) -> None:
        self._moments = moments

    def of(self, weight: str, width: int) -> Inputs:  # noqa: ARG002
        moments = self._moments
        if weight in moments.unobserved or not moments.has(weight):
            return Inputs()
        importance = moments.importance(weight)
        if not importance.any():  # the layers before it put nothing in: all channels count the same
            return Inputs(importance=np.ones_like(importance))
        return Inputs(
            moments.hessian(weight) if moments.has_hessian(weight) else None,
            importance,
            {activation: moments.noise(weight, activation) for activation in ("Q8_K", "Q8_0")},
            moments.key(weight),
        )

    def method(self, weight: str) -> str:
        if weight in self._moments.unobserved or not self._moments.has(weight):
            return "plain"
        return "hessian" if self._moments.has_hessian(weight) else "imatrix"


class FromImatrix:
    """Importance alone, from an imatrix: mean squares per weight, one row per expert."""

    def __init__(self, values: Mapping[str, Floats]) -> None:
        self._values = values

    def of(self, weight: str, width: int) -> Inputs:
        values = self._values.get(weight)
        if values is None or values.size % width:
            return Inputs()
        return Inputs(importance=values.reshape(-1, width).mean(axis=0).astype(np.float32))

    def method(self, weight: str) -> str:
        return "imatrix" if weight in self._values else "plain"


class Factors:
    """The last factors that were needed: weights that share inputs come one after the other."""

    def __init__(self, most: int = 3) -> None:
        self._most = most
        self._made: dict[str, Factor] = {}

    def of(self, inputs: Inputs) -> Factor | None:
        if inputs.hessian is None:
            return None
        if inputs.key not in self._made:
            while len(self._made) >= self._most:
                del self._made[next(iter(self._made))]
            self._made[inputs.key] = factor(inputs.hessian)
        return self._made[inputs.key]
