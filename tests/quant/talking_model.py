"""A small F16 llama with a tokenizer: random weights, but a model that reads text, is measured and answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

from tests.quant.f16_model import Tensors, norms, random_matrices
from tests.support.tiny_recipe import TOKENIZER, VOCAB

HEADS, KV_HEADS = 4, 2
TEXT = "the cat sat on the mat, and the other one said: what of it? 12 + 30 = 42;\n"


def write_talking_model(
    path: Path,
    *,
    layers: int = 2,
    embd: int = 256,
    ffn: int = 512,
    tied: bool = True,
    split_tensors: int = 0,
    changed: Mapping[str, float] | None = None,
    zeros: tuple[str, ...] = (),
    metadata: Mapping[str, str] | None = None,
    alignment: int | None = None,
) -> Path:
    """Returns the path, the first part's when it is split. One weight of each tensor of `changed` gets that value,
    which the tensors then have as F32; all weights of `zeros` are 0."""
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split_tensors)
    writer.add_name("talking llama")
    writer.add_block_count(layers)
    writer.add_context_length(512)
    writer.add_embedding_length(embd)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, value in TOKENIZER.items():
        _add(writer, key, value)
    for key, text in (metadata or {}).items():
        writer.add_string(key, text)
    for name, data in _tensors(layers, embd, ffn, tied).items():
        if name in zeros:
            data[:] = 0
        if name in (changed or {}):
            data = data.astype(np.float32)
            data.flat[5] = (changed or {})[name]
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))[0] if split_tensors else path


def write_text(path: Path, repeats: int = 30) -> Path:
    """Some 50 tokens for each of `repeats`."""
    path.write_text("".join(f"{number}: {TEXT}" for number in range(repeats)))
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    match value:
        case str():
            writer.add_string(key, value)
        case int():
            writer.add_uint32(key, value)
        case list():
            writer.add_array(key, value)


def _tensors(layers: int, embd: int, ffn: int, tied: bool) -> Tensors:
    rng = np.random.default_rng(7)
    tensors = random_matrices(rng, layers, VOCAB, embd, ffn, embd // HEADS * KV_HEADS, tied=tied)
    # channels of very different size, as trained models have
    spread = np.exp(rng.standard_normal(embd)).astype(np.float32)
    return tensors | {name: spread / np.float32(np.sqrt(np.square(spread).mean())) for name in norms(layers)}
