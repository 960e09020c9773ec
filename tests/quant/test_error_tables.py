from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from homeinfer.errors import HomeinferError
from homeinfer.quant.error_tables import ErrorTable, TensorErrors, TypeError_, make_folder, measure_errors
from homeinfer.quant.inputs import Factors, Inputs

TYPES = ("Q4_K", "IQ4_NL", "Q8_0")
RNG = np.random.default_rng(5)
X = (RNG.standard_normal((600, 256)) @ RNG.standard_normal((256, 256)) / 16).astype(np.float32)
INPUTS = Inputs((X.T @ X / len(X)).astype(np.float32), np.square(X).mean(axis=0), key="x")
WEIGHTS = RNG.standard_normal((24, 256)).astype(np.float32)


def error(type_name: str, rounded: float = 0.1) -> TypeError_:
    return TypeError_(type_name, rounded, 0.2, 0.01)


def test_errors_fall_with_bits_and_with_rounding_that_knows_the_inputs() -> None:
    q4_k, iq4_nl, q8_0 = measure_errors(WEIGHTS, INPUTS, TYPES, Factors(), threads=1)
    assert (q4_k.type, iq4_nl.type, q8_0.type) == TYPES
    assert 0 < q8_0.rounded < q4_k.rounded < q4_k.stock
    assert iq4_nl.rounded < iq4_nl.stock


def test_without_moments_homeinfer_rounds_as_llama_cpp_does() -> None:
    for found in measure_errors(WEIGHTS, Inputs(importance=INPUTS.importance), TYPES, Factors(), threads=1):
        assert found.rounded == found.stock
        assert found.noise == 0


def test_rows_of_zeros_have_no_error() -> None:
    zeros = np.zeros_like(WEIGHTS)
    assert all(found.rounded == found.stock == 0 for found in measure_errors(zeros, INPUTS, TYPES, Factors(), 1))


def test_what_was_added_is_there_the_next_time(tmp_path: Path) -> None:
    path = tmp_path / "errors.jsonl"
    table = ErrorTable(path)
    assert table.missing("a", TYPES) == TYPES
    table.add("a", (error("Q4_K"),))
    table.add("b", (error("Q8_0"), error("IQ4_NL")))
    table.add("a", (error("Q8_0", 0.3),))
    for known in (table, ErrorTable(path)):
        assert known.missing("a", TYPES) == ("IQ4_NL",)
        assert known.missing("b", TYPES) == ("Q4_K",)
        assert known.of("a", "Q8_0") == error("Q8_0", 0.3)
        assert known.of("a", "Q4_K") == error("Q4_K")


@pytest.mark.parametrize("rest", [b"", b"\n", b"\xff\xfe\n", b"[" * 5000, b'\n{"name":"a","errors":[{"type":1}]}'])
def test_a_line_cut_anywhere_costs_only_itself(tmp_path: Path, rest: bytes) -> None:
    path = tmp_path / "errors.jsonl"
    ErrorTable(path).add("a", (error("Q4_K"),))
    line = msgspec.json.encode(TensorErrors("b", (error("Q4_K"),)))
    for cut in (1, len(line) // 2, len(line) - 1):
        with path.open("ab") as file:
            file.write(b"\n" + line[:cut] + rest)
        table = ErrorTable(path)
        assert table.missing("a", ("Q4_K",)) == ()
        assert table.missing("b", ("Q4_K",)) == ("Q4_K",)
    table.add("b", (error("Q4_K"),))
    assert ErrorTable(path).missing("b", ("Q4_K",)) == ()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(HomeinferError, match=r"errors\.jsonl: measurements can't be kept there: .*HOMEINFER_KEPT"):
        ErrorTable(tmp_path / "gone" / "errors.jsonl").add("a", (error("Q4_K"),))
    (tmp_path / "file").write_text("")
    with pytest.raises(HomeinferError, match="measurements can't be kept there: Not a directory"):
        make_folder(tmp_path / "file" / "folder")
