from __future__ import annotations

import pytest

from homeinfer.errors import HomeinferError
from homeinfer.model.header import TYPE_SIZES, Header, MetaValue, TensorInfo, ValueType
from homeinfer.quant.allocate import Option
from homeinfer.quant.candidates import (
    NARROW,
    TINY,
    WIDE,
    bpw_left,
    candidate_types,
    free_tensors,
    item_of,
    require_reachable,
)
from homeinfer.quant.error_tables import TypeError_


def matrix(name: str, width: int, rows: int = 64, kind: str = "F16") -> TensorInfo:
    return TensorInfo(f"{name}.weight", (width, rows), kind, 0, width * rows * 2, 0)


def header_of(*tensors: TensorInfo) -> Header:
    return Header(3, (), {"general.architecture": MetaValue(ValueType.STRING, "llama")}, tensors)


@pytest.mark.parametrize("width", [256, 320, 32, 5120])
@pytest.mark.parametrize("bpw", [2.0, 4.0])
def test_every_candidate_fits_the_rows(width: int, bpw: float) -> None:
    types = candidate_types(width, bpw, has_importance=True)
    assert types
    assert all(width % TYPE_SIZES[name][0] == 0 for name in types)


def test_types_depend_on_width_budget_and_importance() -> None:
    assert candidate_types(320, 2.0, True) == NARROW
    assert candidate_types(48, 2.0, True) == ()
    assert candidate_types(256, 3.2, True) == WIDE
    assert candidate_types(256, 3.1, True) == (*TINY, *WIDE)
    assert candidate_types(256, 3.1, False) == ("IQ1_M", *WIDE)


def test_free_are_those_that_no_rule_and_no_width_and_not_llama_cpp_decides() -> None:
    names = [matrix("blk.0.attn_q", 256), matrix("blk.0.ffn_up", 256), matrix("blk.0.ffn_down", 48)]
    names += [matrix("blk.0.ffn_gate_inp", 256), TensorInfo("output_norm.weight", (256,), "F32", 0, 1024, 0)]
    assert [tensor.name for tensor in free_tensors(header_of(*names), {"blk.0.ffn_up.weight": "Q8_0"})] == [
        "blk.0.attn_q.weight"
    ]


def test_an_option_costs_sensitivity_times_weights_and_activations_error_and_the_source_nothing() -> None:
    item = item_of(matrix("a", 256), ("Q8_0", "F16"), lambda _, kind: TypeError_(kind, 0.25, 9.0, 0.5), 2.0)
    assert item.options == (Option("F16", 256 * 64 * 2, 0.0), Option("Q8_0", 256 * 64 * 34 // 32, 1.5))


def test_what_narrow_rows_need_is_not_left_to_the_others() -> None:
    wide, narrow = matrix("a", 256, 3 * 64), matrix("b", 64, 7 * 4 * 64)
    total = wide.n_weights + narrow.n_weights
    assert bpw_left((wide,), 3 * wide.n_weights // 8) == 3
    assert bpw_left((wide, narrow), 8 * total // 8) == 8
    assert bpw_left((wide, narrow), 4 * total // 8) == pytest.approx((4 * 10 - 4.5 * 7) / 3)
    assert bpw_left((narrow,), narrow.n_weights) == 8
    assert bpw_left((), 100) == 800


def test_budgets_below_the_smallest_types_are_refused_with_the_numbers() -> None:
    free = (matrix("a", 256), matrix("b", 64))
    least = 256 * 64 // 256 * 50 + 64 * 64 // 32 * 18
    require_reachable(free, least + 1000, 1000)
    with pytest.raises(
        HomeinferError, match=f"at most {least + 999:,} bytes is out of reach: 1,000 .* least {least:,};"
    ):
        require_reachable(free, least + 999, 1000)
