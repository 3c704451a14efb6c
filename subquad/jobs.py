"""The smaller jobs beside `convert` and `select`: measure a model, let it write, write a teacher's answers down."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from subquad.data.packing import tokenizer_hash
from subquad.data.text import Corpus
from subquad.distill.cache_writer import claim_cache, write_cache
from subquad.distill.loop import make_accelerator
from subquad.distill.teacher_cache import TeacherCache
from subquad.errors import UserError
from subquad.evaluate import paired_samples
from subquad.measure import measured_rows
from subquad.model.base import plan_of
from subquad.model.output_head import check_head
from subquad.opening import open_data, open_teacher, read_data, settled
from subquad.pretrained.load import load_teacher
from subquad.recipes.load import load_recipe
from subquad.recipes.schema import Recipe
from subquad.run import Run, facts
from subquad.utils.environment import machine, source_commit, versions
from subquad.utils.files import write_json
from subquad.utils.format import nats, percent, size


def evaluate_model(
    model: str | Path,
    *,
    teacher: str | None = None,
    data: list[str] | None = None,
    tasks: list[str] | None = None,
    limit: int | None = None,
    changes: list[str] | None = None,
    json_path: str | Path | None = None,
    console: Console | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Measures a student's folder (or any causal language model) beside its teacher; returns metrics.json's rows.

    `teacher`, `data`, `tasks` and `limit` (documents a task) default to those of the recipe that made the student, of
    which `changes` (`evaluate.retrieval.count=20`) changes the rest. The model, whatever it is, is the row `student`.
    Progress is shown on `console`, if there is one. Raises UserError where anything of this is unknown.
    """
    recipe_file = Path(model) / "recipe.yaml"
    if teacher is None and not recipe_file.is_file():
        raise UserError(f"{model} does not say what its teacher is: give --teacher")
    recipe = load_recipe(recipe_file if recipe_file.is_file() else "quick", changes or [])
    given = {key: value for key, value in {"tasks": tasks, "task_limit": limit}.items() if value is not None}
    recipe.evaluate = recipe.evaluate.model_copy(update=given)
    recipe = settled(recipe, teacher or recipe.teacher, data)
    source = load_teacher(recipe.teacher, task=recipe.task, dtype=recipe.dtype)
    measured = load_teacher(str(model), task=recipe.task, dtype=recipe.dtype).model
    for one in (source.model, measured):
        check_head(one)
    corpus = read_data(recipe, source)
    plans, settings = {"teacher": plan_of(source.model), "student": plan_of(measured)}, recipe.evaluate
    metrics = measured_rows({"student": measured}, source, corpus, plans, settings, recipe.dtype, console)
    if isinstance(corpus, Corpus):
        prompts, length = settings.prompts, settings.max_new_tokens
        metrics["samples"] = paired_samples(source.model, measured, source.tokenizer, prompts, length)
    metrics |= {"teacher_name": source.name, "teacher_fingerprint": source.fingerprint, "versions": versions()}
    metrics |= {"machine": machine(measured.device), "command": command, "commit": source_commit()}
    if json_path is not None:
        write_json(Path(json_path), metrics)
    return dict(json.loads(json.dumps(metrics)))


def generate(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> str:
    """The model's continuation of `prompt` (or, with `chat`, its answer), greedy at temperature 0."""
    loaded = load_teacher(str(model))
    lm, tokenizer = loaded.model, loaded.tokenizer
    if chat:
        if tokenizer.chat_template is None:
            raise UserError(f"{model} has no chat template: leave out --chat")
        messages = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(lm.device)
    torch.manual_seed(seed)
    how = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    tokens = cast(Any, lm).generate(  # of GenerationMixin, which transformers' types hide
        input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], max_new_tokens=max_new_tokens, **how
    )
    return str(tokenizer.decode(tokens[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))


def cache_teacher(
    teacher: str = "default",
    recipe: Recipe | str | Path = "quick",
    out: str | Path = "teacher-cache",
    *,
    data: list[str] | None = None,
    tokens: int | None = None,
    sequence_length: int | None = None,
    top_k: int = 64,
    batch: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    command: str | None = None,
) -> TeacherCache:
    """Writes the teacher's `top_k` likeliest next tokens on the text of `convert` into the folder `out`.

    `tokens`, `sequence_length` and `batch` (rows at a time) default to those of the recipe's first stage on logits.
    `resume`: go on with an interrupted cache in `out`; `overwrite`: delete an earlier one first. Raises UserError for
    anything wrong with what was given.
    """
    recipe = settled(recipe, teacher, data)
    out = Path(out)
    stage = next((stage for stage in recipe.stages if "logits" in stage.weights), None)
    if stage is not None:
        tokens, sequence_length = tokens or stage.tokens, sequence_length or stage.sequence_length
        batch = batch or stage.batch // stage.accumulate
    if tokens is None or sequence_length is None:
        raise UserError(f"the recipe '{recipe.name}' has no stage on logits: give --tokens and --sequence-length")
    run = Run(recipe, out, make_accelerator(out), Console(), resume)
    if run.accelerator.num_processes > 1:
        raise UserError("the teacher's cache is written by one process: start the command without accelerate launch")
    claim_cache(out, resume=resume, overwrite=overwrite)  # now, for what follows takes a while
    source = open_teacher(run, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    corpus = open_data(run, source)
    if not isinstance(corpus, Corpus):
        raise UserError(f"only a language model's answers can be written down, and the recipe is for {recipe.task}")
    run.say(f"teacher: {source.name}; {corpus.amount}")
    if len(corpus.train) < tokens:
        run.say(f"the text is shorter than the {tokens:,} tokens that were asked for: all of it is cached")
    about = facts(run, command)
    write_cache(
        out,
        source,
        corpus,
        tokens=tokens,
        sequence_length=sequence_length,
        top_k=top_k,
        batch=batch or 1,
        resume=resume,
        console=run.console,
        about={key: about[key] for key in ("versions", "machine", "command", "commit")},
    )
    cache = TeacherCache.open(
        out, teacher_fingerprint=source.fingerprint, tokenizer_hash=tokenizer_hash(source.tokenizer)
    )
    meta = cache.meta
    run.say(
        f"{out}: {cache.tokens:,} tokens at {meta['bytes_per_token']:,.0f} bytes, "
        f"{size(meta['bytes_per_token'] * cache.tokens)} in all; the top {top_k} keep {percent(meta['mass_kept'])} of "
        f"the mass and lose {nats(meta['kl_lost'])} nats/token; {meta['tokens_per_second']:,.0f} tokens/s"
    )
    return cache
