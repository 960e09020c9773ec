"""What a LayerWindow is made of. Needs little memory: an idle agent imports it."""

from __future__ import annotations

import msgspec

from homeinfer.engine.embedding import EmbeddingSource


class WindowSpec(msgspec.Struct, frozen=True):
    """Everything a LayerWindow is made of.

    path: a window file, or the model itself when the window is all of it (then tokens go in as they are).
    first, last, n_layer: it holds layers [first, last) of n_layer; hidden states are embedding_length wide.
    embedding: where the first window takes its rows from; input_scale: what hidden states are multiplied by
    on the way in (the inverse of a scale in the graph).
    resident: weights are read into memory and repacked for the CPU; otherwise the file is mapped.
    gpu_layers: layers on a GPU where llama.cpp has one (-1: all); gpu: its number in gpus.gpu_devices(), None for those
    that llama.cpp chooses. n_ctx: positions of one sequence. can_shift:
    model.architectures.can_shift.
    """

    path: str
    first: int
    last: int
    n_layer: int
    n_ctx: int
    embedding_length: int
    embedding: EmbeddingSource | None = None
    input_scale: float = 1.0
    resident: bool = True
    gpu_layers: int = 0
    gpu: int | None = None
    n_batch: int = 512
    n_seq: int = 1
    n_threads: int = 2
    flash_attention: bool = False
    can_shift: bool = True
