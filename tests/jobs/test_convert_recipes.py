"""Every shipped recipe on a tiny teacher, and settings of a recipe's stages other than objectives."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from subquad.errors import UserError
from subquad.evaluate.retrieval import FLOORS
from subquad.jobs.cache_teacher import cache_teacher
from subquad.jobs.convert import convert
from subquad.model.conformance import check_student
from subquad.model.interface import shapes_of
from subquad.model.student import Student, tied
from subquad.plan import Plan
from subquad.recipes.load import load_recipe, recipe_names
from subquad.recipes.schema import Recipe
from subquad.results.metrics import Metrics
from subquad.results.record import check_written
from subquad.select import task
from tests.helpers import (
    ALIGN,
    FAMILIES,
    LOGITS,
    RECIPE,
    RandomText,
    T,
    assert_same_bits,
    lines,
    make_student,
    shortened,
    tiny,
    train,
    weights,
)

LORA = {**LOGITS, "objective": "labels", "trainable": "lora", "lora": {"rank": 2, "alpha": 4}, "lr": 1e-2}


OF_TEXT = [name for name in recipe_names() if load_recipe(name).task == "text-generation"]


QUICK = [name if name.endswith("quick") else pytest.param(name, marks=pytest.mark.slow) for name in OF_TEXT]


@pytest.mark.parametrize("name", QUICK)
def test_every_recipe_of_text_runs(name, teacher_folder, text, tmp_path, monkeypatch):
    monkeypatch.setitem(FLOORS, "logprob", -1e9)  # a random teacher retrieves nothing
    recipe = shortened(name)
    student = convert(teacher_folder, recipe, tmp_path / "run", data=text)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert [stage["name"] for stage in metrics["stages"]] == [stage.name for stage in recipe.stages]
    assert all(stage["tokens"] == 128 and stage["peak_memory_bytes"] > 0 for stage in metrics["stages"])
    assert metrics["student"]["kl"]["48"] > 0 and "teacher" in metrics
    check_written(Metrics, metrics)
    loaded_student = Student.from_pretrained(tmp_path / "run")
    ids_BT = torch.randint(3, 97, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(loaded_student(ids_BT).logits, student(ids_BT).logits.to(loaded_student.dtype))
    assert (tmp_path / "run" / "report.html").is_file()


def test_both_plans_of_the_greedy_path_are_kept(teacher_folder, text, tmp_path, monkeypatch):
    """Nothing is trained after the selection, so M_best is a model as well as M_opt."""
    worth = iter([0.5] + [0.8, 0.9, 0.7] + [0.6, 0.6] + [0.1] + [0.5, 0.9, 0.6])  # teacher, three steps, test
    monkeypatch.setattr(task, "_retrieval", lambda *_: lambda *_: next(worth))
    out = tmp_path / "run"
    student = convert(teacher_folder, shortened("distill-then-replace-quick"), out, data=text)
    best = Student.from_pretrained(out / "best")
    assert student.plan.attention_layers == [0] and best.plan.attention_layers == [0, 2]
    path = json.loads((out / "scores.json").read_text())["path"]
    assert [step["unit"] for step in path["steps"]] == [1, 2] and path["test"]["best"] == 0.9
    assert best.generate(torch.randint(3, 97, (1, 5)), max_new_tokens=3).shape == (1, 8)


def test_budgets_are_scaled_together():
    full_recipe = load_recipe("radlads")
    tenth_recipe = load_recipe("radlads", ["stages.logits.tokens=1M"], tokens_scale=0.1)
    assert [stage.tokens for stage in tenth_recipe.stages] == [10_000_000, 100_000, 10_000_000]
    assert tenth_recipe.data.max_tokens == full_recipe.data.max_tokens // 10 and tenth_recipe.selector.tokens == 819
    scaled_recipe = load_recipe("kl-guided-full", tokens_scale=0.1)
    assert scaled_recipe.selector.options == {"retrain_tokens": 20_000_000}
    for scale in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match="cannot scale token budgets by"):
            load_recipe("radlads", tokens_scale=scale)


SIZES = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 6}
MORE_FAMILIES = {  # in addition to FAMILIES
    "phi": {"partial_rotary_factor": 0.5},  # parallel blocks, biases everywhere
    "qwen2": {"num_key_value_heads": 2},  # biases on q, k and v
    "cohere": {"num_key_value_heads": 2, "logit_scale": 0.5, "use_qk_norm": True},  # parallel blocks, q/k norms
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 48},  # learned positions, biases
}


@pytest.mark.parametrize("family", [*MORE_FAMILIES, "llama", "qwen3", "gpt_neox", "gpt2", "olmo2"])
def test_mohawk_on_families(family, tmp_path):
    if family in MORE_FAMILIES:
        torch.manual_seed(0)
        special_tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config = AutoConfig.for_model(family, **SIZES, **MORE_FAMILIES[family], **special_tokens)
        config.initializer_range = 0.2
        teacher = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    else:
        teacher = tiny(family)
    teacher_weights = weights(teacher)
    shapes = shapes_of(teacher)
    student = Student.from_teacher(teacher, Plan.by_layer(shapes, [1], "discrete_mamba2"))
    student.calibrate(torch.randint(3, 97, (2, 32)))
    for index, stage in enumerate(load_recipe("mohawk").stages):
        settings = stage.model_dump() | {
            "tokens": 12 * T,
            "sequence_length": T,
            "batch": 2,
            "accumulate": 1,
            "lr": 1e-3,
        }
        settings["checkpoint_every"] = 100
        out, same_text = tmp_path, RepeatedText()
        _, result = train(out, settings, teacher=teacher, student=student, corpus=same_text, index=index)
        assert result.final_loss < result.first_loss
    assert_same_bits(teacher_weights, weights(teacher))
    check_student(student)


class RepeatedText(RandomText):
    """The same rows at every step."""

    def batch(self, step, **options):
        return super().batch(0, **options)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_are_merged_and_the_teacher_keeps_its_weights(family, tmp_path):
    teacher = tiny(family)
    teacher_weights = weights(teacher)
    student = make_student(teacher)
    names, start_weights = set(student.state_dict()), weights(student)
    train(tmp_path, LORA, teacher=teacher, student=student)
    assert_same_bits(teacher_weights, weights(teacher))
    trained_weights = weights(student)
    assert trained_weights.keys() == names
    changed_names = {name for name in names if not torch.equal(start_weights[name], trained_weights[name])}
    attention = [student.config.attention_paths[layer] for layer in (0, 2)]
    assert changed_names and all(any(f"backbone.{path}." in name for path in attention) for name in changed_names)
    for name in changed_names:
        difference = (trained_weights[name] - start_weights[name]).double()
        assert torch.linalg.matrix_rank(difference, rtol=1e-3) <= 2
    student.save_pretrained(tmp_path / "model")
    ids_BT = torch.randint(3, 97, (2, 20))
    with torch.no_grad():
        assert torch.equal(Student.from_pretrained(tmp_path / "model")(ids_BT).logits, student(ids_BT).logits)


def test_a_stage_of_adapters_is_resumed(tmp_path, monkeypatch):
    teacher = tiny("llama")
    whole_student, result = train(tmp_path / "whole", LORA, teacher=teacher)
    loaded_student, loaded_result = train(tmp_path / "whole", LORA, teacher=teacher, resume=True)
    assert loaded_result == result
    assert_same_bits(weights(whole_student), weights(loaded_student))

    class Dies(RandomText):
        def batch(self, step, **options):
            if step == 3 and options["seed"] == 0:
                raise KeyboardInterrupt
            return super().batch(step, **options)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", LORA, teacher=teacher, corpus=Dies())
    resumed_student, _ = train(tmp_path / "cut", LORA, teacher=teacher, resume=True)
    assert_same_bits(weights(whole_student), weights(resumed_student))


def test_targets_of_adapters(tmp_path):
    teacher = tiny("llama")
    student = make_student(teacher)
    start_weights = weights(student)
    train(tmp_path, {**LORA, "lora": {"targets": ["*v_proj", "*up_proj"]}}, teacher=teacher, student=student)
    trained_weights = weights(student)
    changed_names = [name for name in start_weights if not torch.equal(start_weights[name], trained_weights[name])]
    changed_modules = {name.split(".")[-2] for name in changed_names}
    assert changed_modules == {"v_proj", "up_proj"}
    for target in ("nothing", "lm_head"):  # the head is tied to the embedding
        with pytest.raises(UserError, match=f"no linear map matches '{target}' of stage 'logits': names look like"):
            train(tmp_path, {**LORA, "lora": {"targets": [target]}}, teacher=teacher)


def test_a_stage_ends_on_a_plateau(tmp_path):
    tokens = ALIGN["batch"] * T
    settings = {**ALIGN, "tokens": 40 * tokens, "lr": 1e-9, "plateau": {"tokens": 3 * tokens}}
    student, result = train(tmp_path, settings, corpus=RepeatedText())
    assert result.ended_on_plateau and result.steps == 6 and result.tokens == 6 * tokens
    assert lines(tmp_path)[-1]["step"] == 6
    _, loaded_result = train(tmp_path, settings, corpus=RepeatedText(), resume=True)
    assert loaded_result == result
    _, falling_result = train(tmp_path / "b", {**settings, "tokens": 6 * tokens, "lr": 3e-2}, corpus=RepeatedText())
    assert not falling_result.ended_on_plateau and falling_result.steps == 6


def test_tied_embeddings(teacher_folder, text, tmp_path):
    recipe = {**RECIPE, "stages": [{**RECIPE["stages"][1], "trainable": "all"}], "selector": {"by": "uniform"}}

    def convert_with(option):
        return convert(teacher_folder, Recipe(**recipe, tied_embeddings=option), tmp_path / option, data=text)

    kept_student, untied_student, retied_student = (convert_with(option) for option in ("keep", "untie", "retie"))
    assert tied(kept_student) and not tied(untied_student) and tied(retied_student)
    embedding, head = untied_student.get_input_embeddings().weight, untied_student.get_output_embeddings().weight
    assert not torch.equal(embedding, head)
    torch.testing.assert_close(retied_student.get_input_embeddings().weight, (embedding + head) / 2)
    ids_BT = torch.randint(3, 97, (2, 20))
    for option, student in (("keep", kept_student), ("untie", untied_student), ("retie", retied_student)):
        loaded_student = Student.from_pretrained(tmp_path / option)
        assert tied(loaded_student) == tied(student)
        with torch.no_grad():
            assert torch.equal(loaded_student(ids_BT).logits, student(ids_BT).logits)
    with pytest.raises(UserError, match="ties its output head to its input embedding, and the recipe refuses"):
        convert_with("refuse")


def test_a_tied_head_has_no_name_of_its_own(tmp_path):
    with pytest.raises(UserError, match=r"'\*lm_head\*' of stage 'logits': the output head is tied"):
        train(tmp_path, {**LOGITS, "trainable": ["*lm_head*"]})


def test_a_stage_has_a_teacher_of_its_own(teacher_folder, text, tmp_path):
    """A larger one, whose head is padded to more tokens."""
    torch.manual_seed(5)
    config = AutoConfig.for_model("llama", **{**FAMILIES["llama"], "vocab_size": 104, "num_hidden_layers": 4})
    larger_model = AutoModelForCausalLM.from_config(config)
    larger_model.save_pretrained(tmp_path / "larger")
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(tmp_path / "larger")
    stage = {**RECIPE["stages"][1], "teacher": str(tmp_path / "larger"), "tokens": 2048}
    recipe = {**RECIPE, "stages": [stage], "selector": {"by": "uniform"}}
    convert(teacher_folder, Recipe(**recipe), tmp_path / "run", data=text)
    own_recipe = {**recipe, "stages": [{**stage, "teacher": None}]}
    convert(teacher_folder, Recipe(**own_recipe), tmp_path / "own", data=text)
    first_stages = [json.loads((tmp_path / run / "metrics.json").read_text())["stages"][0] for run in ("run", "own")]
    assert first_stages[0]["first_loss"] > 2 * first_stages[1]["first_loss"]  # a random stranger
    assert first_stages[0]["final_loss"] < first_stages[0]["first_loss"]

    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(tmp_path / "larger")
    with pytest.raises(UserError, match="stage 'logits' cannot learn from larger: its vocabulary is not that of"):
        convert(teacher_folder, Recipe(**recipe), tmp_path / "third", data=text)


def test_a_stage_learns_from_stored_logits(teacher_folder, text, tmp_path):
    stage = {**RECIPE["stages"][1], "tokens": 512}
    recipe = Recipe(**{**RECIPE, "stages": [stage], "selector": {"by": "uniform"}, "data": {"heldout_fraction": 0.1}})
    all_tokens = 10**6  # all of the text, so that both runs draw the same rows
    cache_teacher(teacher_folder, recipe, tmp_path / "cache", data=text, tokens=all_tokens, top_k=97)
    cache_teacher(teacher_folder, recipe, tmp_path / "short", data=text, tokens=all_tokens, top_k=4)
    losses = {}
    for name in (None, "cache", "short"):
        recipe.stages[0].teacher_cache = name and str(tmp_path / name)
        convert(teacher_folder, recipe, tmp_path / f"run-{name}", data=text)
        losses[name] = [line["loss"] for line in lines(tmp_path / f"run-{name}")]
    assert losses["cache"] == pytest.approx(losses[None], rel=1e-2)
    assert all(short_loss < loss for short_loss, loss in zip(losses["short"], losses[None], strict=True))
    recipe.stages[0].sequence_length = 16
    with pytest.raises(UserError, match="sequences of 16 tokens, and the logits in .* are of 32: set sequence_length"):
        convert(teacher_folder, recipe, tmp_path / "other", data=text)
