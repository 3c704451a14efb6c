"""Recipes fitted to teachers whose table of positions ends, in the dry run and in every job."""

import io
import json

import pytest
import torch
from rich.console import Console

from subquad.errors import UserError
from subquad.jobs import convert, dry_run, evaluate, select
from subquad.jobs.fitting import fitted
from subquad.pretrained.load import load_pretrained
from subquad.recipes.load import load_recipe
from subquad.recipes.schema import Recipe
from tests.helpers import RECIPE, byte_tokenizer, tiny


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A GPT-2 with 40 learned positions, and a token for each byte."""
    folder = tmp_path_factory.mktemp("gpt2")
    tiny("gpt2", n_positions=40, vocab_size=258).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def quick(*changes):
    """The shipped recipe, whose rows have up to 2,048 tokens, with few tokens to train on."""
    return load_recipe(
        "quick",
        ["selector.tokens=80", "mixer.options={window: 8, sinks: 1, feature_dim: 4}", *changes],
        tokens_scale=0.02,
    )


def test_rows_are_cut_to_the_table_and_it_is_said_once(gpt2):
    recipe = quick("selector.by=recall")
    short, longest, sentence = fitted(recipe, load_pretrained(gpt2), more_rows={"calibration": 1024})
    assert longest == 40
    assert [stage.sequence_length for stage in short.stages] == [40, 40]
    assert short.selector.sequence_length == 40 and short.selector.options == {"context": 40}
    assert short.evaluate.contexts == [40] and short.evaluate.retrieval.contexts == [40]
    assert short.evaluate.max_new_tokens == 20
    assert short.evaluate.prompts[0] == "The most important t" and len(short.evaluate.prompts) == 2
    assert short.evaluate.retrieval.tasks == ["copy"]
    assert [stage.tokens for stage in short.stages] == [stage.tokens for stage in recipe.stages]
    assert "rows of at most 40 tokens, to which are cut: calibration (1,024), " in sentence
    assert sentence.endswith("; left out, because they need longer ones: the retrieval tasks dictionary, passkey")
    assert "stages.logits.sequence_length (1,024)" in sentence and "evaluate.contexts (2,048)" in sentence
    assert recipe.evaluate.contexts == [256, 1024, 2048], "the caller's recipe is as it was"


def test_short_prompts_stay_as_they_are(gpt2):
    recipe = quick("evaluate.max_new_tokens=30", "evaluate.prompts=['0123456789', abc]")
    short, _, sentence = fitted(recipe, load_pretrained(gpt2))
    assert short.evaluate.prompts == ["0123456789", "abc"] and short.evaluate.max_new_tokens == 30
    assert "prompts" not in sentence


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_rotary_teachers_take_what_is_asked(family, teacher_folder):
    """Though the configuration states 256 positions: rows of any length are computed."""
    teacher = load_pretrained(teacher_folder)
    teacher.model = tiny(family)
    recipe = quick()
    assert fitted(recipe, teacher) == (recipe, 2048, "")


@pytest.mark.slow
def test_a_conversion_and_its_dry_run_in_40_positions(gpt2, text, tmp_path, capsys):
    said = "of at most 40 tokens, to which are cut: calibration (1,024)"
    preview = dry_run.dry_run(gpt2, quick(), tmp_path / "dry", data=text)
    assert " ".join(capsys.readouterr().out.split()).count(said) == 1
    assert [stage.stage.sequence_length for stage in preview.stages] == [40, 40]

    student = convert.convert(gpt2, quick(), tmp_path / "run", data=text)
    assert " ".join(capsys.readouterr().out.split()).count(said) == 1
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["student"]["kl"].keys() == {"40"} and metrics["student"]["retrieval"]["copy"].keys() == {"40"}
    assert torch.isfinite(student(torch.arange(3, 43)[None]).logits).all()

    console = Console(file=io.StringIO(), width=1000)
    again = evaluate.evaluate_model(tmp_path / "run", changes=["evaluate.rows=1"], console=console)
    assert again["student"]["kl"].keys() == {"40"}, "the folder's recipe is what was asked for: eval cuts it as well"
    assert "rows of at most 40 tokens, to which are cut: " in console.file.getvalue()


def test_decoding_beyond_the_table_is_refused(gpt2, text, tmp_path):
    for budget in ("1.5x@32k", "1.5x@40"):
        recipe = Recipe(**RECIPE | {"selector": RECIPE["selector"] | {"budget": budget}})
        with pytest.raises(UserError, match=r"of decoding after [0-9,]+ tokens, more than .* takes"):
            select.select(gpt2, recipe, tmp_path / "plan.yaml", data=text, dry_run=True)
    fitted(Recipe(**RECIPE | {"selector": RECIPE["selector"] | {"budget": "1.5x@39"}}), load_pretrained(gpt2))
