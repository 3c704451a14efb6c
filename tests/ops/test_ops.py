"""Recurrences and window: chunked and step-by-step forms equal the formula for any shape, finite under any decay."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad.ops import (
    decay_chunk,
    decay_loop,
    decay_step,
    delta_chunk,
    delta_loop,
    delta_step,
    dplr_chunk,
    dplr_loop,
    dplr_step,
    window_sum,
)
from subquad.ops.padding import Padding
from subquad.ops.products import decayed_products

DOUBLE = torch.float64

# Each recurrence with each kind of decay: its forms, and a function that draws its gates for (B, G, T, N).
RECURRENCES = {
    "linear": (decay_chunk, decay_loop, decay_step, lambda *shape: [None]),
    "scalar decay": (decay_chunk, decay_loop, decay_step, lambda *shape: [scalar_decay(*shape)]),
    "vector decay": (decay_chunk, decay_loop, decay_step, lambda *shape: [vector_decay(*shape)]),
    "delta": (delta_chunk, delta_loop, delta_step, lambda *shape: [scalar_decay(*shape), strength(*shape)]),
    "delta, vector decay": (
        delta_chunk,
        delta_loop,
        delta_step,
        lambda *shape: [vector_decay(*shape), strength(*shape)],
    ),
    "dplr": (dplr_chunk, dplr_loop, dplr_step, lambda *shape: [vector_decay(*shape), unit(*shape), 0.9 * unit(*shape)]),
    "dplr, one key": (
        dplr_chunk,
        dplr_loop,
        dplr_step,
        lambda *shape: [vector_decay(*shape), unit(*shape), strength(*shape)],
    ),
}
every_recurrence = pytest.mark.parametrize("name", RECURRENCES)
lengths = st.sampled_from([1, 2, 31, 32, 33, 63, 64, 65, 131])


def random(*shape):
    return torch.randn(*shape, dtype=DOUBLE)


def unit(*shape):
    return torch.nn.functional.normalize(random(*shape), dim=-1)


def scalar_decay(B, G, T, N):
    return -torch.rand(B, G, T, dtype=DOUBLE)


def vector_decay(B, G, T, N):
    return -9 * torch.rand(B, G, T, N, dtype=DOUBLE)


def strength(B, G, T, N):
    return torch.rand(B, G, T, dtype=DOUBLE)


def draw(name, T, *, B=2, G=2, R=1, N=5, P=4, seed=0, state=True):
    """Draw the arguments of a form in order: q, k, v, gates and a state (or None)."""
    torch.manual_seed(seed)
    start = random(B, G, N, P) if state else None
    return [random(B, G * R, T, N), unit(B, G, T, N), random(B, G, T, P), *RECURRENCES[name][3](B, G, T, N), start]


@every_recurrence
@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 99),
    lengths,
    st.integers(1, 2),
    st.sampled_from([1, 3]),
    st.booleans(),
    st.sampled_from([(DOUBLE, 1e-9), (torch.float32, 2e-3)]),
)
def test_chunk_is_the_loop(name, seed, T, B, R, with_state, precision):
    chunk, loop, *_ = RECURRENCES[name]
    dtype, tolerance = precision
    arguments = draw(name, T, B=B, R=R, seed=seed, state=with_state)
    chunk_arguments = [None if x is None else x.to(dtype) for x in arguments]
    for actual, reference in zip(chunk(*chunk_arguments), loop(*arguments), strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.to(DOUBLE), reference, rtol=tolerance, atol=tolerance)


@every_recurrence
def test_pieces_with_the_state_carried_are_the_whole(name):
    chunk, _, step, _ = RECURRENCES[name]
    *inputs, state = draw(name, 90, R=3)
    expected, expected_state = chunk(*inputs, state)
    outputs = []
    for start, stop in ((0, 32), (32, 33), (33, 34), (34, 82), (82, 90)):
        piece = [None if x is None else x[:, :, start:stop] for x in inputs]
        y, state = (step if stop - start == 1 else chunk)(*piece, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 2), expected)
    torch.testing.assert_close(state, expected_state)


@every_recurrence
@pytest.mark.parametrize("T", [1, 16, 70])
def test_gradients_are_the_loops(name, T):
    """Gradients of all inputs including the initial state, through the outputs and the final state."""
    chunk, loop, *_ = RECURRENCES[name]
    inputs = [None if x is None else x.requires_grad_() for x in draw(name, T, R=2)]
    leaves = [x for x in inputs if x is not None]

    def gradients(form):
        y, state = form(*inputs)
        torch.manual_seed(1)
        return torch.autograd.grad((y * random(*y.shape)).sum() + (state * random(*state.shape)).sum(), leaves)

    for actual, reference in zip(gradients(chunk), gradients(loop), strict=True):
        torch.testing.assert_close(actual, reference)


@every_recurrence
def test_gradcheck(name):
    """Comparison with finite differences, across a chunk boundary."""
    chunk, *_ = RECURRENCES[name]
    inputs = [None if x is None else x.requires_grad_() for x in draw(name, 34, B=1, G=1, R=2, N=2, P=2)]
    assert torch.autograd.gradcheck(lambda *x: chunk(*x), inputs, fast_mode=True)


def test_decayed_products_are_their_formula():
    torch.manual_seed(0)
    L, R, S, C, N = 3, 2, 2, 16, 4
    x, y, c = random(L, R, C, N), random(L, S, C, N), vector_decay(L, 1, C, N)[:, 0].cumsum(1)
    expected = torch.einsum("lrin,lijn,lsjn->lrsij", x, (c.unsqueeze(2) - c.unsqueeze(1)).clamp_max(0).exp(), y).tril()
    torch.testing.assert_close(decayed_products(x, c, y, c), expected)
    leaves = [leaf.detach().requires_grad_() for leaf in (x, c, y)]
    assert torch.autograd.gradcheck(lambda x, c, y: decayed_products(x, c, y, c), leaves)


def test_decay_is_the_equation():
    """The loop equals S_t = diag(a_t) S_{t-1} + k_t v_t^T written out for one head."""
    q, k, v, log_a, _ = (None if x is None else x[0, 0] for x in draw("vector decay", 7, N=3, P=2, state=False))
    state = torch.zeros(3, 2, dtype=DOUBLE)
    y, _ = decay_loop(*draw("vector decay", 7, N=3, P=2, state=False))
    for t in range(7):
        state = torch.diag(log_a[t].exp()) @ state + torch.outer(k[t], v[t])
        torch.testing.assert_close(y[0, 0, t], q[t] @ state)


@pytest.mark.parametrize("name", ["delta", "delta, vector decay"])
def test_delta_is_the_equation(name):
    q, k, v, log_a, b, _ = (None if x is None else x[0, 0] for x in draw(name, 7, N=3, P=2, state=False))
    state = torch.zeros(3, 2, dtype=DOUBLE)
    y, _ = delta_loop(*draw(name, 7, N=3, P=2, state=False))
    for t in range(7):
        erase = torch.eye(3, dtype=DOUBLE) - b[t] * torch.outer(k[t], k[t])
        state = erase @ torch.diag(log_a[t].exp().expand(3)) @ state + b[t] * torch.outer(k[t], v[t])
        torch.testing.assert_close(y[0, 0, t], q[t] @ state)


def test_dplr_is_the_equation():
    q, k, v, log_a, e, w, _ = (None if x is None else x[0, 0] for x in draw("dplr", 7, N=3, P=2, state=False))
    state = torch.zeros(3, 2, dtype=DOUBLE)
    y, _ = dplr_loop(*draw("dplr", 7, N=3, P=2, state=False))
    for t in range(7):
        state = (torch.diag(log_a[t].exp()) - torch.outer(w[t], e[t])) @ state + torch.outer(k[t], v[t])
        torch.testing.assert_close(y[0, 0, t], q[t] @ state)


# Erasing along a key other than the one read is stable only under decay, so dplr gets no weak decay.
WEAK = [
    (name, decay) for name in RECURRENCES if name not in ("linear", "dplr", "dplr, one key") for decay in (0.0, 1e-6)
]
STRONG = [(name, 1e4) for name in RECURRENCES if name != "linear"]


@pytest.mark.parametrize(("name", "decay"), WEAK + STRONG)
def test_strong_and_weak_decay_stay_finite_over_64k_tokens(name, decay):
    chunk, *_ = RECURRENCES[name]
    arguments = [None if x is None else x.float() for x in draw(name, 65_536, B=1, G=1, state=False)]
    arguments[3] = torch.full_like(arguments[3], -decay).requires_grad_()
    y, state = chunk(*arguments)
    (gradient,) = torch.autograd.grad(y.square().mean(), arguments[3])
    assert y.isfinite().all() and state.isfinite().all() and gradient.isfinite().all()


@every_recurrence
def test_states_stay_float32_under_autocast(name):
    chunk, _, step, _ = RECURRENCES[name]
    arguments = [None if x is None else x.float() for x in draw(name, 20, state=False)]
    expected, _ = chunk(*arguments)
    half_arguments = [x.bfloat16() for x in arguments[:3]] + arguments[3:]
    with torch.autocast("cpu", torch.bfloat16):
        y, state = chunk(*half_arguments)
        _, step_state = step(*(None if x is None else x[:, :, -1:] for x in half_arguments[:-1]), state)
    assert y.dtype == torch.bfloat16 and state.dtype == step_state.dtype == torch.float32
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


def window_reference(q, k, v, window, sinks, scale, real_BT):
    """Softmax over all keys, masked to the window and the row's first real tokens."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    index_BT = real_BT.cumsum(-1) - 1  # of each token among the real ones of its row
    query, key = index_BT[:, :, None], index_BT[:, None, :]
    visible = ((key > query - window) | (key < sinks)) & (key <= query) & real_BT[:, None]
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~visible[:, None], torch.finfo(q.dtype).min)
    return scores.softmax(-1) @ v


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 99),
    st.integers(1, 60),
    st.sampled_from([1, 2, 7, 16, 90]),
    st.integers(0, 4),
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 12)), min_size=60, max_size=60),
)
def test_window_is_masked_attention_in_any_pieces(seed, T, window, sinks, pieces):
    """Each piece begins with pads in one of its rows: it holds (tokens, pads) of them, at least one token in all."""
    torch.manual_seed(seed)
    q, k, v = random(2, 4, T, 3), random(2, 2, T, 3), random(2, 2, T, 3)
    real_BT, stops, stop = torch.ones(2, T, dtype=torch.bool), [], 0
    for tokens, pads in pieces:
        start, stop = stop, min(T, stop + tokens)
        stops.append(stop)
        real_BT[seed % 2, start : min(start + pads, stop if start else T - 1)] = False
    expected = window_reference(q, k, v, window, sinks, 0.7, real_BT)
    outputs, state, past = [], None, 0
    for stop in sorted({*stops}):
        part = window_sum(
            *(x[:, :, past:stop] for x in (q, k, v)),
            window=window,
            sinks=sinks,
            scale=0.7,
            state=state,
            past=past,
            padding=Padding.of(real_BT[:, :stop], past),
        )
        outputs.append(part.normalised())
        state, past = part.state, stop
    actual = torch.cat(outputs, 2)
    assert actual.isfinite().all()
    torch.testing.assert_close(actual * real_BT[:, None, :, None], expected * real_BT[:, None, :, None])
