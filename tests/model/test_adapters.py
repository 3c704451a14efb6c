"""Projections that are wrapped, packed or offloaded once the student is made: PEFT, a stage's LoRA, 8-bit weights."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn

from subquad.distill.lora import adapters
from subquad.model.interface import shapes_of
from subquad.model.join import output_projection
from subquad.model.student import Student
from subquad.plan import Plan
from subquad.recipes.stage import Stage
from tests.helpers import LOGITS, tiny

TOKENS = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(0))
JOINS = ["split", "parallel"]


def make(family="llama", join="parallel", mixer="gla"):
    teacher = tiny(family)
    plan = Plan.by_head(shapes_of(teacher), [(0, 1), (0, 4), (2, 5)], mixer, join=join)
    torch.manual_seed(0)
    return Student.from_teacher(teacher, plan, join_start="random")


def close(logits, expected):
    return (logits - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize(("family", "mixer"), [("llama", "gated_deltanet"), ("gpt2", "gla"), ("phi3", "mamba2")])
@torch.no_grad()
def test_low_rank_adapters_of_every_linear_map_merge(family, mixer, join):
    student = make(family, join, mixer)
    plain_logits = student(TOKENS).logits
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    adapted = get_peft_model(copy.deepcopy(student), config).eval()
    names = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
    assert any(".mixer." in name for name in names) and not any(".join" in name for name in names)
    logits = adapted(TOKENS).logits
    assert not close(logits, plain_logits)
    with adapted.disable_adapter():
        assert close(adapted(TOKENS).logits, plain_logits)
    generated = adapted.generate(input_ids=TOKENS, max_new_tokens=4)
    adapted.merge_adapter()
    assert close(adapted(TOKENS).logits, logits)
    adapted.unmerge_adapter()
    assert close(adapted(TOKENS).logits, logits)
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert close(merged(TOKENS).logits, logits)
    assert torch.equal(merged.generate(input_ids=TOKENS, max_new_tokens=4), generated)
    assert close(adapted.unload()(TOKENS).logits, plain_logits)


@pytest.mark.parametrize("join", JOINS)
def test_a_stages_own_adapters_merge(join):
    student = make(join=join)
    stage = Stage(**{**LOGITS, "trainable": "lora"}, lora={"rank": 2, "alpha": 8, "targets": ["*"]})
    plain_logits = student(TOKENS).logits
    with adapters(student, stage, seed=0):
        for name, parameter in student.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(parameter)
        logits = student(TOKENS).logits
    assert not close(logits, plain_logits) and close(student(TOKENS).logits, logits)


class Packed(nn.Module):
    """Linear map with weights of 8 bits, which no caller can multiply by."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.scale_M1 = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight / self.scale_M1).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.scale_M1, self.bias)


@pytest.mark.parametrize("join", JOINS)
@torch.no_grad()
def test_a_packed_projection_is_the_map_that_it_computes(join):
    packed_student, student = make("phi3", join), make("phi3", join)
    for module, packed_module in zip(student.attention_modules(), packed_student.attention_modules(), strict=True):
        packed = packed_module.o_proj = Packed(packed_module.o_proj)
        module.o_proj.weight.copy_(packed.weight * packed.scale_M1)
        assert output_projection(packed_module, 48, 48) == "o_proj"
    assert close(packed_student(TOKENS).logits, student(TOKENS).logits)


@pytest.mark.parametrize("join", JOINS)
@torch.no_grad()
def test_an_offloaded_student_computes_the_same(join):
    student = make("gpt2", join)
    logits = student(TOKENS).logits
    cpu_offload(student, torch.device("cpu"))
    assert {parameter.device.type for parameter in student.parameters()} == {"meta"}
    torch.testing.assert_close(student(TOKENS).logits, logits)
