"""Teachers whose weights do not show where and in which dtype they compute: quantised and offloaded ones."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from subquad.errors import UserError
from subquad.model.base import plan_of
from subquad.model.student import Student
from subquad.plan import Plan
from tests.helpers import make_student, tiny

CPU = torch.device("cpu")
IDS_BT = torch.arange(3, 43)[None] % 97


class Integers(nn.Parameter):
    """Parameter of a class of its own, with what its values mean, as the 4-bit weights of bitsandbytes are."""

    scale: torch.Tensor


class IntegerLinear(nn.Module):
    """Linear layer of 8-bit integers; `scale_dtype` as quantisers like it, whatever the model computes in."""

    def __init__(self, linear: nn.Linear, packed: bool, scale_dtype: torch.dtype):
        super().__init__()
        scale = (linear.weight.abs().amax(1, keepdim=True) / 127).to(scale_dtype)
        values = (linear.weight / scale).round().to(torch.int8)
        self.packed = packed
        if packed:
            self.weight = Integers(values, requires_grad=False)
            self.weight.scale = scale
        else:
            self.scale = nn.Parameter(scale, requires_grad=False)
            self.weight = nn.Parameter(values, requires_grad=False)

    def forward(self, x):
        return x @ (self.weight * (self.weight.scale if self.packed else self.scale)).to(x.dtype).T


def quantised(packed: bool, dtype: torch.dtype, scale_dtype: torch.dtype):
    """A tiny Llama with integers for its projections, and the same model with the weights that they stand for."""
    model, plain = tiny("llama", dtype), tiny("llama", dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            integer = IntegerLinear(module, packed, scale_dtype)
            model.set_submodule(name, integer)
            scale = integer.weight.scale if packed else integer.scale
            plain.get_submodule(name).weight.data = (integer.weight * scale).to(dtype)
    return model, plain


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype, scale_dtype", [(torch.float32, torch.float32), (torch.float64, torch.float32)])
def test_a_student_of_integer_weights_computes_what_they_stand_for(packed, dtype, scale_dtype):
    model, plain = quantised(packed, dtype, scale_dtype)
    student, expected = make_student(model), make_student(plain)
    assert {weight.dtype for _, weight in student.mixer_parameters()} == {dtype}
    assert torch.equal(student(IDS_BT).logits, expected(IDS_BT).logits)
    kept = Student.from_teacher(model, plan_of(model))
    assert torch.equal(kept(IDS_BT).logits, model(IDS_BT).logits)
    weights = (lm.get_submodule("model.layers.1.mlp.up_proj").weight for lm in (model, student.backbone))
    assert len({weight.data_ptr() for weight in weights}) == 1


def test_the_mixers_of_a_quantised_teachers_student_are_saved_with_the_full_teacher(tmp_path):
    model, plain = quantised(False, torch.float32, torch.float32)
    student = make_student(model)
    with pytest.raises(UserError, match=r"quantised weights cannot be saved: .*mixers_from=student"):
        student.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    full = Student.from_teacher(plain, student.plan, mixers_from=student)
    assert full.new_mixers == set()
    full.save_pretrained(tmp_path)
    saved = Student.from_pretrained(tmp_path).eval()
    assert torch.equal(saved(IDS_BT).logits, student(IDS_BT).logits)


def offload(model, how: str, folder):
    if how == "cpu":
        return cpu_offload(model, execution_device=CPU)
    if how == "disk":
        return disk_offload(model, folder, execution_device=CPU)
    places = dict.fromkeys(["model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb"], "cpu")
    places |= {f"model.layers.{layer}": "disk" if layer == 1 else "cpu" for layer in range(3)}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("how", ["cpu", "disk", "one layer on disk"])
def test_a_student_of_an_offloaded_teacher(tmp_path, how):
    expected = make_student(tiny("llama"), mixer="gla")
    teacher = offload(tiny("llama"), how, tmp_path / "weights")
    assert any(weight.is_meta for weight in teacher.parameters())
    student = make_student(teacher, mixer="gla")
    assert not any(weight.is_meta for _, weight in student.mixer_parameters())
    assert torch.equal(student(IDS_BT).logits, expected(IDS_BT).logits)
    assert torch.equal(teacher(IDS_BT).logits, tiny("llama")(IDS_BT).logits)
    student.save_pretrained(tmp_path / "student")
    saved = Student.from_pretrained(tmp_path / "student").eval()
    assert torch.equal(saved(IDS_BT).logits, expected(IDS_BT).logits)


def quantised_by_library(how, folder):
    """A tiny teacher, quantised by a library where it is installed."""
    teacher = tiny("llama", tie_word_embeddings=False, hidden_size=64, intermediate_size=128, num_attention_heads=8)
    if how == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(teacher, quantization.Int8WeightOnlyConfig())
        return teacher
    pytest.importorskip("bitsandbytes")
    teacher.save_pretrained(folder)
    settings = {"load_in_8bit": True} if how == "8 bit" else {"load_in_4bit": True}
    config = BitsAndBytesConfig(**settings, bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu").eval()


@pytest.mark.parametrize("how", ["torchao", "8 bit", "4 bit"])
def test_a_student_of_a_really_quantised_teacher(tmp_path, how):
    teacher = quantised_by_library(how, tmp_path)
    kept = make_student(teacher, attention_layers=range(3), mixer="gla")
    assert torch.equal(kept(IDS_BT).logits, teacher(IDS_BT).logits)
    plan = Plan.by_head(kept.plan.shapes, [(0, 1), (1, 2)], "gla", join="parallel")
    mixed = Student.from_teacher(teacher, plan)
    mixed.calibrate(IDS_BT)
    assert mixed.generate(IDS_BT, max_new_tokens=4, do_sample=False).shape[1] > IDS_BT.shape[1]
    assert mixed(IDS_BT).logits.isfinite().all()
    with pytest.raises(UserError, match="quantised weights cannot be saved"):
        mixed.save_pretrained(tmp_path / "student")
