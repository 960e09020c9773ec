"""What a file made to a budget says of itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import gguf

from homeinfer.model.header import Header, MetaValue, ValueType
from homeinfer.quant.allocate import Allocation

_FILE_TYPES = {
    "IQ1_S": "MOSTLY_IQ1_S", "IQ1_M": "MOSTLY_IQ1_M", "IQ2_XXS": "MOSTLY_IQ2_XXS", "IQ2_XS": "MOSTLY_IQ2_XS",
    "IQ2_S": "MOSTLY_IQ2_S", "IQ3_XXS": "MOSTLY_IQ3_XXS", "IQ3_S": "MOSTLY_IQ3_S", "IQ4_XS": "MOSTLY_IQ4_XS",
    "IQ4_NL": "MOSTLY_IQ4_NL", "Q2_K": "MOSTLY_Q2_K", "Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_M",
    "Q4_0": "MOSTLY_Q4_0", "Q4_1": "MOSTLY_Q4_1", "Q5_0": "MOSTLY_Q5_0", "Q5_K": "MOSTLY_Q5_K_M",
    "Q5_1": "MOSTLY_Q5_1", "Q6_K": "MOSTLY_Q6_K", "Q8_0": "MOSTLY_Q8_0", "BF16": "MOSTLY_BF16", "F32": "ALL_F32",
}  # fmt: skip


def dynamic_metadata(
    header: Header,
    types: Mapping[str, str],
    rules: Mapping[str, str],
    limit_bytes: int = 0,
    allocation: Allocation | None = None,
) -> dict[str, MetaValue]:
    """Keys that the file has beside the source's; rules are the recipe's own (`--tensor`).

    Their bytes do not depend on the types, the limit and the allocation, so that a budget can count them before.
    """
    weights: Counter[str] = Counter()
    for tensor in header.tensors:
        if tensor.name in types:
            weights[types[tensor.name]] += tensor.n_weights
    most = weights.most_common(1)[0][0] if weights else ""
    file_type = gguf.LlamaFileType[_FILE_TYPES.get(most, "MOSTLY_F16")]
    kld = {name: option.kld for name, option in allocation.choices.items()} if allocation else {}
    shares = [float(kld.get(tensor.name, 0.0)) for tensor in header.tensors]
    return {
        "general.file_type": MetaValue(ValueType.UINT32, int(file_type)),
        "homeinfer.recipe": MetaValue(ValueType.STRING, "dynamic"),
        "homeinfer.limit_bytes": MetaValue(ValueType.UINT64, limit_bytes),
        "homeinfer.predicted_kld": MetaValue(ValueType.FLOAT32, allocation.kld if allocation else 0.0),
        "homeinfer.tensor_kld": MetaValue(ValueType.ARRAY, shares, ValueType.FLOAT32),
        "homeinfer.why": MetaValue(
            ValueType.STRING, "least predicted KLD: sensitivity x (weights' + activations' error), tensors in order"
        ),
        **{key: MetaValue(ValueType.STRING, text) for key, text in rules.items()},
    }
