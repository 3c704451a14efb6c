"""Contenders: our recurrences, softmax attention, transformers' torch forms, flash-linear-attention's kernels.

Legend: B batch, H heads, T time, D width of keys and values, C time within a chunk.
"""

import functools
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from subquad.ops import decay_chunk, decay_step, delta_chunk, delta_step, dplr_chunk, dplr_step

MODES = ("forward", "forward+backward")
COMPILED = ("decay-scalar", "delta-scalar")


@dataclass(frozen=True)
class Settings:
    """Sizes and durations of the measurements; lengths and positions in tokens."""

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
    forms = []
    if hasattr(modeling_bamba, "mamba2_chunk_scan"):
        scan = inspect.unwrap(modeling_bamba.mamba2_chunk_scan)

        def mamba2(q: Tensor, k: Tensor, x: Tensor, dt: Tensor, *, chunk: int) -> tuple[Tensor, Tensor]:
            y, state = scan(x, dt, -x.new_ones(x.shape[2]), k, q, chunk, return_final_states=True)
            return y, state

        for name, chunk in (("hf-mamba2", transformers.BambaConfig().mamba_chunk_size or 256), ("hf-mamba2-64", 64)):
            label, call = f"Mamba-2 (transformers, chunk {chunk})", functools.partial(mamba2, chunk=chunk)
            forms.append(Contender(name, label, "scalar decay", of_scan, call, time_first=True))
    if hasattr(modeling_qwen3_next, "torch_chunk_gated_delta_rule"):
        rule = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)
        delta = functools.partial(rule, output_final_state=True)
        forms.append(Contender("hf-delta", "gated delta rule (transformers)", "delta", of_rule, delta, time_first=True))
    return forms


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
