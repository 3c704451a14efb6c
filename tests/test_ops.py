"""The recurrences and the window: chunked = step by step = the formula, whatever the shape; finite under any decay."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad.ops import decay_chunk, decay_loop, decay_step, delta_chunk, delta_loop, window_sum

DOUBLE = torch.float64


def random(*shape):
    return torch.randn(*shape, dtype=DOUBLE)


def decays(kind, B, G, T, N):
    return {"none": None, "scalar": -torch.rand(B, G, T, dtype=DOUBLE), "vector": -9 * torch.rand(B, G, T, N).double()}[
        kind
    ]


lengths = st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 131])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 99), lengths, st.sampled_from([1, 3]), st.sampled_from(["none", "scalar", "vector"]), st.booleans()
)
def test_decay_chunk_is_the_loop(seed, T, R, kind, with_state):
    torch.manual_seed(seed)
    B, G, N, P = 2, 2, 5, 4
    q, k, v = random(B, G * R, T, N), random(B, G, T, N), random(B, G, T, P)
    log_a = decays(kind, B, G, T, N)
    state = random(B, G, N, P) if with_state else None
    for mine, reference in zip(decay_chunk(q, k, v, log_a, state), decay_loop(q, k, v, log_a, state), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), lengths, st.sampled_from([1, 3]), st.booleans())
def test_delta_chunk_is_the_loop(seed, T, R, with_state):
    torch.manual_seed(seed)
    B, G, N, P = 2, 2, 5, 4
    q, k, v = random(B, G * R, T, N), torch.nn.functional.normalize(random(B, G, T, N), dim=-1), random(B, G, T, P)
    log_a, b = decays("scalar", B, G, T, N), torch.rand(B, G, T, dtype=DOUBLE)
    state = random(B, G, N, P) if with_state else None
    chunked, looped = delta_chunk(q, k, v, log_a, b, state), delta_loop(q, k, v, log_a, b, state)
    for mine, reference in zip(chunked, looped, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-9)


def test_decay_is_the_equation():
    """The loop itself, against S_t = diag(a_t) S_{t-1} + k_t v_t^T written out for one head."""
    torch.manual_seed(0)
    q, k, v, log_a = random(1, 1, 7, 3), random(1, 1, 7, 3), random(1, 1, 7, 2), -torch.rand(1, 1, 7, 3).double()
    state = torch.zeros(3, 2, dtype=DOUBLE)
    y, _ = decay_loop(q, k, v, log_a)
    for t in range(7):
        state = torch.diag(log_a[0, 0, t].exp()) @ state + torch.outer(k[0, 0, t], v[0, 0, t])
        torch.testing.assert_close(y[0, 0, t], q[0, 0, t] @ state)


def test_delta_is_the_equation():
    torch.manual_seed(0)
    q, k, v = random(1, 1, 7, 3), random(1, 1, 7, 3), random(1, 1, 7, 2)
    log_a, b = -torch.rand(1, 1, 7).double(), torch.rand(1, 1, 7).double()
    state = torch.zeros(3, 2, dtype=DOUBLE)
    y, _ = delta_loop(q, k, v, log_a, b)
    for t in range(7):
        key = k[0, 0, t]
        erase = torch.eye(3, dtype=DOUBLE) - b[0, 0, t] * torch.outer(key, key)
        state = log_a[0, 0, t].exp() * erase @ state + b[0, 0, t] * torch.outer(key, v[0, 0, t])
        torch.testing.assert_close(y[0, 0, t], q[0, 0, t] @ state)


@pytest.mark.parametrize("kind", ["none", "scalar", "vector"])
def test_decay_gradients_are_the_loops(kind):
    torch.manual_seed(0)
    shapes = [(1, 2, 19, 3), (1, 1, 19, 3), (1, 1, 19, 2)]
    inputs = [random(*shape).requires_grad_() for shape in shapes]
    log_a = decays(kind, 1, 1, 19, 3)
    inputs += [] if log_a is None else [log_a.requires_grad_()]
    weight = random(1, 2, 19, 2)
    chunk = torch.autograd.grad((decay_chunk(*inputs)[0] * weight).sum(), inputs)
    loop = torch.autograd.grad((decay_loop(*inputs)[0] * weight).sum(), inputs)
    for mine, reference in zip(chunk, loop, strict=True):
        torch.testing.assert_close(mine, reference)


def test_delta_gradients_are_the_loops():
    torch.manual_seed(0)
    inputs = [random(1, 2, 70, 3), torch.nn.functional.normalize(random(1, 1, 70, 3), dim=-1), random(1, 1, 70, 2)]
    inputs += [-torch.rand(1, 1, 70).double(), torch.rand(1, 1, 70).double()]
    inputs = [x.requires_grad_() for x in inputs]
    weight = random(1, 2, 70, 2)
    chunk = torch.autograd.grad((delta_chunk(*inputs)[0] * weight).sum(), inputs)
    loop = torch.autograd.grad((delta_loop(*inputs)[0] * weight).sum(), inputs)
    for mine, reference in zip(chunk, loop, strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("strength", [0.0, 1e-6, 1e4])
def test_strong_and_weak_decay_stay_finite(strength):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, 4096, 4), torch.randn(1, 1, 4096, 4), torch.randn(1, 1, 4096, 4)
    for log_a in (torch.full((1, 1, 4096), -strength), torch.full((1, 1, 4096, 4), -strength)):
        log_a.requires_grad_()
        y, state = decay_chunk(q, k, v, log_a)
        (gradient,) = torch.autograd.grad(y.square().sum(), log_a)
        assert y.isfinite().all() and state.isfinite().all() and gradient.isfinite().all()


def test_states_stay_float32_under_autocast():
    q, k, v = (torch.randn(1, 1, 20, 4) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        y, state = decay_chunk(q.bfloat16(), k.bfloat16(), v.bfloat16(), -torch.rand(1, 1, 20))
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32


def window_reference(q, k, v, window, sinks, scale, real):
    """Masked softmax over all keys: those in the window and the row's first real tokens."""
    groups = q.shape[1] // k.shape[1]
    k, v, T = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), q.shape[2]
    query, key = torch.arange(T)[:, None], torch.arange(T)[None, :]
    start = real.int().argmax(-1)[:, None, None]
    seen = ((key > query - window) | ((key >= start) & (key < start + sinks))) & (key <= query) & real[:, None]
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen[:, None], torch.finfo(q.dtype).min)
    return scores.softmax(-1) @ v


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 99),
    st.integers(1, 60),
    st.sampled_from([1, 2, 7, 16, 90]),
    st.integers(0, 4),
    st.integers(0, 12),
    st.integers(1, 40),
)
def test_window_is_masked_attention_in_any_pieces(seed, T, window, sinks, pads, first):
    torch.manual_seed(seed)
    q, k, v = random(2, 4, T, 3), random(2, 2, T, 3), random(2, 2, T, 3)
    real = torch.ones(2, T, dtype=torch.bool)
    real[1, : min(pads, T - 1)] = False
    wanted = window_reference(q, k, v, window, sinks, 0.7, real)
    outputs, state, past = [], None, 0
    while past < T:
        new = slice(past, min(T, past + (first if past == 0 else 1)))
        part = window_sum(
            *(x[:, :, new] for x in (q, k, v)),
            window=window,
            sinks=sinks,
            scale=0.7,
            state=state,
            past=past,
            padding_BL=real[:, : new.stop],
        )
        outputs.append(part.normalised())
        state, past = part.state, new.stop
    got = torch.cat(outputs, 2)
    assert got.isfinite().all()
    torch.testing.assert_close(got * real[:, None, :, None], wanted * real[:, None, :, None])


def test_step_agrees_with_chunk():
    torch.manual_seed(0)
    q, k, v = random(1, 2, 1, 3), random(1, 1, 1, 3), random(1, 1, 1, 2)
    for mine, other in zip(decay_step(q, k, v, None, None), decay_chunk(q, k, v), strict=True):
        torch.testing.assert_close(mine, other)
