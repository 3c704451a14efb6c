"""Every mixer: its forms agree, padding leaves its state unchanged, and its state has the declared bytes.

To test a new mixer, add a row to MIXERS.
"""

import math
from dataclasses import replace

import pytest
import torch

from subquad.errors import UserError
from subquad.mixers import MIXERS as ALL
from subquad.mixers import HeadGroup, MixerInputs, mixer_class, mixer_options
from subquad.mixers.recurrent import low_rank
from subquad.ops.padding import Padding

MIXERS = [
    ("sliding_window", {"window": 12, "sinks": 3}),
    ("sliding_window", {"window": 1, "sinks": 0}),
    ("linear", {}),
    ("linear", {"feature": "elu", "share_state": True}),
    ("linear", {"feature": "softmax", "bidirectional": True}),
    ("linear", {"state_dim": 3}),
    ("hedgehog", {"window": 12, "sinks": 3}),
    ("hedgehog", {"window": 5, "sinks": 0, "feature_dim": 4}),
    ("liger", {"window": 6, "sinks": 1}),
    ("retention", {}),
    ("retention", {"share_state": True, "bidirectional": True, "state_dim": 5}),
    ("gla", {}),
    ("gla", {"share_state": True, "state_dim": 3}),
    ("gla", {"gate_rank": None, "bidirectional": True}),
    ("mamba2", {}),
    ("mamba2", {"share_state": True, "conv": 1}),
    ("mamba2", {"activation": True, "gate_rank": None, "state_dim": 4}),
    ("mamba2", {"bidirectional": True}),
    ("discrete_mamba2", {}),
    ("discrete_mamba2", {"share_state": True, "state_dim": 8, "rotary": True}),
    ("discrete_mamba2", {"bidirectional": True, "gate_rank": 2}),
    ("gated_deltanet", {}),
    ("gated_deltanet", {"share_state": True, "state_dim": 3}),
    ("gated_deltanet", {"conv": 4, "activation": True, "gate_rank": None}),
    ("gated_deltanet", {"bidirectional": True}),
    ("kda", {}),
    ("kda", {"share_state": True, "conv": 3, "state_dim": 5}),
    ("kda", {"bidirectional": True}),
    ("rwkv7", {}),
    ("rwkv7", {"share_state": True, "state_dim": 3}),
    ("rwkv7", {"bidirectional": True}),
]
CAUSAL = [row for row in MIXERS if not row[1].get("bidirectional")]
ALL_HEADS = HeadGroup(tuple(range(6)), queries_per_kv=3, head_dim=8, hidden_size=16, layer_heads=6)
UNEVEN = replace(ALL_HEADS, heads=(0, 3, 4, 5))

every_mixer = pytest.mark.parametrize(("name", "options"), MIXERS, ids=str)
every_causal_mixer = pytest.mark.parametrize(("name", "options"), CAUSAL, ids=str)


def make(name, options, group=ALL_HEADS):
    """Make a mixer in float64 with random weights, so that no part is at its neutral start."""
    torch.manual_seed(0)
    mixer = mixer_class(name)(group, mixer_options(name, options)).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def inputs(T, group=ALL_HEADS, B=2, **fields):
    torch.manual_seed(1)
    H, G, D, M = len(group.heads), len(group.kv_heads), group.head_dim, group.hidden_size
    shapes = [(B, H, T, D), (B, G, T, D), (B, G, T, D), (B, T, M)]
    return MixerInputs(*(torch.randn(*shape, dtype=torch.float64) for shape in shapes), scale=D**-0.5, **fields)


def part(batch, start, stop, real_BT=None):
    return MixerInputs(
        batch.q_BHTD[:, :, start:stop],
        batch.k_BGTD[:, :, start:stop],
        batch.v_BGTD[:, :, start:stop],
        batch.hidden_BTM[:, start:stop],
        scale=batch.scale,
        padding=None if real_BT is None else Padding.of(real_BT[:, :stop], start),
        past=start,
    )


@every_mixer
def test_half_precision_in_half_precision_out(name, options):
    mixer, batch = make(name, options), inputs(20)
    half_tensors = [x.bfloat16() for x in (batch.q_BHTD, batch.k_BGTD, batch.v_BGTD, batch.hidden_BTM)]
    y_BHTD, _ = mixer.bfloat16()(MixerInputs(*half_tensors, scale=batch.scale, attend=batch.attend))
    assert y_BHTD.dtype == torch.bfloat16


@every_causal_mixer
@pytest.mark.parametrize("group", [ALL_HEADS, UNEVEN], ids=["whole", "uneven"])
@pytest.mark.parametrize("pieces", [[70], [1] * 70, [33, 1, 1, 35], [64, 6], [3, 67]], ids=lambda p: f"{len(p)}-pieces")
def test_forms_agree(name, options, group, pieces):
    """One call equals any split with the state carried over, including token by token."""
    mixer, batch = make(name, options, group), inputs(70, group)
    expected, expected_state = mixer(batch)
    outputs, state, start = [], None, 0
    for piece in pieces:
        y, state = mixer(part(batch, start, start + piece), state)
        outputs.append(y)
        start += piece
    torch.testing.assert_close(torch.cat(outputs, 2), expected, rtol=1e-7, atol=1e-7)
    for key in expected_state:
        torch.testing.assert_close(state[key], expected_state[key], rtol=1e-7, atol=1e-7)


@every_mixer
def test_matrix_is_the_mixing(name, options):
    mixer, batch = make(name, options), inputs(40)
    prepared, _ = mixer.prepare(batch, {})
    y, _ = mixer.mix(prepared, {})
    matrix = mixer.matrix(batch)
    v = prepared.v_BGTD.repeat_interleave(matrix.shape[1] // prepared.v_BGTD.shape[1], 1)
    torch.testing.assert_close(matrix @ v, y, rtol=1e-7, atol=1e-7)
    causal = torch.equal(matrix, matrix.tril())
    assert causal != bool(options.get("bidirectional")), "only bidirectional mixers read later tokens"


@every_mixer
def test_left_padding_changes_nothing(name, options):
    mixer, batch = make(name, options), inputs(50)
    real_BT = torch.ones(2, 50, dtype=torch.bool)
    real_BT[1, :9] = False
    y, state = mixer(part(batch, 0, 50, real_BT))
    unpadded = part(batch, 9, 50)
    unpadded.past = 0
    expected, expected_state = mixer(unpadded)
    torch.testing.assert_close(y[1, :, 9:], expected[1], rtol=1e-7, atol=1e-7)
    for key in expected_state:
        torch.testing.assert_close(state[key][1], expected_state[key][1], rtol=1e-7, atol=1e-7)


PADS = {"no tokens at first": [(0, 9), (20, 30)], "one column": [(15, 16), (40, 41)], "a whole piece": [(16, 40)]}


@every_causal_mixer
@pytest.mark.parametrize("pads", PADS.values(), ids=PADS)
def test_pads_before_later_pieces_change_nothing(name, options, pads):
    """A row with pads in front of its new tokens, in a later piece too, continues as the row without them."""
    mixer, batch = make(name, options), inputs(50)
    real_BT = torch.ones(2, 50, dtype=torch.bool)
    for start, stop in pads:
        real_BT[1, start:stop] = False
    outputs, state, start = [], None, 0
    for stop in (9, 15, 16, 20, 40, 41, 50):
        y, state = mixer(part(batch, start, stop, real_BT), state)
        outputs.append(y)
        start = stop
    y = torch.cat(outputs, 2)
    for row in range(2):
        tokens = [x[row : row + 1, :, real_BT[row]] for x in (batch.q_BHTD, batch.k_BGTD, batch.v_BGTD)]
        alone = MixerInputs(*tokens, batch.hidden_BTM[row : row + 1, real_BT[row]], scale=batch.scale)
        expected, expected_state = mixer(alone)
        torch.testing.assert_close(y[row : row + 1, :, real_BT[row]], expected, rtol=1e-7, atol=1e-7)
        for key in expected_state:
            torch.testing.assert_close(state[key][row : row + 1], expected_state[key], rtol=1e-7, atol=1e-7)


@every_mixer
@pytest.mark.parametrize("group", [ALL_HEADS, UNEVEN], ids=["whole", "uneven"])
def test_state_bytes(name, options, group):
    mixer = mixer_class(name)(group, mixer_options(name, options))
    batch = inputs(40, group, B=1)
    batch = MixerInputs(*(x.float() for x in (batch.q_BHTD, batch.k_BGTD, batch.v_BGTD, batch.hidden_BTM)), scale=0.3)
    _, state = mixer(batch)
    assert sum(tensor.nbytes for tensor in state.values()) == mixer.state_bytes(group, mixer.options, 40, 4, 4)


SCALED = [row for row in MIXERS if row[0] not in ("sliding_window", "hedgehog", "liger")]


@pytest.mark.parametrize(("name", "options"), SCALED, ids=str)
def test_calibration_fits_the_output_scale(name, options):
    """Least squares: no factor on a channel of the output would reduce its distance to the target."""
    mixer, batch = make(name, options), inputs(60)
    target = 3.0 * torch.randn(2, 6, 60, 8, dtype=torch.float64) + 1.0
    error_before = (mixer(batch)[0] - target).square().mean()
    mixer.calibrate(batch, target)
    y = mixer(batch)[0]
    assert (y - target).square().mean() < error_before
    torch.testing.assert_close((y * target).sum((0, 2)), (y * y).sum((0, 2)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), [row for row in SCALED if "state_dim" not in row[1]], ids=str)
def test_calibration_brings_matrices_to_the_size_of_attention(name, options):
    """A matrix proportional to the target's is scaled to it. A matrix whose rows are averages stays."""
    mixer, batch = make(name, options), inputs(60)
    with torch.no_grad():
        if hasattr(mixer, "D_H"):
            mixer.D_H.zero_()  # a diagonal that the gain does not scale
        start = mixer.matrix(batch)
        v_BHTD = mixer.spread(mixer.prepare(batch, {})[0].v_BGTD)
        mixer.calibrate(batch, 0.01 * start @ v_BHTD)
        torch.testing.assert_close(mixer.matrix(batch), start * (1.0 if mixer.averages else 0.01))


def test_calibration_of_hedgehog_is_near_the_teacher():
    """A far factor that dominates the window is reduced, and the output approaches softmax attention."""
    mixer, batch = make("hedgehog", {"window": 12, "sinks": 3}), inputs(60)
    k, v = (x.repeat_interleave(3, 1) for x in (batch.k_BGTD, batch.v_BGTD))
    target = torch.nn.functional.scaled_dot_product_attention(batch.q_BHTD, k, v, is_causal=True, scale=batch.scale)
    torch.nn.init.constant_(mixer.log_far_H, 7.0)
    error_before = (mixer(batch)[0] - target).norm(dim=-1).mean()
    mixer.calibrate(batch, target)
    assert (mixer(batch)[0] - target).norm(dim=-1).mean() < 0.9 * error_before
    assert (mixer.log_far_H < 7.0).all()


def test_hedgehog_is_its_formula():
    """Every entry of the mixing matrix equals the sums written out."""
    mixer, batch = make("hedgehog", {"window": 5, "sinks": 2}), inputs(23)
    k = batch.k_BGTD.repeat_interleave(3, 1)
    near_scores = (batch.q_BHTD @ k.transpose(-1, -2) * batch.scale).exp()
    key_features = mixer.key_map(batch.k_BGTD).repeat_interleave(3, 1)
    far_scores = mixer.query_map(batch.q_BHTD) @ key_features.transpose(-1, -2) * mixer.log_far_H.exp()[:, None, None]
    query, key = torch.arange(23)[:, None], torch.arange(23)[None, :]
    near_mask = ((key > query - 5) | (key < 2)) & (key <= query)
    far_mask = ~near_mask & (key <= query)
    weights = near_scores * near_mask + far_scores * far_mask
    torch.testing.assert_close(mixer.matrix(batch), weights / weights.sum(-1, keepdim=True))


def truncated(scores, rank):
    left_vectors, values, right_vectors = torch.linalg.svd(scores, full_matrices=False)
    return left_vectors[..., :rank] * values[..., None, :rank] @ right_vectors[..., :rank, :]


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_small_states_start_at_the_best_fit(rank):
    """q A (k B)^T is the truncated SVD of all products with one key head, with its queries stacked (the optimum)."""
    batch = inputs(40, B=1)
    query_map, key_map = low_rank(batch.q_BHTD, batch.k_BGTD, rank)
    q = batch.q_BHTD[0].unflatten(0, (2, 3)).flatten(1, 2)  # the three query heads of each key head
    k = batch.k_BGTD[0]
    fitted = (q @ query_map) @ (k @ key_map).transpose(-1, -2)
    torch.testing.assert_close(fitted, truncated(q @ k.transpose(-1, -2), rank), rtol=1e-6, atol=1e-6)


def test_small_states_fit_even_where_channels_are_dead():
    batch = inputs(40, B=1)
    batch.q_BHTD[..., 5:] = 0.0
    query_map, key_map = low_rank(batch.q_BHTD, batch.k_BGTD, 8)
    q, k = batch.q_BHTD.unflatten(1, (2, 3)), batch.k_BGTD.unsqueeze(2)
    fitted = (q @ query_map[:, None]) @ (k @ key_map[:, None]).transpose(-1, -2)
    torch.testing.assert_close(fitted, q @ k.transpose(-1, -2), rtol=1e-6, atol=1e-6)


def test_calibration_of_a_small_state_beats_its_start_and_a_random_one():
    """Linear attention on queries and keys with few strong directions, which no subset of channels captures."""
    torch.manual_seed(2)
    batch = inputs(60)
    mixing = torch.randn(8, 8, dtype=torch.float64) * 2.0 ** -torch.arange(8.0, dtype=torch.float64)[:, None]
    batch.q_BHTD, batch.k_BGTD = batch.q_BHTD @ mixing, batch.k_BGTD @ mixing
    k = batch.k_BGTD.repeat_interleave(3, 1)
    expected = batch.q_BHTD @ k.transpose(-1, -2) * batch.scale

    def error(mixer):
        return (mixer.matrix(batch) - expected).tril().norm()

    mixer = make("discrete_mamba2", {"state_dim": 2, "conv": 1, "share_state": True})
    torch.nn.init.constant_(mixer.decay.bias, 30.0)  # no decay
    torch.nn.init.zeros_(mixer.decay.weight)
    torch.nn.init.zeros_(mixer.D_H)
    random = error(mixer)
    mixer.calibrate(batch, torch.randn_like(batch.q_BHTD))
    torch.nn.init.ones_(mixer.gain_H)
    assert error(mixer) < 0.2 * expected.tril().norm() < random


@pytest.mark.parametrize("name", ["retention", "gla", "discrete_mamba2"])
def test_both_directions_are_two_triangles(name):
    """The lower triangle is the causal mixer's matrix, the upper one that of the reversed sequence."""
    options = {"conv": 1} if name == "discrete_mamba2" else {}
    bidirectional, causal = make(name, options | {"bidirectional": True}), make(name, options)
    batch = inputs(30)
    backwards = MixerInputs(
        *(x.flip(2) for x in (batch.q_BHTD, batch.k_BGTD, batch.v_BGTD)), batch.hidden_BTM.flip(1), batch.scale
    )
    matrix = bidirectional.matrix(batch)
    torch.testing.assert_close(matrix.tril(), causal.matrix(batch), rtol=1e-7, atol=1e-9)
    # A key at distance d has passed d decays forwards but d - 1 backwards, where the query's own decay comes last.
    upper = causal.matrix(backwards).flip(-1, -2).triu(1)
    assert ((matrix.triu(1) != 0) == (upper != 0)).all()
    if name == "retention":
        a = torch.exp(torch.log1p(-1 / torch.linspace(math.log(32), math.log(4096), 6, dtype=torch.float64).exp()))
        torch.testing.assert_close(matrix.triu(1), upper / a[:, None, None], rtol=1e-6, atol=1e-9)


def test_bidirectional_mixers_keep_no_state():
    mixer, batch = make("gla", {"bidirectional": True}), inputs(10)
    assert mixer(batch)[1] == {} and mixer.state_bytes(ALL_HEADS, mixer.options, 99, 4, 4) == 0
    with pytest.raises(ValueError, match="bidirectional: it cannot continue"):
        mixer(part(batch, 4, 10))


@pytest.mark.parametrize("name", ["gla", "mamba2", "gated_deltanet", "kda", "rwkv7", "discrete_mamba2", "retention"])
def test_states_and_outputs_under_autocast(name):
    """Under autocast the state stays float32, and the output is close to that of full precision."""
    mixer = make(name, {}).float()
    batch = inputs(50)
    batch = MixerInputs(*(x.float() for x in (batch.q_BHTD, batch.k_BGTD, batch.v_BGTD, batch.hidden_BTM)), scale=0.3)
    expected, _ = mixer(batch)
    half_inputs = MixerInputs(
        *(x.bfloat16() for x in (batch.q_BHTD, batch.k_BGTD, batch.v_BGTD)), batch.hidden_BTM, scale=0.3
    )
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(half_inputs)
    assert state["recurrent"].dtype == torch.float32
    assert (y.float() - expected).norm() < 0.05 * expected.norm()


def test_wrong_inputs_are_named():
    mixer, batch = make("gla", {}), inputs(10)
    with pytest.raises(ValueError, match=r"GLA was given keys of shape \(2, 6, 10, 8\), and takes \(2, 2, 10, 8\)"):
        mixer(replace(batch, k_BGTD=batch.q_BHTD))
    with pytest.raises(ValueError, match="hidden states of shape"):
        mixer(replace(batch, hidden_BTM=batch.hidden_BTM[:, :, 1:]))
    _, hedgehog_state = make("hedgehog", {})(part(batch, 0, 5))
    with pytest.raises(ValueError, match="GLA was given the state of another mixer: .*window_k.*keeps .*recurrent"):
        mixer(part(batch, 5, 10), hedgehog_state)
    with pytest.raises(ValueError, match="state of another mixer"):
        mixer(part(batch, 5, 10), {"recurrent": torch.zeros(2, 6, 8, 9)})


def test_overflow_in_float16_is_an_error():
    mixer = make("discrete_mamba2", {}).half()
    batch = inputs(10)
    batch = MixerInputs(
        *(x.half() for x in (batch.q_BHTD, 300 * batch.k_BGTD, 300 * batch.v_BGTD, batch.hidden_BTM)), 0.3
    )
    with pytest.raises(UserError, match="DiscreteMamba2 overflows in float16: use bfloat16 or float32"):
        mixer(batch)


def test_every_mixer_has_a_row():
    assert {name for name, _ in MIXERS} == set(ALL) - {"attention"}


def test_errors_name_the_nearest():
    with pytest.raises(UserError, match="did you mean 'hedgehog'"):
        mixer_class("hegdehog")
    with pytest.raises(UserError, match="did you mean 'window'"):
        mixer_options("hedgehog", {"windw": 3})
    with pytest.raises(UserError, match="feature_dim of 9 is above"):
        make("hedgehog", {"feature_dim": 9})
    for name in set(ALL) - {"attention", "sliding_window", "hedgehog", "liger"}:
        with pytest.raises(UserError, match="state_dim of 9 is above the head width of 8"):
            make(name, {"state_dim": 9})
    with pytest.raises(UserError, match="option 'window'.*greater than or equal to 1"):
        mixer_options("hedgehog", {"window": 0})


@every_mixer
@pytest.mark.parametrize("heads", [(2,), (3, 4, 5), (1, 4), (0, 3, 4, 5), (0, 1, 2, 3, 4, 5)], ids=str)
def test_what_was_learned_for_more_heads_serves_fewer(name, options, heads):
    """A mixer that takes over some heads of another computes the same output for them."""
    source, group = make(name, options), replace(ALL_HEADS, heads=heads)
    batch = inputs(30)
    y, _ = source(batch)
    mixer = make(name, options, group)
    assert mixer.share(source)
    part_inputs = replace(
        batch,
        q_BHTD=batch.q_BHTD[:, list(heads)],
        k_BGTD=batch.k_BGTD[:, list(group.kv_heads)],
        v_BGTD=batch.v_BGTD[:, list(group.kv_heads)],
    )
    torch.testing.assert_close(mixer(part_inputs)[0], y[:, list(heads)], rtol=1e-9, atol=1e-9)


def test_what_cannot_be_taken_over_is_not():
    mixer = make("linear", {})
    assert not make("linear", {"state_dim": 3}).share(mixer) and not make("retention", {}).share(mixer)
    two_heads = make("linear", {}, replace(ALL_HEADS, heads=(0, 1)))
    assert not mixer.share(two_heads) and two_heads.share(mixer)
    odd_group = replace(
        ALL_HEADS, heads=tuple(range(9)), queries_per_kv=3
    )  # three heads, two of which share a key/value head
    assert not make("gla", {"share_state": True}, replace(odd_group, heads=(0, 1, 3))).share(
        make("gla", {"share_state": True}, odd_group)
    )
