"""A pipeline's batch as the ring's first message, and what comes back as its logits."""

from __future__ import annotations

from typing import Any

import numpy as np

from homeinfer.cluster.wire.messages import Message, Step
from homeinfer.engine.pipeline import Batch, Floats
from homeinfer.errors import HomeinferError


def first_step(epoch: int, step: int, batch: Batch) -> tuple[Step, bytes]:
    """What goes into the first window, and its rows."""
    index = batch.positions.tobytes() + batch.sequences.tobytes() + batch.wanted.tobytes()
    return Step(epoch, step, 0, len(batch.tokens), 0, index), batch.tokens.astype(np.int32).tobytes()


def logits_of(step: Message, rows: Any, wanted: int, n_vocab: int) -> Floats:
    """The logits that came back: float32 [wanted, n_vocab]. Raises HomeinferError for anything else."""
    if not isinstance(step, Step) or step.width != n_vocab or memoryview(rows).nbytes != 4 * wanted * n_vocab:
        raise HomeinferError("the last device sent back something other than the logits it was asked for")
    return np.frombuffer(rows, np.float32).reshape(wanted, n_vocab)
