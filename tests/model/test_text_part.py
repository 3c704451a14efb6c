"""The text part of a model that also reads images gives a student; the wrapper itself, and others, are refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText

from subquad import text_part
from subquad.errors import UserError
from subquad.model.interface import shapes_of
from subquad.model.student import Student
from subquad.pretrained.load import load_pretrained
from tests.helpers import GROUPED, make_student, tiny
from tests.pretrained.teachers import VOCABULARY, save_tokenizer

TEXT = {**GROUPED, "head_dim": 8, "vocab_size": len(VOCABULARY), "initializer_range": 0.2}
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
IDS_BT = torch.arange(3, 43)[None]


def wrapper(family: str, text_family: str, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, text_config={"model_type": text_family, **TEXT, **changes}, vision_config=VISION
    )
    return AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)


WRAPPERS = {
    "gemma3": {"text_family": "gemma3_text", "sliding_window": 8},
    "llava": {"text_family": "llama", "tie_word_embeddings": False},
    "got_ocr2": {"text_family": "qwen2"},
}


@pytest.mark.parametrize("family", WRAPPERS)
def test_the_text_part_is_the_model(tmp_path, family):
    model = wrapper(family, **WRAPPERS[family])
    text = text_part(model)
    assert torch.allclose(text(IDS_BT).logits, model(IDS_BT).logits, atol=1e-5)
    assert text.get_output_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    student = make_student(text, mixer="gla")
    expected = student(IDS_BT).logits
    assert student.generate(IDS_BT, max_new_tokens=3, do_sample=False).shape[1] == IDS_BT.shape[1] + 3
    student.save_pretrained(tmp_path)
    assert torch.allclose(Student.from_pretrained(tmp_path).eval()(IDS_BT).logits, expected, atol=1e-5)


def test_a_text_part_that_looks_ahead_is_refused():
    """PaliGemma's prompt sees all of itself."""
    with pytest.raises(UserError, match="GemmaForCausalLM is no causal language model"):
        make_student(text_part(wrapper("paligemma", "gemma")), mixer="gla")


@pytest.mark.parametrize("family", ["gemma3", "llava"])
def test_a_folder_of_a_wrapper_loads_as_its_text_part(tmp_path, family):
    model = wrapper(family, **WRAPPERS[family])
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.warns(UserWarning, match="reads more than text: only its text part is converted"):
        teacher = load_pretrained(str(tmp_path))
    assert torch.allclose(teacher.model(IDS_BT).logits, model(IDS_BT).logits, atol=1e-5)
    assert len(shapes_of(teacher.model)) == 3
    with pytest.warns(UserWarning):
        assert len(shapes_of(load_pretrained(str(tmp_path), layers=2).model)) == 2


def test_a_wrapper_itself_is_no_teacher(tmp_path):
    model = wrapper("gemma3", **WRAPPERS["gemma3"])
    with pytest.raises(UserError, match=r"Gemma3ForConditionalGeneration reads .*: convert its text part, .*text_part"):
        shapes_of(model)
    with pytest.raises(UserError, match="convert its text part"):
        Student.from_teacher(model, make_student(text_part(model)).plan)


def test_a_text_part_without_a_class_of_its_own(tmp_path):
    model = wrapper("qwen2_5_vl", "qwen2_5_vl_text", rope_parameters={"mrope_section": [1, 1, 2], "rope_theta": 1e4})
    with pytest.raises(UserError, match="its text part is no model of its own in transformers"):
        text_part(model)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(UserError, match="is no causal language model but a Qwen2_5_VLForConditionalGeneration"):
        load_pretrained(str(tmp_path))


def test_a_model_of_text_alone_is_its_own_text_part():
    model = tiny("llama")
    assert text_part(model) is model


def test_adapters_are_merged_first(tmp_path):
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    plan = make_student(tiny("llama")).plan
    with pytest.raises(UserError, match=r"PeftModel is no model of transformers: .* merge_and_unload"):
        shapes_of(model)
    for teacher in (model, model.get_base_model()):
        with pytest.raises(UserError, match="merge_and_unload"):
            Student.from_teacher(teacher, plan)
    expected = model(IDS_BT % 97).logits
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"holds an adapter \(adapter_config\.json\), no whole model: merge it"):
        load_pretrained(str(tmp_path))

    merged = model.merge_and_unload()
    student = Student.from_teacher(merged, plan)
    assert torch.allclose(merged(IDS_BT % 97).logits, expected, atol=1e-5)
    student.save_pretrained(tmp_path / "student")
    assert Student.from_pretrained(tmp_path / "student").plan == plan
