from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import psutil
import pytest

from homeinfer.errors import HomeinferError
from homeinfer.model.header import read_header
from homeinfer.quant import moments as measuring
from homeinfer.quant.input_sums import rounding_errors
from homeinfer.quant.kept import model_digest, tokens_digest
from homeinfer.quant.moments import Moments, gather_moments, open_moments, plan_passes
from homeinfer.quant.observe import Ints, Mode, observable, observe
from homeinfer.quant.observer_process import gather_in_process
from tests.quant.f16_model import VOCAB, write_f16_model
from tests.support.processes import have_ended, wait_until
from tests.support.tiny_models import make_tiny_model

Floats = npt.NDArray[np.float32]
LENGTHS = (50, 33, 41)


def chunks(vocab: int = VOCAB) -> list[Ints]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, vocab, length).astype(np.int32) for length in LENGTHS]


def weights_of(model: Path) -> tuple[str, ...]:
    return observable(read_header(model), output_tensor=True)


def gathered(model: Path, folder: Path, memory_bytes: int | None = None, vocab: int = VOCAB) -> Moments:
    header = read_header(model)
    return gather_moments(header, chunks(vocab), weights_of(model), folder, threads=1, memory_bytes=memory_bytes)


def opened(model: Path, folder: Path) -> Moments | None:
    return open_moments(folder, model_digest(read_header(model)), tokens_digest(chunks()), weights_of(model))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_f16_model(tmp_path_factory.mktemp("moments") / "dense.gguf")


@pytest.fixture(scope="module")
def rows(dense: Path) -> dict[str, Floats]:
    seen = observe(dense, chunks(), dict.fromkeys(weights_of(dense), Mode.ROWS), 1)
    return {name: seen.rows[leader].astype(np.float64) for name, leader in seen.inputs.items()}


@pytest.fixture(scope="module")
def kept(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept") / "moments"
    gathered(dense, folder)
    return folder


@pytest.fixture
def folder(kept: Path, tmp_path: Path) -> Path:
    """A copy of complete moments, to be damaged."""
    return Path(shutil.copytree(kept, tmp_path / "moments"))


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_ino, path.read_bytes()) for path in sorted(folder.iterdir())}


def makes_keys_or_values(name: str) -> bool:
    return "attn_k" in name or "attn_v" in name


def test_a_hessian_is_the_mean_outer_product_of_the_inputs(dense: Path, kept: Path, rows: dict[str, Floats]) -> None:
    moments = opened(dense, kept)
    assert moments is not None
    for name, inputs in rows.items():
        expected = inputs.T @ inputs / len(inputs)
        if makes_keys_or_values(name):
            firsts = inputs[[0, LENGTHS[0], LENGTHS[0] + LENGTHS[1]]]
            expected += firsts.T @ firsts / 3
        hessian = moments.hessian(name)
        assert moments.has_hessian(name)
        assert hessian.dtype == np.float32
        np.testing.assert_allclose(hessian, expected, rtol=1e-3, atol=1e-4 * expected.max(), err_msg=name)
        np.testing.assert_array_equal(hessian, hessian.T)
        np.testing.assert_allclose(moments.importance(name), np.diag(hessian), rtol=1e-5)
        assert moments.input(name).n_rows == sum(LENGTHS)
    assert moments.unobserved == ()
    assert len(moments.inputs) == 4 * 4 + 1


def rounded(inputs: Floats, kind: str) -> Floats:
    if kind == "Q8_0":
        packed = gguf.quants.quantize(inputs.astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
        return gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    result = np.empty_like(inputs)
    for start in range(0, inputs.shape[1], 256):
        block = inputs[:, start : start + 256]
        step = np.abs(block).max(axis=1)[:, None] / 127
        result[:, start : start + 256] = np.round(block / step) * step
    return result


@pytest.mark.parametrize("kind", ["Q8_0", "Q8_K"])
def test_noise_is_the_mean_squared_error_of_rounded_inputs(
    kind: str, dense: Path, kept: Path, rows: dict[str, Floats]
) -> None:
    moments = opened(dense, kept)
    assert moments is not None
    for name, inputs in rows.items():
        expected = np.square(rounded(inputs, kind) - inputs).mean(axis=0)
        noise = moments.noise(name, "Q8_0" if kind == "Q8_0" else "Q8_K")
        assert noise.dtype == np.float32
        np.testing.assert_allclose(noise, expected, rtol=0.03, err_msg=name)
        np.testing.assert_allclose(noise.mean(), expected.mean(), rtol=1e-3)


def test_rows_of_odd_widths_and_of_zeros_are_rounded_too() -> None:
    odd = np.random.default_rng(1).standard_normal((9, 80)).astype(np.float32)
    padded = np.pad(odd, ((0, 0), (0, 16)))
    expected = np.square(rounded(padded, "Q8_0") - padded).sum(axis=0)[:80]
    np.testing.assert_allclose(rounding_errors(odd, 32, half_scale=True), expected, rtol=1e-3, atol=1e-9)
    assert not rounding_errors(np.zeros((3, 64), np.float32), 32, half_scale=True).any()


def test_the_noise_of_a_long_text_is_that_of_a_sample(dense: Path) -> None:
    rng = np.random.default_rng(3)
    many = [rng.integers(0, VOCAB, 60).astype(np.int32) for _ in range(50)]
    name = "blk.0.ffn_down.weight"
    noise = observe(dense, many, {name: Mode.GRAM}, 1).noise[name]
    inputs = observe(dense, many, {name: Mode.ROWS}, 1).rows[name]
    assert 1024 <= noise.n_rows <= 2048
    every = rounding_errors(inputs, 32, half_scale=True) / len(inputs)
    np.testing.assert_allclose((noise.q8_0 / noise.n_rows).mean(), every.mean(), rtol=0.1)


def test_several_passes_give_what_one_gives(dense: Path, kept: Path, tmp_path: Path) -> None:
    shares: list[float] = []
    header, names = read_header(dense), weights_of(dense)
    passes = gather_moments(
        header, chunks(), names, tmp_path / "kept", threads=1, memory_bytes=2 << 20, on_progress=shares.append
    )
    once = opened(dense, kept)
    assert once is not None
    assert shares == sorted(shares)
    assert shares[-1] == 1
    for name in names:
        np.testing.assert_allclose(passes.hessian(name), once.hessian(name), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(passes.noise(name, "Q8_K"), once.noise(name, "Q8_K"), rtol=1e-2)


def test_passes_hold_what_fits_and_at_least_one_input() -> None:
    assert plan_passes({0: 5, 1: 5, 2: 1, 5: 30, 6: 2}, 10) == [[0, 1], [2], [5], [6]]
    assert plan_passes({}, 10) == []


def test_an_interrupted_gathering_goes_on_where_it_was(dense: Path, kept: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moments"
    program = (
        "import sys; from pathlib import Path; from tests.quant.test_moments import gathered; "
        "gathered(Path(sys.argv[1]), Path(sys.argv[2]), memory_bytes=1)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(dense), str(folder)])
    try:
        wait_until(lambda: len(list(folder.glob("*.npz"))) >= 2)
        its = psutil.Process(process.pid)
        its.suspend()  # it must not start another child while they are counted
        wait_until(lambda: its.status() == psutil.STATUS_STOPPED)
        children = its.children()
        its.kill()
        wait_until(lambda: have_ended(children))
    finally:
        process.kill()
        process.wait()
    assert opened(dense, folder) is None
    before = files_of(folder)
    assert 2 <= sum(name.endswith(".npz") for name in before) < 17
    gathered(dense, folder)
    after = files_of(folder)
    assert all(after[name] == before[name] for name in before if name.endswith(".npz"))
    assert after.keys() == files_of(kept).keys()


@pytest.mark.parametrize("name", ["00003.npy", "00003.npz", "index.json", "plan.json"])
@pytest.mark.parametrize("damage", ["cut short", "not a number", "gone", "another shape"])
def test_what_is_damaged_is_gathered_anew(name: str, damage: str, dense: Path, folder: Path) -> None:
    whole = opened(dense, folder)
    assert whole is not None
    expected = [whole.hessian(weight) for weight in weights_of(dense)]
    before, path = files_of(folder), folder / name
    spoil(path, damage)
    if name != "plan.json":
        assert opened(dense, folder) is None
    again = gathered(dense, folder)
    for weight, hessian in zip(weights_of(dense), expected, strict=True):
        np.testing.assert_allclose(again.hessian(weight), hessian, rtol=1e-4, atol=1e-4)
    after = files_of(folder)
    assert after["00002.npz"] == before["00002.npz"]


def spoil(path: Path, damage: str) -> None:
    data = path.read_bytes()
    match damage:
        case "gone":
            path.unlink()
        case "cut short":
            path.write_bytes(data[: len(data) // 2])
        case "not a number":
            path.write_bytes(data[:-40] + b"\xff" * 40)
        case _:
            with path.open("wb") as file:
                np.save(file, np.zeros((3, 3), np.float32))


def test_moments_of_another_model_or_text_are_not_taken(dense: Path, folder: Path, tmp_path: Path) -> None:
    model, tokens, names = model_digest(read_header(dense)), tokens_digest(chunks()), weights_of(dense)
    assert open_moments(folder, "other", tokens, names) is None
    assert open_moments(folder, model, tokens_digest(chunks()[:2]), names) is None
    assert open_moments(folder, model, tokens, [*names, "blk.0.attn_q.bias"]) is None
    other = write_f16_model(tmp_path / "other.gguf", layers=1)
    moments = gathered(other, folder)
    assert len(moments.inputs) == 5
    assert not (folder / "00007.npy").exists()
    assert opened(dense, folder) is None


def test_complete_moments_are_not_gathered_again(dense: Path, folder: Path) -> None:
    before = files_of(folder)
    gathered(dense, folder)
    assert files_of(folder) == before


def test_what_dead_processes_were_writing_is_removed(dense: Path, folder: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (folder / f".00001.npy.{dead.pid}.0a0b0c0d.partial").write_bytes(b"half")
    (folder / f".00001.npy.{os.getpid()}.0a0b0c0d.partial").write_bytes(b"half")
    (folder / "index.json").unlink()
    gathered(dense, folder)
    assert [path.name.split(".")[3] for path in folder.glob(".*.partial")] == [str(os.getpid())]


def test_of_wide_inputs_only_the_diagonal_is_kept(
    dense: Path, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "WIDEST", 256)
    narrow = gathered(dense, tmp_path / "moments")
    whole = opened(dense, kept)
    assert whole is not None
    for name in weights_of(dense):
        assert narrow.has_hessian(name) == ("ffn_down" not in name)
        np.testing.assert_allclose(narrow.importance(name), whole.importance(name), rtol=1e-4)
        np.testing.assert_allclose(narrow.noise(name, "Q8_0"), whole.noise(name, "Q8_0"), rtol=1e-2)
    with pytest.raises(KeyError):
        narrow.hessian("blk.0.ffn_down.weight")


def test_experts_share_a_hessian_and_heads_with_matrices_of_their_own_have_a_diagonal(tmp_path: Path) -> None:
    model = tmp_path / "tiny.gguf"
    make_tiny_model("deepseek2", model)
    moments = gathered(model, tmp_path / "moments", vocab=120)
    header = read_header(model)
    squares = observe(model, chunks(120), dict.fromkeys(weights_of(model), Mode.SUM2), 1).squares
    for name, seen in squares.items():
        width = header.by_name[name].shape[0]
        stacked = name.endswith(("attn_k_b.weight", "attn_v_b.weight"))
        assert moments.has_hessian(name) == (not stacked)
        assert moments.importance(name).shape == moments.noise(name, "Q8_0").shape == (width,)
        assert (moments.noise(name, "Q8_K") > 0).all()
        if not makes_keys_or_values(name) or stacked:
            sums = seen.in_sum2.reshape(-1, width)
            n_rows = seen.counts.sum() * (len(sums) if len(seen.counts) == 1 else 1)
            if "_exps" in name and "down" not in name:
                continue  # one row goes to several experts: it is one row of the gram, but several of the squares
            np.testing.assert_allclose(moments.importance(name), sums.sum(axis=0) / n_rows, rtol=1e-3)


@pytest.mark.parametrize(
    ("role", "gets_sink"),
    [
        *((f"attn_{part}", True) for part in ("k", "v", "qkv", "kv_a_mqa", "kv_b", "k_b", "v_b")),
        *((part, False) for part in ("attn_q", "attn_q_a", "attn_q_b", "attn_output", "attn_k_norm", "ffn_down")),
    ],
)
def test_keys_and_values_get_the_sink(role: str, gets_sink: bool) -> None:
    assert bool(measuring._SINK_ROLE.fullmatch(f"blk.3.{role}.weight")) == gets_sink


def test_a_folder_that_cannot_be_made_is_one_line(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(HomeinferError, match=r"measurements can't be kept there: .*HOMEINFER_KEPT"):
        gathered(dense, tmp_path / "file" / "moments")


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(HomeinferError, match=r"too full to keep measurements: .* are needed"):
        measuring._require_space(tmp_path, 1 << 60)


def test_a_folder_that_goes_away_while_the_model_runs_is_one_line(dense: Path, kept: Path, tmp_path: Path) -> None:
    moments = opened(dense, kept)
    assert moments is not None
    with pytest.raises(HomeinferError, match=r"result can't be kept in .*gone: No such file.*HOMEINFER_KEPT"):
        gather_in_process(dense, chunks(), {0: moments.inputs[0]}, tmp_path / "gone", 1)


def test_random_bytes_are_never_taken(dense: Path, folder: Path) -> None:
    rng = np.random.default_rng(5)
    files = [folder / name for name in ("00003.npz", "00003.npy", "index.json")]
    whole = {path: path.read_bytes() for path in files}
    for round_ in range(60):
        path = files[round_ % 3]
        data = bytearray(whole[path])
        for place in rng.integers(0, min(len(data), 200), 4):
            data[place] = rng.integers(256)
        path.write_bytes(data)
        taken = opened(dense, folder)
        if taken is not None and path.suffix != ".json":
            assert np.isfinite(taken.hessian("blk.0.ffn_down.weight")).all()
        path.write_bytes(whole[path])
    assert opened(dense, folder) is not None


def test_files_that_go_away_meanwhile_are_said(dense: Path, folder: Path) -> None:
    moments = opened(dense, folder)
    assert moments is not None
    for path in folder.glob("*.np?"):
        path.unlink()
    with pytest.raises(HomeinferError, match="removed or damaged meanwhile"):
        moments.hessian("blk.0.attn_q.weight")
    with pytest.raises(HomeinferError, match="removed or damaged meanwhile"):
        moments.importance("blk.0.attn_q.weight")
