"""What tests lend each other: tiny random teachers of many families, texts, recipes, and how students are trained."""

import gzip
import json
import string
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTImageProcessorPil,
)

from subquad.data.probes import WORDS, Probe, make_probe
from subquad.distill.loop import StageInputs, run_stage
from subquad.model.base import plan_of
from subquad.model.image_student import ImageStudent
from subquad.model.interface import shapes_of
from subquad.model.student import Student
from subquad.plan import Plan
from subquad.recipes.load import load_recipe
from subquad.recipes.schema import Recipe
from subquad.recipes.stage import Stage

SIZE = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 256}
WIDTH = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 6}
GROUPED = {**SIZE, **WIDTH, "num_key_value_heads": 2}

# family -> its configuration; head_dim is 8 everywhere
FAMILIES = {
    "llama": {**GROUPED, "tie_word_embeddings": True},
    "qwen3": {**GROUPED, "head_dim": 8},
    "gpt_neox": {**SIZE, **WIDTH},
    "gpt2": {
        **{key: value for key, value in SIZE.items() if key != "max_position_embeddings"},
        **{"n_positions": 256, "n_embd": 48, "n_layer": 3, "n_head": 6},
    },
    "phi3": {**GROUPED, "sliding_window": None},
    "olmo2": GROUPED,
    "gemma2": {**GROUPED, "head_dim": 8, "sliding_window": 24},
    "mistral": {**GROUPED, "sliding_window": 24},
}


def tiny(family: str, dtype: torch.dtype = torch.float32, **changes) -> PreTrainedModel:
    """A random teacher with three layers of six heads."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    config.use_cache = True
    # Weights of standard deviation 0.2 make attention sharp enough that a wrong mask or state shows in the logits.
    config.initializer_range = 0.2
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def make_teacher(folder):
    """A tiny Llama with a tokenizer of words w0 ... w92."""
    tiny("llama").save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(93))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return str(folder)


def make_text(folder):
    """Sixty documents of random words."""
    torch.manual_seed(0)
    for document in range(60):
        words = " ".join(f"w{int(i)}" for i in torch.randint(0, 93, (120,)))
        (folder / f"{document}.txt").write_text(words, encoding="utf-8")
    return [str(folder)]


WINDOW = {"window": 6, "sinks": 2}


STEPS, BATCH, T = 6, 4, 16


ALIGN = dict(
    name="align", objective="mixer_output", tokens=STEPS * BATCH * T, sequence_length=T, batch=BATCH, lr=1e-2,
    checkpoint_every=2,
)  # fmt: skip


LOGITS = {**ALIGN, "name": "logits", "objective": {"logits": 1.0, "labels": 0.1}, "trainable": "all", "lr": 1e-3}


class RandomText:
    """Token ids that depend on (seed, step) alone."""

    def batch(self, step, *, batch, sequence_length, seed):
        generator = torch.Generator().manual_seed(seed * 1000 + step)
        return torch.randint(3, 97, (batch, sequence_length), generator=generator)


def make_student(teacher, attention_layers=(1,), mixer="hedgehog"):
    shapes = shapes_of(teacher)
    options = WINDOW if mixer in ("hedgehog", "sliding_window") else {}
    torch.manual_seed(1)
    student = Student.from_teacher(teacher, Plan.by_layer(shapes, attention_layers, mixer, options))
    student.calibrate(torch.randint(3, 97, (2, 32)))
    return student


def train(out, settings=ALIGN, *, teacher=None, student=None, corpus=None, seed=0, index=0, accelerator=None, **more):
    """One stage on a tiny Llama: (student, result)."""
    teacher = teacher if teacher is not None else tiny("llama")
    student = student if student is not None else make_student(teacher)
    stage = Stage(**settings)
    inputs = StageInputs(teacher, corpus or RandomText(), accelerator or Accelerator(cpu=True), index, seed)
    result = run_stage(stage, inputs, student=student, out=Path(out), **more)
    return student, result


def lines(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def weights(student):
    return {name: tensor.clone() for name, tensor in student.state_dict().items()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


STAGE = {"sequence_length": 32, "batch": 2, "lr": 1e-2, "checkpoint_every": 1000}


RECIPE = {
    "name": "tiny",
    "mixer": {"name": "hedgehog", "options": {"window": 8, "sinks": 1}},
    "selector": {"by": "kl", "budget": "1", "tokens": 64, "sequence_length": 32},
    "stages": [
        {"name": "align", "objective": "mixer_output", "scope": "all-linear", "tokens": 512, **STAGE},
        {"name": "logits", "objective": "logits", "tokens": 256, **STAGE},
    ],
    "evaluate": {
        "contexts": [16, 48],
        "rows": 2,
        "retrieval": {"tasks": ["copy"], "contexts": [32], "count": 2},
        "cache_contexts": [64, 1024],
        "prompts": ["a b c"],
        "max_new_tokens": 4,
    },
}


def shortened(name):
    """A shipped recipe with its own stages, mixer and selector, in a few steps of a few tokens."""
    recipe = load_recipe(name)
    for stage in recipe.stages:
        stage.tokens, stage.sequence_length, stage.batch = 4 * 32, 32, 2
        stage.accumulate = min(stage.accumulate, 2)
    recipe.selector.tokens, recipe.selector.sequence_length = 64, 32
    if recipe.selector.by == "fixed":
        recipe.selector.options = {"layers": [1, 2]}
    if recipe.selector.by == "retrieval-heads":
        recipe.selector.options = {"tasks": ["copy"], "context": 32, "rows": 2}
    if recipe.selector.by == "greedy":
        recipe.selector.unit, recipe.selector.options = None, {"task": "copy", "context": 32, "limit": 2}
    if "retrain_tokens" in recipe.selector.options:
        recipe.selector.options = {"retrain_tokens": 64}
    if recipe.selector.budget == "4":  # of 24 layers or more, and the tiny teacher has three
        recipe.selector.budget = "1"
    if "feature_dim" in recipe.mixer.options:
        recipe.mixer.options["feature_dim"] = 4
    if recipe.mixer.options.get("window", 0) >= 48:  # the length of the text, all of which it would see
        recipe.mixer.options["window"] = 16
    recipe.data.max_tokens = None
    recipe.evaluate = Recipe(**RECIPE).evaluate
    return recipe


IMAGE_SIZE = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


# family -> (its own configuration, tokens that are no patches)
ENCODERS = {
    "vit": ({}, 1),
    "deit": ({}, 2),
    "dinov2": ({}, 1),
    "dinov2_with_registers": ({"num_register_tokens": 4}, 5),
    "siglip_vision_model": ({}, 0),
    "dinov3_vit": ({"num_register_tokens": 2}, 3),
}


def encoder(family, auto=AutoModel, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**IMAGE_SIZE, **ENCODERS[family][0], **changes})
    config.initializer_range = 0.2
    if family == "deit":  # has two classifiers
        config.architectures = ["DeiTForImageClassification"]
    return auto.from_config(config).eval().requires_grad_(False)


def mixed_plan(teacher, mixer="gated_deltanet", **options):
    """One layer replaced, one head-level hybrid, one that keeps attention."""
    shapes = shapes_of(teacher)
    heads = [*((1, head) for head in (0, 2, 3)), *((2, head) for head in range(6))]
    return Plan.by_head(shapes, heads, mixer, {"bidirectional": True, **options})


def hidden(model, pixels, **how):
    return model(pixels, **how).last_hidden_state


def write_idx(file, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    file.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def write_pictures(folder):
    """Idx files: images of noise around the brightness of their class."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 20)):
        labels = np.arange(count) % 4
        pixels = rng.integers(0, 60, (count, 32, 32)) + 60 * labels[:, None, None]
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", pixels)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    return str(folder)


def converted_classifier(folder):
    """A student of images in this folder."""
    teacher = encoder("vit", AutoModelForImageClassification, num_labels=4)
    plan = Plan.by_layer(plan_of(teacher).shapes, [1], "discrete_mamba2", {"bidirectional": True})
    saved(folder, ImageStudent.from_teacher(teacher, plan))


def saved(folder, model):
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


TEXT = [
    "Memorize the following dictionary: The value of the key is. The pass key is 12 34 56. Remember it.",
    "There is important information hidden in a lot of irrelevant text. Find it and memorize it. What is the pass key?",
    " ".join(WORDS),
]


ALPHABET = string.ascii_letters + string.digits + ":='.,?$\n"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: a space of its own before every number."""
    return _byte_level(merges=0, digits=False)


def _byte_level(merges: int, digits: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    splits = [pre_tokenizers.Digits(individual_digits=True), byte_level] if digits else [byte_level]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=258 + merges, special_tokens=["<bos>", "<eos>"], initial_alphabet=byte_level.alphabet()
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


SALES = "".join(
    f"Near the {WORDS[i]} the old {WORDS[-i]} was then sold for ${7000 + 13 * i}. It is said no {WORDS[i]} was left.\n"
    for i in range(1, 60)
)


def sales(tokenizer) -> torch.Tensor:
    """A text to ask about, and a separator in it."""
    return torch.tensor([tokenizer.eos_token_id, *tokenizer(SALES, add_special_tokens=False)["input_ids"]])


def task_probe(name: str, tokenizer, context: int, count: int, seed: int = 0) -> Probe:
    """`make_probe`, with a text for the one task that cannot do without."""
    haystack_ids = sales(tokenizer) if name == "questions" else None
    return make_probe(name, tokenizer, context, count, seed=seed, haystack_ids=haystack_ids)
