"""A whole cluster, coordinator and agents and engines, around which a token goes twice."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from homeinfer.cluster.coordinator.options import ClusterOptions
from tests.cluster.coordinator.homes import TestCluster, cluster, profile
from tests.support.reference import agreement, references

LIMIT = 30


@pytest.fixture
def twice(smollm2_path: Path) -> Iterator[TestCluster]:
    folder = Path(tempfile.mkdtemp(prefix="hi-test-"))
    options = ClusterOptions(
        model=str(smollm2_path),
        name="desk",
        host="127.0.0.1",
        devices=2,
        rounds=2,
        required=("box",),
        n_ctx=256,
        threads=1,
        n_batch=64,
        profiles=(profile(smollm2_path, "desk"), profile(smollm2_path, "box")),
        announces=False,
        opens_code=False,
    )
    try:
        with cluster(folder, options) as made:
            made.up()
            made.join("box")
            made.ready(2)
            yield made
    finally:
        shutil.rmtree(folder)


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
