"""Architectures that homeinfer does not cut, and what is known of why."""

from __future__ import annotations

_ENCODER = "an embedding model"
_DRAFT = "a draft for another model"
_DIFFUSION = "a diffusion model"
_SPEECH = "a model that writes speech"
NOT_GENERATING: dict[str, str] = {
    "clip": "a vision or audio projector",
    **dict.fromkeys(
        (
            "bert",
            "modern-bert",
            "nomic-bert",
            "nomic-bert-moe",
            "neo-bert",
            "jina-bert-v2",
            "jina-bert-v3",
            "eurobert",
            "gemma-embedding",
            "llama-embed",
            "t5encoder",
        ),
        _ENCODER,
    ),
    **dict.fromkeys(("dream", "llada", "llada-moe", "rnd1"), _DIFFUSION),
    **dict.fromkeys(("dflash", "eagle3", "gemma4-assistant"), _DRAFT),
    **dict.fromkeys(("pockettts", "qwen3tts"), _SPEECH),
    "wavtokenizer-dec": "an audio decoder",
}
"""Architectures that write no text, or not token by token, and what they are."""

_NORM_IN_FRONT = "llama.cpp norms whatever enters layer 0, hidden states of later layers too"
_STREAMS = "several streams of hidden states pass from layer to layer, and a window passes one"
_FIRST_VALUES = "every layer takes in what layer 0 computed"

REFUSED: dict[str, str] = {
    "arwkv7": _FIRST_VALUES,
    "baichuan": "llama.cpp takes its position code (7B: RoPE, 13B: ALiBi) from the number of layers",
    "bloom": _NORM_IN_FRONT,
    "chameleon": "no test has compared its windows with the whole model",
    "cogvlm": "llama.cpp takes hidden states that come in for an image's, which have weights of their own",
    "deepseek4": _STREAMS,
    "dots3note": "llama.cpp ends on the tests' small model of it, so that none compares its windows with the whole",
    "gemma3n": "every layer takes in embeddings of the token, and layers share the keys and values of others",
    "glm5-next": _STREAMS,
    "gptj": "llama.cpp has no graph of it",
    "graniteswitch": "an extra layer that routes between adapters is read by all others",
    "hrm_text": "its layers run several times over, in stacks",
    "hy_v4": _STREAMS,
    "kimi-k3": "its layers take in the sums of the blocks of layers before them",
    "minicpm3": "llama.cpp takes the scale of its residuals from the number of layers",
    "minimax-01": "llama.cpp takes the decay of linear attention from the layer's number and their number",
    "muse-glimmer": _NORM_IN_FRONT,
    "qwen4exp": _STREAMS,
    "rwkv6": _NORM_IN_FRONT,
    "rwkv7": _FIRST_VALUES,
    "t5": "it is an encoder and a decoder, each with layers of its own",
    "talkie": _NORM_IN_FRONT,
}
"""Architectures that write text, but run only as a whole, and why."""
