"""The parallel join: a recurrence on all heads, and attention on a few, by the recolouring adapter."""

import pytest
import torch
from torch import nn

from subquad.errors import UserError
from subquad.model.conformance import check_student
from subquad.model.interface import shapes_of
from subquad.model.join import EPS, RecolouringAdapter, output_projection
from subquad.model.student import Student
from subquad.plan import Plan
from subquad.select.ablation import scaled
from tests.helpers import FAMILIES, tiny


def plan_of(teacher, heads=((0, 1), (0, 4), (2, 5)), join="parallel", mixer="gla"):
    return Plan.by_head(shapes_of(teacher), heads, mixer, join=join)


@pytest.mark.parametrize("family", FAMILIES)
def test_conformance(family):
    """Cached = uncached, padded = alone, saved = loaded, cache bytes as planned, for every family."""
    teacher = tiny(family)
    student = Student.from_teacher(teacher, plan_of(teacher))
    student.calibrate(torch.randint(3, 97, (2, 64)))
    check_student(student, batch=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_join_is_the_papers_formula(family):
    teacher = tiny(family)
    student = Student.from_teacher(teacher, plan_of(teacher), join_start="random")
    tokens = torch.randint(3, 97, (2, 20))
    module = student.attention_modules()[0]
    outputs = {}
    shape = student.plan.shapes[0]
    projection = getattr(module, output_projection(module, 6 * shape.head_dim, shape.hidden_size))

    def keep(name):
        def hook(part, args, output):
            outputs.setdefault(name, []).append(output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [
        module.mixer["attention"].register_forward_hook(keep("attention")),
        projection.register_forward_hook(keep("projected")),
        module.register_forward_hook(keep("joined")),
    ]
    student(tokens, use_cache=False)
    for handle in handles:
        handle.remove()

    y_BHTD = outputs["attention"][0]
    width = y_BHTD.shape[-1]
    columns = [head * width + channel for head in (1, 4) for channel in range(width)]
    kind = type(projection)
    weight_MX = projection.weight if kind is nn.Linear else projection.weight.T
    v_BTM = y_BHTD.transpose(1, 2).flatten(2) @ weight_MX[:, columns].T
    u_BTM = outputs["projected"][0]
    (mu_u, mu_v), (std_u, std_v) = ([f(x) for x in (u_BTM, v_BTM)] for f in (_mean, _std))
    recoloured = (v_BTM - mu_v) / (std_v + EPS) * (std_u + EPS) + mu_u
    join = module.mixer.adapter
    expected = (u_BTM + recoloured @ join.weight.T + join.bias) / 2
    torch.testing.assert_close(outputs["joined"][0], expected, atol=1e-5, rtol=1e-4)


def _mean(x):
    return x.mean(-1, keepdim=True)


def _std(x):
    return (x - _mean(x)).square().mean(-1, keepdim=True).sqrt()


def test_from_the_identity_two_equal_branches_are_one():
    u = torch.randn(2, 5, 16)
    torch.testing.assert_close(RecolouringAdapter(16)(u, u), u, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(RecolouringAdapter(16, "random")(u, u), u, atol=1e-2)


def test_the_size_of_the_retained_branch_does_not_matter():
    u, v = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    adapter = RecolouringAdapter(16)
    torch.testing.assert_close(adapter(u, v), adapter(u, 50 * v + 3), atol=1e-3, rtol=1e-3)


def test_the_recurrence_has_all_heads_and_its_cache_is_the_larger():
    teacher = tiny("llama")
    parallel, split = (plan_of(teacher, join=join) for join in ("parallel", "split"))
    assert parallel.layers[0]["gla"] == list(range(6)) and split.layers[0]["gla"] == [0, 2, 3, 5]
    assert parallel.layers[1] == {"gla": list(range(6))} == split.layers[1]
    assert parallel.attention_heads == split.attention_heads == [(0, 1), (0, 4), (2, 5)]
    assert parallel.head_table() == split.head_table()
    per_state = split.cache_bytes(0) // 15  # heads that recur
    assert parallel.cache_bytes(100) - split.cache_bytes(100) == 3 * per_state


def test_a_layer_without_retained_heads_is_the_mixer_alone():
    teacher = tiny("llama")
    tokens = torch.randint(3, 97, (2, 20))
    parallel = Student.from_teacher(teacher, plan_of(teacher, heads=()))
    split = Student.from_teacher(teacher, plan_of(teacher, heads=(), join="split"))
    torch.testing.assert_close(parallel(tokens).logits, split(tokens).logits, atol=0, rtol=0)
    assert not [name for name, _ in parallel.named_parameters() if ".join." in name]


def test_a_plan_says_its_join():
    plan = plan_of(tiny("llama"))
    assert "join: parallel\n" in plan.to_yaml() and Plan.from_yaml(plan.to_yaml()) == plan
    assert "join" not in plan_of(tiny("llama"), join="split").to_yaml()
    with pytest.raises(UserError, match="exactly one mixer beside attention"):
        Plan.from_yaml(plan.to_yaml().replace("[0, 1, 2, 3, 4, 5]", "[0, 1, 2, 3, 4]"))
    with pytest.raises(UserError, match="join"):
        Plan.from_yaml(plan.to_yaml().replace("join: parallel", "join: sideways"))


def test_a_module_without_an_output_projection_is_refused():
    with pytest.raises(UserError, match="output projection of Sequential"):
        output_projection(nn.Sequential(nn.Linear(4, 8)), 8, 4)


def test_the_adapter_is_trained_with_the_mixers():
    student = Student.from_teacher(tiny("llama"), plan_of(tiny("llama")))
    names = [name for name, _ in student.mixer_parameters()]
    assert sum(".mixer.join." in name for name in names) == 4  # a weight and a bias in two layers


def test_a_silenced_head_is_silent_in_both_branches():
    teacher = tiny("llama")
    student = Student.from_teacher(teacher, plan_of(teacher))
    tokens = torch.randint(3, 97, (1, 20))
    gain_BH = torch.ones(1, 6)
    gain_BH[0, 4] = 0  # it attends, and the recurrence has it too
    silenced_hidden = student.final_hidden(tokens, forward_context=scaled({0: gain_BH}))
    width = student.plan.shapes[0].head_dim
    projection = student.attention_modules()[0].o_proj
    projection.weight.data = projection.weight.data.clone()
    projection.weight.data[:, 4 * width : 5 * width] = 0
    torch.testing.assert_close(silenced_hidden, student.final_hidden(tokens))
