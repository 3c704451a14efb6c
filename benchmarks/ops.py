"""How fast the recurrences are: beside attention, beside transformers' own torch forms, and beside the machine.

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
import functools
import importlib.util
import inspect
import json
import math
import os
import platform
import random
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import matplotlib
import torch
import transformers
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

import subquad
from subquad.evaluate import peak_rss_bytes
from subquad.ops import decay_chunk, decay_step, delta_chunk, delta_step, dplr_chunk, dplr_step, triton
from subquad.report import format as fmt
from subquad.report.plots import MIXER_COLOURS, SPARE_COLOURS, STYLE
from subquad.run import device_name, processor, source_commit

PARTS = ("times", "decode", "memory", "compile")
MODES = ("forward", "forward+backward")
COMPILED = ("decay-scalar", "delta-scalar")
MATMUL = "matmul"
GROWTH_STEPS = 1000


@dataclass(frozen=True)
class Settings:
    """What is measured and for how long; lengths and positions in tokens."""

    batch: int = 1
    heads: int = 9
    width: int = 64
    device: str = "cpu"
    dtype: str = "float32"
    lengths: Sequence[int] = tuple(512 << i for i in range(7))
    rounds: Sequence[int] = (3, 9)  # at least and at most, for one length and mode
    seconds: float = 8.0  # after which no more than the least number of rounds is made
    limit: float = 20.0  # seconds a call may be expected to take, else it is left out
    matmul: int = 1024
    positions: Sequence[int] = (100, 100_000)
    batches: Sequence[int] = (1, 16)
    step_rounds: int = 300
    memory_length: int = 4096
    compile_length: int = 1024


QUICK: dict[str, Any] = {
    "lengths": (256, 512, 1024),
    "rounds": (2, 2),
    "positions": (100, 10_000),
    "step_rounds": 50,
    "memory_length": 1024,
    "compile_length": 256,
}


# ---------------------------------------------------------------------------------------------------------- contenders


@dataclass(frozen=True)
class Contender:
    """A way to compute a rule. `call(*arguments, state)` and `step(*arguments, state)` return y and the new state."""

    name: str
    label: str
    rule: str
    takes: Sequence[str]  # the names of its arguments among `make_inputs`
    call: Callable[..., tuple[Tensor, Tensor | None]]
    step: Callable[..., tuple[Tensor, Tensor]] | None = None
    ours: bool = False
    time_first: bool = False

    def arguments(self, inputs: Mapping[str, Tensor], *, gradients: bool = False) -> list[Tensor]:
        """Its arguments, in its own layout."""
        return [self.laid_out(inputs[name]).requires_grad_(gradients) for name in self.takes]

    def laid_out(self, x: Tensor) -> Tensor:
        """A tensor that is heads first in this contender's layout, and back."""
        return x.transpose(1, 2).contiguous() if self.time_first else x.detach()


def make_inputs(settings: Settings, length: int, *, batch: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Everything that some contender takes, heads first. Keys have unit length, as the delta rules need."""
    B, H, T, D = batch or settings.batch, settings.heads, length, settings.width
    generator = torch.Generator().manual_seed(seed)
    q, k, e = (normalize(torch.randn(B, H, T, D, generator=generator), dim=-1) for _ in range(3))
    v = torch.randn(B, H, T, D, generator=generator)
    b_BHT = torch.rand(B, H, T, generator=generator)
    dt_BHT = 0.001 + 0.1 * torch.rand(B, H, T, generator=generator)
    log_a_BHTD = -0.001 - 0.1 * torch.rand(B, H, T, D, generator=generator)
    dtype = getattr(torch, settings.dtype)
    values = {"q": q, "k": k, "v": v, "e": e, "b": b_BHT, "w": b_BHT.unsqueeze(-1) * e}
    # Mamba-2 has dt in its values too; transformers' delta rule divides its queries by the root of the width
    values |= {"v_over_dt": v / dt_BHT.unsqueeze(-1), "q_root": q * math.sqrt(D)}
    gates = {"log_a": -dt_BHT, "dt": dt_BHT, "log_a_vector": log_a_BHTD}
    return {name: x.to(settings.device, dtype) for name, x in values.items()} | {
        name: x.to(settings.device) for name, x in gates.items()
    }


def find_contenders(device: str) -> list[Contender]:
    """Ours first, then the rivals that are there."""
    kernels = fla_kernels() if device == "cuda" and importlib.util.find_spec("fla") else []
    return [*our_forms(), softmax_attention(), *transformers_forms(), *kernels]


def our_forms() -> list[Contender]:
    """The chunk forms of subquad.ops, with their steps."""

    def linear(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return decay_chunk(q, k, v, None, state)

    def linear_step(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        return decay_step(q, k, v, None, state)

    qkv = ("q", "k", "v")
    ours = functools.partial(Contender, ours=True)
    return [
        ours("linear", "linear attention", "no decay", qkv, linear, linear_step),
        ours("decay-scalar", "Mamba-2, RetNet", "scalar decay", (*qkv, "log_a"), decay_chunk, decay_step),
        ours("decay-vector", "GLA", "vector decay", (*qkv, "log_a_vector"), decay_chunk, decay_step),
        ours("delta-scalar", "gated delta rule", "delta", (*qkv, "log_a", "b"), delta_chunk, delta_step),
        ours("delta-vector", "KDA", "vector delta", (*qkv, "log_a_vector", "b"), delta_chunk, delta_step),
        ours("dplr", "RWKV-7", "dplr", (*qkv, "log_a_vector", "e", "w"), dplr_chunk, dplr_step),
    ]


def softmax_attention() -> Contender:
    """PyTorch's fused causal attention."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        return scaled_dot_product_attention(q, k, v, is_causal=True), None

    return Contender("sdpa", "softmax attention (PyTorch)", "softmax", ("q", "k", "v"), attend)


def transformers_forms() -> list[Contender]:
    """transformers' torch forms of two of the rules, in versions that have them as functions."""
    from transformers.models.bamba import modeling_bamba
    from transformers.models.qwen3_next import modeling_qwen3_next

    of_scan, of_rule = ("q", "k", "v_over_dt", "dt"), ("q_root", "k", "v", "log_a", "b")
    found = []
    if hasattr(modeling_bamba, "mamba2_chunk_scan"):
        scan = inspect.unwrap(modeling_bamba.mamba2_chunk_scan)

        def mamba2(q: Tensor, k: Tensor, x: Tensor, dt: Tensor, *, chunk: int) -> tuple[Tensor, Tensor]:
            y, state = scan(x, dt, -x.new_ones(x.shape[2]), k, q, chunk, return_final_states=True)
            return y, state

        for name, chunk in (("hf-mamba2", transformers.BambaConfig().mamba_chunk_size or 256), ("hf-mamba2-64", 64)):
            label, call = f"Mamba-2 (transformers, chunk {chunk})", functools.partial(mamba2, chunk=chunk)
            found.append(Contender(name, label, "scalar decay", of_scan, call, time_first=True))
    if hasattr(modeling_qwen3_next, "torch_chunk_gated_delta_rule"):
        rule = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)
        delta = functools.partial(rule, output_final_state=True)
        found.append(Contender("hf-delta", "gated delta rule (transformers)", "delta", of_rule, delta, time_first=True))
    return found


def fla_kernels() -> list[Contender]:
    """flash-linear-attention's Triton kernels of four of the rules."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla
    from fla.ops.kda import chunk_kda
    from fla.ops.simple_gla import chunk_simple_gla

    names = ("q", "k", "v", "g", "beta")

    def kernel(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
        def call(*arguments: Tensor) -> tuple[Tensor, Tensor]:
            named = dict(zip(names, arguments, strict=False))
            y, state = function(**named, scale=1.0, output_final_state=True)
            return y, state

        return call

    qkv = ("q", "k", "v")
    fla = functools.partial(Contender, time_first=True)
    return [
        fla("fla-simple-gla", "Mamba-2 (fla)", "scalar decay", (*qkv, "log_a"), kernel(chunk_simple_gla)),
        fla("fla-gla", "GLA (fla)", "vector decay", (*qkv, "log_a_vector"), kernel(chunk_gla)),
        fla("fla-delta", "gated delta rule (fla)", "delta", (*qkv, "log_a", "b"), kernel(chunk_gated_delta_rule)),
        fla("fla-kda", "KDA (fla)", "vector delta", (*qkv, "log_a_vector", "b"), kernel(chunk_kda)),
    ]


# Useful operations of one head's forward pass for one token, C = 64: a product of (m, n) with (n, p) counts 2 m n p, a
# triangular system of C unknowns with p right-hand sides C C p. Of the causal half, attention needs only that half.
FORMULAS = {
    "softmax": "2 T D",
    "no decay": "4 C D + 4 D D",
    "scalar decay": "4 C D + 4 D D",
    "vector decay": "4 C D + 4 D D",
    "delta": "8 C D + 6 D D",
    "vector delta": "8 C D + 6 D D",
    "dplr": "16 C D + 8 D D",
}


def useful_flops(rule: str, length: int, width: int) -> int:
    """Useful operations of one head's forward pass, by `FORMULAS`; with the backward pass it is three times that."""
    sizes = {"T": length, "D": width, "C": 64}
    terms = [term.split() for term in FORMULAS[rule].split(" + ")]
    return length * sum(math.prod(sizes.get(factor) or int(factor) for factor in term) for term in terms)


# -------------------------------------------------------------------------------------------------------------- timing


class Spread(NamedTuple):
    """What a few measurements come to."""

    median: float
    low: float
    high: float


def spread(samples: Iterable[float]) -> Spread:
    """Median, minimum and maximum."""
    ordered = sorted(samples)
    return Spread(median(ordered), ordered[0], ordered[-1])


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """The quotients of two contenders' times, round by round."""
    return spread(a / b for a, b in zip(over, under, strict=True))


def expected_seconds(known: Mapping[int, float], length: int) -> float:
    """What the last two lengths let expect of another: their power law, at least linear. 0 where nothing is known."""
    if not known:
        return 0.0
    *before, (last, seconds) = sorted(known.items())
    power = 1.0
    if before:
        shorter, faster = before[-1]
        power = max(1.0, math.log(seconds / faster) / math.log(last / shorter))
    return seconds * (length / last) ** power


def race(calls: Mapping[str, Callable[[], Any]], rounds: Sequence[int], seconds: float) -> dict[str, list[float]]:
    """Seconds of every call in every round; after `seconds` no more than the least number of rounds."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    least, most = rounds
    started = time.perf_counter()
    for turn in range(most):
        if turn >= least and time.perf_counter() - started > seconds:
            break
        for name in random.Random(turn).sample(list(calls), len(calls)):
            samples[name].append(seconds_of(calls[name]))
    return samples


def seconds_of(call: Callable[[], Any]) -> float:
    """Wall-clock time of one call, all work on a GPU included."""
    synchronize()
    started = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def prepared(contender: Contender, inputs: Mapping[str, Tensor], mode: str) -> Callable[[], Any]:
    """A call without arguments that is all of `mode` and nothing else."""
    gradients = mode == "forward+backward"
    arguments = contender.arguments(inputs, gradients=gradients)
    grad = contender.laid_out(inputs["v"])  # any values that are not all alike

    def forward() -> Tensor:
        with torch.no_grad():
            return contender.call(*arguments)[0]

    def forward_backward() -> Sequence[Tensor]:
        return torch.autograd.grad(contender.call(*arguments)[0], arguments, grad)

    return forward_backward if gradients else forward


def matrix_product(settings: Settings) -> Callable[[], Any]:
    """A square matrix product, whose speed is the machine's limit."""
    n, dtype = settings.matmul, getattr(torch, settings.dtype)
    left, right, out = (torch.randn(n, n, device=settings.device, dtype=dtype) for _ in range(3))
    return lambda: torch.mm(left, right, out=out)


def measure_times(settings: Settings, contenders: Sequence[Contender], say: Callable[[str], None]) -> list[dict]:
    """One row a length, mode and contender; `seconds` is None where the call was expected to take too long."""
    rows = []
    known: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for length in settings.lengths:
        inputs = make_inputs(settings, length)
        for mode in MODES:
            say(f"{mode} of {length} tokens")
            expected = {c.name: expected_seconds(known[c.name, mode], length) for c in contenders}
            calls = {c.name: prepared(c, inputs, mode) for c in contenders if expected[c.name] <= settings.limit}
            calls[MATMUL] = matrix_product(settings)
            for name, call in calls.items():
                if expected.get(name, 0.0) < 1.0:  # the first touch of memory weighs little in a longer one
                    call()
            samples = race(calls, settings.rounds, settings.seconds)
            peak = 2 * settings.matmul**3 / median(samples[MATMUL])
            rows.append({"contender": MATMUL, "mode": mode, "length": length, "flops_per_second": peak})
            rows[-1] |= _timed(samples[MATMUL])
            for c in contenders:
                row = {"contender": c.name, "mode": mode, "length": length}
                if c.name not in calls:
                    rows.append({**row, "seconds": None, "expected_seconds": expected[c.name]})
                    continue
                known[c.name, mode][length] = min(samples[c.name])
                flops = settings.batch * settings.heads * useful_flops(c.rule, length, settings.width)
                flops *= 3 if mode == "forward+backward" else 1
                share = flops / median(samples[c.name]) / peak
                rows.append({**row, **_timed(samples[c.name]), "useful_flops": flops, "share_of_matmul": share})
    return rows


def _timed(samples: Sequence[float]) -> dict[str, Any]:
    middle, low, high = spread(samples)
    return {"seconds": middle, "low": low, "high": high, "samples": list(samples)}


def compare(rows: Sequence[dict], contenders: Sequence[Contender]) -> list[dict]:
    """How many times faster each of ours is than attention and than the rivals of its rule."""
    samples = {(row["contender"], row["mode"], row["length"]): row.get("samples") for row in rows}
    found = []
    for (name, mode, length), mine in samples.items():
        ours = next((c for c in contenders if c.name == name and c.ours), None)
        for rival in contenders:
            theirs = samples.get((rival.name, mode, length))
            if ours is None or rival.ours or rival.rule not in (ours.rule, "softmax") or not mine or not theirs:
                continue
            times = ratio(theirs, mine)._asdict()
            found.append({"contender": name, "rival": rival.name, "mode": mode, "length": length, "faster": times})
    return found


@torch.no_grad()
def agreement(settings: Settings, contenders: Sequence[Contender]) -> dict[str, float]:
    """How far each rival's result is from ours of the same rule: the largest difference over the largest value."""
    inputs = make_inputs(settings, min(settings.lengths))
    results = {c.name: c.laid_out(c.call(*c.arguments(inputs))[0]).float() for c in contenders}
    return {
        rival.name: float((results[rival.name] - results[c.name]).abs().max() / results[c.name].abs().max())
        for rival in contenders
        for c in contenders
        if c.ours and not rival.ours and c.rule == rival.rule
    }


# -------------------------------------------------------------------------------------------------------------- decode


@torch.no_grad()
def measure_decode(settings: Settings, contenders: Sequence[Contender], say: Callable[[str], None]) -> list[dict]:
    """One row a recurrence and batch: a step early and late in a sequence, beside copying the state once."""
    rows = []
    for c in contenders:
        if c.step is None:
            continue
        say(f"decoding: {c.label}")
        states = {position: state_after(c, position, settings) for position in settings.positions}
        for batch in settings.batches:
            arguments = c.arguments(make_inputs(settings, 1, batch=batch))
            grown = {position: state.repeat(batch, 1, 1, 1) for position, state in states.items()}
            state = grown[max(grown)]
            calls: dict[str, Callable[[], Any]]
            calls = {str(position): functools.partial(c.step, *arguments, grown[position]) for position in grown}
            calls["copy"] = functools.partial(torch.empty_like(state).copy_, state)
            race(calls, (10, 10), 0)
            samples = race(calls, (settings.step_rounds, settings.step_rounds), 0)
            rows.append(
                {
                    "contender": c.name,
                    "batch": batch,
                    "state_bytes": state.untyped_storage().nbytes(),
                    "step": {position: _timed(samples[str(position)]) for position in grown},
                    "copy": _timed(samples["copy"]),
                    "step_over_copy": ratio(samples[str(max(grown))], samples["copy"])._asdict(),
                    "late_over_early": ratio(samples[str(max(grown))], samples[str(min(grown))])._asdict(),
                }
            )
    return rows


def state_after(contender: Contender, tokens: int, settings: Settings, piece: int = 4096) -> Tensor:
    """The state (1, H, D, D) that the chunk form makes of so many tokens, piece by piece."""
    state = None
    for start in range(0, tokens, piece):
        inputs = make_inputs(settings, min(piece, tokens - start), batch=1, seed=start)
        _, state = contender.call(*contender.arguments(inputs), state)
    assert state is not None
    return state


# -------------------------------------------------------------------------------------------------------------- memory


def measure_memory(settings: Settings, contenders: Sequence[Contender], say: Callable[[str], None]) -> list[dict]:
    """One row a contender, measured by `measure_one_memory` in a process of its own."""
    # Blocks that are freed must go back to the system, or what is allocated after them stays unseen
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    rows = []
    for c in contenders:
        say(f"memory: {c.label}")
        job = json.dumps({"contender": c.name, "settings": asdict(settings)})
        found = subprocess.run(
            [sys.executable, "-m", "benchmarks.ops", "--memory-of", job],
            cwd=Path(__file__).parents[1],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        row = {"contender": c.name, "length": settings.memory_length}
        failed = {"failed": f"exit status {found.returncode}"}
        rows.append(row | (failed if found.returncode else json.loads(found.stdout.splitlines()[-1])))
    return rows


def measure_one_memory(contender: Contender, settings: Settings) -> dict[str, Any]:
    """What this process holds more than before: after 1000 steps, and at most in forward and backward."""
    prepared(contender, make_inputs(settings, 128), "forward+backward")()  # libraries and threads allocate once
    growth = growth_in_steps(contender, settings) if contender.step else {}
    call = prepared(contender, make_inputs(settings, settings.memory_length), "forward+backward")
    forget_peak(settings.device)
    before = held_bytes(settings.device)
    call()
    return {"peak_bytes": most_held_bytes(settings.device) - before, **growth}


@torch.no_grad()
def growth_in_steps(contender: Contender, settings: Settings) -> dict[str, int]:
    """How many bytes 1000 steps in a row add to the state, and to what the process holds."""
    assert contender.step is not None
    arguments, state = contender.arguments(make_inputs(settings, 1)), state_after(contender, 10, settings)
    state = state.repeat(settings.batch, 1, 1, 1)
    sizes = []
    for _ in range(2):  # a first time, for what is allocated once
        for _ in range(GROWTH_STEPS):
            _, state = contender.step(*arguments, state)
        sizes.append((state.untyped_storage().nbytes(), held_bytes(settings.device)))
    (state_before, held_before), (state_bytes, held) = sizes
    return {"state_growth_bytes": state_bytes - state_before, "process_growth_bytes": held - held_before}


def forget_peak(device: str) -> None:
    """Lets the count of the most that was held start again, where the system can."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def held_bytes(device: str) -> int:
    """What this process holds now (on a system without /proc: the most so far)."""
    return torch.cuda.memory_allocated() if device == "cuda" else _proc_status("VmRSS")


def most_held_bytes(device: str) -> int:
    """The most that this process has held."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _proc_status("VmHWM")


def _proc_status(key: str) -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_rss_bytes()
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


# ------------------------------------------------------------------------------------------------------------- compile


def measure_compile(settings: Settings, contenders: Sequence[Contender], say: Callable[[str], None]) -> list[dict]:
    """Two chunk forms as they are and under torch.compile; a row says why where it fails."""
    rows = []
    inputs = make_inputs(settings, settings.compile_length)
    for c in (c for c in contenders if c.name in COMPILED):
        for mode in MODES:
            say(f"torch.compile: {c.label}, {mode}")
            row: dict[str, Any] = {"contender": c.name, "mode": mode, "length": settings.compile_length}
            eager = prepared(c, inputs, mode)
            fast = prepared(replace(c, call=torch.compile(c.call, dynamic=False)), inputs, mode)
            eager()
            try:
                row["compile_seconds"] = seconds_of(fast)
            except Exception as error:  # torch.compile fails in many ways, none of which is ours to handle
                rows.append({**row, "failed": f"torch.compile failed: {type(error).__name__}"})
                continue
            samples = race({"eager": eager, "compiled": fast}, settings.rounds, settings.seconds)
            times = {name: _timed(seconds) for name, seconds in samples.items()}
            faster = ratio(samples["eager"], samples["compiled"])._asdict()
            rows.append({**row, **times, "faster": faster})
    return rows


# ------------------------------------------------------------------------------------------------------------- reports


def run(settings: Settings, parts: Sequence[str], command: str, console: Console) -> dict[str, Any]:
    """Measures `parts` and returns all there is to know, ready for JSON."""
    contenders = find_contenders(settings.device)
    report: dict[str, Any] = {**facts(settings, command), "contenders": [described(c) for c in contenders]}
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
    """What a reader of the JSON needs to know of a contender."""
    known = {name: getattr(contender, name) for name in ("name", "label", "rule", "ours")}
    return {**known, "useful_flops_per_token_and_head": FORMULAS[contender.rule]}


def kept_to_torch(device: str) -> Any:
    """On a GPU, the torch form of `subquad.ops` even where kernels are installed."""
    return patch.object(triton, "serves", lambda x: False) if device == "cuda" else nullcontext()


def facts(settings: Settings, command: str) -> dict[str, Any]:
    """When, where, with what and how."""
    telling = ("MALLOC_", "OMP_", "MKL_")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "commit": source_commit(),
        "modified_since": modified_files(),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": device_name(torch.device(settings.device)),
        },
        "versions": {
            "subquad": subquad.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(telling)},
        "settings": asdict(settings),
    }


def modified_files() -> list[str]:
    """Files of the source tree that are not as in the commit, if there is one."""
    command = ["git", "status", "--porcelain", "--", "subquad", "benchmarks/*.py"]
    found = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    return [line[3:] for line in found.stdout.splitlines()]


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """All tables, after a warning if the machine was not ours alone."""
    taken = report["cores_taken_by_others"]
    if taken > 0.1:
        console.print(f"Other processes took {taken:.1f} cores: these times say little. Run it again, alone.")
    labels = {c["name"]: c["label"] for c in report["contenders"]}
    for mode in MODES if "times" in report else ():
        console.print(times_table(report, mode, labels))
        console.print(faster_table(report, mode, labels))
    makers = {"decode": decode_table, "memory": memory_table, "compile": compile_table}
    for part, table in makers.items():
        if part in report:
            console.print(table(report, labels))


def times_table(report: Mapping[str, Any], mode: str, labels: Mapping[str, str]) -> Table:
    """Milliseconds, spread, and share of the machine's limit."""
    title = f"{mode}: ms and share of a matrix product's speed; in grey, from minimum to maximum"
    rows = [row for row in report["times"] if row["mode"] == mode]
    lengths = sorted({row["length"] for row in rows})
    table = _table(title, "", *(f"{fmt.context(length)} tokens" for length in lengths))
    for name in [*labels, MATMUL]:
        cells = {row["length"]: _time_cell(row) for row in rows if row["contender"] == name}
        table.add_row(labels.get(name, "one matrix product"), *(cells[length] for length in lengths))
    return table


def _time_cell(row: Mapping[str, Any]) -> str:
    if row["seconds"] is None:
        return fmt.DASH
    extremes = f"[dim]{_ms(row['low'])}–{_ms(row['high'])}[/]"
    if row["contender"] == MATMUL:
        return f"{_ms(row['seconds'])}\n{extremes}\n[dim]{row['flops_per_second'] / 1e9:,.0f} GFLOP/s[/]"
    return f"{_ms(row['seconds'])} [dim]{fmt.percent(row['share_of_matmul']):>6}[/]\n{extremes}"


def faster_table(report: Mapping[str, Any], mode: str, labels: Mapping[str, str]) -> Table:
    """Ours against each rival."""
    rows = [row for row in report["faster"] if row["mode"] == mode]
    lengths = sorted({row["length"] for row in report["times"]})
    title = f"{mode}: times faster than the rival"
    table = _table(title, "", *(f"{fmt.context(length)} tokens" for length in lengths))
    pairs = dict.fromkeys((row["rival"], row["contender"]) for row in rows)
    for rival, name in sorted(pairs, key=lambda pair: list(labels).index(pair[0])):
        cells = {r["length"]: r["faster"]["median"] for r in rows if (r["rival"], r["contender"]) == (rival, name)}
        table.add_row(f"{labels[name]} : {labels[rival]}", *(_times(cells.get(length)) for length in lengths))
    return table


def decode_table(report: Mapping[str, Any], labels: Mapping[str, str]) -> Table:
    """Microseconds a step, early and late."""
    positions = report["settings"]["positions"]
    headings = ["", "batch", "state", *(f"step at {p:,}" for p in positions), "copy of the state"]
    table = _table("decoding: µs a step (median)", *headings, "step : copy", "late : early")
    for row in report["decode"]:
        steps = [row["step"].get(p, row["step"].get(str(p)))["seconds"] for p in positions]
        table.add_row(
            labels[row["contender"]],
            str(row["batch"]),
            fmt.size(row["state_bytes"]),
            *(f"{1e6 * seconds:,.0f}" for seconds in steps),
            f"{1e6 * row['copy']['seconds']:,.1f}",
            _times(row["step_over_copy"]["median"]),
            _times(row["late_over_early"]["median"]),
        )
    return table


def memory_table(report: Mapping[str, Any], labels: Mapping[str, str]) -> Table:
    """Peak of forward and backward, and growth in decoding."""
    length = fmt.context(report["settings"]["memory_length"])
    steps = f"in {GROWTH_STEPS:,} steps"
    peak = f"peak of forward+backward at {length} tokens"
    table = _table("memory", "", peak, f"the state grows {steps}", f"the process grows {steps}")
    for row in report["memory"]:
        sizes = [row.get(key) for key in ("peak_bytes", "state_growth_bytes", "process_growth_bytes")]
        table.add_row(labels[row["contender"]], *(fmt.DASH if size is None else fmt.size(size) for size in sizes))
    return table


def compile_table(report: Mapping[str, Any], labels: Mapping[str, str]) -> Table:
    """Eager and compiled."""
    length = report["settings"]["compile_length"]
    title = f"torch.compile at {fmt.context(length)} tokens: ms"
    table = _table(title, "", "mode", "eager", "compiled", "times faster", "first call (s)")
    for row in report["compile"]:
        if "failed" in row:
            table.add_row(labels[row["contender"]], row["mode"], row["failed"])
            continue
        table.add_row(
            labels[row["contender"]],
            row["mode"],
            _ms(row["eager"]["seconds"]),
            _ms(row["compiled"]["seconds"]),
            _times(row["faster"]["median"]),
            f"{row['compile_seconds']:.0f}",
        )
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", box=None, header_style="bold", pad_edge=False)
    table.min_width = len(title)  # a title is wrapped at the table's width
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    return table


def _ms(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def _times(value: float | None) -> str:
    if value is None:
        return fmt.DASH
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.1 else f"{value:.2g}"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Time over length, one panel a mode, as a PNG."""
    with matplotlib.rc_context(STYLE | {"savefig.facecolor": "white"}):
        figure = Figure(figsize=(9, 4.6), layout="constrained")
        panels = figure.subplots(1, len(MODES), sharey=True)
        for ax, mode in zip(panels, MODES, strict=True):
            draw_mode(ax, report, mode)
        panels[0].set_ylabel("time of one call (ms)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, handlelength=3)
        aside = path.with_name(path.name + ".tmp")
        figure.savefig(aside, format="png", dpi=200)
    os.replace(aside, path)


def draw_mode(ax: Axes, report: Mapping[str, Any], mode: str) -> None:
    """One line a contender: a colour a rule, ours solid, rivals broken; the band is minimum to maximum."""
    colours = {
        "softmax": MIXER_COLOURS["attention"],
        "no decay": MIXER_COLOURS["hedgehog"],
        "scalar decay": MIXER_COLOURS["mamba2"],
        "vector decay": MIXER_COLOURS["gla"],
        "delta": MIXER_COLOURS["gated_deltanet"],
        "vector delta": SPARE_COLOURS[0],
        "dplr": SPARE_COLOURS[1],
    }
    ends = ("low", "seconds", "high")
    rivals = iter(3 * [("--", "x"), (":", "+"), ("-.", "v")])
    for c in report["contenders"]:
        rows = [r for r in report["times"] if (r["contender"], r["mode"]) == (c["name"], mode) and r["seconds"]]
        lengths = [row["length"] for row in rows]
        line, marker = ("-", "o") if c["ours"] else next(rivals)
        label = f"ours: {c['label']}" if c["ours"] else c["label"]
        colour, (low, middle, high) = colours[c["rule"]], ([1e3 * row[end] for row in rows] for end in ends)
        ax.plot(lengths, middle, linestyle=line, marker=marker, color=colour, markersize=4, label=label)
        ax.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0)
    ax.set_title(mode)
    ax.set_xlabel("length (tokens)")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_locator(FixedLocator(report["settings"]["lengths"]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: fmt.context(round(value))))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.grid()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three short lengths, two rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers, samples included")
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
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a file has room; 80 columns would break every cell
    command = shlex.join(["python", "-m", "benchmarks.ops", *(sys.argv[1:] if argv is None else argv)])
    report = run(settings_of(arguments), arguments.parts, command, console)
    print_report(report, console)
    if arguments.json:
        aside = arguments.json.with_name(arguments.json.name + ".tmp")
        aside.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, arguments.json)
    if arguments.plot and "times" in report:
        draw(report, arguments.plot)


if __name__ == "__main__":
    main()
