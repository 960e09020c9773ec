from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from homeinfer.errors import HomeinferError
from homeinfer.model.header import read_header
from homeinfer.quant.quantize import quantize
from homeinfer.quant.tensor_rules import parse_tensor_rule
from homeinfer.quant.weights_check import require_finite
from tests.quant.f16_model import write_f16_model
from tests.support.tiny_models import make_tiny_model

ON_A_SMALL_DISK = """
import sys
from pathlib import Path
from homeinfer.quant import quantize as quantizing
folder, fill, require_space = Path(sys.argv[2]), Path(sys.argv[2], "other"), quantizing.require_space

def and_then_another_program_fills_it(*asked):
    require_space(*asked)
    fill.write_bytes(bytes(3 << 20))

if sys.argv[3] == "before":
    fill.write_bytes(bytes(3 << 20))
if sys.argv[3] == "half-way":
    quantizing.require_space = and_then_another_program_fills_it
try:
    quantizing.quantize(sys.argv[1], folder / "small.gguf", "Q8_0", threads=1)
finally:
    print(*sorted(path.name for path in folder.iterdir()))
"""


def broken(path: Path, tensor: str, value: float) -> Path:
    """The same file with one value of a tensor changed."""
    found = read_header(path).by_name[tensor]
    dtype = {"F16": np.float16, "F32": np.float32}[found.type]
    with path.open("rb+") as file:
        file.seek(found.offset + 3 * np.dtype(dtype).itemsize)
        file.write(np.array(value, dtype).tobytes())
    return path


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("tensor", "recipe"),
    [("blk.1.ffn_up.weight", "Q4_K_M"), ("blk.0.attn_norm.weight", "DQ3_K_M"), ("output.weight", "COPY")],
)
def test_tensor_with_impossible_values_is_named(tmp_path: Path, tensor: str, recipe: str, value: float) -> None:
    source = broken(write_f16_model(tmp_path / "model.gguf", layers=2), tensor, value)
    line = f"'{tensor}' has NaN or infinite values: the file is damaged; download or convert"
    with pytest.raises(HomeinferError, match=line):
        quantize(source, tmp_path / "small.gguf", recipe)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_tensor_whose_values_no_block_can_hold_is_named(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path / "model.gguf")
    source = broken(tmp_path / "model.gguf", "blk.0.ffn_up.weight", 1e30)
    with pytest.raises(HomeinferError, match=r"'blk\.0\.ffn_up\.weight' has values that are too large for its new"):
        quantize(source, tmp_path / "small.gguf", "Q4_0")
    rule = parse_tensor_rule("blk.0.ffn_up.weight=F32")
    quantize(source, tmp_path / "small.gguf", "Q4_0", tensor_rules=[rule])
    assert read_header(tmp_path / "small.gguf").by_name["blk.0.ffn_up.weight"].type == "F32"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_read_elsewhere_are_checked_the_same_way(value: float) -> None:
    weights = np.ones((3, 4), np.float32)
    require_finite("m.gguf", "output.weight", weights)
    require_finite("m.gguf", "output.weight", weights * 3e38)
    weights[1, 2] = value
    with pytest.raises(HomeinferError, match=r"m\.gguf: tensor 'output\.weight' has NaN or infinite values"):
        require_finite("m.gguf", "output.weight", weights)


@pytest.mark.parametrize(
    ("when", "words", "left"),
    [("before", "the disk is too full: 2.7 MiB are needed, 1.0 MiB are free", "other"),
     ("half-way", "writing failed half-way, with 0.0 MiB free on the disk", "other"),
     ("never", "", "small.gguf")],
)  # fmt: skip
def test_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path: Path, when: str, words: str, left: str) -> None:
    """In a mount namespace of its own, with a disk of 4 MiB."""
    source, disk = write_f16_model(tmp_path / "model.gguf"), tmp_path / "disk"
    disk.mkdir()
    command = [sys.executable, "-c", ON_A_SMALL_DISK, str(source), str(disk), when]
    mount = f"mount -t tmpfs -o size=4m none {shlex.quote(str(disk))}"
    ran = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{mount} && exec {shlex.join(command)}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert words in (ran.stderr.splitlines() or [""])[-1]
    assert ran.stdout == f"{left}\n"
