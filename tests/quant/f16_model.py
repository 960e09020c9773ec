"""A small F16 model of random weights that llama.cpp quantizes, loads and runs."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

Tensors = dict[str, npt.NDArray[np.float16 | np.float32]]

VOCAB, EMBD, FFN, HEADS, KV_HEADS = 512, 256, 512, 4, 2


def write_f16_model(
    path: Path,
    layers: int = 4,
    embd: int = EMBD,
    alignment: int | None = None,
    split_tensors: int = 0,
    nan_in: str = "",
) -> Path:
    """A llama model without a tokenizer; returns its path, the first part's when it is split."""
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split_tensors)
    writer.add_name("random llama")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(embd)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for name, data in _tensors(layers, embd).items():
        if name == nan_in:
            data.flat[5] = np.nan
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))[0] if split_tensors else path


def _tensors(layers: int, embd: int) -> Tensors:
    tensors = random_matrices(np.random.default_rng(1), layers, VOCAB, embd, FFN, embd // HEADS * KV_HEADS)
    return tensors | {name: np.ones(embd, np.float32) for name in norms(layers)}


def random_matrices(
    rng: np.random.Generator, layers: int, vocab: int, embd: int, ffn: int, kv: int, *, tied: bool = False
) -> Tensors:
    """The F16 weights of a llama model, by name; tied: the embedding is the output matrix, too."""
    shapes = {"token_embd": (vocab, embd)} | ({} if tied else {"output": (vocab, embd)})
    for layer in range(layers):
        for role, rows in (("attn_q", embd), ("attn_k", kv), ("attn_v", kv), ("attn_output", embd)):
            shapes[f"blk.{layer}.{role}"] = (rows, embd)
        shapes[f"blk.{layer}.ffn_gate"] = shapes[f"blk.{layer}.ffn_up"] = (ffn, embd)
        shapes[f"blk.{layer}.ffn_down"] = (embd, ffn)
    return {
        f"{name}.weight": (rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float16)
        for name, shape in shapes.items()
    }


def norms(layers: int) -> list[str]:
    """Names of its other weights."""
    roles = [f"blk.{layer}.{role}" for layer in range(layers) for role in ("attn_norm", "ffn_norm")]
    return [f"{name}.weight" for name in (*roles, "output_norm")]
