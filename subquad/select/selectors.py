"""Every selector, as a function from a question and its options to a choice. To add one: a function here, and its row.

Each announces its bill before it works (`question.work.announce`), and leaves what it measured in `Ranking.report`.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from subquad.data.probes import PROBE_TASKS, make_probe
from subquad.errors import UserError, nearest
from subquad.evaluate.retrieval import usable
from subquad.recipes.schema import Recipe, SelectorConfig
from subquad.select import ablation, alignment, gates, halo, kl
from subquad.select.budget import Budget
from subquad.select.greedy import greedy_path
from subquad.select.inputs import SelectorInputs
from subquad.select.ranking import Ranking
from subquad.select.retrieval_heads import retrieval_scores
from subquad.select.supernet import passes
from subquad.select.task import Score, task_score
from subquad.select.units import Wish, by_layer, layers_in, uniform_layers
from subquad.select.work import bootstrap
from subquad.utils.token_cost import TokenCost


def by_uniform(question: SelectorInputs) -> Ranking:
    """Evenly spaced units; measures nothing."""
    units = question.units
    question.work.announce("uniform", TokenCost())
    return Ranking(units, lambda count: uniform_layers(len(units), count), question.unit)


def by_fixed(question: SelectorInputs, *, layers: Sequence[int]) -> Ranking:
    """The layers of a list, most important first: the budget says how many of them."""
    units, order = question.units, list(layers)
    question.work.announce("fixed", TokenCost())
    strange = [layer for layer in order if layer not in range(len(units))]
    if strange or len({*order}) < len(order):
        raise UserError(f"selector.options.layers should be different units of 0 to {len(units) - 1}, not {order}")
    if question.least > len(order):
        raise UserError(f"the budget keeps {question.least} units, and selector.options.layers names {len(order)}")
    return Ranking(units, lambda count: sorted(order[:count]), question.unit, report={"order": order})


# From KL -------------------------------------------------------------------------------------------------------------


def by_kl(question: SelectorInputs, *, stride: int = 4, retrain_tokens: int = 0, rounds: int = 1) -> Ranking:
    """Units whose restored attention brings the all-linear student nearest to the teacher (select/kl.py).

    `retrain_tokens`: to train each candidate on before it is measured. `rounds`: of successive halving.
    """
    return _by_kl(question, "restore", stride, retrain_tokens, rounds)


def by_kl_removal(question: SelectorInputs, *, stride: int = 4, retrain_tokens: int = 0, rounds: int = 1) -> Ranking:
    """Units whose attention the teacher misses most, in KL, when they alone are linear (select/kl.py)."""
    return _by_kl(question, "remove", stride, retrain_tokens, rounds)


def _by_kl(question: SelectorInputs, base: kl.Base, stride: int, tokens: int, rounds: int) -> Ranking:
    board, units, text_NT, work = question.new_board(), question.units, question.text_BT, question.work
    plans = kl.candidates(board, units, base)
    plans += [board.having(other, layers_in(unit)) for other in question.alternatives for unit in units]
    name = "kl" if base == "restore" else "kl-removal"
    if tokens == 0:
        work.announce(f"{name}, {len(units)} units", TokenCost(forward_tokens=(1 + passes(plans)) * text_NT.numel()))
        found = kl.kl_without_training(board, plans, text_NT, stride, work)
        gains_NU, *others = kl.gains_of(found, base).split(len(units), 1)
        gains = {other: x_NU.mean(0).tolist() for other, x_NU in zip(question.alternatives, others, strict=True)}
        more = {"kl_base": float(found[:, 0].mean()), "alternatives": gains}
        return replace(_by_rows(question, gains_NU, more), alternatives=gains)
    if question.train is None:
        raise UserError(
            f"the selector '{name}' with retrain_tokens trains as the recipe does, and the recipe has no stage on "
            "logits with scope 'plan': add one, or leave out retrain_tokens"
        )
    work.announce(f"{name}, {len(units)} units", kl.training_bill(len(plans), text_NT, tokens, rounds))
    gains_NU, last = kl.gains_with_training(
        board,
        plans,
        text_NT,
        stride,
        work,
        question.train,
        base=base,
        tokens=tokens,
        rounds=rounds,
        cut=question.count,
    )
    return _by_rows(question, gains_NU, {"retrain_tokens": tokens, "last_round": by_layer(last, units)})


def _by_rows(question: SelectorInputs, gains_NU: Tensor, more: dict[str, Any]) -> Ranking:
    """A choice by what the units gain on rows of text, in the mean, with bootstrap intervals."""
    units, scores = question.units, gains_NU.mean(0).tolist()
    low, high = (bound.tolist() for bound in bootstrap(gains_NU))
    report = {"scores": scores, "low": low, "high": high}
    shaped = {key: by_layer(values, units) for key, values in report.items()}
    return Ranking.in_order(units, scores, question.unit, shaped | {"rows": len(gains_NU)} | more, scores)


def by_alignment_loss(question: SelectorInputs) -> Ranking:
    """Units whose mixers stayed furthest from the teacher's attention in alignment (select/alignment.py)."""
    text_NT, work = question.text_BT, question.work
    packs = len(alignment.packed(question.units))
    work.announce("alignment loss", TokenCost(forward_tokens=(1 + packs) * text_NT.numel()))
    return _by_rows(question, alignment.alignment_losses(question.new_board(), question.units, text_NT, work), {})


# From retrieval ------------------------------------------------------------------------------------------------------


def by_retrieval_heads(
    question: SelectorInputs,
    *,
    tasks: Sequence[str] = ("dictionary",),
    context: int = 512,
    rows: int = 64,
    measure: ablation.Measure = "auto",
    top: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Ranking:
    """Heads, or layers, without which the teacher cannot look things up (select/retrieval_heads.py)."""
    found = retrieval_scores(
        question.source.model,
        question.source.tokenizer,
        question.text_BT,
        units=question.units,
        tasks=tasks,
        context=context,
        rows=rows,
        measure=measure,
        top=question.count if top is None and question.budget.context is None else top,
        confidence=confidence,
        seed=seed,
        work=question.work,
    )
    pairs = [*zip(found.scores, found.logprob_drop, strict=True)]
    return Ranking.in_order(question.units, pairs, question.unit, found.as_dict(), found.scores)


def by_halo(
    question: SelectorInputs,
    *,
    recall: Sequence[str] = ("copy", "dictionary", "passkey"),
    common: Sequence[str] = (),
    context: int = 512,
    rows: int = 32,
    limit: int = 500,
    seed: int = 0,
) -> Ranking:
    """Units whose attention matters to recall more than to the rest (select/halo.py).

    `recall`: retrieval tasks, of `rows` rows. `common`: tasks of lm-eval's, of which `limit` documents count; none: the
    next tokens of held-out text.
    """
    board, source, work, text_NT = question.new_board(), question.source, question.work, question.text_BT
    plans = kl.candidates(board, question.units, "remove")
    tasks = [task_score(task, limit=limit, seed=seed) for task in common]
    asked = rows * context * len(recall) + (0 if tasks else text_NT.numel())
    work.announce(f"halo, {len(question.units)} units", TokenCost(forward_tokens=passes(plans) * asked))
    probes = {task: make_probe(task, source.tokenizer, context, rows, seed, text_NT) for task in recall}
    verdicts = {task: usable(source.model, probe) for task, probe in probes.items()}
    for task, verdict in verdicts.items():
        if not verdict.usable:
            work.say(f"the retrieval task '{task}' is left out: {verdict.reason}")
            del probes[task]
    if not probes:
        raise UserError(
            "the teacher answers none of the retrieval tasks, so halo has nothing to rank by: give it easier tasks or "
            "a shorter context (selector.options.recall, .context)"
        )
    board.prepare(plans)
    recall_RU = halo.probe_recall(board, plans, probes, work)[:, 1:]
    if tasks:
        common_RU = halo.task_scores(board, plans, tasks, source.tokenizer, work)[:, 1:]
    else:
        common_RU = halo.next_tokens_right(board, plans, text_NT, work)[:, 1:]
    scores = halo.halo_scores(recall_RU.mean(0), common_RU.mean(0)).tolist()
    report = {"scores": scores, "recall": recall_RU.mean(0).tolist(), "common": common_RU.mean(0).tolist()}
    shaped = {key: by_layer(values, question.units) for key, values in report.items()}
    return Ranking.in_order(question.units, scores, question.unit, shaped, scores)


# From gates ----------------------------------------------------------------------------------------------------------


def by_gradient(question: SelectorInputs, *, points: int = 4) -> Ranking:
    """The KL's derivative by how much attention a unit has, from all-linear to the teacher (select/gates.py)."""
    text_NT, work = question.text_BT, question.work
    work.announce(f"gradient at {points} points", TokenCost(training_tokens=points * text_NT.numel()))
    return _by_rows(question, gates.gradient_scores(question.new_board(), question.units, text_NT, work, points), {})


def by_fisher(question: SelectorInputs, *, draws: int = 4) -> Ranking:
    """The second-order estimate of the KL that removing a unit's attention costs (select/gates.py)."""
    text_NT, work = question.text_BT, question.work
    work.announce(f"fisher, {draws} draws", gates.fisher_bill(text_NT.numel(), draws))
    return _by_rows(question, gates.fisher_scores(question.new_board(), question.units, text_NT, work, draws), {})


def by_gates(question: SelectorInputs, *, tokens: int = 50_000, sequence_length: int = 512, batch: int = 1) -> Ranking:
    """Gates trained together in one run, with a mean that the budget says (select/gates.py)."""
    corpus, units = question.corpus, question.units
    if corpus is None:
        raise UserError("the selector 'gates' trains its gates and was given no text to train on")
    steps = max(1, round(tokens / (batch * sequence_length)))
    question.work.announce("gates", TokenCost(training_tokens=steps * batch * sequence_length))

    def rows(step: int) -> Tensor:
        return corpus.batch(step, batch=batch, sequence_length=sequence_length, seed=question.seed)

    share = question.count / len(units)
    found = gates.trained_gates(
        question.new_board(), units, rows, question.work, steps=steps, share=share, seed=question.seed
    )
    odds = found[0].tolist()
    report = {"scores": by_layer(odds, units), "gate_tokens": steps * batch * sequence_length}
    return Ranking.in_order(units, odds, question.unit, report)


# By task -------------------------------------------------------------------------------------------------------------


def by_greedy(
    question: SelectorInputs,
    *,
    task: str | Score = "dictionary",
    tolerance: float = 0.05,
    limit: int = 500,
    metric: str | None = None,
    context: int = 512,
    seed: int = 0,
) -> Ranking:
    """Makes linear what a task misses least, one unit after the other (select/greedy.py: Distill-then-Replace).

    With the budgets `opt` (as much as the tolerance allows) and `best` it stops at the floor; other budgets are points
    of the path. `task`: a retrieval task, a task of lm-eval's, a JSONL file, or a Python function.
    """
    units = question.units
    scored = task_score(task, limit=limit, metric=metric, context=context, seed=seed, text_BT=question.text_BT)
    path = greedy_path(
        question.new_board(),
        units,
        scored,
        question.source.tokenizer,
        question.work,
        tolerance=tolerance,
        most=None if question.budget.word else len(units) - question.least,
        document_tokens=limit * context if task in PROBE_TASKS else 0,
    )
    order = [*path.kept(len(units), len(path.steps)), *(step.unit for step in reversed(path.steps))]
    named = {name: path.kept(len(units), steps) for name, steps in (("best", path.best), ("opt", path.opt))}
    report = {"order": order, "path": path.as_dict()}
    return Ranking(units, lambda count: sorted(order[:count]), question.unit, named=named, report=report)


# All of them ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selector:
    """`unit`: the one it is for, if the recipe says nothing. `aligned`, `text`: whether it needs an aligned student,
    and text."""

    choose: Callable[..., Ranking]
    unit: Wish = "layer"
    aligned: bool = False
    text: bool = True


SELECTORS: dict[str, Selector] = {
    "uniform": Selector(by_uniform, text=False),
    "fixed": Selector(by_fixed, text=False),
    "kl": Selector(by_kl, aligned=True),
    "kl-removal": Selector(by_kl_removal, aligned=True),
    "alignment-loss": Selector(by_alignment_loss, aligned=True),
    "recall": Selector(partial(by_retrieval_heads, tasks=("dictionary", "variables", "associative"))),
    "retrieval-heads": Selector(by_retrieval_heads, unit="head"),
    "halo": Selector(by_halo, aligned=True),
    "gradient": Selector(by_gradient, aligned=True),
    "fisher": Selector(by_fisher, aligned=True),
    "gates": Selector(by_gates, aligned=True),
    "greedy": Selector(by_greedy, aligned=True),
}


def check_selector(settings: SelectorConfig) -> None:
    """Raises UserError, with the nearest valid name, for an unknown selector, option, or budget not meant for it."""
    by, options, budget = settings.by, settings.options, Budget.parse(settings.budget)
    if by not in SELECTORS:
        raise UserError(f"unknown selector '{by}': {nearest(by, SELECTORS)}")
    parameters = inspect.signature(SELECTORS[by].choose).parameters.values()
    taken = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    for key in options:
        if key not in taken:
            raise UserError(f"selector '{by}' has no option '{key}' (valid: {', '.join(taken) or 'none'})")
    layers = options.get("layers")
    if by == "fixed" and not (isinstance(layers, list) and all(isinstance(layer, int) for layer in layers)):
        raise UserError(
            "selector 'fixed' needs the layers to keep, most important first: selector.options.layers=[4,10]"
        )
    if budget.word is not None and by != "greedy":
        raise UserError(
            f"the budget '{budget.word}' is a plan that only the selector greedy finds: give selector '{by}' a number "
            "of units, a share of them, or bytes (64MiB@32k)"
        )


def check_alternatives(recipe: Recipe) -> None:
    """Raises UserError for other mixers where they cannot be chosen."""
    mixer, selector = recipe.mixer, recipe.selector
    names = [mixer.name, *(one.name for one in mixer.alternatives)]
    unit = SELECTORS[selector.by].unit if selector.unit is None else selector.unit
    if len(names) == 1:
        return
    if len({*names}) < len(names):
        raise UserError(f"mixer.alternatives should be other mixers than '{mixer.name}', each once: not {names[1:]}")
    if selector.by != "kl" or selector.options.get("retrain_tokens") or unit == "head" or mixer.join != "split":
        raise UserError(
            "mixer.alternatives are chosen by the selector kl without retrain_tokens, for layers or groups of them, "
            "with the split join: change the selector, or leave them out"
        )
    if Budget.parse(selector.budget).speedup is not None:
        raise UserError("a budget of decoding speed knows one mixer: give bytes, or leave out mixer.alternatives")
