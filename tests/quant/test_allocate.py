from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homeinfer.errors import HomeinferError
from homeinfer.quant.allocate import Item, Option, allocate, efficient

OPTIONS = st.builds(
    Option,
    type=st.sampled_from(("Q4_K", "Q6_K", "Q8_0", "IQ3_S")),
    bytes=st.integers(1, 60).map(lambda n: 32 * n),
    kld=st.floats(0, 5),
)
ITEMS = st.lists(st.lists(OPTIONS, min_size=1, max_size=5), min_size=1, max_size=5).map(
    lambda each: [Item(f"t{index}", tuple(options)) for index, options in enumerate(each)]
)


def least_kld(items: list[Item], limit: int) -> float:
    found = (
        sum(option.kld for option in picked)
        for picked in itertools.product(*(item.options for item in items))
        if sum(option.bytes for option in picked) <= limit
    )
    return min(found)


@settings(max_examples=150, deadline=None)
@given(items=ITEMS, share=st.floats(0, 1.1))
def test_choice_is_as_good_as_the_best_of_all_and_never_over_the_limit(items: list[Item], share: float) -> None:
    least = sum(min(option.bytes for option in item.options) for item in items)
    most = sum(max(option.bytes for option in item.options) for item in items)
    limit = least + int(share * (most - least))
    found = allocate(items, limit)
    assert [item.name for item in items] == list(found.choices)
    assert all(found.choices[item.name] in item.options for item in items)
    assert found.bytes == sum(option.bytes for option in found.choices.values()) <= limit
    assert found.kld == pytest.approx(sum(option.kld for option in found.choices.values()))
    largest = max(option.kld for item in items for option in item.options)
    assert found.kld <= least_kld(items, limit) * 1.001 + 1e-6 * largest
    with pytest.raises(HomeinferError, match=f"at least {least:,} bytes"):
        allocate(items, least - 1)


@given(options=st.lists(OPTIONS, min_size=1))
def test_what_another_option_beats_in_bytes_and_kld_is_left_out(options: list[Option]) -> None:
    left = efficient(options)
    assert [option.bytes for option in left] == sorted({option.bytes for option in left})
    assert [option.kld for option in left] == sorted({option.kld for option in left}, reverse=True)
    assert all(any(kept.bytes <= each.bytes and kept.kld <= each.kld for kept in left) for each in options)


def test_of_equal_options_the_first_is_taken_each_time() -> None:
    options = (Option("A", 64, 1.0), Option("B", 64, 1.0), Option("C", 128, 0.5), Option("D", 128, 0.5))
    items = [Item(f"t{index}", options) for index in range(8)]
    found = [allocate(items, 8 * 64 + 4 * 64) for _ in range(3)]
    assert found[0] == found[1] == found[2]
    assert {option.type for option in found[0].choices.values()} == {"A", "C"}
    assert found[0].bytes == 8 * 64 + 4 * 64


def test_nothing_to_choose_is_fine() -> None:
    assert allocate([], 0).choices == {}


def test_a_thousand_tensors_of_17_types_take_seconds() -> None:
    rng = np.random.default_rng(1)
    bits = np.linspace(1.6, 16, 17)
    items = []
    for index in range(1000):
        n, weight = int(rng.integers(1, 200)) * 2**16, rng.lognormal(0, 2)
        klds = weight * 4.0**-bits * rng.lognormal(0, 0.2, 17)
        items.append(
            Item(
                f"t{index}",
                tuple(Option(f"{b}", int(n * b / 8), float(kld)) for b, kld in zip(bits, klds, strict=True)),
            )
        )
    limit = int(sum(item.options[5].bytes for item in items))
    began = time.process_time()
    found = allocate(items, limit)
    assert time.process_time() - began < 15
    assert 0.999 * limit < found.bytes <= limit
    assert found.kld < sum(item.options[5].kld for item in items)
