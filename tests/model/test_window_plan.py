"""What window files say, and where a model is cut: decided from headers alone."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homeinfer.errors import HomeinferError
from homeinfer.model.architectures import input_scale, is_exact
from homeinfer.model.header import Header
from homeinfer.model.window_plan import (
    PLACEHOLDER_VOCAB,
    WindowPlan,
    layer_bytes,
    plan_window,
    split_layers,
    why_not,
)
from tests.support.headers import header_of

N_EMBD, N_VOCAB = 64, 1000
GLOBALS = {"token_embd.weight": (N_EMBD, N_VOCAB), "output_norm.weight": (N_EMBD,)}


def blocks(n: int, *names: str) -> dict[str, tuple[int, ...]]:
    """Tensors of n layers, after those of the whole model."""
    names = names or ("attn_norm.weight",)
    return GLOBALS | {f"blk.{i}.{name}": (N_EMBD,) for i in range(n) for name in names}


def said(plan: WindowPlan, key: str) -> object:
    """What the window says of the architecture's key; None where it says nothing."""
    architecture = plan.metadata["general.architecture"].value
    value = plan.metadata.get(f"{architecture}.{key}")
    return None if value is None else value.value


def names(plan: WindowPlan) -> dict[str, tuple[int, ...]]:
    return {t.name: t.shape for t in plan.tensors}


@given(st.integers(1, 60), st.data())
def test_equal_layers_are_split_evenly(n: int, data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, n))
    windows = split_layers(header_of("llama", layers=n, tensors={f"blk.{i}.w": (32,) for i in range(n)}), parts)
    assert [layer for first, last in windows for layer in range(first, last)] == list(range(n))
    lengths = [last - first for first, last in windows]
    assert len(lengths) == parts
    assert max(lengths) - min(lengths) <= 1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.data())
def test_no_other_split_is_more_even(sizes: list[int], data: st.DataObject) -> None:
    n = len(sizes)
    parts = data.draw(st.integers(1, n))
    header = header_of("llama", layers=n, tensors={f"blk.{i}.w": (size,) for i, size in enumerate(sizes)})
    assert layer_bytes(header, n) == [4 * size for size in sizes]

    def unevenness(cuts: tuple[int, ...]) -> int:
        return sum(sum(sizes[a:b]) ** 2 for a, b in itertools.pairwise((0, *cuts, n)))

    chosen = tuple(first for first, _ in split_layers(header, parts)[1:])
    assert unevenness(chosen) == min(unevenness(cuts) for cuts in itertools.combinations(range(1, n), parts - 1))


@settings(max_examples=40)
@given(st.lists(st.booleans(), min_size=2, max_size=24), st.integers(1, 6))
def test_a_hybrid_is_split_so_that_each_window_has_both_kinds(recurrent: list[bool], parts: int) -> None:
    n = len(recurrent)
    header = header_of("qwen3next", layers=n, attention__recurrent_layers=recurrent)
    try:
        windows = split_layers(header, parts)
    except HomeinferError:
        assert parts > 1
        return
    assert [layer for first, last in windows for layer in range(first, last)] == list(range(n))
    if parts > 1:
        assert all(len(set(recurrent[first:last])) == len(set(recurrent)) for first, last in windows)


def test_output_counts_to_the_last_layer() -> None:
    header = header_of("llama", layers=2, tensors={**GLOBALS, "blk.0.w": (32,), "blk.1.w": (32,)})
    assert layer_bytes(header, 2) == [128, 128 + 4 * N_EMBD * N_VOCAB]


def test_more_windows_than_places_to_cut_are_refused_with_the_number_there_is() -> None:
    with pytest.raises(HomeinferError, match="this model of 3 layers can be cut into at most 3 windows, not 5"):
        split_layers(header_of("llama", layers=3), 5)
    with pytest.raises(HomeinferError, match="this model of 12 layers can be cut into at most 3 windows, not 4"):
        split_layers(header_of("smollm3", layers=12), 4)


def test_no_windows_at_all_are_refused() -> None:
    with pytest.raises(HomeinferError, match="one window at least, not 0"):
        split_layers(header_of("llama", layers=3), 0)


@pytest.mark.parametrize(("first", "last"), [(-1, 2), (2, 2), (3, 2), (0, 5), (4, 5)])
def test_layers_that_the_model_does_not_have_are_refused(first: int, last: int) -> None:
    with pytest.raises(HomeinferError, match="can't be a window: the model has layers 0 to 3"):
        plan_window(header_of("llama", layers=4, tensors=blocks(4)), first, last)


def test_layers_are_renumbered_and_others_left_out() -> None:
    plan = plan_window(header_of("llama", layers=4, tensors=blocks(4, "attn_norm.weight", "ffn_norm.weight")), 2, 4)
    assert said(plan, "block_count") == 2
    sources = {t.name: t.source.name for t in plan.tensors if t.source is not None and t.name.startswith("blk.")}
    assert sources == {
        f"blk.{i}.{part}_norm.weight": f"blk.{i + 2}.{part}_norm.weight" for i in (0, 1) for part in ("attn", "ffn")
    }


def test_only_the_last_window_holds_a_vocabulary() -> None:
    header = header_of("llama", layers=4, tensors={**blocks(4), "output.weight": (N_EMBD, N_VOCAB)})
    first, last = plan_window(header, 0, 2), plan_window(header, 2, 4)
    assert said(first, "vocab_size") == PLACEHOLDER_VOCAB
    assert names(first)["token_embd.weight"] == names(first)["output.weight"] == (N_EMBD, PLACEHOLDER_VOCAB)
    assert said(last, "vocab_size") == N_VOCAB
    assert names(last)["output.weight"] == (N_EMBD, N_VOCAB)
    copied = {t.name for t in last.tensors if t.source is not None}
    assert "output.weight" in copied
    assert "token_embd.weight" not in copied
    assert first.metadata["tokenizer.ggml.model"].value == "none"
    assert first.nbytes == sum(t.nbytes for t in first.tensors if t.name.startswith(("blk.", "output_norm")))


def test_tied_embeddings_are_copied_to_the_last_window() -> None:
    plan = plan_window(header_of("llama", layers=2, tensors=blocks(2)), 1, 2)
    assert next(t for t in plan.tensors if t.name == "token_embd.weight").source is not None


def test_what_is_said_of_each_layer_is_sliced() -> None:
    header = header_of(
        "openelm",
        layers=4,
        tensors=blocks(4),
        attention__head_count=[4, 4, 8, 8],
        attention__head_count_kv=[1, 1, 2, 2],
        feed_forward_length=[32, 64, 96, 128],
    )
    plan = plan_window(header, 1, 3)
    assert said(plan, "attention.head_count") == [4, 8]
    assert said(plan, "attention.head_count_kv") == [1, 2]
    assert said(plan, "feed_forward_length") == [64, 96]


def test_the_width_of_a_head_stays_that_of_the_whole_model() -> None:
    """llama.cpp takes embedding_length / head_count of the first layer where the file does not say it."""
    header = header_of("openelm", layers=4, tensors=blocks(4), attention__head_count=[4, 4, 8, 8])
    assert said(plan_window(header, 2, 4), "attention.key_length") == N_EMBD // 4


def test_an_array_that_may_be_one_of_layers_and_is_unknown_is_refused() -> None:
    header = header_of("llama", layers=4, tensors=blocks(4), mystery=[1, 2, 3, 4], triple=[1, 2, 3])
    with pytest.raises(HomeinferError, match="mystery may hold one entry per layer"):
        plan_window(header, 0, 2)


def test_an_array_of_layers_that_is_too_short_is_refused() -> None:
    header = header_of("llama", layers=4, tensors=blocks(4), feed_forward_length=[1, 2, 3])
    with pytest.raises(HomeinferError, match="feed_forward_length has 3 entries for 4 layers"):
        plan_window(header, 0, 2)


def test_layers_for_multi_token_prediction_are_dropped() -> None:
    header = header_of("glm4moe", layers=5, tensors=blocks(5), nextn_predict_layers=1, leading_dense_block_count=1)
    assert split_layers(header, 4) == ((0, 1), (1, 2), (2, 3), (3, 4))
    plan = plan_window(header, 3, 4)
    assert said(plan, "nextn_predict_layers") is None
    assert "blk.1.attn_norm.weight" not in names(plan)
    assert "blk.0.attn_norm.weight" in names(plan)


def test_the_dense_lead_ends_where_it_did() -> None:
    header = header_of("dots1", layers=6, tensors=blocks(6), leading_dense_block_count=3)
    assert [said(plan_window(header, c, 6), "leading_dense_block_count") for c in (0, 1, 3, 5)] == [3, 2, 0, 0]


def test_sliding_windows_keep_their_place() -> None:
    header = header_of("gemma3", layers=12, tensors=blocks(12), attention__sliding_window=512)
    assert said(plan_window(header, 4, 7), "attention.sliding_window_pattern") == [True, False, True]
    alone = plan_window(header, 5, 6)
    assert said(alone, "attention.sliding_window") is None
    assert said(alone, "attention.sliding_window_pattern") is None


def test_a_window_needs_a_sliding_layer_where_llama_cpp_has_no_other_way() -> None:
    header = header_of("gpt-oss", layers=4, tensors=blocks(4), attention__sliding_window=128)
    assert [why_not(header, i, i + 1) is None for i in range(4)] == [True, False, True, False]


def test_gemma3_27b_keeps_its_scale_of_attention() -> None:
    header = header_of("gemma3", layers=62, tensors=blocks(62, "attn_q_norm.weight"), attention__key_length=24)
    for length, factor in ((61, (24 / 16) ** 0.5), (62, 1.0)):
        plan = plan_window(header, 0, length)
        factors = [t.factor for t in plan.tensors if t.name.endswith("attn_q_norm.weight")]
        assert factors == [pytest.approx(factor)] * length
        assert is_exact(header, 0, length) == (factor == 1.0)


def test_a_part_of_another_gemma3_is_not_taken_for_the_27b() -> None:
    header = header_of("gemma3", layers=70, tensors=blocks(70, "attn_q_norm.weight"), attention__key_length=24)
    factors = [t.factor for t in plan_window(header, 8, 70).tensors if t.name.endswith("attn_q_norm.weight")]
    assert factors == [pytest.approx((16 / 24) ** 0.5)] * 62


def test_gemma2_27b_gets_a_scale_of_q() -> None:
    header = header_of("gemma2", layers=46, tensors=blocks(46, "attn_q.weight"), attention__key_length=24)
    scales = [t for t in plan_window(header, 10, 12).tensors if t.name.endswith(".scale")]
    assert [t.name for t in scales] == ["blk.0.attn_q.scale", "blk.1.attn_q.scale"]
    assert [t.fill for t in scales] == [pytest.approx((24 / 16) ** 0.5)] * 2
    assert [t.source for t in scales] == [None] * 2


def test_gemma_divides_by_what_the_graph_multiplies_with() -> None:
    header = header_of("gemma", layers=4, tensors=blocks(4))
    assert [input_scale(header, c) for c in (0, 1)] == [1.0, 1 / 8]


def _deepseek(layers: int, *, q_lora: bool, vocabulary: int = N_VOCAB) -> Header:
    q = {f"blk.{i}.attn_q_a.weight": (N_EMBD,) for i in range(layers)} if q_lora else {}
    embedding = {"token_embd.weight": (1, vocabulary)}
    return header_of("deepseek2", layers=layers, tensors={**blocks(layers), **q, **embedding})


def test_parts_of_deepseek_are_not_taken_for_the_lite_model() -> None:
    header = _deepseek(61, q_lora=True)
    assert [k for k in range(1, 61) if why_not(header, 0, k) is not None] == [26, 27]
    assert [k for k in range(1, 61) if why_not(header, 61 - k, 61) is not None] == [26, 27]
    assert said(plan_window(header, 0, 30), "attention.q_lora_rank") is None
    assert why_not(_deepseek(61, q_lora=True, vocabulary=128256), 13, 61) is not None


def test_parts_of_the_lite_model_say_that_they_have_no_q_lora() -> None:
    header = _deepseek(27, q_lora=False)
    assert all(why_not(header, 0, k) is None for k in range(1, 28))
    assert said(plan_window(header, 0, 13), "attention.q_lora_rank") == 0
    assert said(plan_window(header, 0, 13), "expert_gating_func") == 1


def test_parts_of_glm_flash_keep_its_gating_function() -> None:
    assert said(plan_window(_deepseek(47, q_lora=True, vocabulary=154880), 0, 20), "expert_gating_func") == 2


def test_exaone4_is_cut_only_without_its_sliding_windows() -> None:
    assert why_not(header_of("exaone4", layers=30), 0, 15) is None
    with pytest.raises(HomeinferError, match=r"this model can't be cut into windows: .* gives exaone4"):
        split_layers(header_of("exaone4", layers=64), 2)


def test_llama4_is_cut_at_multiples_of_both_its_steps() -> None:
    header = header_of("llama4", layers=24, interleave_moe_layer_step=3)
    assert [c for c in range(1, 24) if why_not(header, 0, c) is None and why_not(header, c, 24) is None] == [12]
    assert why_not(header_of("llama4", layers=10, interleave_moe_layer_step=1), 8, 10) is not None


def test_laguna_windows_start_with_the_kind_of_layer_that_decides_the_rotation() -> None:
    header = header_of(
        "laguna", layers=8, attention__sliding_window=16, rope__dimension_count=8, rope__dimension_count_swa=16
    )
    assert [why_not(header, first, last) is None for first, last in ((4, 8), (1, 4), (1, 5), (3, 8))] == [
        True,
        True,
        False,
        False,
    ]


def test_a_window_starts_with_attention_where_the_model_does() -> None:
    header = header_of("deci", layers=4, attention__head_count=[4, 0, 4, 4], attention__head_count_kv=[2, 0, 2, 2])
    assert [why_not(header, c, 4) is None for c in (1, 2, 3)] == [False, True, True]


def test_images_between_the_layers_are_forgotten() -> None:
    header = header_of(
        "qwen3vl", layers=4, tensors=blocks(4), n_deepstack_layers=3, rope__dimension_sections=[1, 1, 1, 1]
    )
    plan = plan_window(header, 1, 3)
    assert said(plan, "n_deepstack_layers") is None
    assert said(plan, "rope.dimension_sections") == [1, 1, 1, 1]


def test_old_minicpm_files_keep_the_residual_scale_of_all_layers() -> None:
    plan = plan_window(header_of("minicpm", layers=40, tensors=blocks(40)), 20, 40)
    assert said(plan, "residual_scale") == pytest.approx(1.4 / 40**0.5)
    assert said(plan, "embedding_scale") == 1.0


def test_positions_are_added_in_the_first_window_only() -> None:
    header = header_of("gpt2", layers=2, tensors={**blocks(2), "position_embd.weight": (N_EMBD, 128)})
    for first, copied in ((0, True), (1, False)):
        tensor = next(t for t in plan_window(header, first, first + 1).tensors if t.name == "position_embd.weight")
        assert (tensor.source is not None) == copied


def test_the_window_file_says_what_the_output_is_called_where_that_differs() -> None:
    header = header_of("nemotron_h", layers=6, tensors=blocks(6), attention__head_count_kv=[0, 2, 0, 0, 2, 0])
    assert plan_window(header, 0, 3).metadata["homeinfer.layer_output"].value == "nemotron_h_block_out-2"
    assert "homeinfer.layer_output" not in plan_window(header, 3, 6).metadata


def test_layers_of_feed_forward_only_are_of_neither_kind() -> None:
    header = header_of(
        "nemotron_h", layers=6, attention__head_count_kv=[0, 2, 0, 0, 2, 0], feed_forward_length=[0, 0, 96, 0, 0, 96]
    )
    assert why_not(header, 1, 6) is None
    assert why_not(header, 1, 3) == "each window of a hybrid model needs a layer with attention and a recurrent one"
