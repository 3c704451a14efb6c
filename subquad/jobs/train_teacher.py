"""A small teacher for experiments, trained from scratch until it copies and looks up perfectly.

A pretrained model is too slow for a test, and a random one has nothing to lose. This one is a Llama of 4 layers, small
enough for two cores. It reads plain text and answers the retrieval probes almost without a fault, so that any loss in a
conversion shows.

Notable:
- The contexts of `LADDER` are trained one after the other, in rounds. A round is a stage of the one training loop
  (distill/loop.py), with checkpoints and a learning rate that comes down; after it the probes of this context and the
  shorter ones are measured. The next context begins when nearly all are answered, and the run ends when, at the last
  one, as many are as `NEEDED` says.
- Its training data is in data/curriculum.py.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from subquad.data.curriculum import Lessons, shares, train_tokenizer
from subquad.data.probes import Probe, make_probe
from subquad.data.text import Corpus, load_corpus
from subquad.distill.state import StageResult
from subquad.errors import UserError
from subquad.evaluate import likelihood, retrieval
from subquad.evaluate.retrieval import Score
from subquad.jobs.run import start_run
from subquad.jobs.small_teacher import SmallTeacher, card_header, how_it_was_made, labels_stage, small_recipe
from subquad.model.base import BaseStudent
from subquad.model.student import Student
from subquad.recipes.schema import DataConfig, Recipe
from subquad.recipes.stage import count_of

CONTEXT = 1024
LAYERS = range(4, 9)

LADDER = {32: 0.1, 64: 0.3, 128: 0.6, 256: 0.8, 512: 1.0}  # context -> share of the token budget spent when it ends
RATES = {32: 4e-3, 64: 4e-3, 128: 3e-3, 256: 3e-3, 512: 2e-3}
COOLING = 0.75  # factor of the rate from round to round at the last context
BATCH_TOKENS = 2048
ROUND_TOKENS = 600_000
NEEDED = {"copy": 0.985, "dictionary": 0.98, "passkey": 0.98}  # accuracy
READY = 0.95  # of that: the next context begins
HEADS, HEAD_DIM = 8, 32
ROPE_THETA = 10_000.0
LOOK_BACK = 4.0  # size of the biases that make heads look back
PROBE_ROWS = 64
HELDOUT_ROWS = 32

Scores = dict[str, dict[int, Score]]


def train_teacher(
    out: str | Path,
    *,
    layers: int = 4,
    tokens: int | str = "14M",
    seed: int = 0,
    data: list[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Trains a teacher of `layers` layers on at most about `tokens` tokens into the folder `out`; returns its metrics.

    `data`: text instead of the default corpora. `resume`: continue an interrupted run in `out`; `overwrite`: delete an
    earlier run there first. Leaves the model, its tokenizer, README.md, metrics.json, log.jsonl and checkpoints.
    Raises UserError for anything wrong with what was given.
    """
    started = time.perf_counter()
    recipe = _recipe(Path(out), layers, tokens, seed, data)
    run = start_run(recipe, Path(out), resume=resume, overwrite=overwrite)
    with run.timed("data"):
        tokenizer = train_tokenizer(data)
        corpus = load_corpus(data, tokenizer)
    for remark in corpus.remarks:
        run.say(remark)
    teacher = RetrievalTeacher(run, tokenizer, corpus, layers, count_of(tokens, "--tokens"))
    return teacher.train(f"{len(corpus.train):,} tokens of text", started, command)


def _recipe(out: Path, layers: int, tokens: int | str, seed: int, data: list[str] | None) -> Recipe:
    if layers not in LAYERS:
        raise UserError(f"a small teacher has {LAYERS[0]} to {LAYERS[-1]} layers, not {layers}: change --layers")
    budget = count_of(tokens, "--tokens")
    stages = [
        labels_stage(
            name=f"context-{context}",
            tokens=max(1, round(share * budget)),
            sequence_length=context,
            batch=BATCH_TOKENS // context,
            lr=RATES[context],
            betas=(0.9, 0.98),
            warmup=50,
            weight_decay=0.01,
        )
        for context, share in LADDER.items()
    ]
    description = f"a small teacher of {layers} layers, trained from nothing on at most {budget} tokens"
    return small_recipe("small-teacher", out, seed, DataConfig(sources=data), stages, description=description)


@dataclass
class RetrievalTeacher(SmallTeacher):
    """A Llama that learns from text and retrieval problems, on a ladder of contexts."""

    corpus: Corpus
    layers: int
    budget: int  # tokens
    scores: Scores = field(default_factory=dict)  # of the last probes that were measured

    def new_model(self) -> LlamaForCausalLM:
        """Random Llama; see `new_model`."""
        return new_model(self.reader, self.layers)

    def learn(self, student: BaseStudent, model: PreTrainedModel) -> list[StageResult]:
        """Rounds at every context of the ladder, until its probes are answered or its share of the tokens is spent."""
        assert isinstance(student, Student)
        run, lessons = self.run, Lessons(self.corpus, self.reader)
        rounds: list[StageResult] = []
        spent = 0
        for stage in run.recipe.stages:
            is_last = stage.sequence_length == max(LADDER)
            earlier_rounds = len(rounds)
            while spent < stage.tokens:
                # A round is a short stage, with a cooler learning rate each time at the last context
                number = len(rounds)
                settings = {
                    "name": f"{stage.name}-round-{number}",
                    "tokens": min(ROUND_TOKENS, stage.tokens - spent),
                    "lr": stage.lr * COOLING ** (number - earlier_rounds) if is_last else stage.lr,
                }
                result = self.run_stage(stage.model_copy(update=settings), number, student, model, lessons)
                rounds.append(result)
                spent += result.tokens

                # Then the probes of this context and the shorter ones
                self.scores = retrieval(student, heldout_probes(lessons, asked_after(stage.sequence_length)))
                run.say(f"after {spent:,} tokens, loss {result.final_loss:.3f}: {_in_words(self.scores)}")
                if is_perfect(self.scores, 1.0 if is_last else READY):
                    break
        return rounds

    def measure(self, model: LlamaForCausalLM, results: list[StageResult]) -> dict[str, Any]:
        """Retrieval scores, perplexity of held-out text, and the tokens it took."""
        text_BT = self.corpus.heldout_batch(HELDOUT_ROWS, max(LADDER))
        perplexity = likelihood({}, model, text_BT, [*LADDER])["teacher"]["perplexity"]
        is_done = max(self.scores["copy"]) == max(LADDER) and is_perfect(self.scores)
        return {
            "outcome": "perfect" if is_done else "token budget spent",
            "retrieval": self.scores,
            "retrieval_rows": PROBE_ROWS,
            "perplexity": perplexity,
            "tokens": sum(result.tokens for result in results),
            "rounds": [result.as_dict() for result in results],
            "layers": self.layers,
            "budget": self.budget,
        }

    def summary(self, metrics: dict[str, Any]) -> str:
        """Outcome, accuracy and perplexity, a line each."""
        perplexity = ", ".join(f"{value:.1f} at {context}" for context, value in metrics["perplexity"].items())
        return (
            f"{metrics['outcome']}: {metrics['tokens']:,} tokens in {metrics['seconds']:,.0f} s of training\n"
            f"accuracy: {_in_words(metrics['retrieval'])}\nperplexity: {perplexity}"
        )

    def model_card(self, metrics: dict[str, Any]) -> str:
        """README.md: the purpose of the model, its numbers, how it was made, and the licences of its text."""
        sources = "\n".join(
            f"- {source['name']}: {source['license']}, {source['tokens']['train']:,} tokens"
            for source in self.corpus.meta["sources"]
        )
        return f"""{card_header("text-generation")}

# A small teacher

A Llama of {metrics["layers"]} layers and {metrics["parameters"]:,} weights, trained from scratch by Subquad, for
experiments and tests: it is meant to copy, to look up and to read a little English, and is of no other use. It learned
from text mixed with synthetic retrieval (copying, a dictionary, a pass key); it never saw the text and the questions
that it is measured on here.

{self.summary(metrics)}

Accuracy is of {metrics["retrieval_rows"]} questions of each kind and context length (copying: of their tokens), with
held-out text for a haystack; perplexity is of held-out text.

{how_it_was_made(metrics)}

## Text

{sources}
"""


def new_model(tokenizer: PreTrainedTokenizerFast, layers: int) -> LlamaForCausalLM:
    """A random Llama with 8 heads of 32 in each layer, all with keys and values of their own, and biases."""
    separator = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
        attention_bias=True,
        bos_token_id=separator,
        eos_token_id=separator,
        pad_token_id=separator,
    )
    model = LlamaForCausalLM(config)
    _initialise(model)
    return model


@torch.no_grad()
def _initialise(model: LlamaForCausalLM) -> None:
    """A start from which copying and looking up are learned in a few million tokens.

    - Tokens have unit size, and what a layer adds to them is small. With embeddings of the usual size 0.02 the first
      layer drowns the token that it stands on, and the second has nothing to look for.
    - The output head begins as the embeddings, so that to attend to a token is to predict it.
    - Attention begins as trained attention is (mimetic initialisation, arXiv 2305.09828): queries and keys look for
      what is alike, and what a head writes is the transpose of what it reads.
    - Half of the first layer's heads begin by looking a few tokens back (`_look_back`).
    """
    width, layers = model.config.hidden_size, model.config.num_hidden_layers
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            parameter.normal_()
        elif "down_proj" in name:
            parameter.normal_(std=(2 * layers * width) ** -0.5)
        elif parameter.dim() > 1:
            parameter.normal_(std=width**-0.5)
    model.lm_head.weight.copy_(0.05 * model.model.embed_tokens.weight)
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.o_proj.weight.copy_(attention.v_proj.weight.T)
        q_HDM, k_HDM = (part.weight.unflatten(0, (HEADS, -1)) for part in (attention.q_proj, attention.k_proj))
        for q_DM, k_DM in zip(q_HDM, k_HDM, strict=True):
            alike_DM = torch.linalg.qr(torch.randn_like(q_DM).T)[0].T
            for projection_DM in (q_DM, k_DM):
                projection_DM.mul_(0.3).add_(0.7 * alike_DM)
    _look_back(model.model.layers[0].self_attn)


def _look_back(attention: Any) -> None:
    """Half of its heads begin by looking 1, 2, 3 and 4 tokens back, softly, whatever these are.

    As the convolutional start of vision transformers (ConViT, arXiv 2103.10697), by rotary embeddings: a bias on the
    queries and one on the keys, turned by r steps of the embedding, have their largest product at a distance of r.
    """
    speed_F = ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    q_HD, k_HD = (part.bias.view(HEADS, HEAD_DIM) for part in (attention.q_proj, attention.k_proj))
    for head in range(HEADS // 2):
        angle_F = (head + 1) * speed_F
        q_HD[head, : HEAD_DIM // 2] = LOOK_BACK
        k_HD[head] = LOOK_BACK * torch.cat([angle_F.cos(), angle_F.sin()])


def asked_after(context: int) -> list[int]:
    """The contexts that are asked once `context` is being learned: it, and the shorter ones that have every task."""
    return [c for c in LADDER if c == context or (c < context and NEEDED.keys() <= shares(c).keys())]


def heldout_probes(lessons: Lessons, contexts: list[int]) -> dict[str, dict[int, Probe]]:
    """Probes of seed 0, in text that was held out from training."""
    text = lessons.corpus.heldout_batch(HELDOUT_ROWS, max(contexts))
    return {
        task: {
            c: make_probe(task, lessons.tokenizer, c, PROBE_ROWS, haystack_ids=text)
            for c in contexts
            if task in shares(c)
        }
        for task in NEEDED
    }


def is_perfect(scores: Scores, share: float = 1.0) -> bool:
    """Whether every probe is answered as well as `NEEDED` asks, or as well as this share of it."""
    return all(score["accuracy"] >= share * NEEDED[task] for task in scores for score in scores[task].values())


def _in_words(scores: Scores) -> str:
    return "; ".join(
        f"{task} " + ", ".join(f"{score['accuracy']:.1%} at {context}" for context, score in by_context.items())
        for task, by_context in scores.items()
        if by_context
    )
