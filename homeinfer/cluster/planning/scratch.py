"""What llama.cpp computes in: the buffers of a context beside weights and cache. Pure functions of a header.

A context's compute buffer is as large as the widest moment of a layer for a whole batch (ggml_gallocr reuses what is
no longer needed), in float32. Without flash attention that is nearly always the scores, heads x context x batch.
"""

from __future__ import annotations

from homeinfer.cluster.planning.attention import layer_widths, sliding_flags, state_flags
from homeinfer.cluster.planning.plan import Workload
from homeinfer.model.cut_rules import per_layer
from homeinfer.model.header import Header

CELL_STEP = 256
"""llama.cpp rounds a context up to so many positions (llama_context), and attends to as many (get_n_kv)."""
_FLOAT_BYTES = 4
_MARGIN = 1.02
"""Small inputs, and what an architecture keeps beside: its models' buffers were up to 2 % larger than the sum here."""
_WORK_BYTES = 34 / 32
"""The inputs of a matrix product are rounded to Q8_0 or the like in a buffer of the CPU backend's own."""


def cells(workload: Workload) -> int:
    """Positions that a context has room for, those of all sequences, each of which has a buffer of its own."""
    return workload.sequences * sequence_cells(workload)


def sequence_cells(workload: Workload) -> int:
    """Positions of one sequence's buffer."""
    return -(-workload.n_ctx // CELL_STEP) * CELL_STEP


def scratch_bytes(header: Header, workload: Workload) -> int:
    """What one llama.cpp context of a window that is not the last computes in, for a whole batch."""
    n_embd = int(header.arch_get("embedding_length", 0))
    widths = layer_widths(header)
    n_cells = sequence_cells(workload)
    masks = n_cells * (2 if _has_two_masks(header) else 1)
    heads = max(per_layer(header, "attention.head_count"), default=0) + _indexer_heads(header)
    attention = heads * n_cells + 3 * n_embd + widths.attention
    rest = 4 * n_embd + max(widths.feed_forward, widths.experts, widths.recurrent)
    batch = batch_tokens(workload)
    work = round(_WORK_BYTES * batch * max(widths.feed_forward // 3, n_embd))
    return round(_MARGIN * _FLOAT_BYTES * batch * (masks + max(attention, rest))) + work


def scratch_logits_bytes(header: Header, workload: Workload, n_vocab: int) -> int:
    """How much more the last window computes in: a batch's logits, made when the scores are no longer needed, and the
    logits that each sequence's caller reads."""
    n_embd = int(header.arch_get("embedding_length", 0))
    logits = _FLOAT_BYTES * batch_tokens(workload) * (n_vocab + 4 * n_embd)
    return max(logits - scratch_bytes(header, workload), 0) + _FLOAT_BYTES * n_vocab * workload.sequences


def batch_tokens(workload: Workload) -> int:
    """Tokens of the largest batch that llama.cpp makes room for."""
    return min(workload.n_batch, cells(workload))


def _indexer_heads(header: Header) -> int:
    """Sparse attention scores all positions first (deepseek32, glm-dsa)."""
    count = header.arch_get("attention.indexer.head_count", 0)
    return count + 1 if isinstance(count, int) and count > 0 else 0


def _has_two_masks(header: Header) -> bool:
    """A cache with sliding windows has a mask beside that of full attention."""
    return any(sliding_flags(header)) and any(flag is False for flag in state_flags(header))
