"""Speed of the recurrences, compared with attention, transformers' own torch forms, and the machine.

    python -m benchmarks.ops [--quick] [--json FILE] [--plot FILE.png]

Notable:
- Everything that is compared runs in turns, in an order shuffled anew every round. A ratio is the median over rounds of
  the ratios within a round; times of different runs are never compared. Spreads are minimum and maximum.
- Rivals get the layout they want (transformers and flash-linear-attention: time first), made before the clock starts.
  transformers' forms are its own functions, `torch_chunk_gated_delta_rule` of Qwen3-Next and `mamba2_chunk_scan`, which
  is what BambaMixer calls between its convolution and its norm; unwrapped, since a kernel takes their place where
  one is installed. The scan runs with BambaConfig's chunks, and with chunks of 64, which suit a CPU better: the number
  in its label. `agreement` in the JSON is how far their results are from ours.
- Useful operations (`useful_flops`) are the matrix products of the chunked form with chunks of 64, the same number for
  all contenders of a rule, whatever each of them does: within a rule, equal shares of the limit mean equal times.
- A state after 100,000 tokens is one that the chunk form made from as many; for a larger batch it is repeated.
- Peak memory is of a fresh process each, over what it held before, without the inputs. On Linux it is read from /proc:
  the maximum that `getrusage` reports there starts at what the parent held.
- Two threads on a core that another process wants wait for each other, and times grow tenfold and more. On Linux the
  JSON says how many cores others took during the run (`cores_taken_by_others`), and a warning precedes the tables.
- On a GPU `subquad.ops` is kept to its torch form, and flash-linear-attention's kernels are rivals, if it is installed.

Legend: B batch, H heads, T time, D width of keys and values, C time within a chunk.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console

from benchmarks.common import command_of, facts, wide_console
from benchmarks.ops.contenders import FORMULAS, QUICK, Contender, Settings, find_contenders
from benchmarks.ops.measures import (
    agreement,
    compare,
    measure_compile,
    measure_decode,
    measure_memory,
    measure_one_memory,
    measure_times,
)
from benchmarks.ops.report import draw, print_report
from subquad.ops import triton
from subquad.utils.files import write_json

PARTS = ("times", "decode", "memory", "compile")


def run(settings: Settings, parts: Sequence[str], command: str, console: Console) -> dict[str, Any]:
    """Measures `parts` and returns all there is to know, ready for JSON."""
    contenders = find_contenders(settings.device)
    report: dict[str, Any] = {
        **facts(command, asdict(settings), torch.device(settings.device)),
        "contenders": [described(c) for c in contenders],
    }
    measures = {
        "times": measure_times,
        "decode": measure_decode,
        "memory": measure_memory,
        "compile": measure_compile,
    }
    started = clocks()
    with kept_to_torch(settings.device), console.status("starting") as status:
        report["agreement"] = agreement(settings, contenders)
        for part in (part for part in PARTS if part in parts):
            report[part] = measures[part](settings, contenders, status.update)
    if "times" in report:
        report["faster"] = compare(report["times"], contenders)
    wall, busy, own = (now - then for now, then in zip(clocks(), started, strict=True))
    return {**report, "seconds": wall, "cores_taken_by_others": max(0.0, busy - own) / wall}


def clocks() -> tuple[float, float, float]:
    """Seconds of the wall clock, of work on all cores (0 where unknown), and of this process's work among them."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return time.perf_counter(), 0.0, 0.0
    user, nice, system, _idle, _wait, interrupts, soft, stolen = map(int, stat.read_text().split()[1:9])
    ticks = user + nice + system + interrupts + soft + stolen
    return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def described(contender: Contender) -> dict[str, Any]:
    """Description of a contender for the JSON."""
    known = {name: getattr(contender, name) for name in ("name", "label", "rule", "ours")}
    return {**known, "useful_flops_per_token_and_head": FORMULAS[contender.rule]}


def kept_to_torch(device: str) -> Any:
    """On a GPU, the torch form of `subquad.ops` even where kernels are installed."""
    return patch.object(triton, "serves", lambda x: False) if device == "cuda" else nullcontext()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three short lengths, two rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw time over length")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="such as lengths=[64,128]")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # how measure_memory calls itself
    return parser.parse_args(argv)


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The settings that a command line asks for."""
    on_gpu = arguments.device == "cuda"
    settings = Settings(
        device=arguments.device,
        dtype=arguments.dtype or ("bfloat16" if on_gpu else "float32"),
        matmul=8192 if on_gpu else 1024,
    )
    changes = {key: json.loads(value) for key, _, value in (change.partition("=") for change in arguments.set)}
    return replace(settings, **((QUICK if arguments.quick else {}) | changes))


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes what was asked for."""
    arguments = parse(argv)
    if arguments.memory_of:
        job = json.loads(arguments.memory_of)
        settings = Settings(**job["settings"])
        contender = next(c for c in find_contenders(settings.device) if c.name == job["contender"])
        with kept_to_torch(settings.device):
            print(json.dumps(measure_one_memory(contender, settings)))
        return
    console = wide_console()
    report = run(settings_of(arguments), arguments.parts, command_of("benchmarks.ops", argv), console)
    print_report(report, console)
    if arguments.json:
        write_json(arguments.json, report)
    if arguments.plot and "times" in report:
        draw(report, arguments.plot)


if __name__ == "__main__":
    main()
