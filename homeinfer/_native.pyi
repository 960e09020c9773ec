from typing_extensions import CapsuleType

def capture_new(
    ggml_get_name: int, ggml_nbytes: int, ggml_backend_tensor_get: int, node_name: str, /
) -> CapsuleType: ...
def capture_pointers(capsule: CapsuleType, /) -> tuple[int, int]: ...
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
) -> CapsuleType:
    """A window's runner. decode, logits_ith, to_float: addresses (to_float 0: rows are float32). capture None: logits
    come out. scale: what hidden states are multiplied by on the way in. embedding: a buffer of n_rows rows, or None."""

def runner_forward(capsule: CapsuleType, n: int, index: object, rows: object, /) -> tuple[int, bytes, float]:
    """Run n tokens: llama_decode's status, what came out (float32), microseconds computing.

    index: positions, sequences (int32 [n] each), wanted (uint8 [n]); rows: int32 [n] or float32 [n, n_embd].
    Raises ValueError for what does not fit the window; nothing of it has reached llama.cpp then.
    """

def batch_layout() -> tuple[int, ...]: ...
def spin(n: int, /) -> None: ...
