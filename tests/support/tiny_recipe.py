"""What the metadata of each tiny model says: the keys that convert_hf_to_gguf.py writes for real models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Value = bool | int | float | str | list[int] | list[float] | list[bool] | list[str]

VOCAB = 128
ROPE_ONLY = (r"^rope_f", r"\.scale$", r"input_scale$")
NO_BIAS = (*ROPE_ONLY, r"attn_(q|k|v|qkv|output|out)\.bias$", r"ffn_(gate|up|down)\.bias$")
TIED = (*NO_BIAS, r"^output\.(weight|bias)$")


@dataclass(frozen=True)
class Recipe:
    """One tiny model: `metadata` has the keys after "<arch>.", `other` keys without that prefix; `omit` are patterns of
    tensors that real files lack."""

    arch: str
    metadata: Mapping[str, Value]
    variant: str = ""
    omit: tuple[str, ...] = NO_BIAS
    joined_qkv: bool = False
    weight_type: str = "F32"
    other: Mapping[str, Value] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.arch}:{self.variant}" if self.variant else self.arch

    @property
    def n_layer(self) -> int:
        count = self.metadata["block_count"]
        assert isinstance(count, int)
        return count

    def keys(self) -> dict[str, Value]:
        own = {f"{self.arch}.{key}": value for key, value in self.metadata.items()}
        return {"general.type": "model", "general.name": "tiny", **own, **TOKENIZER, **self.other}


def _tokenizer() -> dict[str, Value]:
    """A byte-level BPE of printable ASCII, newline, space and 30 merges."""
    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    pairs = [f"Ġ {letter}" for letter in "taoiswcbphfm"]
    pairs += [f"{a} {b}" for a, b in zip("hieroaoeaieian", "enrennrntsstrd", strict=True)]
    pairs += ["Ġt he", "Ġa nd", "Ġo f", "in g"]
    tokens = letters + [pair.replace(" ", "") for pair in pairs]
    tokens += ["<|begin|>", "<|end|>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (VOCAB - 2) + [3, 3],
        "tokenizer.ggml.merges": pairs,
        "tokenizer.ggml.bos_token_id": VOCAB - 2,
        "tokenizer.ggml.eos_token_id": VOCAB - 1,
    }


TOKENIZER = _tokenizer()
RMS: dict[str, Value] = {"attention.layer_norm_rms_epsilon": 1e-5}
LN: dict[str, Value] = {"attention.layer_norm_epsilon": 1e-5}
ROPE: dict[str, Value] = {"rope.dimension_count": 16, "rope.freq_base": 10000.0}
HEAD: dict[str, Value] = {"attention.key_length": 16, "attention.value_length": 16}
VOCAB_SIZE: dict[str, Value] = {"vocab_size": VOCAB}
MOE: dict[str, Value] = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 48}
SWA: dict[str, Value] = {"attention.sliding_window": 16}


def layers(
    n: int, *parts: Mapping[str, Value], heads: int = 4, kv: int | list[int] = 2, ff: int = 96, embd: int = 64
) -> dict[str, Value]:
    """The keys every decoder has, `n` layers, with `parts` merged over them."""
    out: dict[str, Value] = {
        "block_count": n,
        "context_length": 512,
        "embedding_length": embd,
        "feed_forward_length": ff,
        "attention.head_count": heads,
        "attention.head_count_kv": kv,
    }
    for part in parts:
        out |= part
    return out


def sliding(n: int, period: int, *, full_first: bool = False) -> dict[str, Value]:
    """A window of 16 tokens and, for each of `n` layers, whether it slides: all but one in `period` do."""
    full = 0 if full_first else period - 1
    return SWA | {"attention.sliding_window_pattern": [i % period != full for i in range(n)]}


LLAMA = (RMS, ROPE, VOCAB_SIZE)
YARN: dict[str, Value] = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 128,
}
SIGMOID: dict[str, Value] = {"expert_gating_func": 2, "expert_weights_norm": True, "expert_weights_scale": 1.5}
SHARED: dict[str, Value] = {"expert_shared_count": 1}
SHARED_FF: dict[str, Value] = {"expert_shared_feed_forward_length": 32}
MLA: dict[str, Value] = {
    "attention.kv_lora_rank": 32,
    "attention.key_length": 40,
    "attention.value_length": 32,
    "attention.key_length_mla": 24,
    "attention.value_length_mla": 16,
    "rope.dimension_count": 8,
}
Q_LORA: dict[str, Value] = {"attention.q_lora_rank": 24}
NO_ROPE_SCALING: dict[str, Value] = {"rope.scaling.type": "none"}


def lead(n: int) -> dict[str, Value]:
    """The first `n` layers have no experts."""
    return {"leading_dense_block_count": n}
