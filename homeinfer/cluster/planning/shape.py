"""What planning needs of a model: numbers of its layers, from the header alone."""

from __future__ import annotations

import msgspec


class LayerShape(msgspec.Struct, frozen=True):
    """One layer. nbytes: all weights, of which expert_bytes are routed experts; a token reads expert_share of those.
    kv_bytes: KV cache per position and sequence, which a sliding window stops at kv_window positions (0: never).
    attention_macs: multiplications of attention per token and position that it attends to. state_bytes: recurrent
    state per sequence. largest_bytes: the largest tensor but for routed experts (0: not known)."""

    kind: str
    nbytes: int
    expert_bytes: int = 0
    expert_share: float = 1.0
    kv_bytes: int = 0
    kv_window: int = 0
    state_bytes: int = 0
    attention_macs: int = 0
    largest_bytes: int = 0


class ModelShape(msgspec.Struct, frozen=True):
    """A model as planning sees it.

    output_kind, output_bytes: final norm and output matrix, which the last window holds. embedding_bytes: on the
    head's disk, of which a token reads one row (row_bytes). hidden_bytes: one token's hidden state on the wire in
    float32. scratch_bytes: compute buffers of a device, scratch_logits_bytes: more for the last window.
    allowed[first]: bit `last` says that layers [first, last) can be a window. output_block_bytes: what of a streamed
    output matrix is used at once; 0: all of it, as where tokens are looked up in it too (is_tied) in the model's own
    file.
    """

    name: str
    layers: tuple[LayerShape, ...]
    output_kind: str
    output_bytes: int
    embedding_bytes: int
    hidden_bytes: int
    n_vocab: int
    scratch_bytes: int
    scratch_logits_bytes: int
    allowed: tuple[int, ...]
    has_experts: bool = False
    output_block_bytes: int = 0
    is_tied: bool = True

    def may_cut(self, first: int, last: int) -> bool:
        """Whether layers [first, last) can be a window of their own."""
        return bool(self.allowed[first] >> last & 1)
