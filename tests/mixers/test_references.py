"""Comparison with other implementations: transformers' Mamba-2 and gated delta rule, and flash-linear-attention.

The kernels of flash-linear-attention need a GPU. Without one, the tests check their inputs through a stand-in with the
same signatures and layouts, computed by our loops.
"""

import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.models.bamba.configuration_bamba import BambaConfig
from transformers.models.bamba.modeling_bamba import BambaMixer
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from subquad.mixers import HeadGroup, MixerInputs, mixer_class, mixer_options
from subquad.ops import decay_chunk, decay_loop, delta_chunk, delta_loop, dplr_chunk, dplr_loop, triton

H, D, M, T = 4, 8, 32, 70
GROUP = HeadGroup(tuple(range(H)), queries_per_kv=1, head_dim=D, hidden_size=M)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def split_heads(x_BTE):
    return x_BTE.unflatten(-1, (-1, D)).transpose(1, 2)


def join_heads(y_BHTD):
    return y_BHTD.transpose(1, 2).flatten(2)


def randomised(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return module.eval()


def mixer_with(module, name, options):
    mixer = mixer_class(name)(GROUP, mixer_options(name, options))
    mixer.load_state_dict({"gain_H": torch.ones(len(GROUP.heads)), **module})
    return mixer


def taps(weight_E1W, bias_E):
    """Split a depthwise convolution by head: weights (H, W, D) and bias (H, D)."""
    return weight_E1W.squeeze(1).unflatten(0, (-1, D)).transpose(1, 2), bias_E.unflatten(0, (-1, D))


def convolutions(conv, names):
    bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias
    parts = zip(names, conv.weight.chunk(3), bias.chunk(3), strict=True)
    weights = {}
    for name, weight, part in parts:
        weights[f"conv_{name}.weight_HWD"], weights[f"conv_{name}.bias_HD"] = taps(weight, part)
    return weights


def test_mamba2_is_transformers_bamba():
    """Equality of the modules: convolution with activation, discretisation, skip, gate and norm."""
    config = BambaConfig(
        hidden_size=M, mamba_n_heads=H, mamba_d_head=D, mamba_d_state=D, mamba_n_groups=H, mamba_expand=1,
        mamba_d_conv=4, mamba_chunk_size=16, mamba_conv_bias=True, mamba_proj_bias=True, rms_norm_eps=1e-6,
        num_hidden_layers=1, attn_layer_indices=[],
    )  # fmt: skip
    reference = randomised(BambaMixer(config, layer_idx=0))
    hidden = torch.randn(2, T, M)
    gate_w, inner_w, dt_w = reference.in_proj.weight.split([M, 3 * M, H])
    gate_b, inner_b, dt_b = reference.in_proj.bias.split([M, 3 * M, H])
    mixer = mixer_with(
        {
            **convolutions(reference.conv1d, "vkq"),
            "dt.weight": dt_w,
            "dt.bias": dt_b + reference.dt_bias,
            "A_log_G": reference.A_log,
            "D_H": reference.D,
            "output.scale_HD": reference.norm.weight.unflatten(0, (H, D)),
            "output.gate.0.weight": gate_w,
            "output.gate.0.bias": gate_b,
        },
        "mamba2",
        {"activation": True, "gate_rank": None, "conv": 4},
    )
    v, k, q = (split_heads(x) for x in nn.functional.linear(hidden, inner_w, inner_b).chunk(3, -1))
    with torch.no_grad():
        y, _ = mixer(MixerInputs(q, k, v, hidden, scale=1.0))
        torch.testing.assert_close(reference.out_proj(join_heads(y)), reference(hidden), rtol=1e-4, atol=1e-5)


def test_gated_deltanet_is_transformers_qwen3_next():
    config = Qwen3NextConfig(
        hidden_size=M, linear_num_value_heads=H, linear_num_key_heads=H, linear_key_head_dim=D, linear_value_head_dim=D,
        linear_conv_kernel_dim=4, rms_norm_eps=1e-6, num_hidden_layers=1, layer_types=["linear_attention"],
    )  # fmt: skip
    reference = randomised(Qwen3NextGatedDeltaNet(config, layer_idx=0))
    # Transformers scales queries by 1 / sqrt(D). The norm removes that factor, except from its epsilon.
    reference.norm.variance_epsilon /= D
    hidden = torch.randn(2, T, M)
    # The input projections of transformers interleave q, k, v and gate by head, and likewise b and a.
    qkvz_w = reference.in_proj_qkvz.weight.unflatten(0, (H, 4, D))
    b_w, a_w = reference.in_proj_ba.weight.unflatten(0, (H, 2)).unbind(1)
    mixer = mixer_with(
        {
            **convolutions(reference.conv1d, "qkv"),
            "write.weight": b_w,
            "write.bias": torch.zeros(H),
            "decay.weight": a_w,
            "decay.bias": reference.dt_bias,
            "A_log_G": reference.A_log,
            "output.scale_HD": reference.norm.weight.repeat(H, 1),
            "output.gate.0.weight": qkvz_w[:, 3].flatten(0, 1),
            "output.gate.0.bias": torch.zeros(M),
        },
        "gated_deltanet",
        {"activation": True, "gate_rank": None, "conv": 4},
    )
    q, k, v = (split_heads(nn.functional.linear(hidden, qkvz_w[:, i].flatten(0, 1))) for i in range(3))
    with torch.no_grad():
        y, _ = mixer(MixerInputs(q, k, v, hidden, scale=1.0))
        torch.testing.assert_close(reference.out_proj(join_heads(y)), reference(hidden), rtol=1e-3, atol=1e-5)


def arguments(kind, dtype=torch.float32, device="cpu", groups=2):
    """Make inputs of a chunk form. Returns the inputs, the chunk form and its reference loop."""
    torch.manual_seed(0)
    B, G, N = 2, groups, 16
    q, k, v = torch.randn(B, 4, T, N), nn.functional.normalize(torch.randn(B, G, T, N), dim=-1), torch.randn(B, G, T, N)
    vector, scalar, b = -torch.rand(B, G, T, N), -torch.rand(B, G, T), torch.rand(B, G, T)
    state = torch.randn(B, G, N, N)
    tensors, chunk, loop = {
        "linear": ((q, k, v, None, state), decay_chunk, decay_loop),
        "scalar decay": ((q, k, v, scalar, state), decay_chunk, decay_loop),
        "vector decay": ((q, k, v, vector, state), decay_chunk, decay_loop),
        "delta": ((q, k, v, scalar, b, state), delta_chunk, delta_loop),
        "delta, vector decay": ((q, k, v, vector, b, state), delta_chunk, delta_loop),
        "dplr": ((q, k, v, vector, k, 0.5 * k, state), dplr_chunk, dplr_loop),
    }[kind]
    inputs = tuple(x if x is None else x.to(device, torch.float32 if x is state else dtype) for x in tensors)
    return inputs, chunk, loop


KINDS = ["linear", "scalar decay", "vector decay", "delta", "delta, vector decay", "dplr"]


def time_first(form):
    """Wrap one of our loops in the layout of the kernels: tensors (B, T, H, D), states (B, H, N, P)."""

    def kernel(*inputs, scale, initial_state, output_final_state, **keywords):
        assert output_final_state
        tensors = [None if x is None else x.transpose(1, 2) for x in (*inputs, *keywords.values())]
        assert all(x is None or x.shape[1] == 4 for x in tensors), "the kernels know no groups"
        y, state = form(tensors[0] * scale, *tensors[1:], initial_state)
        return y.transpose(1, 2), state

    return kernel


@pytest.fixture
def stand_in(monkeypatch):
    """Replace flash-linear-attention by a stand-in that also serves CPU tensors. Returns the list of kernel calls."""
    calls = []

    def record_calls(name, form):
        def kernel(*inputs, **keywords):
            calls.append(name)
            return time_first(form)(*inputs, **keywords)

        return kernel

    def kernel_dplr(q, k, v, a, b, log_w, state):
        return dplr_loop(q, k, v, log_w, -a, b, state)

    for path, kernels in {
        "fla.ops.simple_gla": {"chunk_simple_gla": decay_loop},
        "fla.ops.gla": {"chunk_gla": decay_loop},
        "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": delta_loop},
        "fla.ops.kda": {"chunk_kda": delta_loop},
        "fla.ops.generalized_delta_rule": {"chunk_dplr_delta_rule": kernel_dplr},
    }.items():
        module = ModuleType(path)
        for name, form in kernels.items():
            setattr(module, name, record_calls(name, form))
        monkeypatch.setitem(sys.modules, path, module)
    monkeypatch.setattr(triton, "serves", lambda x: True)
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_are_given_what_they_take(kind, stand_in):
    inputs, chunk, loop = arguments(kind)
    for actual, reference in zip(chunk(*inputs), loop(*inputs), strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-4)
    assert stand_in == [
        {
            "linear": "chunk_simple_gla",
            "scalar decay": "chunk_simple_gla",
            "vector decay": "chunk_gla",
            "delta": "chunk_gated_delta_rule",
            "delta, vector decay": "chunk_kda",
            "dplr": "chunk_dplr_delta_rule",
        }[kind]
    ]


def test_without_the_extra_the_torch_form_runs_on_a_gpu_and_one_warning_says_so(monkeypatch):
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    triton._installed.cache_clear()
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    with pytest.warns(UserWarning, match=r'pip install "subquad\[gpu\]"'):
        assert not triton.serves(on_gpu)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not triton.serves(on_gpu)
    triton._installed.cache_clear()


def test_kernels_do_not_serve_processors_or_double_precision(monkeypatch):
    monkeypatch.setattr(triton, "_installed", lambda: True)
    assert not triton.serves(torch.zeros(1))
    assert not triton.serves(SimpleNamespace(is_cuda=True, dtype=torch.float64))
    assert triton.serves(SimpleNamespace(is_cuda=True, dtype=torch.bfloat16))


@gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 3e-2)], ids=str)
def test_triton_kernels_are_the_loop(kind, dtype, tolerance, monkeypatch):
    """Output and gradient match the loop, and the kernel was called."""
    pytest.importorskip("fla")
    inputs, chunk, loop = arguments(kind, dtype, "cuda")
    leaves = [x.requires_grad_() for x in inputs if x is not None]
    form = "decay" if chunk is decay_chunk else "delta" if chunk is delta_chunk else "dplr"
    calls, kernel = [], getattr(triton, form)
    monkeypatch.setattr(triton, form, lambda *x: calls.append(form) or kernel(*x))
    y, state = chunk(*inputs)
    assert calls == [form]
    expected, expected_state = loop(*(None if x is None else x.float() for x in inputs))
    grads = torch.autograd.grad(y.float().square().sum() + state.square().sum(), leaves)
    expected_grads = torch.autograd.grad(expected.square().sum() + expected_state.square().sum(), leaves)
    for actual, reference in zip((y, state, *grads), (expected, expected_state, *expected_grads), strict=True):
        assert (actual.float() - reference.float()).norm() < tolerance * reference.float().norm()


def test_flash_linear_attentions_naive_forms():
    gla = pytest.importorskip("fla.ops.gla.naive")
    delta = pytest.importorskip("fla.ops.gated_delta_rule.naive")
    (q, k, v, log_a, state), _, loop = arguments("vector decay", groups=4)
    reference, _ = gla.naive_recurrent_gla(*(x.transpose(1, 2) for x in (q, k, v, log_a)), initial_state=state)
    torch.testing.assert_close(loop(q * q.shape[-1] ** -0.5, k, v, log_a, state)[0], reference.transpose(1, 2))
    (q, k, v, log_a, b, state), _, loop = arguments("delta", groups=4)
    reference, _ = delta.naive_recurrent_gated_delta_rule(
        *(x.transpose(1, 2) for x in (q, k, v)),
        b.transpose(1, 2),
        log_a.transpose(1, 2),
        scale=1.0,
        initial_state=state,
    )
    torch.testing.assert_close(loop(q, k, v, log_a, b, state)[0], reference.transpose(1, 2))
