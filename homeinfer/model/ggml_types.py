"""The tensor types of a GGUF file and what they weigh (ggml_blck_size, ggml_type_size)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

TYPE_NUMBERS: Mapping[str, int] = MappingProxyType(
    {
        "F32": 0,
        "F16": 1,
        "Q4_0": 2,
        "Q4_1": 3,
        "Q5_0": 6,
        "Q5_1": 7,
        "Q8_0": 8,
        "Q8_1": 9,
        "Q2_K": 10,
        "Q3_K": 11,
        "Q4_K": 12,
        "Q5_K": 13,
        "Q6_K": 14,
        "Q8_K": 15,
        "IQ2_XXS": 16,
        "IQ2_XS": 17,
        "IQ3_XXS": 18,
        "IQ1_S": 19,
        "IQ4_NL": 20,
        "IQ3_S": 21,
        "IQ2_S": 22,
        "IQ4_XS": 23,
        "I8": 24,
        "I16": 25,
        "I32": 26,
        "I64": 27,
        "F64": 28,
        "IQ1_M": 29,
        "BF16": 30,
        "TQ1_0": 34,
        "TQ2_0": 35,
        "MXFP4": 39,
        "NVFP4": 40,
        "Q1_0": 41,
        "Q2_0": 42,
    }
)
"""Type name to its number in a tensor table (enum ggml_type)."""

TYPE_SIZES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "F32": (1, 4),
        "F16": (1, 2),
        "Q4_0": (32, 18),
        "Q4_1": (32, 20),
        "Q5_0": (32, 22),
        "Q5_1": (32, 24),
        "Q8_0": (32, 34),
        "Q8_1": (32, 36),
        "Q2_K": (256, 84),
        "Q3_K": (256, 110),
        "Q4_K": (256, 144),
        "Q5_K": (256, 176),
        "Q6_K": (256, 210),
        "Q8_K": (256, 292),
        "IQ2_XXS": (256, 66),
        "IQ2_XS": (256, 74),
        "IQ3_XXS": (256, 98),
        "IQ1_S": (256, 50),
        "IQ4_NL": (32, 18),
        "IQ3_S": (256, 110),
        "IQ2_S": (256, 82),
        "IQ4_XS": (256, 136),
        "I8": (1, 1),
        "I16": (1, 2),
        "I32": (1, 4),
        "I64": (1, 8),
        "F64": (1, 8),
        "IQ1_M": (256, 56),
        "BF16": (1, 2),
        "TQ1_0": (256, 54),
        "TQ2_0": (256, 66),
        "MXFP4": (32, 17),
        "NVFP4": (64, 36),
        "Q1_0": (128, 18),
        "Q2_0": (64, 18),
    }
)
"""Type name to (weights per block, bytes per block)."""

TYPE_NAMES: Mapping[int, str] = MappingProxyType({number: name for name, number in TYPE_NUMBERS.items()})

REMOVED_TYPES: Mapping[int, str] = MappingProxyType(
    {
        4: "Q4_2",
        5: "Q4_3",
        31: "Q4_0_4_4",
        32: "Q4_0_4_8",
        33: "Q4_0_8_8",
        36: "IQ4_NL_4_4",
        37: "IQ4_NL_4_8",
        38: "IQ4_NL_8_8",
    }
)
"""Numbers that llama.cpp once used and no longer reads."""
