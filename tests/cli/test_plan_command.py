"""`homeinfer plan` as a user runs it: machines as in prima.cpp's paper, and headers of models without data."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from homeinfer.cli.main import main
from homeinfer.cli.plan_tables import where
from homeinfer.cluster.planning.model_shape import model_shape
from homeinfer.cluster.planning.plan import Workload
from homeinfer.cluster.planning.profile import DeviceProfile
from homeinfer.cluster.planning.report import PlannedWindow, PlanReport
from homeinfer.model.header import read_header
from tests.support.commands import HANG_SECONDS
from tests.support.header_file import LLAMA_8B, LLAMA_70B, LlamaSize, write_header_file
from tests.support.profiles import DESK, LAPTOP, MAC, PHONE, device_of, write_profile
from tests.support.tiny_models import make_tiny_model

Said = tuple[int, str, str]
Plan = Callable[..., Said]
THIN = msgspec.structs.replace(LAPTOP, name="thin", gpu_bytes=0)
MACHINES = (LAPTOP, MAC, PHONE, DESK, THIN)


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Runs the command in this process: exit code, standard output, standard error."""

    def run(*arguments: str | Path) -> Said:
        monkeypatch.setattr(sys, "argv", ["homeinfer", "plan", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return run


def profiled(folder: Path, size: LlamaSize) -> Path:
    """A model's header and a profile of each machine for it, in a folder."""
    write_header_file(folder / "model.gguf", size)
    shape = model_shape(read_header(folder / "model.gguf", allow_truncated=True), Workload())
    for machine in MACHINES:
        write_profile(folder / f"{machine.name}.json", device_of(machine, shape))
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return profiled(tmp_path_factory.mktemp("8B"), LLAMA_8B)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Too large for three of the machines together: 16 of Llama 3 70B's layers."""
    return profiled(tmp_path_factory.mktemp("large"), msgspec.structs.replace(LLAMA_70B, n_layer=16))


def asked(folder: Path, *names: str) -> list[str | Path]:
    """model --profiles a.json b.json …, as the help says."""
    return [folder / "model.gguf", "--profiles", *(folder / f"{name}.json" for name in names)]


def one_line(said: Said) -> str:
    code, out, err = said
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("homeinfer: ")
    return err


def changed(folder: Path, name: str, to: Path, **fields: object) -> Path:
    """A profile with some of its fields changed."""
    raw = msgspec.json.decode((folder / f"{name}.json").read_bytes())
    device = msgspec.convert(raw["devices"][0], DeviceProfile)
    return write_profile(to, msgspec.structs.replace(device, **fields))


def test_a_plan_reads_like_advice(large: Path, plan: Plan) -> None:
    code, out, err = plan(*asked(large, "thin", "mac", "phone"), "--compare")
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    for words in (
        "model · 16 layers · 8.9 GB · 4,096 tokens of context",
        "from disk",
        "in memory",
        "tokens/s ·",
        "per token · first token after",
        "Not all layers fit into memory",
        "where the time of a token goes",
        "what would help most",
        "stays free",
        "other rules, same devices",
        "prima.cpp's rule",
        "nobody measured the network of thin, mac and phone",
    ):
        assert words in text


def test_json_is_one_object_that_a_ring_can_be_started_from(large: Path, plan: Plan) -> None:
    code, out, err = plan(*asked(large, "thin", "mac", "phone"), "--compare", "--json", "--kv-type", "q8_0")
    assert (code, err) == (0, "")
    report = msgspec.json.decode(out, type=PlanReport)
    layers = [layer for window in report.windows for layer in range(window.first, window.last)]
    assert layers == list(range(16))
    assert report.windows[0].device == report.windows[-1].device == "thin"
    for window in report.windows:
        assert window.gpu_layers + window.resident_layers + window.streamed_layers == window.last - window.first
        assert len(window.places) == window.last - window.first
    assert report.workload.kv_type == "q8_0"
    assert report.model.files == ("model.gguf",)
    assert len(report.model.digest) == 64
    assert [device.name for device in report.devices] == ["thin", "mac", "phone"]
    for device in report.devices:
        assert device.memory_bytes + device.memory_free_bytes == device.memory_total_bytes
        assert bool(device.reason) is not device.used
    assert all(row.tpot_ms >= 0.999 * report.predicted.tpot_ms for row in report.compare if row.tpot_ms is not None)
    assert [row.name for row in report.compare] == ["prima.cpp's rule", "by memory", "even split"]


def test_a_small_model_goes_whole_to_the_best_gpu_and_the_rest_is_told_why(small: Path, plan: Plan) -> None:
    code, out, _ = plan(*asked(small, "desk", "laptop", "phone"))
    assert code == 0
    assert "32 on the GPU" in out
    assert "left out" in out
    assert "phone: " in out


def test_profiles_may_be_named_in_every_way(small: Path, plan: Plan, tmp_path: Path) -> None:
    model, desk, mac, phone = (small / name for name in ("model.gguf", "desk.json", "mac.json", "phone.json"))
    both = tmp_path / "both.json"
    both.write_bytes(mac.read_bytes())
    for arguments in (
        (model, "--profiles", desk, mac, phone),
        (model, "--profiles", desk, "--profiles", mac, "--profiles", phone),
        ("--profiles", desk, mac, phone, model),
        (model, "-p", desk, mac, "-p", phone),
    ):
        code, out, _ = plan(*arguments, "--json")
        assert code == 0
        found = msgspec.json.decode(out, type=PlanReport)
        assert found.devices[0].name == "desk"
        assert {device.name for device in found.devices} == {"desk", "mac", "phone"}


def test_demands_are_kept(small: Path, plan: Plan) -> None:
    demands = ("--head", "mac", "--require", "phone", "--forbid", "laptop", "--private-layers", "3", "--ctx", "512")
    code, out, err = plan(*asked(small, "desk", "laptop", "mac", "phone"), *demands, "--json")
    assert (code, err) == (0, "")
    report = msgspec.json.decode(out, type=PlanReport)
    names = [window.device for window in report.windows]
    assert names[0] == names[-1] == "mac"
    assert report.windows[0].last >= 3
    assert report.windows[-1].first <= 29
    assert "phone" in names
    assert "laptop" not in names
    reasons = {device.name: device.reason for device in report.devices}
    assert reasons["laptop"] == "you ruled it out (--forbid)"


def test_a_token_goes_around_as_often_as_is_asked_for(small: Path, plan: Plan) -> None:
    base = asked(small, "mac", "phone", "desk")
    code, out, err = plan(*base, "--require", "phone", "--require", "desk", "--rounds", "2", "--json")
    assert (code, err) == (0, "")
    report = msgspec.json.decode(out, type=PlanReport)
    names = [window.device for window in report.windows]
    assert report.rounds == 2
    assert {name: names.count(name) for name in names} == {"mac": 3, "phone": 2, "desk": 2}
    assert "--rounds 16: 3 devices need 49 layers for that, the model has 32: ask for fewer" in one_line(
        plan(*base, "--require", "phone", "--require", "desk", "--rounds", "16")
    )


def test_the_timeline_is_a_picture_with_a_lane_for_each_device_used(large: Path, plan: Plan, tmp_path: Path) -> None:
    picture = tmp_path / "token.svg"
    code, out, _ = plan(*asked(large, "thin", "mac", "phone"), "--timeline", picture, "--json")
    assert code == 0
    used = {window.device for window in msgspec.json.decode(out, type=PlanReport).windows}
    words = {element.text for element in ElementTree.parse(picture).getroot().iter("{http://www.w3.org/2000/svg}text")}
    assert used <= words
    assert "this is a directory" in one_line(plan(*asked(large, "desk"), "--timeline", tmp_path))
    assert "it can't be written" in one_line(plan(*asked(large, "desk"), "--timeline", tmp_path / "no" / "token.svg"))
    assert [path.name for path in tmp_path.iterdir()] == ["token.svg"]


def test_a_busy_device_is_said_to_have_been_busy(small: Path, plan: Plan, tmp_path: Path) -> None:
    noisy = changed(small, "mac", tmp_path / "noisy.json", is_quiet=False, noise=0.4)
    code, out, _ = plan(*asked(small, "desk"), noisy)
    assert code == 0
    assert "mac was busy while it was measured (times differed by 40 %)" in out


def test_bad_profiles_are_one_line(small: Path, large: Path, plan: Plan, tmp_path: Path) -> None:
    model, desk = small / "model.gguf", small / "desk.json"
    text = desk.read_text()
    cases = {
        "other.json": (text.replace('"version":1', '"version":7'), "version 7, and this homeinfer reads version 1"),
        "zero.json": (text.replace('"memory_bytes_per_s":4', '"memory_bytes_per_s":-4'), "memory_bytes_per_s is -4"),
        "nan.json": (text.replace('"hop_ms":0.3', '"hop_ms":NaN'), "desk: hop_ms is nan"),
        "none.json": ("GGUF", "this is no profile"),
        "empty.json": ("", "this is no profile"),
        "bare.json": ('{"devices":[{"name":"desk","memory_bytes":5}]}', "make one with homeinfer profile"),
    }
    for name, (content, said) in cases.items():
        path = tmp_path / name
        path.write_text(content)
        assert f"{path}: " in (line := one_line(plan(model, "--profiles", path)))
        assert said in line
    assert "the profile can't be read: No such file" in one_line(plan(model, "--profiles", tmp_path / "gone.json"))
    assert "two devices are called desk" in one_line(plan(model, "--profiles", desk, desk))
    line = one_line(plan(model, "--profiles", desk, large / "laptop.json"))
    assert "laptop's profile has no times for this model's layers: run homeinfer profile MODEL -o FILE on it" in line


def test_demands_that_cannot_be_met_are_one_line(small: Path, plan: Plan, tmp_path: Path) -> None:
    base = asked(small, "laptop", "mac")
    assert "--head tower: no profile is of a device called so" in one_line(plan(*base, "--head", "tower"))
    assert "--require tower" in one_line(plan(*base, "--require", "tower"))
    assert "it is the head" in one_line(plan(*base, "--forbid", "laptop"))
    assert "is no type of KV cache" in one_line(plan(*base, "--kv-type", "q9_9"))
    disks = []
    for name in ("laptop", "mac"):
        device = msgspec.json.decode((small / f"{name}.json").read_bytes())["devices"][0]
        disk = msgspec.structs.replace(msgspec.convert(device, DeviceProfile).disk, free_bytes=1_000_000_000)
        disks.append(changed(small, name, tmp_path / f"{name}.json", disk=disk))
    line = one_line(plan(small / "model.gguf", "--profiles", *disks))
    assert "the model's layers take 4.2 GB and all 2 disks together have room for 2.0 GB" in line


def test_a_context_that_fits_nowhere_is_told_the_largest_that_does(small: Path, plan: Plan) -> None:
    line = one_line(plan(*asked(small, "mac", "phone"), "--ctx", "1000000"))
    assert "the KV cache of 1,000,000 tokens fits nowhere beside the layers; the largest context that does is " in line
    most = int(line.split("--ctx ")[1].split(",")[0])
    assert plan(*asked(small, "mac", "phone"), "--ctx", str(most), "--json")[0] == 0
    assert plan(*asked(small, "mac", "phone"), "--ctx", str(most + 256), "--json")[0] == 1


def test_too_little_memory_for_anything_is_one_line(small: Path, plan: Plan, tmp_path: Path) -> None:
    tiny = changed(small, "phone", tmp_path / "tiny.json", memory_bytes=150_000_000)
    assert "the devices have 0.0 GB for them" in one_line(plan(small / "model.gguf", "--profiles", tiny))


def test_a_model_that_can_not_be_cut_stays_on_the_head(plan: Plan, tmp_path: Path) -> None:
    model = tmp_path / "bloom.gguf"
    make_tiny_model("bloom", model)
    shape = model_shape(read_header(model), Workload())
    profiles = [write_profile(tmp_path / f"{m.name}.json", device_of(m, shape)) for m in (MAC, DESK)]
    code, out, _ = plan(model, "--profiles", *profiles, "--json")
    assert code == 0
    report = msgspec.json.decode(out, type=PlanReport)
    assert [window.device for window in report.windows] == ["mac"]
    assert "bloom models run in one piece" in report.notes[-1]


def test_wrong_usage_ends_with_2(small: Path, plan: Plan) -> None:
    model = small / "model.gguf"
    for arguments, said in (
        ((model,), "say which devices: --profiles desk.json laptop.json"),
        ((*asked(small, "desk"), "--link", "fast"), "--link: 'fast' is no link"),
        ((*asked(small, "desk"), "--headroom", "120%"), "--headroom: '120%' is no share"),
        ((*asked(small, "desk"), "--objective", "speed"), "--objective"),
        ((*asked(small, "desk"), "--ctx", "0"), "--ctx"),
        ((*asked(small, "desk"), small / "other.gguf"), "are both models"),
    ):
        code, out, err = plan(*arguments)
        assert (code, out) == (2, "")
        assert said in err


@pytest.mark.parametrize("objective", ["latency", "throughput", "ttft"])
def test_every_objective_gives_a_plan(large: Path, plan: Plan, objective: str) -> None:
    more = ("--objective", objective, "--sequences", "4", "--ctx", "512", "--link", "50mbit,4ms", "--wire", "f16")
    code, out, err = plan(*asked(large, "thin", "mac"), *more, "--prompt-tokens", "32")
    assert (code, err) == (0, "")
    assert "4 answers at once" in out
    assert "nobody measured" not in out


def test_it_starts_as_an_installed_command_with_examples_in_its_help(small: Path) -> None:
    command = [sys.executable, "-c", "from homeinfer.cli.main import main; main()", "plan"]
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=HANG_SECONDS,
            env=environment,
        )

    told = run("--help")
    assert told.returncode == 0
    assert "homeinfer plan model.gguf --profiles desk.json laptop.json phone.json" in " ".join(told.stdout.split())
    ran = run(*asked(small, "desk", "laptop", "mac"))
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "32 on the GPU" in ran.stdout


def test_streamed_layers_count_as_in_memory_where_nothing_is_read_from_disk() -> None:
    window = PlannedWindow("desk", 0, 7, 2, 4, 1, "ggrrrrs")
    assert where(window) == "4 in memory, 1 from disk, 2 on the GPU"
    assert where(window, reads=False) == "5 in memory, 2 on the GPU"
