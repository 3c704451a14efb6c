"""Recipes: loading, overrides, `extends`, and the error messages for mistakes."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from subquad.errors import UserError
from subquad.recipes.load import load_recipe, recipe_names
from subquad.recipes.schema import Recipe, Stage

STAGE = {"name": "align", "tokens": "4k"}


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a recipe, a mapping or a text, and returns its file."""

    def write(recipe, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load_and_survive_writing(name, write):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe.stages
    assert load_recipe(write(recipe.to_yaml())) == recipe


def test_quick_selects_from_an_aligned_all_linear_student_and_keeps_half():
    recipe = load_recipe("quick")
    assert recipe.mixer.name == "hedgehog"
    assert (recipe.selector.by, recipe.selector.budget) == ("kl", "50%")
    assert [(stage.objective, stage.scope) for stage in recipe.stages] == [
        ("mixer_output", "all-linear"),
        ("logits", "plan"),
    ]


def test_kl_guided_has_the_published_settings():
    """arXiv 2512.20569 and its configurations: 100M tokens of alignment, 600M of distillation."""
    recipe = load_recipe("kl-guided")
    align, distill = recipe.stages
    assert (recipe.mixer.name, recipe.selector.budget) == ("gated_deltanet", "25%")
    assert (align.tokens, align.sequence_length, align.batch, align.lr) == (100_000_000, 512, 96, 1e-3)
    assert (align.objective, align.schedule) == ("mixer_output", "cosine")
    assert (distill.tokens, distill.sequence_length, distill.batch, distill.lr) == (600_000_000, 4096, 32, 7e-6)
    assert (distill.trainable, distill.lr_groups, distill.schedule) == ("all", {"*self_attn*": 1e-4}, "constant")


@pytest.mark.parametrize(
    ("text", "count"), [("50k", 50_000), ("1.5M", 1_500_000), ("2B", 2_000_000_000), ("0.5K", 500), (7, 7), ("7", 7)]
)
def test_token_counts(text, count):
    assert Stage(name="a", tokens=text).tokens == count


@given(st.integers(1, 10**6), st.sampled_from([("k", 10**3), ("M", 10**6)]))
def test_every_suffixed_count_is_exact(number, suffix):
    assert Stage(name="a", tokens=f"{number}{suffix[0]}").tokens == number * suffix[1]


def test_overrides_address_stages_by_position_and_by_name():
    recipe = load_recipe(
        "quick",
        [
            "stages.0.tokens=50k",
            "stages.logits.lr=1e-5",
            "stages.logits.objective={logits: 1, labels: 0.1}",
            "selector.budget=64MiB@32k",
            "evaluate.contexts=[128, 256]",
            "data.sources=[a.txt]",
        ],
    )
    align, logits = recipe.stages
    assert (align.tokens, logits.lr, logits.objective) == (50_000, 1e-5, {"logits": 1, "labels": 0.1})
    assert (recipe.selector.budget, recipe.evaluate.contexts, recipe.data.sources) == (
        "64MiB@32k",
        [128, 256],
        ["a.txt"],
    )


def test_scientific_notation_is_a_number_in_free_form_options_too():
    assert load_recipe("quick", ["mixer.options.eps=1e-3"]).mixer.options["eps"] == 1e-3


def test_another_mixer_drops_the_options_of_the_former():
    assert load_recipe("quick", ["mixer.name=gla"]).mixer.options == {}
    assert load_recipe("quick", ["mixer.name=hedgehog"]).mixer.options == load_recipe("quick").mixer.options != {}
    overrides = ["mixer.options.gate_rank=8", "mixer.name=gla"]
    assert (
        load_recipe("quick", overrides).mixer.options
        == load_recipe("quick", overrides[::-1]).mixer.options
        == {"gate_rank": 8}
    )


def test_extends_merges_mappings_and_replaces_lists(write):
    write({"extends": "quick", "stages": [STAGE], "mixer": {"options": {"window": 32}}, "teacher": "base"}, "base.yaml")
    recipe = load_recipe(write({"extends": "base.yaml", "mixer": {"options": {"sinks": 1}}, "seed": 7}))
    assert (recipe.name, recipe.teacher, recipe.seed) == ("mine", "base", 7)
    assert recipe.mixer.options == {**load_recipe("quick").mixer.options, "window": 32, "sinks": 1}
    assert [stage.tokens for stage in recipe.stages] == [4000]
    assert recipe.selector == load_recipe("quick").selector


def test_a_mapping_of_stages_changes_those_it_names(write):
    changes = {"logits": {"divergence": "reverse_kl", "tokens": "2M"}}
    recipe = load_recipe(write({"extends": "radlads", "stages": changes}))
    base = load_recipe("radlads")
    assert [stage.name for stage in recipe.stages] == [stage.name for stage in base.stages]
    assert recipe.stages[1] == base.stages[1].model_copy(update={"divergence": "reverse_kl", "tokens": 2_000_000})
    assert [recipe.stages[0], recipe.stages[2]] == [base.stages[0], base.stages[2]]
    with pytest.raises(UserError, match="changes 'logit', which the recipe it extends lacks: did you mean 'logits'"):
        load_recipe(write({"extends": "radlads", "stages": {"logit": {"tokens": 1}}}))
    with pytest.raises(UserError, match=r"'stages\.logits' should be a mapping of what changes there, not 5"):
        load_recipe(write({"extends": "radlads", "stages": {"logits": 5}}))


def test_extending_with_another_mixer_drops_the_options_of_the_base(write):
    recipe = load_recipe(write({"extends": "quick", "mixer": {"name": "sliding_window", "options": {"window": 8}}}))
    assert recipe.mixer.options == {"window": 8}
    changes = {"extends": "cab", "stages": {"logits": {"objective": {"features": 2.0}}}}
    assert load_recipe(write(changes)).stages[1].objective == {"features": 2.0}  # one value, not a section
    assert load_recipe(write({"extends": "quick", "mixer": {"name": "gla"}})).mixer.options == {}


def test_a_recipe_that_extends_itself_is_refused(write):
    write({"extends": "mine.yaml"}, "other.yaml")
    with pytest.raises(UserError, match="extends itself, through mine.yaml -> other.yaml"):
        load_recipe(write({"extends": "other.yaml"}))


def stage(**changes):
    return {"stages": [{**STAGE, **changes}]}


# Invalid recipe, pattern of the error message.
MISTAKES = [
    ({"stags": []}, "unknown key 'stags'.*did you mean 'stages'"),
    (stage(tokenz=3), r"unknown key 'stages\.0\.tokenz'.*did you mean 'tokens'"),
    ({"evaluate": {"retrieval": {"task": []}}}, r"'evaluate\.retrieval\.task'.*did you mean 'tasks'"),
    ({"stages": [{"name": "align"}]}, r"lacks the key 'stages\.0\.tokens'"),
    (stage(lr="fast"), r"'stages\.0\.lr'.*should be a valid number, not 'fast'"),
    (stage(tokens="many"), r"'stages\.0\.tokens'.*integer, not 'many'"),
    (stage(tokens=0), r"'stages\.0\.tokens'.*greater than 0"),
    (stage(betas=[0.9]), r"lacks the key 'stages\.0\.betas\.1'"),
    (stage(schedule="cosin"), r"'stages\.0\.schedule'.*'cosine'.*not 'cosin'"),
    (stage(objective="logit"), r"'stages\.0\.objective'.*'logit'.*did you mean 'logits'"),
    (stage(objective={"logits": 1, "matrix": 1}), r"'stages\.0'.*'matrix' needs teacher_forced"),
    (stage(objective={}), r"'stages\.0\.objective'.*at least one"),
    (stage(objective="logits", teacher_forced=True), r"'stages\.0'.*cannot be teacher_forced with 'logits'"),
    (stage(objective="logits", gap=2), r"'stages\.0'.*gap.*'block_output'"),
    (stage(objective="labels", teacher="big"), r"'stages\.0'.*teacher, which has only logits to give, for 'labels'"),
    (stage(teacher="big", teacher_cache="folder"), r"'stages\.0'.*both a teacher and a teacher_cache"),
    (stage(teacher_cache="folder", temperature=2.0), r"'stages\.0'.*temperature 1, and another temperature"),
    (stage(trainable="lora"), r"'stages\.0'.*needs both 'lora'"),
    (stage(tokens=0), r"'stages\.0\.tokens'.*greater than 0"),
    (stage(replaced=0.5), r"all of them in the last: see 'replaced'"),
    (stage(objective={"logits": -1}), r"'stages\.0\.objective'.*positive number"),
    (stage(trainable="mixer"), r"'stages\.0\.trainable'.*'mixer', nor a glob: did you mean 'mixers'"),
    (stage(trainable=[]), r"'stages\.0\.trainable'.*all but mlp, globs"),
    (stage(lr_groups={"*mlp*": "low"}), r"'stages\.0\.lr_groups\.\*mlp\*'.*number"),
    (stage(batch=3, accumulate=2), r"'stages\.0'.*batch of 3 into accumulate = 2"),
    ({"stages": [STAGE, STAGE]}, "two stages the same name"),
    ({"stages": [STAGE, {**STAGE, "name": "b", "scope": "all-linear"}]}, "put all-linear stages first"),
    ({"stages": [3]}, r"'stages\.0'.*mapping with the keys name, objective"),
    ({"mixer": "gla"}, "'mixer'.*mapping with the keys name, options, join, join_start, alternatives, not 'gla'"),
    ({"data": {"sources": "a.txt"}}, r"'data\.sources'.*list, not 'a.txt'"),
    ({"extends": "quik"}, "unknown recipe 'quik'.*did you mean 'quick'"),
    ("stages: [", "is not valid YAML"),
    ("- quick", "should be a mapping of keys to values, not a list"),
]


@pytest.mark.parametrize(("recipe", "sentence"), MISTAKES)
def test_mistakes_are_named_in_one_sentence(recipe, sentence, write):
    with pytest.raises(UserError, match=sentence) as error:
        load_recipe(write(recipe))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("tokens", "should look like stages.0.tokens=50k"),
        ("=3", "should look like"),
        ("stages.2.tokens=1", r"no item '2' \(valid: 0, 1, align, logits\)"),
        ("stages.algin.tokens=1", r"no item 'algin' \(valid: 0, 1, align, logits\)"),
        ("stages.0.token=1", "did you mean 'tokens'"),
        ("name.first=x", "'name' is a single value and has no key 'first'"),
        ("mixr.name=gla", "did you mean 'mixer'"),
    ],
)
def test_mistyped_overrides(override, sentence):
    with pytest.raises(UserError, match=sentence):
        load_recipe("quick", [override])


def test_recipes_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="did you mean 'quick'"):
        load_recipe("quikc")
    with pytest.raises(UserError, match="nowhere.yaml' does not exist; shipped recipes are cab, "):
        load_recipe(tmp_path / "nowhere.yaml")


def test_a_recipe_that_is_not_text(tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(UserError, match="is not valid YAML"):
        load_recipe(path)


def test_empty_recipe_is_all_defaults(write):
    assert load_recipe(write("")) == Recipe(name="mine")
