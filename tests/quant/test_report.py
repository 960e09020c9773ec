from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, read_header
from homeinfer.quant.recipes import dq3_k_m, plan
from homeinfer.quant.report import comparison, picture, render, write_report
from homeinfer.quant.report_data import CurvePoint, Measured, QuantReport, TensorChoice
from homeinfer.quant.report_labels import Box
from homeinfer.quant.report_svg import luminance, style
from homeinfer.svg import text_width
from tests.quant.f16_model import write_f16_model

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</title></style><script>alert(1)</script>\"'&<!--\x00\x1b[31m\udcff\u202e\n]]>"
PRESETS = {
    "Q2_K": (89_248_864, 0.7421), "IQ3_XXS": (93_000_000, 0.52), "Q3_K_S": (97_500_000, 0.44),
    "IQ3_S": (98_833_504, 0.3151), "IQ3_M": (101_000_000, 0.27), "Q3_K_M": (106_863_712, 0.2019),
    "Q3_K_L": (111_500_000, 0.16), "IQ4_XS": (114_900_000, 0.062), "IQ4_NL": (117_900_000, 0.058),
    "Q4_0": (118_500_000, 0.061), "Q4_K_S": (119_800_000, 0.036), "Q4_K_M": (124_168_288, 0.0251),
}  # fmt: skip
MEASURED = Measured("help topics", 0.065, 0.0011, 0.71, 0.842, 14.2, 13.4)


def choices(header: Header, types: Sequence[tuple[str, str]] = ()) -> tuple[TensorChoice, ...]:
    """Every tensor of a real header as the report wants it; each costs by its size and bits."""
    made = []
    for tensor, planned in zip(header.tensors, plan(header, types), strict=True):
        match = re.fullmatch(r"blk\.(\d+)\.(.+)", tensor.name.removesuffix(".weight"))
        layer, role = (int(match[1]), match[2]) if match else (None, tensor.name.removesuffix(".weight"))
        kept = planned.type == "F32"
        cost = 0.0 if kept else planned.bytes * 1e-10
        how = "kept" if kept else "hessian"
        made.append(TensorChoice(tensor.name, layer, role, planned.type, planned.bytes, tensor.n_weights, cost, how))
    return tuple(made)


def report_of(tensors: tuple[TensorChoice, ...]) -> QuantReport:
    curve = [CurvePoint(label, size, kld, "preset") for label, (size, kld) in PRESETS.items()]
    for size in range(88_000_000, 125_000_000, 4_000_000):
        curve.append(CurvePoint("", size, 0.25 * math.exp((89e6 - size) / 13e6), "predicted"))
    curve.append(CurvePoint("homeinfer 4.1 bpw", 124_100_000, 0.0168, "measured"))
    return QuantReport(
        model="SmolLM2 135M Instruct", source="smollm2-f16.gguf", source_bytes=384_179_104,
        destination="small.gguf", size_bytes=106_854_496, limit_bytes=107_000_000, bpw=3.52,
        asked="--size 107MB", predicted_kld=0.063,
        measured=(MEASURED, replace(MEASURED, text="code", mean_kld=0.071)),
        tensors=tensors, curve=tuple(curve), why=("ffn_down costs most.",), notes=("7 tensors are narrow.",),
        calibration="120,000 bytes of text", seconds=412.0, version="0.1.0",
    )  # fmt: skip


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> QuantReport:
    return report_of(choices(read_header(smollm2_path)))


class Page(HTMLParser):
    """A page's tags, attributes and text; open tags that were never closed stay on the stack."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def drawn(svg: str) -> ElementTree.Element:
    """The parsed picture, after a look at every number in it: finite, and on the sheet."""
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    limits = {"x": width, "x1": width, "x2": width, "cx": width, "width": width}
    limits |= {"y": height, "y1": height, "y2": height, "cy": height, "height": height}
    for element in root.iter():
        for key, value in element.attrib.items():
            if key in limits:
                assert 0 <= float(value) <= limits[key], ElementTree.tostring(element)
            elif key == "points":
                assert all(math.isfinite(float(number)) for number in re.split(r"[ ,]", value))
    assert not re.search(r"\b(nan|inf|None)\b", " ".join(text for text in root.itertext() if "{" not in text))
    return root


def checked(report: QuantReport) -> ElementTree.Element:
    """The report's picture, after checks of form that every report must pass."""
    page = render(report)
    page.encode()
    parsed = Page(page)
    assert parsed.stack == []
    assert not {"script", "link", "img", "iframe", "object", "use", "image", "foreignobject"} & set(parsed.tags)
    assert not {key for key, _ in parsed.attributes} & {"href", "src", "xlink:href", "onload", "onclick"}
    assert "url(" not in page
    assert "@import" not in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        drawn(svg)
    return drawn(picture(report))


def cells(root: ElementTree.Element) -> dict[str, ElementTree.Element]:
    """The map's cells by the name of their tensor."""
    found = {}
    for rect in root.iter(f"{SVG}rect"):
        title = rect.findtext(f"{SVG}title")
        if title and re.fullmatch(r"q\d+", rect.attrib["class"]):
            found[title.partition(":")[0]] = rect
    return found


def test_page_of_a_real_model_needs_nothing_else_and_says_the_numbers(smollm2: QuantReport) -> None:
    checked(smollm2)
    words = " ".join(Page(render(smollm2)).words)
    for said in (
        "SmolLM2 135M Instruct", "106.9 MB", "3.52", "0.0650", "84.2 %", "27.8 % of the source", "--size 107MB",
        "3.1× less KLD than Q3_K_M of the same size", "ffn_down costs most.", "7 tensors are narrow.", "0.0710",
        "120,000 bytes of text", "homeinfer 0.1.0", "blk.29.ffn_down.weight",
    ):  # fmt: skip
        assert said in words, said
    assert Page(render(smollm2)).tags.count("details") == 1


def test_map_has_a_cell_for_every_tensor_that_was_quantized(smollm2: QuantReport) -> None:
    found = cells(checked(smollm2))
    assert set(found) == {tensor.name for tensor in smollm2.tensors if tensor.method != "kept"}
    for role in ("attn_q", "ffn_down"):
        row = [found[f"blk.{layer}.{role}.weight"].attrib for layer in range(30)]
        assert len({cell["y"] for cell in row}) == 1
        assert all(float(left["x"]) < float(right["x"]) for left, right in pairwise(row))
    column = [found[f"blk.7.{role}.weight"].attrib for role in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_down")]
    assert len({cell["x"] for cell in column}) == 1
    assert all(float(upper["y"]) < float(lower["y"]) for upper, lower in pairwise(column))
    assert float(found["token_embd.weight"].attrib["y"]) < float(column[0]["y"])


def test_map_shows_the_types_of_a_recipe(tmp_path: Path) -> None:
    header = read_header(write_f16_model(tmp_path / "model.gguf", layers=8))
    recipe = dq3_k_m(header)
    found = cells(checked(report_of(choices(header, recipe.overrides))))
    for name, kind in recipe.overrides:
        assert f": {kind}, " in (found[name].findtext(f"{SVG}title") or "")
    down = [found[f"blk.{layer}.ffn_down.weight"].attrib["class"] for layer in range(8)]
    first, rare, others = down[0], down[2], down[3]
    assert down == [first, first, rare, *[others] * 4, rare]
    assert len({first, rare, others}) == 3


def test_names_from_files_stay_text(smollm2: QuantReport) -> None:
    nasty = tuple(
        replace(tensor, name=HOSTILE + tensor.name, role=HOSTILE, type=HOSTILE, method=HOSTILE)
        for tensor in smollm2.tensors[:20]
    )
    report = replace(
        smollm2,
        **dict.fromkeys(("model", "source", "destination", "asked", "calibration", "version"), HOSTILE),
        tensors=nasty,
        why=(HOSTILE,),
        notes=(HOSTILE,),
        curve=tuple(replace(point, label=HOSTILE) for point in smollm2.curve),
        measured=(replace(MEASURED, text=HOSTILE),),
    )
    root = checked(report)
    shown = "</title></style><script>alert(1)</script>\"'&<!--\\x00\\x1b[31m\\udcff\\u202e\\n]]>"
    assert shown in "".join(Page(render(report)).words)
    assert any(shown in text for text in root.itertext())


@pytest.mark.parametrize(
    "changes",
    [
        {"tensors": ()},
        {"curve": ()},
        {"measured": ()},
        {"measured": (), "predicted_kld": None},
        {"tensors": (), "curve": (), "measured": (), "predicted_kld": None, "why": (), "notes": ()},
        {"limit_bytes": None},
        {"limit_bytes": 1},
        {"limit_bytes": 16 * 10**9},
        {"size_bytes": 0, "source_bytes": 0, "bpw": 0.0, "seconds": math.nan},
        {"bpw": math.nan, "predicted_kld": math.inf},
        {"measured": (Measured("x", 0.0, 0.0, 0.0, 1.0, 1.0, 1.0),)},
        {"measured": (Measured("x", *[math.nan] * 6),)},
        {"measured": (Measured("x", 0.01, 5.0, math.inf, math.nan, math.inf, 1.0),)},
        {"curve": (CurvePoint("F16", 384_000_000, 0.0, "preset"),)},
        {"curve": (CurvePoint("same", 106_854_496, 0.065, "preset"),), "limit_bytes": 106_854_496},
        {"curve": tuple(CurvePoint("many", 10**8 + at * 1000, 0.1, "preset") for at in range(300))},
    ],
)  # fmt: skip
def test_report_with_little_or_odd_data_is_whole(smollm2: QuantReport, changes: dict[str, object]) -> None:
    checked(replace(smollm2, **changes))


@pytest.mark.parametrize("cost", [0.0, -1.0, math.nan, math.inf, 1e300])
def test_predicted_costs_may_be_anything(smollm2: QuantReport, cost: float) -> None:
    odd = tuple(replace(tensor, predicted_kld=cost) for tensor in smollm2.tensors)
    checked(replace(smollm2, tensors=odd))


POINTS = st.builds(
    CurvePoint,
    label=st.text('<&"\x00\udcffé漢_', max_size=30),
    size_bytes=st.integers(-1, 2**70),
    mean_kld=st.floats(),
    kind=st.sampled_from(["preset", "predicted", "measured"]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(POINTS, max_size=12), st.floats(), st.none() | st.integers(-1, 2**70))
def test_any_numbers_make_a_picture(curve: list[CurvePoint], kld: float, limit: int | None) -> None:
    tensors = (TensorChoice("output.weight", None, "output", "Q6_K", 10, 0, kld, "plain"),)
    measured = (replace(MEASURED, mean_kld=kld, mean_kld_stderr=kld),)
    checked(replace(report_of(tensors), curve=tuple(curve), measured=measured, limit_bytes=limit))


@pytest.mark.parametrize("layers", [1, 2, 128, 600])
def test_models_of_any_depth_fit_the_sheet(layers: int) -> None:
    roles = (
        "ffn_down_exps", "attn_output", "ffn_up_exps", "attn_q", "ffn_gate_inp", "ffn_gate_exps", "attn_kv_b",
        "ssm_out", "ffn_down_shexp", "attn_q_a", "ffn_up_shexp", "ffn_gate_shexp",
    )  # fmt: skip
    tensors = tuple(
        TensorChoice(f"blk.{layer}.{role}.weight", layer, role, "Q3_K", 110, 256, 1e-6, "imatrix")
        for layer in range(layers)
        for role in roles
    )
    root = checked(report_of(tensors))
    labels = [text.text for text in root.iter(f"{SVG}text") if text.text in roles]
    assert labels == [
        "attn_q", "attn_q_a", "attn_kv_b", "attn_output", "ssm_out", "ffn_gate_shexp", "ffn_up_shexp",
        "ffn_down_shexp", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps",
    ]  # fmt: skip
    assert len(cells(root)) == layers * 12 if layers <= 256 else len(cells(root)) <= 256 * 12


def test_labels_of_the_curve_do_not_overlap(smollm2: QuantReport) -> None:
    boxes = {}
    for text in checked(smollm2).iter(f"{SVG}text"):
        if text.text and (text.text in PRESETS or text.text.startswith(("this file 0", "homeinfer 4.1"))):
            x, y, half = float(text.attrib["x"]), float(text.attrib["y"]), text_width(text.text) / 2
            boxes[text.text] = Box(x - half, y - 10, x + half, y + 2)
    assert set(boxes) == {*PRESETS, "this file 0.0650", "homeinfer 4.1 bpw"}
    for one, other in combinations(boxes, 2):
        assert not boxes[one].meets(boxes[other]), (one, other)


def test_curve_falls_where_kld_falls(smollm2: QuantReport) -> None:
    marks = {}
    for circle in checked(smollm2).iter(f"{SVG}circle"):
        label = (circle.findtext(f"{SVG}title") or "").partition(":")[0]
        marks[label] = float(circle.attrib["cx"]), float(circle.attrib["cy"])
    for (one, (size, kld)), (other, (next_size, next_kld)) in pairwise(PRESETS.items()):
        assert (marks[one][0] < marks[other][0]) == (size < next_size)
        assert (marks[one][1] < marks[other][1]) == (kld > next_kld)
    assert marks["this file"][1] > marks["Q3_K_M"][1]


@pytest.mark.parametrize(
    ("kld", "size", "said"),
    [
        (0.065, 106_854_496, "3.1× less KLD than Q3_K_M of the same size"),
        (0.15, 106_854_496, "26 % less KLD than Q3_K_M of the same size"),
        (0.3, 106_854_496, "49 % more KLD than Q3_K_M of the same size"),
        (0.2019, 106_854_496, "the KLD of Q3_K_M of the same size"),
        (0.01, 150_000_000, "2.5× less KLD than Q4_K_M, which is 17 % smaller"),
        (0.2, 80_000_000, "3.7× less KLD than Q2_K, which is 12 % larger"),
        (0.03, 118_300_000, "48 % less KLD than IQ4_NL of the same size"),
        (0.0, 106_854_496, ""),
        (math.nan, 106_854_496, "Predicted: 3.2× less KLD than Q3_K_M of the same size"),
    ],
)
def test_file_is_compared_with_the_nearest_preset(smollm2: QuantReport, kld: float, size: int, said: str) -> None:
    measured = (replace(MEASURED, mean_kld=kld),)
    assert comparison(replace(smollm2, measured=measured, size_bytes=size)) == said


def test_everything_drawn_has_a_colour_in_both_schemes(smollm2: QuantReport) -> None:
    light, _, dark = style().partition("@media screen")
    for element in checked(smollm2).iter():
        kinds = element.attrib.get("class", "").split()
        if element.tag not in {f"{SVG}svg", f"{SVG}g"} and kinds:
            for scheme in (light, dark):
                rules = "".join(re.findall(rf"\.(?:{'|'.join(kinds)})\{{(.*?)\}}", scheme))
                assert re.search(r"(fill|stroke):#", rules), kinds


def test_more_bits_stand_out_more_and_numbers_are_readable() -> None:
    for scheme, away in zip(style().split("@media screen"), (-1, 1), strict=True):
        colours = [luminance(colour) for colour in re.findall(r"\.q\d+\{fill:(#\w+)\}", scheme)]
        inks = [luminance(colour) for colour in re.findall(r"\.on\d+\{fill:(#\w+)\}", scheme)]
        assert len(colours) == len(inks) == 11
        assert all((right - left) * away > 0 for left, right in pairwise(colours))
        for colour, ink in zip(colours, inks, strict=True):
            assert (max(colour, ink) + 0.05) / (min(colour, ink) + 0.05) > 4


def test_sixty_thousand_tensors_render_quickly() -> None:
    tensors = tuple(
        TensorChoice(f"blk.{at // 1000}.up.{at}.weight", at // 1000, f"up.{at}", "Q3_K", 110, 256, 1e-6, "hessian")
        for at in range(60_000)
    )
    report = report_of(tensors)
    began = time.process_time()
    page = render(report)
    assert time.process_time() - began < 2
    assert "All 60,000 tensors" in page
    assert len(cells(drawn(picture(report)))) == 60


def test_report_is_written_whole_over_an_older_one(smollm2: QuantReport, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("older")
    write_report(path, smollm2)
    assert path.read_text("utf-8") == render(smollm2)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_report_that_cannot_be_written_is_one_line(smollm2: QuantReport, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere" / "report.html", tmp_path / ("x" * 300)):
        with pytest.raises(HomeinferError) as refused:
            write_report(path, smollm2)
        assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []
