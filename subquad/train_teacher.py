"""A small teacher for experiments, trained from nothing until it copies and looks up perfectly.

A pretrained model is too slow for a test, and a random one has nothing to lose. This one is a Llama of 4 layers, small
enough for a thread of a CPU. The goal is that it reads plain text and answers the retrieval probes without a fault, so
that whatever a conversion takes from it shows; no run has reached it yet, and each says what it did reach.

Notable:
- The contexts of `LADDER` are trained one after the other, in rounds. A round is a stage of the one training loop
  (distill/loop.py), with checkpoints and a learning rate that comes down; after it the probes of this context and the
  shorter ones are measured, and when all are answered the next context begins.
- A quarter of the rows is text, the others are the probes of data/retrieval.py, with seeds of their own, packed whole
  or several to a row. A dictionary is asked many questions: one answer among hundreds of tokens teaches slowly.
- The tokenizer is trained on the default text and on the words of the probes, a mix like what the model will read.

Shapes: B rows, T tokens, N problems of C tokens.
"""

import json
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import ModelCardData
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from subquad.attention import find_attention
from subquad.data.corpora import default_sources
from subquad.data.packing import document_separator
from subquad.data.retrieval import TASKS, WORDS, Probe, make_probe
from subquad.data.sources import clean, open_source
from subquad.data.text import Corpus, load_corpus
from subquad.distill.ledger import StageResult
from subquad.distill.loop import run_stage
from subquad.errors import UserError
from subquad.evaluate import likelihood, retrieval
from subquad.evaluate.retrieval import Score
from subquad.plan import Plan
from subquad.recipe import DataConfig, Recipe
from subquad.run import Run, facts, start_run
from subquad.stage import Stage, count_of
from subquad.student import Student

SEPARATOR = "<|endoftext|>"
VOCABULARY = 1024
TOKENIZER_CHARACTERS = 1_000_000  # of each source that the tokenizer learns from
WORDS_REPEATED = 1000  # times that the probes' words stand in that text: each becomes one token
CONTEXT = 1024
LAYERS = range(4, 9)

LADDER = {64: 0.25, 128: 0.5, 256: 0.75, 512: 1.0}  # context -> share of the token budget spent when it ends
BATCH_TOKENS = 2048
ROUND_TOKENS = 300_000
NEEDED = {"copy": 0.99, "dictionary": 0.98, "passkey": 0.98}  # accuracy
HEADS = 8
SHORTEST = {"copy": 16, "dictionary": 64, "passkey": 128}  # tokens of a problem
TRAINING_SEEDS = 10**9  # probes are trained on seeds from here on, and measured on seeds below
REPEATED = 0.75  # of the copying rows repeat a sequence more than twice
PROBE_ROWS = 64
HELDOUT_ROWS = 32

Scores = dict[str, dict[int, Score]]


def train_teacher(
    out: str | Path,
    *,
    layers: int = 4,
    tokens: int | str = "20M",
    seed: int = 0,
    data: list[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Trains a teacher of `layers` layers on at most about `tokens` tokens into the folder `out`; returns its metrics.

    `data`: text instead of the default corpora. `resume`: go on with an interrupted run in `out`; `overwrite`: delete
    an earlier run there first. Leaves the model, its tokenizer, README.md, metrics.json, log.jsonl and checkpoints.
    Raises UserError for anything wrong with what was given.
    """
    started = time.perf_counter()
    recipe = _recipe(Path(out), layers, tokens, seed, data)
    run = start_run(recipe, Path(out), resume=resume, overwrite=overwrite)
    with run.timed("data"):
        tokenizer = train_tokenizer(data)
        corpus = load_corpus(data, tokenizer)
    torch.manual_seed(seed)
    fresh = new_model(tokenizer, layers).to(run.accelerator.device)
    student = Student.from_teacher(fresh, Plan.all_attention([site.shape for site in find_attention(fresh)]))
    run.say(f"{fresh.num_parameters():,} weights, {len(corpus.train):,} tokens of text")

    rounds, scores = _climb(run, student, fresh, Lessons(corpus, tokenizer))

    if run.main:
        model = new_model(tokenizer, layers)
        model.load_state_dict(student.backbone.state_dict())
        metrics = _measured(model, corpus, rounds, scores)
        metrics["seconds"] = sum(result.seconds for result in rounds)
        metrics["total_seconds"] = time.perf_counter() - started
        metrics |= {"layers": layers, "budget": count_of(tokens, "--tokens")} | facts(run, command)
        with run.writing() as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        run.write("metrics.json", json.dumps(metrics, indent=1))
        run.write("README.md", model_card(metrics, corpus))
        run.say(summary(metrics))
    run.end()
    return metrics


# Settings ------------------------------------------------------------------------------------------------------------


def _recipe(out: Path, layers: int, tokens: int | str, seed: int, data: list[str] | None) -> Recipe:
    """The settings of the run, in the file by which `start_run` knows it again; its teacher is what it will make."""
    if layers not in LAYERS:
        raise UserError(f"a small teacher has {LAYERS[0]} to {LAYERS[-1]} layers, not {layers}: change --layers")
    budget = count_of(tokens, "--tokens")
    stages = [
        Stage(
            name=f"context-{context}",
            objective="labels",
            trainable="all",
            tokens=max(1, round(share * budget)),
            sequence_length=context,
            batch=BATCH_TOKENS // context,
            lr=1e-3,
            betas=(0.9, 0.99),
            schedule="wsd",
            warmup=50,
            weight_decay=0.01,
            log_every=20,
            checkpoint_every=200,
        )
        for context, share in LADDER.items()
    ]
    description = f"a small teacher of {layers} layers, trained from nothing on at most {budget} tokens"
    return Recipe(
        name="small-teacher",
        description=description,
        teacher=str(out),
        seed=seed,
        data=DataConfig(sources=data),
        stages=stages,
    )


# The model and its tokenizer -----------------------------------------------------------------------------------------


def train_tokenizer(data: list[str] | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` tokens with single digits; `<|endoftext|>` is its only special token."""
    tokenizer = Tokenizer(models.BPE())
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[SEPARATOR],
        initial_alphabet=bytes_only.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_texts(data), trainer)
    roles = dict.fromkeys(("bos_token", "eos_token", "pad_token"), SEPARATOR)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT, **roles)


def _tokenizer_texts(data: list[str] | None) -> Iterator[str]:
    for source in default_sources() if data is None else map(open_source, data):
        room = TOKENIZER_CHARACTERS
        for document in source.documents():
            if room <= 0:
                break
            if not document.test:
                yield (text := clean(document.text))
                room -= len(text)
    yield from ["\n".join(WORDS)] * WORDS_REPEATED


def new_model(tokenizer: PreTrainedTokenizerFast, layers: int) -> LlamaForCausalLM:
    """A random Llama with 8 heads of 32 in each layer, all with keys and values of their own."""
    separator = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=separator,
        eos_token_id=separator,
        pad_token_id=separator,
    )
    model = LlamaForCausalLM(config)
    _initialise(model)
    return model


@torch.no_grad()
def _initialise(model: LlamaForCausalLM) -> None:
    """Mimetic initialisation (arXiv 2305.09828): random, but as trained attention is: queries and keys begin alike, and
    what a head writes begins as the transpose of what it reads."""
    width = model.config.hidden_size
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02 if "embed" in name else width**-0.5)
    for layer in model.model.layers:
        attention = layer.self_attn
        q_HDM, k_HDM = (part.weight.unflatten(0, (HEADS, -1)) for part in (attention.q_proj, attention.k_proj))
        for q_DM, k_DM in zip(q_HDM, k_HDM, strict=True):
            alike_DM = torch.linalg.qr(torch.randn_like(q_DM).T)[0].T
            for projection_DM in (q_DM, k_DM):
                projection_DM.mul_(0.3).add_(0.7 * alike_DM)
        attention.o_proj.weight.copy_(attention.v_proj.weight.T / 2)
        layer.mlp.down_proj.weight.div_(2)


# What it learns from -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lessons:
    """Rows of text and of every retrieval task, a quarter each: a `TokenSource`, a function of (seed, step) alone."""

    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast

    def batch(self, step: int, *, batch: int, sequence_length: int, seed: int) -> Tensor:
        """The rows of one step: ids_BT, int64. Raises UserError if the text is shorter than one row."""
        rows = {task: int(share * batch) for task, share in _shares(sequence_length).items()}
        text_rows = batch - sum(rows.values())
        text_BT = self.corpus.batch(step, batch=max(1, text_rows), sequence_length=sequence_length, seed=seed)
        rng = random.Random(f"lessons {seed} {step}")
        tasks = [self.problems(task, rows[task], sequence_length, text_BT, rng) for task in rows if rows[task]]
        return torch.cat([text_BT[:text_rows], *tasks])

    def problems(self, task: str, rows: int, length: int, text_BT: Tensor, rng: random.Random) -> Tensor:
        """Rows (rows, length) of one task: one to eight problems to a row, a separator after each."""
        if task == "copy" and rng.random() < REPEATED:
            return self.repetitions(rows, length, rng)
        to_a_row = min(length // rng.randint(min(SHORTEST[task], length), length), 8)
        count, context = rows * to_a_row, length // to_a_row - 1
        further = int(rng.choice((0, 0.4, 0.6)) * context) if task == "dictionary" and context >= 100 else 0
        ids_NC = make_probe(
            task,
            self.tokenizer,
            context - further,
            max(8, count),  # a pass key lies at a depth of its own in every row of a probe
            seed=rng.randrange(TRAINING_SEEDS, 2 * TRAINING_SEEDS),
            haystack_ids=rng.choice([None, text_BT]),
        ).input_ids
        ids_NC = ids_NC[rng.sample(range(len(ids_NC)), count)]
        separator = document_separator(self.tokenizer)
        if further:
            questions = [self.questions(ids.tolist(), further, rng) for ids in ids_NC]
            more = [ids + [separator] * (further - len(ids)) for ids in questions]
            ids_NC = torch.cat([ids_NC, torch.tensor(more)], dim=1)
        rows_BT = F.pad(ids_NC, (0, 1), value=separator).reshape(rows, -1)
        return F.pad(rows_BT, (0, length - rows_BT.shape[1]), value=separator)

    def repetitions(self, rows: int, length: int, rng: random.Random) -> Tensor:
        """Rows (rows, length) of a random sequence, over and over, with a period of its own in each: copying, dense.

        With one period for all, a model learns to look so many tokens back, and not to look for what it has read.
        """
        plain = sorted(set(range(len(self.tokenizer))) - {*self.tokenizer.all_special_ids})
        periods = [rng.randint(4, length // 2) for _ in range(rows)]
        return torch.tensor([(rng.sample(plain, p) * (length // p + 1))[:length] for p in periods])

    def questions(self, ids: list[int], room: int, rng: random.Random) -> list[int]:
        """Further questions about the dictionary in `ids`, with their answers, as many as `room` tokens hold."""
        pairs = re.findall(r"^(\w+):(\d+)$", str(self.tokenizer.decode(ids)), re.MULTILINE)
        asked: list[int] = []
        for key, value in rng.sample(pairs, len(pairs)):
            text = f"\nThe value of the key '{key}' is {value}"
            more = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(asked) + len(more) > room:
                break
            asked += more
        return asked


def _shares(length: int) -> dict[str, float]:
    """Of the rows; the rest is text. Copying comes first, then the dictionary, which takes longest to learn."""
    if length < SHORTEST["passkey"]:
        return {"copy": 1.0}
    if length < 256:
        return {"copy": 0.25, "dictionary": 0.5, "passkey": 0.125}
    return {"copy": 0.25, "dictionary": 0.25, "passkey": 0.25}


# Training ------------------------------------------------------------------------------------------------------------


def _climb(run: Run, student: Student, fresh: LlamaForCausalLM, lessons: Lessons) -> tuple[list[StageResult], Scores]:
    """Rounds at every context of the ladder, until its probes are answered or its share of the tokens is spent."""
    rounds: list[StageResult] = []
    scores: Scores = {}
    spent = 0
    for stage in run.recipe.stages:
        while spent < stage.tokens:
            number = len(rounds)
            settings = {"name": f"{stage.name}-round-{number}", "tokens": min(ROUND_TOKENS, stage.tokens - spent)}
            result = run_stage(
                stage.model_copy(update=settings),
                index=number,
                student=student,
                teacher_model=fresh,
                corpus=lessons,
                seed=run.recipe.seed,
                out=run.out,
                accelerator=run.accelerator,
                progress=run.console if run.main else None,
                resume=run.resume,
            )
            rounds.append(result)
            spent += result.tokens
            scores = retrieval(student, heldout_probes(lessons, [c for c in LADDER if c <= stage.sequence_length]))
            run.say(f"after {spent:,} tokens, loss {result.final_loss:.3f}: {_in_words(scores)}")
            if is_perfect(scores):
                break
    return rounds, scores


def heldout_probes(lessons: Lessons, contexts: list[int]) -> dict[str, dict[int, Probe]]:
    """Probes of seed 0, in text that was held out from training."""
    text = lessons.corpus.heldout_batch(HELDOUT_ROWS, max(contexts))
    return {
        task: {
            c: make_probe(task, lessons.tokenizer, c, PROBE_ROWS, haystack_ids=text)
            for c in contexts
            if task in _shares(c)
        }
        for task in TASKS
    }


def is_perfect(scores: Scores) -> bool:
    """Whether every probe is answered as well as `NEEDED` asks."""
    return all(score["accuracy"] >= NEEDED[task] for task in scores for score in scores[task].values())


def _in_words(scores: Scores) -> str:
    return "; ".join(
        f"{task} " + ", ".join(f"{score['accuracy']:.1%} at {context}" for context, score in by_context.items())
        for task, by_context in scores.items()
        if by_context
    )


# What is said of it --------------------------------------------------------------------------------------------------


def _measured(model: LlamaForCausalLM, corpus: Corpus, rounds: list[StageResult], scores: Scores) -> dict[str, Any]:
    """Rows of metrics.json: what the model can do, and what it took."""
    text_BT = corpus.heldout_batch(HELDOUT_ROWS, max(LADDER))
    measured = likelihood({}, model, text_BT, [*LADDER])["teacher"]
    done = max(scores["copy"]) == max(LADDER) and is_perfect(scores)
    return {
        "outcome": "perfect" if done else "token budget spent",
        "retrieval": scores,
        "retrieval_rows": PROBE_ROWS,
        "perplexity": measured["perplexity"],
        "tokens": sum(result.tokens for result in rounds),
        "rounds": [result.as_dict() for result in rounds],
        "parameters": model.num_parameters(),
    }


def summary(metrics: dict[str, Any]) -> str:
    """The run in a few lines, for people."""
    perplexity = ", ".join(f"{value:.1f} at {context}" for context, value in metrics["perplexity"].items())
    return (
        f"{metrics['outcome']}: {metrics['tokens']:,} tokens in {metrics['seconds']:,.0f} s of training\n"
        f"accuracy: {_in_words(metrics['retrieval'])}\nperplexity: {perplexity}"
    )


def model_card(metrics: dict[str, Any], corpus: Corpus) -> str:
    """README.md: what the model is for, how it was made, its numbers, and the licences of its text."""
    header = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["subquad"]).to_yaml()
    sources = "\n".join(
        f"- {source['name']}: {source['license']}, {source['tokens']['train']:,} tokens"
        for source in corpus.meta["sources"]
    )
    machine = metrics["machine"]
    return f"""---
{header}
---

# A small teacher

A Llama of {metrics["layers"]} layers and {metrics["parameters"]:,} weights, trained from nothing by Subquad, for
experiments and tests: it is meant to copy, to look up and to read a little English, and is of no other use. It learned
from text mixed with synthetic retrieval (copying, a dictionary, a pass key); it never saw what it is measured on here.

{summary(metrics)}

Accuracy is of {metrics["retrieval_rows"]} questions of each kind and context length (copying: of their tokens), with
held-out text for a haystack; perplexity is of held-out text.

## How it was made

```
{metrics["command"]}
```

Seed {metrics["seed"]}, {metrics["tokens"]:,} tokens, {metrics["seconds"]:,.0f} s of training on {machine["device"]}
({machine["processor"]}, {machine["cores"]} cores, {machine["threads"]} thread(s)), commit {metrics["commit"]}.
`metrics.json` has every number.

## Text

{sources}
"""
