"""Every mixer, one row each: its forms agree, padding leaves its state alone, and its bytes are what it says.

To test a new mixer, add a row to MIXERS.
"""

import pytest
import torch

from subquad.errors import UserError
from subquad.mixers import MIXERS as ALL
from subquad.mixers import HeadGroup, MixerInputs, mixer_class, mixer_options

MIXERS = [
    ("sliding_window", {"window": 12, "sinks": 3}),
    ("sliding_window", {"window": 1, "sinks": 0}),
    ("hedgehog", {"window": 12, "sinks": 3}),
    ("hedgehog", {"window": 5, "sinks": 0, "feature_dim": 4}),
    ("gla", {}),
    ("gla", {"share_state": True}),
    ("gated_deltanet", {}),
    ("gated_deltanet", {"share_state": True}),
    ("mamba2", {}),
    ("mamba2", {"share_state": True, "conv": 1}),
]
WHOLE = HeadGroup(tuple(range(6)), queries_per_kv=3, head_dim=8, hidden_size=16)
UNEVEN = HeadGroup((0, 3, 4, 5), queries_per_kv=3, head_dim=8, hidden_size=16)

each = pytest.mark.parametrize(("name", "options"), MIXERS, ids=lambda value: str(value))


def make(name, options, group=WHOLE):
    """A mixer in float64 with random weights, so that every part of it counts."""
    torch.manual_seed(0)
    mixer = mixer_class(name)(group, mixer_options(name, options)).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def inputs(T, group=WHOLE, B=2, **more):
    torch.manual_seed(1)
    H, G, D, M = len(group.heads), len(group.kv_heads), group.head_dim, group.hidden_size
    shapes = [(B, H, T, D), (B, G, T, D), (B, G, T, D), (B, T, M)]
    return MixerInputs(*(torch.randn(*shape, dtype=torch.float64) for shape in shapes), scale=D**-0.5, **more)


def part(whole, start, stop):
    return MixerInputs(
        whole.q_BHTD[:, :, start:stop],
        whole.k_BGTD[:, :, start:stop],
        whole.v_BGTD[:, :, start:stop],
        whole.hidden_BTM[:, start:stop],
        scale=whole.scale,
        padding_BL=None if whole.padding_BL is None else whole.padding_BL[:, :stop],
        past=start,
    )


@each
@pytest.mark.parametrize("group", [WHOLE, UNEVEN], ids=["whole", "uneven"])
@pytest.mark.parametrize("pieces", [[70], [1] * 70, [33, 1, 1, 35], [64, 6], [3, 67]], ids=lambda p: f"{len(p)}-pieces")
def test_forms_agree(name, options, group, pieces):
    """One call = any split with the state carried = token by token."""
    mixer, whole = make(name, options, group), inputs(70, group)
    wanted, wanted_state = mixer(whole)
    outputs, state, start = [], None, 0
    for piece in pieces:
        y, state = mixer(part(whole, start, start + piece), state)
        outputs.append(y)
        start += piece
    torch.testing.assert_close(torch.cat(outputs, 2), wanted, rtol=1e-7, atol=1e-7)
    for key in wanted_state:
        torch.testing.assert_close(state[key], wanted_state[key], rtol=1e-7, atol=1e-7)


@each
def test_matrix_is_the_mixing(name, options):
    mixer, whole = make(name, options), inputs(40)
    prepared, _ = mixer.prepare(whole, {})
    y, _ = mixer.mix(prepared, {})
    matrix = mixer.matrix(whole)
    v = prepared.v_BGTD.repeat_interleave(matrix.shape[1] // prepared.v_BGTD.shape[1], 1)
    torch.testing.assert_close(matrix @ v, y, rtol=1e-7, atol=1e-7)
    assert torch.equal(matrix, matrix.tril()), "a mixing matrix is causal"


@each
def test_left_padding_changes_nothing(name, options):
    mixer, whole = make(name, options), inputs(50)
    real = torch.ones(2, 50, dtype=torch.bool)
    real[1, :9] = False
    whole.padding_BL = real
    y, state = mixer(whole)
    whole.padding_BL = None
    alone = part(whole, 9, 50)
    alone.past = 0
    wanted, wanted_state = mixer(alone)
    torch.testing.assert_close(y[1, :, 9:], wanted[1], rtol=1e-7, atol=1e-7)
    for key in wanted_state:
        torch.testing.assert_close(state[key][1], wanted_state[key][1], rtol=1e-7, atol=1e-7)


@each
@pytest.mark.parametrize("group", [WHOLE, UNEVEN], ids=["whole", "uneven"])
def test_state_bytes(name, options, group):
    mixer = mixer_class(name)(group, mixer_options(name, options))
    whole = inputs(40, group, B=1)
    whole = MixerInputs(*(x.float() for x in (whole.q_BHTD, whole.k_BGTD, whole.v_BGTD, whole.hidden_BTM)), scale=0.3)
    _, state = mixer(whole)
    assert sum(tensor.nbytes for tensor in state.values()) == mixer.state_bytes(group, mixer.options, 40, 4)


@pytest.mark.parametrize("name", ["gla", "gated_deltanet", "mamba2"])
def test_calibration_fits_the_output_scale(name):
    """Least squares: no factor on a channel of the output would bring it nearer to the target."""
    mixer, whole = make(name, {}), inputs(60)
    torch.nn.init.zeros_(mixer.output.gate_up.weight)
    torch.nn.init.constant_(mixer.output.gate_up.bias, mixer.output.OPEN)
    target = 3.0 * torch.randn(2, 6, 60, 8, dtype=torch.float64) + 1.0
    before = (mixer(whole)[0] - target).square().mean()
    mixer.calibrate(whole, target)
    y = mixer(whole)[0]
    assert (y - target).square().mean() < before
    torch.testing.assert_close((y * target).sum((0, 2)), (y * y).sum((0, 2)), rtol=1e-5, atol=1e-5)


def test_calibration_of_hedgehog_is_near_the_teacher():
    """A far factor that swamps the window is brought down; what is left is nearer to softmax attention."""
    mixer, whole = make("hedgehog", {"window": 12, "sinks": 3}), inputs(60)
    k, v = (x.repeat_interleave(3, 1) for x in (whole.k_BGTD, whole.v_BGTD))
    target = torch.nn.functional.scaled_dot_product_attention(whole.q_BHTD, k, v, is_causal=True, scale=whole.scale)
    torch.nn.init.constant_(mixer.log_far_H, 7.0)
    before = (mixer(whole)[0] - target).norm(dim=-1).mean()
    mixer.calibrate(whole, target)
    assert (mixer(whole)[0] - target).norm(dim=-1).mean() < 0.9 * before
    assert (mixer.log_far_H < 7.0).all()


def test_hedgehog_is_its_formula():
    """Every entry of the mixing matrix, against the sums written out."""
    mixer, whole = make("hedgehog", {"window": 5, "sinks": 2}), inputs(23)
    k = whole.k_BGTD.repeat_interleave(3, 1)
    near_scores = (whole.q_BHTD @ k.transpose(-1, -2) * whole.scale).exp()
    key_features = mixer.key_map(whole.k_BGTD).repeat_interleave(3, 1)
    far_scores = mixer.query_map(whole.q_BHTD) @ key_features.transpose(-1, -2) * mixer.log_far_H.exp()[:, None, None]
    query, key = torch.arange(23)[:, None], torch.arange(23)[None, :]
    near = ((key > query - 5) | (key < 2)) & (key <= query)
    far = ~near & (key <= query)
    weights = near_scores * near + far_scores * far
    torch.testing.assert_close(mixer.matrix(whole), weights / weights.sum(-1, keepdim=True))


def test_every_mixer_has_a_row():
    assert {name for name, _ in MIXERS} == set(ALL) - {"attention"}


def test_errors_name_the_nearest():
    with pytest.raises(UserError, match="did you mean 'hedgehog'"):
        mixer_class("hegdehog")
    with pytest.raises(UserError, match="did you mean 'window'"):
        mixer_options("hedgehog", {"windw": 3})
    with pytest.raises(UserError, match="feature_dim of 9 is above"):
        make("hedgehog", {"feature_dim": 9})
    with pytest.raises(UserError, match="option 'window'.*greater than or equal to 1"):
        mixer_options("hedgehog", {"window": 0})
