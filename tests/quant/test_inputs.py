from __future__ import annotations

import numpy as np
import pytest

from homeinfer.quant.inputs import Factors, FromImatrix, Inputs, activation_of
from homeinfer.quant.rounding import factor

RNG = np.random.default_rng(4)
X = (RNG.standard_normal((300, 64)) * np.linspace(0.1, 3, 64)).astype(np.float32)
HESSIAN = (X.T @ X / len(X)).astype(np.float32)
WEIGHTS = RNG.standard_normal((10, 64)).astype(np.float32)
CHANGED = WEIGHTS + RNG.normal(0, 0.05, WEIGHTS.shape).astype(np.float32)


def test_error_is_that_of_the_outputs() -> None:
    meant = np.square(X @ (CHANGED - WEIGHTS).T).sum() / np.square(X @ WEIGHTS.T).sum()
    assert Inputs(HESSIAN).relative_error(CHANGED, WEIGHTS) == pytest.approx(meant, rel=1e-3)
    assert Inputs(HESSIAN).relative_error(WEIGHTS, WEIGHTS) == 0


def test_with_less_known_channels_count_by_importance_or_alike() -> None:
    importance = np.diag(HESSIAN).copy()
    squares = np.square(CHANGED - WEIGHTS)
    weighted = (squares @ importance).sum() / (np.square(WEIGHTS) @ importance).sum()
    assert Inputs(importance=importance).relative_error(CHANGED, WEIGHTS) == pytest.approx(weighted, rel=1e-5)
    plain = squares.sum() / np.square(WEIGHTS).sum()
    assert Inputs().relative_error(CHANGED, WEIGHTS) == pytest.approx(plain, rel=1e-5)


def test_weights_without_output_have_no_error() -> None:
    zeros = np.zeros_like(WEIGHTS)
    for inputs in (Inputs(HESSIAN), Inputs(), Inputs(np.zeros_like(HESSIAN))):
        assert inputs.relative_error(CHANGED, zeros) == 0
        assert inputs.relative_noise("Q4_K", zeros) == 0
    assert Inputs(np.zeros_like(HESSIAN)).relative_error(CHANGED, WEIGHTS) == 0


@pytest.mark.parametrize(
    ("type_name", "activation"),
    [("F16", None), ("BF16", None), ("Q4_1", "Q8_0"), ("IQ4_NL", "Q8_0"), ("IQ4_XS", "Q8_K"), ("Q6_K", "Q8_K")],
)
def test_noise_is_that_of_the_activations_type(type_name: str, activation: str | None) -> None:
    assert activation_of(type_name) == activation
    noise = {"Q8_K": np.full(64, 0.02, np.float32), "Q8_0": np.full(64, 0.01, np.float32)}
    found = Inputs(HESSIAN, None, noise).relative_noise(type_name, WEIGHTS)
    energy = np.square(X @ WEIGHTS.T).sum() / len(X)
    meant = np.square(WEIGHTS).sum() * noise[activation][0] / energy if activation else 0
    assert found == pytest.approx(meant, rel=1e-3)


def test_an_imatrix_gives_importance_averaged_over_experts() -> None:
    known = FromImatrix({"a": np.arange(8, dtype=np.float32)})
    assert known.of("a", 4).importance == pytest.approx([2, 3, 4, 5])
    assert known.of("b", 4) == Inputs()
    assert known.of("a", 5) == Inputs()
    assert (known.method("a"), known.method("b")) == ("imatrix", "plain")


def test_factors_are_made_once_for_shared_inputs_and_few_are_kept() -> None:
    factors = Factors(most=2)
    assert factors.of(Inputs()) is None
    first = factors.of(Inputs(HESSIAN, key="a"))
    assert first is not None
    assert np.array_equal(first.upper, factor(HESSIAN).upper)
    assert factors.of(Inputs(HESSIAN, key="a")) is first
    for key in "bc":
        factors.of(Inputs(HESSIAN, key=key))
    assert factors.of(Inputs(HESSIAN, key="a")) is not first
