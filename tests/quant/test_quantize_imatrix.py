from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from homeinfer.errors import HomeinferError
from homeinfer.model.header import read_header
from homeinfer.quant.imatrix import Entry, Imatrix, prepared, write_imatrix
from homeinfer.quant.importance import Importance, gather_importance, read_importance
from homeinfer.quant.quantize import quantize
from homeinfer.quant.recipes import recipe_info
from homeinfer.quant.tensor_rules import parse_tensor_rule
from tests.quant.f16_model import write_f16_model
from tests.support.tiny_models import make_tiny_model

LLAMA_CPP_ALONE = """
import ctypes, sys
import llama_cpp
import numpy as np
source, output, ftype, file = sys.argv[1:]
values = dict(np.load(file))
entries = (llama_cpp.llama_model_imatrix_data * (len(values) + 1))()
for entry, (name, array) in zip(entries, values.items()):
    entry.name, entry.size = name.encode(), array.size
    entry.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.imatrix, params.nthread = int(ftype), entries, 2
sys.exit(llama_cpp.llama_model_quantize(source.encode(), output.encode(), ctypes.byref(params)))
"""


def imatrix_of(source: Path, *, without: str = "-") -> Imatrix:
    """A random one of the layers' weights, with an expert that no token reached."""
    rng = np.random.default_rng(3)
    entries = {}
    for tensor in read_header(source).tensors:
        if tensor.name.startswith("blk.") and "norm" not in tensor.name and without not in tensor.name:
            n_expert = tensor.shape[2] if len(tensor.shape) > 2 else 1
            counts = np.full(n_expert, 64, np.float32)
            counts[1:2] = 0
            sums = rng.gamma(0.5, 20, (n_expert, tensor.shape[0])).astype(np.float32) * (counts[:, None] > 0)
            entries[tensor.name] = Entry(sums, counts)
    return Imatrix(512, 3, ("wiki.txt", "code.txt"), entries)


def data_of(path: Path) -> dict[str, tuple[str, bytes]]:
    data = path.read_bytes()
    return {
        tensor.name: (tensor.type, data[tensor.offset : tensor.offset + tensor.nbytes])
        for tensor in read_header(path).tensors
    }


def llama_cpp_alone(source: Path, target: Path, recipe: str, values: dict[str, npt.NDArray[np.float32]]) -> None:
    np.savez(target.with_suffix(".npz"), **values)  # type: ignore[arg-type]
    ftype = str(recipe_info(recipe).ftype)
    command: list[str | Path] = [sys.executable, "-c", LLAMA_CPP_ALONE, source, target, ftype]
    subprocess.run([*command, target.with_suffix(".npz")], check=True, capture_output=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_f16_model(tmp_path_factory.mktemp("source") / "model-f16.gguf", layers=2)


@pytest.fixture(scope="module")
def imatrix_file(source: Path) -> Path:
    path = source.with_name("model.imatrix.gguf")
    write_imatrix(path, imatrix_of(source))
    return path


@pytest.mark.parametrize("recipe", ["Q3_K_M", "Q4_0", "IQ3_XS", "Q2_K_S"])
def test_weights_are_those_of_llama_cpp_with_the_same_imatrix(
    source: Path, imatrix_file: Path, tmp_path: Path, recipe: str
) -> None:
    importance = read_importance(imatrix_file, read_header(source))
    quantize(source, tmp_path / "ours.gguf", recipe, importance=importance)
    llama_cpp_alone(source, tmp_path / "alone.gguf", recipe, prepared(imatrix_of(source)))
    ours = data_of(tmp_path / "ours.gguf")
    assert ours == data_of(tmp_path / "alone.gguf")
    if recipe == "Q3_K_M":
        quantize(source, tmp_path / "without.gguf", recipe)
        assert ours != data_of(tmp_path / "without.gguf")


def test_experts_have_rows_of_their_own_in_the_imatrix(tmp_path: Path) -> None:
    source = tmp_path / "mixture.gguf"
    make_tiny_model("qwen3moe", source)
    values = prepared(imatrix_of(source))
    quantize(source, tmp_path / "ours.gguf", "Q4_0", importance=Importance(values))
    llama_cpp_alone(source, tmp_path / "alone.gguf", "Q4_0", values)
    assert any("_exps" in name for name in values)
    assert data_of(tmp_path / "ours.gguf") == data_of(tmp_path / "alone.gguf")


def test_written_file_says_which_imatrix_it_had(source: Path, imatrix_file: Path, tmp_path: Path) -> None:
    importance = read_importance(imatrix_file, read_header(source))
    quantize(source, tmp_path / "small.gguf", "Q3_K_S", importance=importance)
    header = read_header(tmp_path / "small.gguf")
    said = {key.removeprefix("quantize.imatrix."): header.get(key) for key in header.metadata if ".imatrix." in key}
    assert said == {
        "file": str(imatrix_file)[:127],
        "dataset": "wiki.txt",
        "entries_count": 14,
        "chunks_count": 3,
    }


def test_imatrix_of_another_model_is_refused(source: Path, tmp_path: Path) -> None:
    other = write_f16_model(tmp_path / "other.gguf", layers=3, embd=512)
    write_imatrix(tmp_path / "other.imatrix.gguf", imatrix_of(other))
    with pytest.raises(HomeinferError, match=r"imatrix is of another model: .*homeinfer imatrix MODEL -o FILE"):
        read_importance(tmp_path / "other.imatrix.gguf", read_header(source))


def test_weight_that_the_imatrix_misses_is_named_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    values = prepared(imatrix_of(source, without="blk.0.ffn_up"))
    target = tmp_path / "small.gguf"
    line = r"no entry for tensor 'blk\.0\.ffn_up\.weight', which IQ3_XXS needs; choose another type .*--tensor"
    with pytest.raises(HomeinferError, match=line):
        quantize(source, target, "IQ3_XS", importance=Importance(values, "my.imatrix"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(HomeinferError, match=r"no entry for tensor 'token_embd\.weight', which IQ1_S needs"):
        quantize(
            source, target, "Q4_0", importance=Importance(values), tensor_rules=[parse_tensor_rule("token_embd=IQ1_S")]
        )
    rules = [parse_tensor_rule(r"blk\.0\.ffn_up=Q3_K")]
    quantize(source, target, "IQ3_XS", importance=Importance(values), tensor_rules=rules)
    assert read_header(target).by_name["blk.0.ffn_up.weight"].type == "Q3_K"


def test_imatrix_can_be_gathered_from_texts(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path / "model.gguf")
    (tmp_path / "text.txt").write_text("a b c d e f g h i j k l m n o p q r s t u v w x y z " * 40)
    header = read_header(tmp_path / "model.gguf")
    seen: list[float] = []
    importance = gather_importance(header, [tmp_path / "text.txt"], threads=1, on_progress=seen.append)
    assert importance.datasets == ("text.txt",)
    assert importance.chunks > 0
    assert {values.size for name, values in importance.values.items() if "ffn_down" in name} == {
        header.by_name["blk.0.ffn_down.weight"].shape[0]
    }
    quantize(tmp_path / "model.gguf", tmp_path / "small.gguf", "Q4_0", importance=importance)
    assert read_header(tmp_path / "small.gguf").get("quantize.imatrix.file") is None
