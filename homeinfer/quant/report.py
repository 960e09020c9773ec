"""The report of a quantization: one HTML file that needs nothing else, and its picture as one SVG.

Pure but for `write_report`: what was chosen and measured comes as a QuantReport.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from homeinfer.errors import HomeinferError
from homeinfer.model.header import printable
from homeinfer.quant.report_curve import LEAST, MOST, kld_curve, this_file
from homeinfer.quant.report_data import CurvePoint, Measured, QuantReport, TensorChoice
from homeinfer.quant.report_map import Module, bits_map, modules, total_kld
from homeinfer.quant.report_svg import Drawing, bits_per_weight, inline, nbytes, percent, standalone, style
from homeinfer.svg import figures, safe, text
from homeinfer.whole_file import whole_file

_SAME_SIZE = 0.01
"""Presets within this share of the file's size are of the same size."""
_METHODS = {
    "hessian": "rounded with the Hessian",
    "imatrix": "rounded with the importance matrix",
    "plain": "rounded without calibration",
    "kept": "kept as they are",
}
_PAGE_STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--soft:#59636e;--line:#d8dee4;--paper:#fff;--mine:#c2410c}
@media screen and (prefers-color-scheme:dark){
:root{--ink:#e6edf3;--soft:#9198a1;--line:#30363d;--paper:#0d1117;--mine:#ff9b5e}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1010px;margin:0 auto;padding:28px 20px 48px}
h1{font-size:1.6rem;line-height:1.25;margin:0;overflow-wrap:anywhere}h2{font-size:1.05rem;margin:2.2rem 0 .5rem}
p{margin:.4rem 0}.soft{color:var(--soft)}.where{overflow-wrap:anywhere}
.claim{font-size:1.15rem;color:var(--mine);font-weight:600;margin:1rem 0 0}
dl.facts{display:flex;flex-wrap:wrap;gap:1rem 2.4rem;margin:1.2rem 0 0}
.facts div{display:flex;flex-direction:column-reverse;justify-content:flex-end}
.facts dd{margin:0;font-size:1.5rem;font-weight:600}
.facts dt{color:var(--soft);font-size:.82rem}.facts small{display:block;font-size:inherit}
figure{margin:2rem 0 0}.wide{overflow-x:auto}
figure svg{display:block;width:100%;min-width:760px;height:auto}
table{min-width:640px;border-collapse:collapse;font-size:.87rem;font-variant-numeric:tabular-nums;width:100%}
th{font-weight:600;text-align:left;color:var(--soft)}
th,td{padding:.28rem .7rem .28rem 0;border-bottom:1px solid var(--line)}
td.n,th.n{text-align:right;white-space:nowrap}summary{cursor:pointer;font-weight:600;margin-top:2.2rem}
ul{padding-left:1.2rem;margin:.4rem 0}li{margin:.25rem 0}
footer{margin-top:2.6rem;padding-top:.8rem;border-top:1px solid var(--line);color:var(--soft);font-size:.82rem}
@page{margin:14mm}
@media print{body{font-size:12px}main{max-width:none;padding:0}.wide{overflow:visible}figure svg,table{min-width:0}
figure,tr,.facts div{break-inside:avoid}h2{break-after:avoid}}
"""


def render(report: QuantReport) -> str:
    """The report as one HTML document: no scripts, nothing from elsewhere, every name escaped."""
    name = safe(report.model)
    curve = kld_curve(report)
    parts = [
        f"<header><h1>{name}</h1>",
        f'<p class="soft where">{safe(report.source, 500)} ({nbytes(report.source_bytes)}) → '
        f"{safe(report.destination, 500)}{_asked(report)}</p>",
        f'<p class="claim">{safe(claim, 400)}</p>' if (claim := comparison(report)) else "",
        _facts(report) + "</header>",
        _figure(bits_map(report.tensors)),
        _figure(curve) if curve else "",
        _sentences("Why", report.why),
        _sentences("Notes", report.notes),
        _measured_table(report),
        _module_table(report),
        _tensor_table(report.tensors),
        f"<footer>{safe(_made(report), 1000)}</footer>",
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{name}, quantized</title><style>{_PAGE_STYLE}{style()}</style>"
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body><main>{"".join(parts)}</main></body></html>\n'


def picture(report: QuantReport) -> str:
    """The headline, the map and the curve as one SVG file on a sheet of its own, for a README."""
    drawings = [_headline(report), bits_map(report.tensors)]
    curve = kld_curve(report)
    if curve is not None:
        drawings.append(curve)
    return standalone(drawings, f"{report.model} quantized: {_summary(report)}")


def write_report(path: str | os.PathLike[str], report: QuantReport) -> None:
    """Write the HTML file whole or not at all; HomeinferError where that cannot be."""
    target = Path(os.path.realpath(path))
    name = printable(os.fspath(path), 1000)
    try:
        if target.is_dir():
            raise HomeinferError(f"{name}: this is a directory; name the report's file")
        with whole_file(target) as file:
            file.write(render(report).encode())
    except OSError as error:
        raise HomeinferError(
            f"{name}: the report cannot be written: {error.strerror}; name another place for it"
        ) from None


def comparison(report: QuantReport) -> str:
    """The file against llama.cpp's preset of the same size, or the nearest; "" without one to compare."""
    own = this_file(report)
    presets = [point for point in report.curve if point.kind == "preset" and LEAST < point.mean_kld < MOST]
    if own is None or not LEAST < own.mean_kld < MOST or own.size_bytes <= 0 or not presets:
        return ""
    rival = min(presets, key=lambda preset: _rivalry(preset, own.size_bytes))
    ratio = rival.mean_kld / own.mean_kld
    if ratio >= 2:
        amount = f"{ratio:.1f}× less KLD than {rival.label}"
    elif ratio > 1.01:
        amount = f"{100 * (1 - 1 / ratio):.0f} % less KLD than {rival.label}"
    elif ratio > 0.99:
        amount = f"the KLD of {rival.label}"
    else:
        amount = f"{100 * (1 / ratio - 1):.0f} % more KLD than {rival.label}"
    difference = rival.size_bytes / own.size_bytes - 1
    if abs(difference) <= _SAME_SIZE:
        size = "of the same size"
    else:
        size = f"which is {abs(100 * difference):.0f} % {'larger' if difference > 0 else 'smaller'}"
        amount += ","
    return f"{'Predicted: ' if own.kind == 'predicted' else ''}{amount} {size}"


def _rivalry(preset: CurvePoint, size: int) -> tuple[float, float]:
    """Nearest in size first; among those of the same size the one that is hardest to beat."""
    off = abs(preset.size_bytes / size - 1)
    return (0.0 if off <= _SAME_SIZE else off), preset.mean_kld


def _summary(report: QuantReport) -> str:
    words = [nbytes(report.size_bytes), f"{figures(report.bpw)} bits per weight"]
    own = this_file(report)
    if own is not None:
        words.append(f"{'mean' if own.kind == 'measured' else 'predicted'} KLD {figures(own.mean_kld)}")
    if report.measured:
        words.append(f"same top token {percent(report.measured[0].same_top)}")
    return ", ".join(words)


def _headline(report: QuantReport) -> Drawing:
    words, claim = _summary(report), comparison(report)
    parts = [text(0, 20, report.model[:70], "ink big")]
    if claim:
        parts.append(text(0, 47, claim, "mine head"))
    end = 70 if claim else 45
    parts.append(text(0, end, words, "soft"))
    return Drawing(end + 4, "".join(parts), words)


def _asked(report: QuantReport) -> str:
    return f", asked for {safe(report.asked)}" if report.asked else ""


def _facts(report: QuantReport) -> str:
    of_source = report.size_bytes / report.source_bytes if report.source_bytes > 0 else math.nan
    limit = f", limit {nbytes(report.limit_bytes)}" if report.limit_bytes else ""
    facts = [
        ("size", nbytes(report.size_bytes), f"{percent(of_source)} of the source{limit}"),
        ("bits per weight", figures(report.bpw), ""),
    ]
    if report.predicted_kld is not None:
        facts.append(("mean KLD, predicted", figures(report.predicted_kld), ""))
    if report.measured:
        first = report.measured[0]
        error = f"± {figures(first.mean_kld_stderr, 2)} on {safe(first.text, 40)}"
        facts.append(("mean KLD, measured", figures(first.mean_kld), error))
        facts.append(("same top token", percent(first.same_top), ""))
    cells = (
        f"<div><dt>{name}{f' <small>{more}</small>' if more else ''}</dt><dd>{value}</dd></div>"
        for name, value, more in facts
    )
    return f'<dl class="facts">{"".join(cells)}</dl>'


def _figure(drawing: Drawing) -> str:
    return f'<figure><div class="wide">{inline(drawing)}</div></figure>\n'


def _sentences(title: str, sentences: Iterable[str]) -> str:
    items = "".join(f"<li>{safe(sentence, 1000)}</li>" for sentence in sentences)
    return f"<h2>{title}</h2><ul>{items}</ul>\n" if items else ""


def _measured_table(report: QuantReport) -> str:
    if not report.measured:
        return ""
    rows = [_measured_row(measured) for measured in report.measured]
    table = _table(("text", "mean KLD", "99th percentile", "same top token", "perplexity", "of the original"), rows)
    return f"<h2>Measured against the original</h2>{table}\n"


def _measured_row(measured: Measured) -> tuple[str, ...]:
    return (
        safe(measured.text),
        f"{figures(measured.mean_kld)} ± {figures(measured.mean_kld_stderr, 2)}",
        figures(measured.kld_p99),
        percent(measured.same_top),
        figures(measured.ppl, 4),
        figures(measured.ppl_reference, 4),
    )


def _module_table(report: QuantReport) -> str:
    found = modules(report.tensors)
    if not found:
        return ""
    total = total_kld(report.tensors)
    rows = [_module_row(module, total) for module in found[:200]]
    table = _table(("module", "types", "tensors", "size", "bpw", "predicted KLD"), rows, words=2)
    return f"<h2>Modules</h2>{table}{_methods(report.tensors)}\n"


def _module_row(module: Module, total: float) -> tuple[str, ...]:
    counts = Counter(tensor.type for tensor in module.tensors)
    kinds = ", ".join(f"{count}×{kind}" for kind, count in counts.most_common(8))
    share = f"{figures(module.kld)} ({percent(module.kld / total)})" if total and module.kld else "–"
    size, bpw = nbytes(module.nbytes), f"{module.bpw:.2f}"
    return safe(module.role, 60), safe(kinds), f"{len(module.tensors):,}", size, bpw, share


def _methods(tensors: Sequence[TensorChoice]) -> str:
    counts = Counter(tensor.method for tensor in tensors)
    words = ", ".join(f"{count:,} tensors {_METHODS.get(method, method)}" for method, count in counts.most_common(8))
    return f'<p class="soft">{safe(words, 400)}.</p>'


def _tensor_table(tensors: Sequence[TensorChoice]) -> str:
    if not tensors:
        return ""
    rows = (
        (
            safe(tensor.name),
            safe(tensor.type),
            f"{bits_per_weight(tensor.bytes, tensor.n_weights):.2f}",
            f"{tensor.bytes:,}",
            figures(tensor.predicted_kld),
            safe(tensor.method),
        )
        for tensor in tensors
    )
    table = _table(("tensor", "type", "bpw", "bytes", "predicted KLD", "method"), rows, words=2)
    return f'<details><summary>All {len(tensors):,} tensors</summary><div class="wide">{table}</div></details>\n'


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """Rows of ready HTML; the first `words` columns are words, the others numbers."""
    open_cells = ["<td>" if at < words else '<td class="n">' for at in range(len(titles))]
    heads = "".join(f"<th{'' if at < words else ' class=n'}>{title}</th>" for at, title in enumerate(titles))
    body = "\n".join(
        f"<tr>{''.join(f'{cell}{value}</td>' for cell, value in zip(open_cells, row, strict=True))}</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _made(report: QuantReport) -> str:
    words = [f"homeinfer {report.version}"]
    if math.isfinite(report.seconds) and report.seconds > 0:
        words.append(f"{report.seconds:.0f} s" if report.seconds < 120 else f"{report.seconds / 60:.0f} minutes")
    if report.calibration:
        words.append(f"calibrated on {report.calibration}")
    words.append("KLD is of the next-token distributions to the original's, in nats, second half of each chunk")
    return " · ".join(words)
