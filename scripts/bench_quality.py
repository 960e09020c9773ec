#!/usr/bin/env python3
"""How close to the original homeinfer's files are, against llama.cpp's presets of the same size and imatrix.

    scripts/bench_quality.py [--size BYTES …] [--other-texts] [--threads N]

Makes the padded F16 SmolLM2 of ../shared/testmodels. Calibration: the first 120,000 bytes of Python's help topics;
evaluation: their last 100,000, 16 chunks of 512 tokens (llama-perplexity's convention). Without --size: the sizes of
llama.cpp's Q4_K_M, Q3_K_M, IQ3_S and Q2_K. For each size homeinfer quantizes to it, and is compared with the closest of
those presets that is no larger (or the smallest). --other-texts adds English, code and chat that calibration never saw.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from homeinfer.cli.default_model import default_model
from homeinfer.quant.evaluate import evaluate, keep_logits

TEST_MODELS = Path(__file__).resolve().parents[2] / "shared" / "testmodels"
PRESETS = {"Q4_K_M": 124_168_288, "Q3_K_M": 106_863_712, "IQ3_S": 98_833_504, "Q2_K": 89_248_864}
CODE = ("argparse", "heapq", "textwrap", "json/decoder", "difflib", "tarfile", "inspect", "asyncio/queues")


def texts() -> dict[str, tuple[str, int]]:
    """Name → text and how many chunks of it are read; the first is what calibration reads, and is not evaluated."""
    import pydoc_data.topics

    topics = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)).encode()
    library = Path(sysconfig.get_paths()["stdlib"])
    code = "\n\n".join((library / f"{name}.py").read_text()[1500:8000] for name in CODE)
    packages = sorted(importlib.metadata.distributions(), key=lambda each: each.name)
    about = ((each.read_text("METADATA") or "").partition("\n\n")[2] for each in packages)
    english = "\n\n".join(text[500:3500] for text in about)
    chat = (Path(__file__).parent / "texts" / "chat.txt").read_text()
    return {
        "calibration": (topics[:120_000].decode(errors="ignore"), 0),
        "help topics": (topics[-100_000:].decode(errors="ignore"), 16),
        "english": (english, 6),
        "code": (code, 6),
        "chat": (chat, 3),
    }


def run(*arguments: object) -> None:
    print("homeinfer", *arguments, file=sys.stderr)
    subprocess.run([sys.executable, "-m", "homeinfer", *map(str, arguments)], check=True, stdout=sys.stderr)


def measured(model: Path, kept: dict[str, Path], words: dict[str, tuple[str, int]], threads: int) -> dict[str, Any]:
    """Size, and KLD and same top token on every text; the first text's at the top level."""
    found: dict[str, Any] = {"size_bytes": model.stat().st_size}
    for index, (name, logits) in enumerate(kept.items()):
        text, chunks = words[name]
        result = evaluate(model, logits, text, chunks=chunks, threads=threads)
        numbers = {"mean_kld": round(result.mean_kld, 5), "same_top": round(result.same_top, 4)}
        found |= numbers if index == 0 else {name: numbers}
    return found


def compared(folder: Path, sizes: list[int], other_texts: bool, threads: int) -> list[dict[str, Any]]:
    source, calibration, imatrix = folder / "padded-F16.gguf", folder / "calibration.txt", folder / "imatrix.gguf"
    maker = [sys.executable, str(TEST_MODELS / "pad_model.py"), str(default_model()), str(source)]
    subprocess.run(maker, check=True)
    words = texts()
    calibration.write_text(words.pop("calibration")[0])
    kept = {name: folder / f"{name}.logits" for name in (words if other_texts else ["help topics"])}
    for name, path in kept.items():
        keep_logits(source, words[name][0], path, chunks=words[name][1], threads=threads)
    run("imatrix", source, "--text", calibration, "-o", imatrix, "--threads", threads)
    presets = {}
    rows = []
    for size in sizes:
        preset = max((p for p in PRESETS if PRESETS[p] <= size), key=PRESETS.__getitem__, default="Q2_K")
        if preset not in presets:
            made = folder / f"{preset}.gguf"
            run("quantize", source, made, "--recipe", preset, "--imatrix", imatrix, "--threads", threads)
            presets[preset] = measured(made, kept, words, threads)
        ours = folder / f"{size}.gguf"
        run("quantize", source, ours, "--size", size, "--text", calibration, "--threads", threads)
        found = measured(ours, kept, words, threads)
        assert found["size_bytes"] <= size
        rows.append({"limit_bytes": size, "homeinfer": found, "llama.cpp": {"preset": preset, **presets[preset]}})
        print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", type=int, help="bytes; may be given again")
    parser.add_argument("--other-texts", action="store_true", help="evaluate on English, code and chat as well")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="homeinfer-bench-") as temporary:
        os.environ.setdefault("HOMEINFER_KEPT", f"{temporary}/kept")
        sizes = options.size or list(PRESETS.values())
        rows = compared(Path(temporary), sizes, options.other_texts, options.threads)
    print(json.dumps({"cpu": platform.processor() or platform.machine(), "sizes": rows}, indent=2))


if __name__ == "__main__":
    main()
