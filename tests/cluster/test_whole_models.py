"""Models that are never cut still run whole, on one device."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from homeinfer.cluster.local import RingOptions, start_local_ring
from homeinfer.engine.pipeline import Batch
from homeinfer.model.architectures_refused import REFUSED
from homeinfer.model.header import read_header
from homeinfer.model.window_plan import n_layers
from tests.support.tiny_models import file_name, make_tiny_models


@pytest.mark.parametrize("name", ["bloom", "minicpm3", "rwkv6", "talkie"])
def test_a_model_that_is_never_cut_answers_on_one_device(name: str, tmp_path: Path) -> None:
    assert make_tiny_models(tmp_path, (name,)) == {}
    header = read_header(tmp_path / file_name(name))
    assert header.architecture in REFUSED
    with closing(start_local_ring(header, RingOptions(devices=1, n_ctx=64, n_threads=1))) as pipeline:
        assert pipeline.devices[0].windows == [(0, n_layers(header))]
        assert np.isfinite(pipeline.forward(Batch.of([1, 2, 3], 0))).all()
