"""The roofline: what a machine can move and compute at most, and what a pass of a model has to at least.

A pass can take no less time than its bytes at the machine's bandwidth, and no less than its operations at the machine's
rate. The rest of its time is what an optimisation can gain; see Williams, Waterman and Patterson, "Roofline"
(Communications of the ACM 52:4, 2009).
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from subquad.mixers import mixer_class, mixer_options
from subquad.plan import Plan, dtype_name
from subquad.utils.timing import seconds_of

_ROUNDS = 7
_SAMPLES = 64  # contexts at which the mixing of a prefill is counted


class PassCost(NamedTuple):
    """Bytes that a pass moves and operations that it computes."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Roof:
    """Peak rates of a machine: `bytes_per_second` of a copy (read and written), `flops_per_second` of a product."""

    bytes_per_second: float
    flops_per_second: float

    def seconds(self, work: PassCost) -> float:
        """Least seconds that this work takes."""
        return max(work.bytes / self.bytes_per_second, work.flops / self.flops_per_second)


@torch.no_grad()
def measure_roof(device: torch.device, dtype: torch.dtype) -> Roof:
    """Times a copy far larger than any cache, and a square matrix product in `dtype`; the best of several each."""
    gpu = device.type == "cuda"
    source = torch.ones((4 if gpu else 1) << 28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = 8192 if gpu else 1024
    left, right, out = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(3))

    def best(call: Callable[[], Any]) -> float:
        return min(seconds_of(call, device) for _ in range(_ROUNDS))

    copying, multiplying = best(lambda: target.copy_(source)), best(lambda: torch.mm(left, right, out=out))
    return Roof(2 * source.nbytes / copying, 2 * n**3 / multiplying)


@dataclass(frozen=True)
class Costs:
    """Least work of a model's passes. All weights count as used, so a mixture of experts is overrated.

    `weight_bytes` are read once a pass, whatever the batch; embedding tables are left out, for only rows of them are
    looked up. `token_flops` are those of all matrices for one token, without the output head's `head_flops`.
    """

    plan: Plan
    dtype: str
    weight_bytes: int
    token_flops: int
    head_flops: int

    @classmethod
    def of(cls, model: PreTrainedModel, plan: Plan) -> "Costs":
        """The costs of a causal language model whose cache is that of `plan`."""
        head: Any = model.get_output_embeddings()
        tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)} - {id(head.weight)}
        read = [weight for weight in model.parameters() if id(weight) not in tables]
        return cls(
            plan,
            dtype=dtype_name(model),
            weight_bytes=sum(weight.nbytes for weight in read),
            token_flops=sum(2 * weight.numel() for weight in read if weight.dim() > 1) - 2 * head.weight.numel(),
            head_flops=2 * head.weight.numel(),
        )

    def decode(self, context: int, batch: int) -> PassCost:
        """One more token for each of `batch` sequences of `context` tokens: reads the weights and the caches."""
        flops = self.token_flops + self.head_flops + mixing_flops(self.plan, context)
        return PassCost(self.weight_bytes + self.cache_bytes(context, batch), batch * flops)

    def prefill(self, context: int, batch: int) -> PassCost:
        """`batch` prompts of `context` tokens: reads the weights, writes the caches, and gives the last logits."""
        positions = (round((i + 0.5) * context / _SAMPLES) for i in range(_SAMPLES))
        mixing = fmean(mixing_flops(self.plan, position) for position in positions)
        flops = context * (self.token_flops + mixing) + self.head_flops
        return PassCost(self.weight_bytes + self.cache_bytes(context, batch), batch * flops)

    def cache_bytes(self, context: int, batch: int) -> int:
        """Bytes of the caches of `batch` sequences, by the plan."""
        return self.plan.cache_bytes(context, batch, self.dtype)


def mixing_flops(plan: Plan, context: int) -> int:
    """Operations by which one token's mixing reads the cache of `context` tokens of one sequence, in all layers.

    Every query head multiplies and adds all that its key/value head or state holds; what writes to a state is extra.
    """
    return sum(
        2 * len(group.heads) * held.shape[1] * held.shape[2]
        for layer in range(plan.num_layers)
        for name, group in plan.groups(layer).items()
        for held in mixer_class(name).held(group, mixer_options(name, plan.mixers[name]), context).values()
    )
