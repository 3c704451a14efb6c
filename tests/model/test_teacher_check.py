"""Checks of a teacher when it is opened: causality, cached steps, padding, positions, finite logits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from subquad.errors import UserError
from subquad.jobs.conversion import open_teacher
from subquad.model import teacher_check
from subquad.model.interface import shapes_of
from subquad.model.student import Student
from subquad.model.teacher_check import (
    WithinTables,
    check_finite,
    check_same,
    check_shared,
    check_students,
    longest_input,
)
from subquad.plan import Plan
from subquad.recipes.schema import Recipe
from tests.helpers import FAMILIES, RECIPE, make_teacher, tiny

POSITIONS = {"max_position_embeddings": 40, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
BERT = {**POSITIONS, "intermediate_size": 64}
OPT = {**POSITIONS, "ffn_dim": 64, "word_embed_proj_dim": 48}


def small(family, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=97, **settings)
    return AutoModelForCausalLM.from_config(config).eval()


def students(teacher, mixer="gated_deltanet"):
    shapes = shapes_of(teacher)
    plans = {"attention": Plan.all_attention(shapes), mixer: Plan.by_layer(shapes, [], mixer)}
    return {name: Student.from_teacher(teacher, plan) for name, plan in plans.items()}


@pytest.mark.parametrize("family", ["bert", "electra", "roberta"])
def test_an_encoder_is_no_teacher(family, tmp_path):
    """From Python, and from a folder before anything else is read; with random weights, whose heads mix little."""
    encoder = small(family, is_decoder=False, **BERT)
    plan = Plan.by_layer(shapes_of(encoder), [1], "gla")
    with pytest.raises(UserError, match=r"no causal language model: .* is_decoder: false"):
        Student.from_teacher(encoder, plan)
    make_teacher(tmp_path)
    encoder.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no causal language model"):
        open_teacher(Recipe(**RECIPE | {"teacher": str(tmp_path)}), "cpu")
    decoder = small(family, is_decoder=True, **BERT)
    assert Student.from_teacher(decoder, plan).plan == plan


def test_causality_is_probed_once(monkeypatch):
    teacher = tiny("llama")
    students(teacher)
    monkeypatch.setattr(teacher_check, "_logits", None)
    students(teacher)


@pytest.mark.parametrize("family", FAMILIES)
def test_teachers_and_their_students_pass(family):
    teacher = tiny(family)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    training = {name: module.train(name.endswith("mlp")).training for name, module in teacher.named_modules()}
    check_finite(teacher)
    check_same(teacher, students(teacher)["attention"])
    assert check_students(teacher, students(teacher)) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert {name: module.training for name, module in teacher.named_modules()} == training


def test_a_teacher_that_deviates_itself_is_said_and_not_refused():
    """Decoders of RoBERTa's kind count their positions from the padding token, whatever they are given."""
    teacher = small("roberta", is_decoder=True, pad_token_id=1, **BERT)
    [note] = check_students(teacher, students(teacher))
    assert "with left padding, RobertaForCausalLM itself deviates by " in note


class Forgetful(Student):
    """A student whose cached steps do not see what was read before."""

    def forward(self, input_ids=None, cache=None, **kwargs):
        return super().forward(input_ids=input_ids, cache=None if cache is None else self.new_cache(), **kwargs)


class Broken(Student):
    """A student that cannot continue."""

    def forward(self, input_ids=None, cache=None, **kwargs):
        if cache is not None:
            raise ValueError("no state")
        return super().forward(input_ids=input_ids, **kwargs)


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Forgetful, r"the logits of a student with gla change by \S+ of the largest"), (Broken, "ValueError: no state")],
)
def test_a_student_that_cannot_generate_is_refused(kind, message):
    teacher = tiny("llama")
    student = kind.from_teacher(teacher, Plan.by_layer(shapes_of(teacher), [], "gla"))
    with pytest.raises(
        UserError, match=f"LlamaForCausalLM cannot be converted: .*two cached steps.*{message}|{message}"
    ):
        check_students(teacher, {"gla": student})


def test_a_student_that_is_not_its_teacher_is_refused():
    teacher = tiny("llama")
    other = students(copy.deepcopy(teacher))["attention"]
    other.backbone.model.norm.weight.data = -other.backbone.model.norm.weight
    with pytest.raises(UserError, match="every head attends deviates"):
        check_same(teacher, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_refused(value):
    teacher = tiny("qwen3")
    teacher.model.layers[1].mlp.down_proj.weight[0, 0] = value
    with pytest.raises(UserError, match="no finite numbers in torch.float32"):
        check_finite(teacher)


def test_whatever_fails_when_a_teacher_is_opened_is_refused_by_name(tmp_path, monkeypatch):
    """As for models whose code cannot run a trial pass."""
    run = LlamaForCausalLM.forward

    def fail(*args, **kwargs):
        if kwargs.get("use_cache"):
            return run(*args, **kwargs)
        raise AttributeError("'NoneType' object has no attribute 'to'")

    monkeypatch.setattr(LlamaForCausalLM, "forward", fail)
    folder = make_teacher(tmp_path)
    with pytest.raises(
        UserError, match=r"^LlamaForCausalLM cannot be converted: a trial pass fails \(AttributeError: 'N"
    ):
        open_teacher(Recipe(**RECIPE | {"teacher": folder}), "cpu")


def test_shared_weights_that_cannot_be_saved_are_refused():
    check_shared(tiny("llama"))  # whose class ties the output head to the embedding
    for share in ("mlp", "mlp.up_proj", "self_attn.q_proj"):
        teacher = tiny("llama")
        teacher.model.layers[2].set_submodule(share, teacher.model.layers[0].get_submodule(share))
        with pytest.raises(UserError, match=rf"shares model.layers.0.{share}\S* with model.layers.2.{share}"):
            check_shared(teacher)


def test_forbidden_tokens_are_no_fault():
    teacher = tiny("qwen3")
    head = teacher.lm_head
    head.register_forward_hook(lambda module, args, logits: logits.index_fill(-1, torch.tensor([5]), -torch.inf))
    check_finite(teacher)
    assert check_students(teacher, students(teacher)) == []


@pytest.mark.parametrize(
    ("teacher", "longest"),
    [
        (("gpt2", {"n_positions": 40, "n_embd": 48, "n_layer": 2, "n_head": 6}), 40),
        (("opt", OPT), 40),
        (("bert", {**BERT, "is_decoder": True}), 40),
        (("roberta", {**BERT, "is_decoder": True, "pad_token_id": 1}), 38),  # whose positions begin behind the pads
        (("gptj", {"n_positions": 40, "n_embd": 48, "n_layer": 2, "n_head": 6, "rotary_dim": 4}), 40),
        (("bloom", {"hidden_size": 48, "n_layer": 2, "n_head": 6}), 300),
        (("llama", {**BERT, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}), 300),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_the_longest_row_is_found_by_trial(teacher, longest):
    """Learned tables end, whatever the configuration says of them; rotary embeddings and ALiBi do not."""
    model = small(teacher[0], **teacher[1])
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert longest_input(model, 300) == longest
    assert longest_input(model, 20) == 20
    assert buffers.keys() == dict(model.named_buffers()).keys()
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers()), "as it was"


def test_no_long_row_is_computed_to_find_that_a_model_takes_it(monkeypatch):
    model, rows = tiny("llama"), []
    monkeypatch.setattr(teacher_check, "_takes", lambda model, length: not rows.append(length))
    assert longest_input(model, 100_000) == 100_000
    assert max(rows) <= 256 + 9


def test_an_index_beyond_a_table_is_found_before_it_is_looked_up():
    """On a GPU, the look-up itself could not be caught."""
    table = torch.zeros(4, 2)
    with WithinTables():
        assert F.embedding(torch.tensor([3]), table).shape == (1, 2)
        for look_up in (
            lambda: F.embedding(torch.tensor([4]), table),
            lambda: table.index_select(0, torch.tensor([4])),
            lambda: table.gather(0, torch.tensor([[4, 0]])),
        ):
            with pytest.raises(IndexError, match="index 4 is beyond a table of 4"):
                look_up()
