"""The main job: a teacher in, a measured student out.

`convert` reads top to bottom as what happens: load, align an all-linear student, select the layers that keep attention,
distill the chosen plan, measure it beside its baselines, save. Everything it needs later it finds in the run's folder,
so that an interrupted run goes on where it stopped.
"""

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate import Accelerator
from rich.console import Console
from rich.progress import Progress

import subquad
from subquad.attention import find_attention
from subquad.data.retrieval import Probe, make_probe
from subquad.data.text import Corpus, load_corpus
from subquad.distill.ledger import StageResult
from subquad.distill.loop import make_accelerator, run_stage
from subquad.errors import UserError
from subquad.evaluate import cache_table, likelihood, peak_rss_bytes, retrieval, samples
from subquad.mixers import mixer_options
from subquad.mixers.sliding_window import WindowOptions
from subquad.plan import ATTENTION, ITEMSIZE, Plan
from subquad.recipe import EvaluateConfig, Recipe, load_recipe
from subquad.report import print_table, write_model_card, write_report
from subquad.select import SELECTORS, Budget, Choice, check_selector, choose_plan, uniform_layers
from subquad.student import Student
from subquad.teacher import Teacher, load_teacher, load_tokenizer

CALIBRATION_TOKENS = 1024


@dataclass
class Run:
    """A conversion under way: its folder, its settings, and the seconds of each part."""

    recipe: Recipe
    out: Path
    accelerator: Accelerator
    console: Console
    resume: bool
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - start

    def write(self, name: str, text: str) -> None:
        """Writes a file of the run: aside first, then renamed."""
        if self.main:
            aside = self.out / f"{name}.tmp"
            aside.write_text(text, encoding="utf-8")
            os.replace(aside, self.out / name)


def convert(
    teacher: str = "default",
    recipe: Recipe | str | Path = "quick",
    out: str | Path = "runs/quick",
    *,
    plan: str | Path | None = None,
    data: list[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    layers: int | None = None,
    command: str | None = None,
) -> Student:
    """Converts `teacher` by `recipe` into the folder `out`, and returns the student.

    `plan`: a plan file to use instead of selecting. `data`: text instead of the recipe's. `resume`: go on with an
    interrupted run in `out`; `overwrite`: delete an earlier run there first. `layers`: cut the teacher to its first
    layers (for trials).
    Leaves the model, plan.yaml, scores.json, metrics.json, log.jsonl, report.html and README.md in `out`.
    Raises UserError for anything wrong with what was given.
    """
    started = time.perf_counter()
    recipe = _settled(recipe, teacher, data)
    given_plan = None if plan is None else Plan.load(plan)
    run = _start(recipe, Path(out), resume=resume, overwrite=overwrite)
    with run.timed("load"):
        source = load_teacher(
            teacher,
            dtype=recipe.dtype,
            device=str(run.accelerator.device),
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            layers=layers,
        )
    with run.timed("data"):
        corpus = _corpus(run, source)
    run.console.print(f"teacher: {source.name}; text: {len(corpus.train):,} tokens to train on")

    linear = _all_linear(run, source, corpus)
    results = _train(run, linear, source, corpus, scope="all-linear")
    if given_plan is None:
        chosen, scores = _select(run, linear, source, corpus)
    else:
        chosen, scores = given_plan, None
        if run.main:
            chosen.save(run.out / "plan.yaml")
    run.console.print(f"plan: {chosen.pattern()}")

    student = _student(source, chosen, corpus, mixers_from=linear)
    results += _train(run, student, source, corpus, scope="plan")

    if run.main:
        metrics = _measure(run, source, corpus, student, linear)
        student.save_pretrained(run.out)
        source.tokenizer.save_pretrained(run.out)
        metrics |= _ledger(run, source, results, scores, command, time.perf_counter() - started)
        run.write("metrics.json", json.dumps(metrics, indent=1))
        write_report(run.out)
        write_model_card(run.out)
        print_table(metrics, run.console)
        run.console.print(f"model, report.html and metrics.json are in {run.out}")
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    return student


def select(
    teacher: str = "default",
    recipe: Recipe | str | Path = "quick",
    out: str | Path = "plan.yaml",
    *,
    data: list[str] | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    command: str | None = None,
) -> Plan:
    """Aligns an all-linear student, chooses the layers that keep attention, and writes the plan to the file `out`.

    scores.json is written beside it. Raises UserError for anything wrong with what was given, or when `out` exists.
    """
    recipe = _settled(recipe, teacher, data)
    out = Path(out)
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists; give --overwrite to replace it")
    work = out.parent / f"{out.stem}.work"
    run = _start(recipe, work, resume=False, overwrite=True)
    source = load_teacher(
        teacher,
        dtype=recipe.dtype,
        device=str(run.accelerator.device),
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    corpus = _corpus(run, source)
    linear = _all_linear(run, source, corpus)
    if recipe.selector.by != "uniform":
        _train(run, linear, source, corpus, scope="all-linear")
    plan, _ = _select(run, linear, source, corpus)
    run.accelerator.end_training()
    if run.main:
        os.replace(work / "scores.json", out.parent / "scores.json")
        os.replace(work / "plan.yaml", out)
        shutil.rmtree(work)
        run.console.print(f"{plan.pattern()}\n{out} and {out.parent / 'scores.json'} written")
    return plan


def evaluate_model(
    model: str | Path,
    *,
    teacher: str | None = None,
    data: list[str] | None = None,
    json_path: str | Path | None = None,
) -> dict[str, Any]:
    """Measures a student's folder (or any causal language model) beside its teacher; metrics are as in metrics.json.

    `teacher` and `data` default to those of the recipe that made the student. Raises UserError where these are unknown.
    """
    folder = Path(model)
    recipe_file = folder / "recipe.yaml"
    recipe = load_recipe(recipe_file) if recipe_file.is_file() else load_recipe("quick")
    if teacher is None and not recipe_file.is_file():
        raise UserError(f"{model} does not say what its teacher is: give --teacher")
    source = load_teacher(teacher or recipe.teacher, dtype=recipe.dtype)
    student, _ = _load_any(str(model), recipe.dtype)
    corpus = load_corpus(
        data or recipe.data.sources,
        source.tokenizer,
        max_tokens=recipe.data.max_tokens,
        heldout_fraction=recipe.data.heldout_fraction,
    )
    rows, probes = _questions(recipe.evaluate, source, corpus)
    name = "student" if isinstance(student, Student) else "model"
    measured = likelihood({name: student}, source.model, rows, recipe.evaluate.contexts)
    metrics: dict[str, Any] = {}
    for key, one in (("teacher", source.model), (name, student)):
        plan = one.plan if isinstance(one, Student) else Plan.all_attention(_shapes(one))
        metrics[key] = _row(measured[key], retrieval(one, probes), plan, recipe)
    metrics["teacher_name"] = source.name
    if json_path is not None:
        Path(json_path).write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    return json.loads(json.dumps(metrics))


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
    lm, tokenizer = _load_any(str(model), "float32")
    if chat:
        if tokenizer.chat_template is None:
            raise UserError(f"{model} has no chat template: leave out --chat")
        messages = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    torch.manual_seed(seed)
    how = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    tokens = lm.generate(
        input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], max_new_tokens=max_new_tokens, **how
    )
    return str(tokenizer.decode(tokens[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))


# Starting ------------------------------------------------------------------------------------------------------------


def _settled(recipe: Recipe | str | Path, teacher: str, data: list[str] | None) -> Recipe:
    """The recipe with what was given beside it written in, and what only selectors and mixers can check, checked."""
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    recipe = recipe.model_copy(update={"teacher": teacher})
    if data:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": data})})
    mixer_options(recipe.mixer.name, recipe.mixer.options)
    if recipe.mixer.name == ATTENTION:
        raise UserError("the recipe's mixer is attention itself, so there is nothing to convert: choose another mixer")
    check_selector(recipe.selector.by, recipe.selector.options)
    Budget.parse(recipe.selector.budget)
    return recipe


def _start(recipe: Recipe, out: Path, *, resume: bool, overwrite: bool) -> Run:
    """The run's folder, made ready: new, emptied of an earlier run, or to be resumed with the same recipe."""
    accelerator = Accelerator()  # who we are, before anything is written
    before = out / "recipe.yaml"
    if accelerator.is_main_process:
        if out.exists() and not out.is_dir():
            raise UserError(f"{out} is a file; give another folder with --out")
        is_run = before.is_file()
        if out.exists() and any(out.iterdir()) and not is_run:
            raise UserError(f"{out} holds something other than a run of Subquad; give another folder with --out")
        if is_run and not (resume or overwrite):
            raise UserError(f"{out} holds an earlier run; go on with it by --resume, or replace it by --overwrite")
        if is_run and resume and before.read_text(encoding="utf-8") != recipe.to_yaml():
            raise UserError(f"{out} was started with other settings (see {before}); resume with the same command")
        if overwrite and out.exists():
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        before.write_text(recipe.to_yaml(), encoding="utf-8")
    accelerator.wait_for_everyone()
    precision: Literal["no", "bf16"] = (
        "bf16" if recipe.dtype == "bfloat16" and accelerator.device.type == "cuda" else "no"
    )
    console = Console(quiet=not accelerator.is_main_process)
    return Run(recipe, out, make_accelerator(out, precision), console, resume)


def _corpus(run: Run, source: Teacher) -> Corpus:
    data = run.recipe.data
    with run.accelerator.main_process_first():
        return load_corpus(
            data.sources, source.tokenizer, max_tokens=data.max_tokens, heldout_fraction=data.heldout_fraction
        )


def _shapes(model: Any) -> list[Any]:
    return [site.shape for site in find_attention(model)]


def _student(source: Teacher, plan: Plan, corpus: Corpus, mixers_from: Student | None = None) -> Student:
    """A student with this plan, calibrated, or with the mixers of another one where these fit."""
    torch.manual_seed(0)  # new weights that are random at all are gates' inner projections
    student = Student.from_teacher(source.model, plan, mixers_from=mixers_from)
    if mixers_from is None:
        student.calibrate(corpus.batch(0, batch=1, sequence_length=_calibration(corpus), seed=0).to(student.device))
    return student


def _calibration(corpus: Corpus) -> int:
    return min(CALIBRATION_TOKENS, len(corpus.train))


def _all_linear(run: Run, source: Teacher, corpus: Corpus) -> Student:
    mixer = run.recipe.mixer
    with run.timed("calibrate"):
        return _student(source, Plan.by_layer(_shapes(source.model), [], mixer.name, mixer.options), corpus)


# Working -------------------------------------------------------------------------------------------------------------


def _train(run: Run, student: Student, source: Teacher, corpus: Corpus, scope: str) -> list[StageResult]:
    """The stages of one scope, in order."""
    results = []
    for index, stage in enumerate(run.recipe.stages):
        if stage.scope == scope:
            with run.timed(stage.name):
                results.append(
                    run_stage(
                        stage,
                        index=index,
                        student=student,
                        teacher_model=source.model,
                        corpus=corpus,
                        seed=run.recipe.seed,
                        out=run.out,
                        accelerator=run.accelerator,
                        progress=run.console if run.main else None,
                        resume=run.resume,
                    )
                )
    return results


def _select(run: Run, linear: Student, source: Teacher, corpus: Corpus) -> tuple[Plan, dict[str, Any]]:
    """The plan and scores.json: read, when an interrupted run had got as far, else measured and written."""
    plan_file, scores_file = run.out / "plan.yaml", run.out / "scores.json"
    if run.resume and plan_file.is_file() and scores_file.is_file():
        return Plan.load(plan_file), json.loads(scores_file.read_text(encoding="utf-8"))
    selector = run.recipe.selector
    rows = max(1, selector.tokens // selector.sequence_length)
    tokens_BT = corpus.heldout_batch(rows, selector.sequence_length, part="selection")
    with run.timed("select"), Progress(console=run.console, transient=True) as bar:
        task = bar.add_task(f"select by {selector.by}", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        choice: Choice = SELECTORS[selector.by](
            linear, teacher=source.model, tokens_BT=tokens_BT, progress=progress, **selector.options
        )
    plan, kept = choose_plan(linear, Budget.parse(selector.budget), choice)
    scores = choice.report | {
        "by": selector.by,
        "unit": "layer",
        "mixer": run.recipe.mixer.name,
        "budget": selector.budget,
        "chosen": kept,
        "seed": run.recipe.seed,
    }
    run.write("scores.json", json.dumps(scores, indent=1))
    if run.main:
        plan.save(plan_file)
    run.accelerator.wait_for_everyone()
    return plan, scores


# Measuring -----------------------------------------------------------------------------------------------------------


def _measure(run: Run, source: Teacher, corpus: Corpus, student: Student, linear: Student) -> dict[str, Any]:
    """metrics.json's rows: the teacher, the student, and the baselines of the same budget or cache."""
    recipe, plan = run.recipe, student.plan
    start = time.perf_counter()
    models: dict[str, Student] = {"student": student}
    models["aligned"] = _student(source, plan, corpus, mixers_from=linear)
    even = Plan.by_layer(
        plan.shapes,
        uniform_layers(plan.num_layers, len(plan.attention_layers)),
        recipe.mixer.name,
        recipe.mixer.options,
    )
    models["uniform"] = _student(source, even, corpus, mixers_from=linear)
    models["untrained"] = _student(source, plan, corpus)
    models["window"] = _student(source, window_plan(plan, recipe.dtype), corpus)
    rows, probes = _questions(recipe.evaluate, source, corpus)
    run.console.print(f"measuring {len(models) + 1} models on {rows.numel():,} held-out tokens and retrieval ...")
    measured = likelihood(models, source.model, rows, recipe.evaluate.contexts)
    everyone = {"teacher": source.model, **models}
    plans = {"teacher": Plan.all_attention(plan.shapes)} | {name: model.plan for name, model in models.items()}
    metrics: dict[str, Any] = {
        name: _row(measured[name], retrieval(model, probes), plans[name], recipe) for name, model in everyone.items()
    }
    texts = {
        name: samples(everyone[name], source.tokenizer, recipe.evaluate.prompts, recipe.evaluate.max_new_tokens)
        for name in ("teacher", "student")
    }
    metrics["samples"] = [
        {"prompt": mine["prompt"], "teacher": theirs["text"], "student": mine["text"]}
        for mine, theirs in zip(texts["student"], texts["teacher"], strict=True)
    ]
    metrics["verdicts"] = verdicts(metrics, max(recipe.evaluate.contexts))
    run.seconds["evaluate"] = time.perf_counter() - start
    return metrics


def _questions(
    config: EvaluateConfig, source: Teacher, corpus: Corpus
) -> tuple[torch.Tensor, dict[str, dict[int, Probe]]]:
    """The held-out rows, and the retrieval probes in text of the same kind."""
    longest = max(config.contexts)
    rows = corpus.heldout_batch(config.rows, longest)
    probes: dict[str, dict[int, Probe]] = {
        task: {
            context: make_probe(task, source.tokenizer, context, config.retrieval.count, haystack_ids=rows.flatten())
            for context in config.retrieval.contexts
        }
        for task in config.retrieval.tasks
    }
    return rows, probes


def _row(measured: Any, retrieved: Any, plan: Plan, recipe: Recipe) -> dict[str, Any]:
    return {
        **measured,
        "retrieval": retrieved,
        "cache_bytes": cache_table(plan, recipe.evaluate.cache_contexts, recipe.dtype),
        "attention_layers": plan.attention_layers,
        "plan_pattern": plan.pattern(),
    }


def window_plan(plan: Plan, dtype: str) -> Plan:
    """The training-free rival: sliding windows with sinks for the plan's mixers, at its cache bytes or just under."""
    sinks = WindowOptions().sinks
    per_token = sum(
        2 * group.states(share=True) * group.head_dim * ITEMSIZE[dtype]
        for layer in range(plan.num_layers)
        for name, group in plan.groups(layer).items()
        if name != ATTENTION
    )
    if per_token == 0:
        return plan
    window = max(1, plan.cache_bytes(0, dtype=dtype) // per_token - sinks + 1)
    layers = []
    for layer in plan.layers:
        replaced = sorted(head for name, heads in layer.items() if name != ATTENTION for head in heads)
        kept = {ATTENTION: layer[ATTENTION]} if ATTENTION in layer else {}
        layers.append(kept | ({"sliding_window": replaced} if replaced else {}))
    mixers: dict[str, dict[str, Any]] = {ATTENTION: {}, "sliding_window": {"window": window, "sinks": sinks}}
    return Plan(shapes=plan.shapes, mixers=mixers, layers=layers)


def verdicts(metrics: dict[str, Any], context: int) -> list[str]:
    """In words, whether the student beats each baseline in held-out KL at `context` tokens, with the two values."""
    said = []
    for better, worse, what in (
        ("aligned", "uniform", "the selected plan against the uniform one, both aligned"),
        ("student", "untrained", "training against none"),
        ("student", "window", "the student against a training-free window of the same cache bytes"),
    ):
        mine, theirs = metrics[better]["kl"][context], metrics[worse]["kl"][context]
        word = "won" if mine < theirs else "LOST" if mine > theirs else "tied"
        said.append(f"{what}: {word}, KL {mine:.4f} against {theirs:.4f} nats at {context} tokens")
    return said


def _ledger(
    run: Run,
    source: Teacher,
    results: list[StageResult],
    scores: dict[str, Any] | None,
    command: str | None,
    total: float,
) -> dict[str, Any]:
    """What the run was and what it cost."""
    run.seconds["total"] = total
    chosen = scores or {}
    return {
        "stages": [result.as_dict() for result in results],
        "selection": {key: chosen.get(key) for key in ("by", "budget", "tokens", "seconds")},
        "seconds": run.seconds,
        "tokens": {result.name: result.tokens for result in results},
        "tokens_per_second": {result.name: result.tokens_per_second for result in results},
        "peak_rss_bytes": peak_rss_bytes(),
        "seed": run.recipe.seed,
        "versions": {
            "subquad": subquad.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": _device_name(run.accelerator.device),
            "processes": run.accelerator.num_processes,
        },
        "command": command,
        "commit": _commit(),
        "teacher_name": source.name,
        "teacher_fingerprint": source.fingerprint,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _commit() -> str | None:
    """The commit of the source tree, if Subquad runs from one."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def _load_any(model: str, dtype: str) -> tuple[Any, Any]:
    """A student's folder, or any causal language model that `load_teacher` takes; with its tokenizer."""
    folder = Path(model)
    config = folder / "config.json"
    if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("model_type") == "subquad":
        return Student.from_pretrained(folder, dtype=dtype).eval(), load_tokenizer(folder)
    loaded = load_teacher(model, dtype=dtype)
    return loaded.model, loaded.tokenizer
