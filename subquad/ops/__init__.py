"""The recurrences behind all mixers, and windowed softmax attention.

- `decay`: S_t = diag(a_t) S_{t-1} + k_t v_t^T (linear attention, RetNet, GLA, Mamba-2)
- `delta`: S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T (gated DeltaNet)
- `dplr`: S_t = diag(a_t) S_{t-1} - w_t (e_t S_{t-1}) + k_t v_t^T, with one decay per key channel (KDA, RWKV-7)
- `window`: softmax over the last W keys and some sinks, as an unnormalised sum that can be combined with a linear one

Each recurrence has three equivalent forms: `*_loop` (step by step, the reference), `*_chunk` (parallel, for training
and prefill) and `*_step` (one token). On a GPU, the chunk form calls flash-linear-attention's Triton kernel if the
`gpu` extra is installed (`ops.triton`). Ops do not depend on mixers.
"""

from subquad.ops.decay import decay_chunk, decay_loop, decay_read, decay_step
from subquad.ops.delta import delta_chunk, delta_loop, delta_step
from subquad.ops.dplr import dplr_chunk, dplr_loop, dplr_step
from subquad.ops.window import WindowSum, window_sum

__all__ = [
    "WindowSum",
    "decay_chunk",
    "decay_loop",
    "decay_read",
    "decay_step",
    "delta_chunk",
    "delta_loop",
    "delta_step",
    "dplr_chunk",
    "dplr_loop",
    "dplr_step",
    "window_sum",
]
