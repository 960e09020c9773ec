"""A whole cluster, coordinator and agents and engines, around which a token goes twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.coordinator.homes import TestCluster, desk_and_box
from tests.support.reference import agreement, references

LIMIT = 30


@pytest.fixture
def twice(smollm2_path: Path) -> Iterator[TestCluster]:
    with desk_and_box(smollm2_path, rounds=2, required=("box",)) as made:
        yield made


def test_two_devices_in_two_rounds_answer_as_llama_cpp_does(twice: TestCluster, smollm2_path: Path) -> None:
    status = twice.status()
    assert status is not None
    assert [len(device.layers) for device in status.devices] == [3, 2]
    # one longer than a step of prompts: its chunks follow each other twice around the ring
    texts = ["A list of colours: red, green,", "The quick brown fox jumps over the lazy dog. " * 12]
    for reference in references(smollm2_path, texts, LIMIT, longest=64, n_ctx=256):
        tokens, notices = twice.tell(reference.prompt, LIMIT)
        assert agreement([reference], [tokens]).ties == 0
        assert notices == []
