"""Heads with and without rotary embedding in one layer: the convention found by trial is the model's own."""

import pytest
import torch

from subquad.model import rotary
from subquad.model.interface import shapes_of
from subquad.model.layer_call import attending
from subquad.model.rotary import Rotation
from subquad.model.student import Student
from subquad.plan import Plan
from tests.helpers import FAMILIES, GROUPED, tiny

# family -> its configuration, and how it turns queries and keys
CONVENTIONS = {
    "llama": (FAMILIES["llama"], Rotation("halves", "all")),
    "gemma2": (FAMILIES["gemma2"], Rotation("halves", "all")),
    "gpt_neox": ({**FAMILIES["gpt_neox"], "rotary_pct": 0.5}, Rotation("halves", "all")),  # half of the channels
    "cohere": (GROUPED, Rotation("neighbours", "all")),
    "glm": ({**GROUPED, "head_dim": 8}, Rotation("neighbours", "first")),
    "helium": ({**GROUPED, "head_dim": 8}, Rotation("neighbours", "first")),
}


def teacher_of(family, monkeypatch):
    monkeypatch.setitem(FAMILIES, family, CONVENTIONS[family][0])
    monkeypatch.setattr(rotary, "_rotations", {})
    return tiny(family)


@pytest.mark.parametrize("family", CONVENTIONS)
def test_attention_in_the_place_of_mixers_without_rotary_embedding_is_the_teachers(family, monkeypatch):
    teacher = teacher_of(family, monkeypatch)
    shapes = shapes_of(teacher)
    student = Student.from_teacher(teacher, Plan.by_layer(shapes, [], "gla", {"rotary": False}))
    tokens_BT = torch.randint(3, 97, (2, 20))
    mask_BT = torch.ones_like(tokens_BT)
    mask_BT[1, :7] = 0  # rows of different positions
    attention_context = attending(range(len(shapes)))
    arguments = {"attention_mask": mask_BT, "position_ids": mask_BT.cumsum(-1) - 1, "use_cache": False}
    with torch.no_grad():
        teacher_logits = teacher(tokens_BT, **arguments).logits
        restored_logits = student.backbone(tokens_BT, **arguments, forward_context=attention_context).logits
        mixed_logits = student(tokens_BT, **arguments).logits
    is_token = mask_BT.bool()
    torch.testing.assert_close(restored_logits[is_token], teacher_logits[is_token], rtol=1e-5, atol=1e-5)
    assert (mixed_logits - teacher_logits)[is_token].abs().max() > 0.1
    assert {*rotary._rotations.values()} == {CONVENTIONS[family][1]}


def test_a_half_table_serves_both_halves():
    x_BHTD, angle_BTK = torch.randn(1, 2, 3, 8), torch.randn(1, 3, 4)
    half_table, full_table = Rotation("halves", "pairs"), Rotation("halves", "all")
    tables = angle_BTK.cos(), angle_BTK.sin()
    full_tables = [torch.cat([table, table], -1) for table in tables]
    assert torch.equal(half_table.rotate(x_BHTD, *half_table.tables(*tables)), full_table.rotate(x_BHTD, *full_tables))


def test_weights_of_zero_tell_nothing_and_are_not_remembered(monkeypatch):
    teacher = teacher_of("cohere", monkeypatch)
    for layer in teacher.model.layers:
        layer.self_attn.q_proj.weight.zero_(), layer.self_attn.k_proj.weight.zero_()
    plan = Plan.by_head(shapes_of(teacher), [(0, 0)], "gla", {"rotary": False})
    Student.from_teacher(teacher, plan)(torch.randint(3, 97, (1, 5)))
    assert rotary._rotations == {}


@torch.no_grad()
def test_for_an_unknown_convention_the_module_computes_queries_and_keys_again(monkeypatch):
    teacher = teacher_of("llama", monkeypatch)
    plan = Plan.by_head(shapes_of(teacher), [(0, 0), (1, 5)], "gla", {"rotary": False})
    tokens_BT = torch.randint(3, 97, (2, 9))
    expected_logits = Student.from_teacher(teacher, plan)(tokens_BT).logits
    monkeypatch.setattr(rotary, "_rotations", {})
    student = Student.from_teacher(teacher, plan)
    monkeypatch.setattr(Rotation, "rotate", lambda self, x, cos, sin: x + 1)
    torch.testing.assert_close(student(tokens_BT).logits, expected_logits, rtol=1e-5, atol=1e-5)
    assert {*rotary._rotations.values()} == {None}
