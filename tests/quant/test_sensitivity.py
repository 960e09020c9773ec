"""Groups, their fit to layers, and the measurement on a real model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from homeinfer.model.header import Header, MetaValue, TensorInfo, ValueType, read_header
from homeinfer.quant.quantize import quantize
from homeinfer.quant.sensitivity import (
    ASSUMED,
    Group,
    assumed,
    groups_of,
    measure_sensitivity,
    per_tensor,
)
from homeinfer.quant.sensitivity_kept import MeasuredGroup
from homeinfer.quant.tensor_encoding import decode, encode
from tests.quant.f16_model import VOCAB, write_f16_model

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


def header_of(names: list[str]) -> Header:
    return Header(3, (), {}, tuple(TensorInfo(name, (256, 256), "F16", 0, 131072, 0) for name in names))


def layer_names(role: str, layers: int) -> list[str]:
    return [f"blk.{layer}.{role}.weight" for layer in range(layers)]


def measured(group: Group | MeasuredGroup, kld: float | None, error: float = 0.01) -> MeasuredGroup:
    return MeasuredGroup(group.role, group.layers, group.tensors, error, kld, 0.0)


def groups(layers: int, *roles: str, bins: int = 5) -> tuple[Group, ...]:
    names = [name for role in roles for name in layer_names(role, layers)]
    return groups_of(header_of(names), names, bins)


def test_thirty_layers_of_seven_roles_and_an_embedding_make_36_groups() -> None:
    roles = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    names = ["token_embd.weight", *(name for role in roles for name in layer_names(role, 30))]
    found = groups_of(header_of(names), names, 5)
    assert len(found) == 36
    assert found[0] == Group("token_embd", (), ("token_embd.weight",))
    spans = [(group.layers[0], group.layers[-1]) for group in found if group.role == "attn_k"]
    assert spans == [(0, 0), (1, 10), (11, 19), (20, 28), (29, 29)]


def test_experts_and_stacks_are_roles_of_their_own() -> None:
    names = ["blk.3.ffn_down_exps.weight", "blk.3.ffn_down_shexp.weight", "enc.blk.0.attn_q.weight"]
    names += ["dec.blk.0.attn_q.weight", "blk.3.attn_kv_a_mqa.weight", "output.weight"]
    found = {group.role for group in groups_of(header_of(names), names, 5)}
    assert found == {"ffn_down_exps", "ffn_down_shexp", "enc.attn_q", "dec.attn_q", "attn_kv_a_mqa", "output"}


@given(layers=st.integers(1, 70), bins=st.integers(1, 12), picked=st.sets(st.integers(0, 69)))
def test_every_tensor_is_in_one_group_of_neighbours(layers: int, bins: int, picked: set[int]) -> None:
    every = layer_names("attn_q", layers)
    names = [name for layer, name in enumerate(every) if layer in picked]
    found = groups_of(header_of(every), names, bins)
    assert [name for group in found for name in group.tensors] == names
    assert len(found) <= bins
    assert all(group.layers == tuple(sorted(group.layers)) for group in found)
    if len(names) >= 8 and bins >= 3:
        assert len(found[0].layers) == len(found[-1].layers) == 1


@given(
    klds=st.lists(st.one_of(st.none(), st.floats(-1, 0), st.floats(1e-9, 10)), min_size=10, max_size=10),
    layers=st.integers(1, 40),
    factor=st.floats(0.1, 10),
)
def test_sensitivities_are_positive_and_grow_with_the_kld(klds: list[float | None], layers: int, factor: float) -> None:
    made = groups(layers, "attn_q", "ffn_down")
    given_groups = [measured(group, kld) for group, kld in zip(made, klds, strict=False)]
    found = per_tensor(given_groups)
    assert list(found.per_tensor) == [name for group in made for name in group.tensors]
    assert all(0 < value < math.inf for value in found.per_tensor.values())
    if not found.measured:
        return
    more = per_tensor([measured(g, None if g.kld is None else g.kld * factor) for g in given_groups])
    for name, value in found.per_tensor.items():
        assert more.per_tensor[name] == pytest.approx(factor * value, rel=1e-6)


def test_inside_a_role_the_logarithm_is_interpolated_and_the_ends_keep_their_own() -> None:
    made = groups(30, "ffn_down")
    found = per_tensor([measured(g, 0.01 * s) for g, s in zip(made, (20, 1, 2, 4, 30), strict=True)])
    values = [found.per_tensor[name] for name in layer_names("ffn_down", 30)]
    assert found.measured
    assert values[0] == pytest.approx(20)
    assert values[29] == pytest.approx(30)
    assert values[1] == values[5] == pytest.approx(1)
    assert values[15] == pytest.approx(2)
    assert values[24] == values[28] == pytest.approx(4)
    steps = np.diff(np.log(values[6:15]))
    assert steps == pytest.approx(np.full(8, math.log(2) / 9.5))


def test_a_bin_far_from_its_role_is_drawn_near_and_one_without_kld_filled_by_its_neighbours() -> None:
    made = groups(30, "ffn_down")
    found = per_tensor([measured(g, 0.01 * s) for g, s in zip(made, (1, 1, 5000, 1, 1), strict=True)])
    assert max(found.per_tensor.values()) == pytest.approx(8)
    for nothing in (0.0, -0.3, None):
        klds = (0.01, 0.01, nothing, 0.01, nothing)
        found = per_tensor([measured(g, kld) for g, kld in zip(made, klds, strict=True)])
        assert list(found.per_tensor.values()) == pytest.approx([1] * 30)


def test_a_role_without_measurement_stands_to_the_others_as_assumed() -> None:
    made = groups(4, "ffn_down", "attn_v")
    found = per_tensor([measured(g, 0.01 * 2 * ASSUMED["ffn_down"] if g.role == "ffn_down" else 0.0) for g in made])
    assert found.per_tensor["blk.0.attn_v.weight"] == pytest.approx(2 * ASSUMED["attn_v"])
    assert not per_tensor([measured(g, None) for g in made]).measured


def test_assumed_sensitivities_share_a_mixture_out_among_its_experts() -> None:
    names = ["output.weight", *(f"blk.5.ffn_down{kind}.weight" for kind in ("", "_exps", "_shexp"))]
    counts = {"m.expert_used_count": 6, "m.expert_shared_count": 2}
    metadata = {key: MetaValue(ValueType.UINT32, value) for key, value in counts.items()}
    metadata["general.architecture"] = MetaValue(ValueType.STRING, "m")
    found = assumed(Header(3, (), metadata, ()), names)
    assert list(found.per_tensor.values()) == pytest.approx([17, 0.28, 0.21, 0.07])
    assert (found.groups, found.measured) == ((), False)


@pytest.mark.parametrize(("type_name", "most"), [("F32", 0), ("F16", 1e-6), ("BF16", 1e-5), ("Q8_0", 1e-4)])
def test_encoded_weights_are_read_back_as_ggml_reads_them(type_name: str, most: float) -> None:
    rows = np.random.default_rng(2).standard_normal((6, 256)).astype(np.float32)
    back = decode(type_name, encode(type_name, rows), rows.size).reshape(rows.shape)
    assert np.square(back - rows).mean() <= most


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_f16_model(tmp_path_factory.mktemp("f16") / "model.gguf", layers=2)


class Perturb:
    """Multiplies weights by 1.02: E, whatever the inputs, is 0.0004."""

    def __init__(self, header: Header, folder: Path, fail_after: int = 1000) -> None:
        self._header, self._folder, self._left = header, folder, fail_after
        self.names: list[str] = []

    def __call__(self, name: str) -> tuple[Floats, float]:
        self.names.append(name)
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt
        tensor = self._header.by_name[name]
        with Path(self._header.files[0].path).open("rb") as file:
            file.seek(tensor.offset)
            weights = decode(tensor.type, file.read(tensor.nbytes), tensor.n_weights)
        return weights.reshape(-1, tensor.shape[0]) * np.float32(1.02), 0.0004


NAMES = ["output.weight", "blk.0.ffn_down.weight", "blk.1.ffn_down.weight", "blk.0.attn_q.weight"]
CHUNKS = list(np.random.default_rng(3).integers(0, VOCAB, (2, 48), np.int32))


def test_an_interrupted_measurement_goes_on_and_a_finished_one_is_not_repeated(
    model_path: Path, tmp_path: Path
) -> None:
    header = read_header(model_path)
    first = Perturb(header, tmp_path, fail_after=2)
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(header, NAMES, CHUNKS, first, threads=1, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["sensitivity.json"]
    second, seen = Perturb(header, tmp_path), list[float]()
    found = measure_sensitivity(header, NAMES, CHUNKS, second, threads=1, folder=tmp_path, on_progress=seen.append)
    assert sorted(first.names[:2] + second.names) == sorted(NAMES)
    assert (seen, seen[-1]) == (sorted(seen), 1.0)
    assert found.measured
    assert sorted(found.per_tensor) == sorted(NAMES)
    assert all(group.kld is not None and group.kld > 0 for group in found.groups)
    third = Perturb(header, tmp_path)
    again = measure_sensitivity(header, NAMES, CHUNKS, third, threads=1, folder=tmp_path)
    assert (again, third.names) == (found, [])


@pytest.mark.parametrize("damage", [b"{", b'{"version":1,"of":"x","groups":[]}', b"[" * 5000])
def test_a_damaged_file_of_groups_is_measured_anew(model_path: Path, tmp_path: Path, damage: bytes) -> None:
    header = read_header(model_path)
    (tmp_path / "sensitivity.json").write_bytes(damage)
    perturb = Perturb(header, tmp_path)
    found = measure_sensitivity(header, NAMES[:1], CHUNKS[:1], perturb, threads=1, folder=tmp_path)
    assert perturb.names == NAMES[:1]
    assert found.measured


class Noise(Perturb):
    """Adds noise of a fourth of a Q4_0 step or so, and calls it an error of 1."""

    def __call__(self, name: str) -> tuple[Floats, float]:
        weights, _ = super().__call__(name)
        weights = weights / np.float32(1.02)
        self.original = weights
        self.noisy = weights + np.random.default_rng(1).normal(0, 0.005, weights.shape).astype(np.float32)
        return self.noisy, 1.0


def test_what_a_coarse_source_makes_of_the_error_is_what_counts(model_path: Path, tmp_path: Path) -> None:
    quantize(model_path, tmp_path / "q4_0.gguf", "Q4_0")
    header = read_header(tmp_path / "q4_0.gguf")
    noise = Noise(header, tmp_path)
    found = measure_sensitivity(header, NAMES[1:2], CHUNKS[:1], noise, threads=1, folder=tmp_path / "kept")
    written = decode("Q4_0", encode("Q4_0", noise.noisy), noise.noisy.size).reshape(noise.noisy.shape)
    became, meant = (np.square(w - noise.original).mean() for w in (written, noise.noisy))
    assert found.groups[0].error == pytest.approx(became / meant, rel=1e-3)
    assert became > 1.05 * meant
