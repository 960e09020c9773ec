from collections.abc import Sequence

from typing_extensions import CapsuleType

def capture_new(
    ggml_get_name: int, ggml_nbytes: int, ggml_backend_tensor_get: int, node_name: str, /
) -> CapsuleType: ...
def capture_pointers(capsule: CapsuleType, /) -> tuple[int, int]: ...
def capture_stream(capsule: CapsuleType, stream: CapsuleType, /) -> None:
    """From now on the graph waits for the streamed weights that its nodes touch."""

def runner_new(
    *,
    decode: int,
    logits_ith: int,
    context: int,
    capture: CapsuleType | None,
    capacity: int,
    n_embd: int,
    n_vocab: int,
    n_seq: int,
    n_ctx: int,
    sections: int,
    scale: float,
    takes_tokens: bool,
    embedding: object,
    n_rows: int,
    row_bytes: int,
    to_float: int,
    only_wanted: bool,
) -> CapsuleType:
    """A window's runner. decode, logits_ith, to_float: addresses (to_float 0: rows are float32). capture None: logits
    come out. only_wanted: what is captured are rows of wanted tokens only. scale: what hidden states are multiplied by
    on the way in. embedding: a buffer of n_rows rows, or None."""

def runner_forward(capsule: CapsuleType, n: int, index: object, rows: object, /) -> tuple[int, bytes, float]:
    """Run n tokens: llama_decode's status, what came out (float32), microseconds computing.

    index: positions, sequences (int32 [n] each), wanted (uint8 [n]); rows: int32 [n] or float32 [n, n_embd].
    Raises ValueError for what does not fit the window; nothing of it has reached llama.cpp then.
    """

def batch_layout() -> tuple[int, ...]: ...
def tap_new(
    ggml_nbytes: int,
    ggml_backend_tensor_get: int,
    mul_mat: int,
    mul_mat_id: int,
    weights: Sequence[tuple[str, int, int, int, object, object]],
    /,
) -> CapsuleType:
    """Two addresses, two numbers of enum ggml_op, and per weight (name, mode, n_in, n_mat, values, counts).

    Mode 0 adds squares to values (float64 [n_mat, n_in]) and rows to counts (int64 [n_mat]; only the first when no
    experts are chosen); mode 1 copies rows to values (float32 [any, n_in]), counts is None. Buffers stay the
    caller's and are held. Raises ValueError for buffers that are too small, and for names that come twice.
    """

def tap_pointers(capsule: CapsuleType, /) -> tuple[int, int]: ...
def tap_begin(capsule: CapsuleType, /) -> None:
    """To be called before every llama_decode: rows are written from the start of their buffers again."""

def tap_state(capsule: CapsuleType, /) -> tuple[str | None, int, list[tuple[int, int, int]]]:
    """What went wrong since tap_begin (or None), with which weight, and per weight: kind (0 not seen yet, 1 a plain
    product, 2 one with chosen experts), rows in its buffer, index of the weight whose buffer holds its rows (or -1)."""

def tensor_fields(address: int, /) -> tuple[int, int, tuple[int, ...], tuple[int, ...], tuple[int, ...], int, str]:
    """(type, op, ne, nb, the first three src, data, name) of a struct ggml_tensor as compiled here."""

def round_super_block(
    type: int,
    rows: int,
    n: int,
    weights: object,
    blocks: object,
    upper: object,
    inverse_diagonal: object,
    factors: object,
    first: object,
    second: object,
    first_of: object,
    second_of: object,
    code: object,
    /,
) -> None:
    """One super-block column of n (up to 256) weights with error feedback; the GIL is released meanwhile.

    weights: float32 [rows, n], become the errors e with proxy loss sum(e^2); blocks: uint8 [rows, bytes], whose scales
    come in and whose codes and scales go out; upper: float32 [n, 256], inverse_diagonal: float32 [n] (Factor); factors:
    float32 [any, 2], scale and minimum are tried times each. A grid is given as its vectors' different halves
    first, second (float32 [any, vector / 2]), which of them each entry has (first_of, second_of: uint8 [entries]) and
    its index in the format's grid (code: uint16 [entries]); empty for types without. Raises ValueError for what does
    not fit together.
    """

def half_bits(values: object, bits: object, /) -> None:
    """Rounds float32 values to halves: their bits go to `bits` (uint16), what they stand for stays in `values`."""

def stream_new(limit: int, threads: int, piece: int, /) -> CapsuleType:
    """Streams at most `limit` bytes of weights at a time with so many reader threads, `piece` bytes (whole pages) per
    request. Raises NotImplementedError elsewhere than on Linux."""

def stream_add(
    stream: CapsuleType, fd: int, window: int, kept: bool, spans: tuple[tuple[int, int, int, int], ...], /
) -> int:
    """A group, read and let go as one (`kept`: never), as (offset in the file, address, bytes) in whole pages
    and the bytes of the tensor before them, in a page that it shares with another and that stays:
    anonymous memory takes the place of what is at the addresses, at once. The order of a window's calls is the order
    of use until a graph has shown it, that of windows for good. To be called before stream_start. Raises OSError."""

def stream_start(stream: CapsuleType, /) -> None: ...
def stream_done(stream: CapsuleType, /) -> None:
    """To be called after every graph: its last layer may go."""

def stream_resize(stream: CapsuleType, limit: int, /) -> None: ...
def stream_state(stream: CapsuleType, /) -> tuple[int, int, float, int, int, int, int, int]:
    """Bytes read, waits, milliseconds waited, bytes held, most bytes held, problem (0, an errno, -1: a file ended
    early), number of the group that has it (or -1), whether it is closed."""

def stream_close(stream: CapsuleType, /) -> None:
    """Ends the threads, after the requests under way; nothing is written to any address after it."""

def spin(n: int, /) -> None: ...
def rows_pack(kind: int, rows: object, width: int, /) -> bytes:
    """Rows of float32 as they travel. kind: 0 f32, 1 f16, 2 bf16, 3 q8 (homeinfer.cluster.wire.rows)."""

def rows_unpack(kind: int, rows: object, n: int, width: int, /) -> object:
    """n rows of float32 from what came, the same object for f32. Raises ValueError for another size and for what is
    not a number."""
