"""KL-guided scores: how much closer to the teacher is a student in which one unit keeps its attention?

Two base points, with or without training of each candidate:

- `restore`: the all-linear, aligned student. A unit's score is the gain of its attention, KL(all linear) - KL(unit
  restored). Without training this is SMART's score (Zebra-Llama, arXiv 2505.17272); with a short stage on logits for
  each candidate it is "greedy addition" of KL-guided selection (GA-S2, arXiv 2512.20569).
- `remove`: the teacher with one linear unit. The score is the KL that this costs ("greedy removal", GR-S2).

Notable:
- Without training, candidates share the aligned mixers and every layer below the one that they change. The base's pass
  records the output of each block, and a candidate's pass starts at its first difference, so L layers cost about L / 2
  passes. The KL is taken at every `stride`-th position.
- Trained candidates are compared on held-out text. (The paper's code compares training losses at a logged step.)
- With `rounds`, the first round trains all candidates on few tokens. Each later round trains 1 / REDUCTION of them,
  those nearest to the cut between kept and replaced units, on REDUCTION times the tokens. This is successive halving
  around the cut instead of the best.

Legend: B rows, T tokens, M model width, N rows of text, P plans, U units.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from subquad.distill.logit_losses import FromHidden, chunked_loss
from subquad.errors import UserError
from subquad.model.base import BaseStudent
from subquad.model.output_head import OutputHead, final_hidden
from subquad.plan import Plan
from subquad.recipes.stage import Length
from subquad.select.inputs import SelectorInputs, Train
from subquad.select.ranking import Ranking
from subquad.select.registry import Selector, selector
from subquad.select.supernet import Supernet, passes, without
from subquad.select.units import Unit, by_layer, layers_in
from subquad.select.work import SelectionCost, SelectionWork
from subquad.utils.token_cost import TokenCost

Base: TypeAlias = Literal["restore", "remove"]

REDUCTION = 4  # each round keeps 1 / REDUCTION of the candidates and multiplies their tokens by REDUCTION


@selector("kl", aligned=True)
class Kl(Selector):
    """Units whose restored attention brings the all-linear student closest to the teacher."""

    base: ClassVar[Base] = "restore"
    stride: Length = 4
    """The KL is taken at every `stride`-th position."""
    retrain_tokens: int = Field(default=0, ge=0)
    """Tokens to train each candidate on before it is measured."""
    rounds: Length = 1
    """Rounds of successive halving."""

    def cost(self, inputs: SelectorInputs) -> SelectionCost:
        plans, text_NT = self._plans(inputs, inputs.supernet()), inputs.text_BT
        if self.retrain_tokens:
            self._train(inputs)
            tokens = training_cost(len(plans), text_NT, self.retrain_tokens, self.rounds)
        else:
            tokens = TokenCost(forward_tokens=(1 + passes(plans)) * text_NT.numel())
        return SelectionCost(f"{self.name}, {len(inputs.units)} units", tokens)

    def choose(self, inputs: SelectorInputs) -> Ranking:
        supernet, units = inputs.supernet(), inputs.units
        plans = self._plans(inputs, supernet)
        if self.retrain_tokens == 0:
            return self._without_training(inputs, supernet, plans)
        gains_NU, last_round = gains_with_training(
            supernet,
            plans,
            inputs.text_BT,
            self.stride,
            inputs.work,
            self._train(inputs),
            base=self.base,
            tokens=self.retrain_tokens,
            rounds=self.rounds,
            cut=inputs.count,
        )
        report = {"retrain_tokens": self.retrain_tokens, "last_round": by_layer(last_round, units)}
        return Ranking.by_rows(units, gains_NU, inputs.unit, report)

    def _without_training(self, inputs: SelectorInputs, supernet: Supernet, plans: Sequence[Plan]) -> Ranking:
        units = inputs.units
        kl_NP = kl_without_training(supernet, plans, inputs.text_BT, self.stride, inputs.work)
        gains_NU, *alternatives = gains_of(kl_NP, self.base).split(len(units), 1)
        gains = {name: x_NU.mean(0).tolist() for name, x_NU in zip(inputs.alternatives, alternatives, strict=True)}
        report = {"kl_base": float(kl_NP[:, 0].mean()), "alternatives": gains}
        return replace(Ranking.by_rows(units, gains_NU, inputs.unit, report), alternatives=gains)

    def _plans(self, inputs: SelectorInputs, supernet: Supernet) -> list[Plan]:
        """The base's plan, those with one unit changed, and those with an alternative mixer in one unit."""
        return [
            *candidates(supernet, inputs.units, self.base),
            *(
                supernet.plan_with_mixer(mixer, layers_in(unit))
                for mixer in inputs.alternatives
                for unit in inputs.units
            ),
        ]

    def _train(self, inputs: SelectorInputs) -> Train:
        if inputs.train is None:
            raise UserError(
                f"the selector '{self.name}' with retrain_tokens trains as the recipe does, and the recipe has no "
                "stage on logits with scope 'plan': add one, or leave out retrain_tokens"
            )
        return inputs.train


@selector("kl-removal", aligned=True)
class KlRemoval(Kl):
    """Units without whose attention the teacher's KL rises most, when only that unit is linear."""

    base: ClassVar[Base] = "remove"


def candidates(supernet: Supernet, units: Sequence[Unit], base: Base) -> list[Plan]:
    """The base's plan, and those with one unit changed."""
    if base == "restore":
        return [supernet.plan_with(heads) for heads in ([], *units)]
    all_heads = supernet.all_heads
    return [supernet.plan_with(heads) for heads in (all_heads, *(without(all_heads, unit) for unit in units))]


def kl_without_training(
    supernet: Supernet, plans: Sequence[Plan], text_NT: Tensor, stride: int, work: SelectionWork
) -> Tensor:
    """KL(teacher, student) in nats per token of every plan on every row of text: (N, P)."""

    @torch.no_grad()
    def measure(row: int) -> list[float]:
        ids_1T = text_NT[row : row + 1].to(supernet.student.device)
        teacher_1TM = final_hidden(supernet.teacher, ids_1T)

        def student_kl(student: BaseStudent) -> float:
            return float(kl(student, student.final_hidden(ids_1T), supernet.teacher, teacher_1TM, stride))

        return supernet.measure_all(plans, student_kl)

    supernet.prepare(plans)
    item_cost = TokenCost(forward_tokens=(1 + passes(plans)) * text_NT.shape[1])
    return work.map(f"kl {stride}", len(text_NT), measure, item_cost=item_cost)


def kl(
    student: BaseStudent, student_BTM: Tensor, teacher: PreTrainedModel, teacher_BTM: Tensor, stride: int = 1
) -> Tensor:
    """KL in nats per token, (), at every `stride`-th position, from the last hidden states."""
    return chunked_loss(
        student_BTM[:, ::stride],
        OutputHead.of(student),
        weights={"logits": 1.0},
        teacher=FromHidden(teacher_BTM[:, ::stride], OutputHead.of(teacher)),
    ).total


def gains_of(kl_NP: Tensor, base: Base) -> Tensor:
    """The worth of the units, (N, U), from the KL of the base's plan and of those with one unit changed."""
    gains_NU = kl_NP[:, :1] - kl_NP[:, 1:]
    return gains_NU if base == "restore" else -gains_NU


def round_tokens(tokens: int, rounds: int) -> list[int]:
    """Training tokens of a candidate in each round; `tokens` in the last."""
    return [max(1, round(tokens / REDUCTION**later)) for later in range(rounds - 1, -1, -1)]


def training_cost(plans: int, text_NT: Tensor, tokens: int, rounds: int) -> TokenCost:
    """The cost of all rounds: the first trains every plan, each later one the remaining candidates and the base."""
    counts = [plans, *(_candidates_in(round_, plans - 1) + 1 for round_ in range(1, rounds))]
    training_tokens = sum(count * amount for count, amount in zip(counts, round_tokens(tokens, rounds), strict=True))
    return TokenCost(forward_tokens=2 * sum(counts) * text_NT.numel(), training_tokens=training_tokens)


def _candidates_in(round_: int, units: int) -> int:
    """The number of candidates that a later round trains."""
    return max(2, round(units / REDUCTION**round_))


def gains_with_training(
    supernet: Supernet,
    plans: Sequence[Plan],
    text_NT: Tensor,
    stride: int,
    work: SelectionWork,
    train: Train,
    *,
    base: Base,
    tokens: int,
    rounds: int,
    cut: int,
) -> tuple[Tensor, list[int]]:
    """The worth of the units after training their candidates, (N, U), and the last round of each candidate.

    `cut`: number of units that will be kept; later rounds train the candidates whose worth is nearest to the cut.
    """
    units = len(plans) - 1
    gains_NU = torch.zeros(len(text_NT), units, dtype=torch.float64)
    last_round = [0] * units
    open_units = [*range(units)]
    for round_, amount in enumerate(round_tokens(tokens, rounds)):
        # After the first round, only the units nearest to the cut stay.
        if round_:
            worth_U = gains_NU.mean(0)
            ordered_U = worth_U.sort(descending=True).values
            place = min(max(cut, 1), units - 1)
            distances = (worth_U - (ordered_U[place - 1] + ordered_U[place]) / 2).abs().tolist()
            nearest = sorted(open_units, key=lambda unit: distances[unit])
            open_units = sorted(nearest[: _candidates_in(round_, units)])

        # Train and measure the base and the candidates of these units.
        kl_N = [
            _trained_kl(supernet, plans[index], text_NT, stride, work, train, amount, f"{index}-{round_}")
            for index in (0, *(unit + 1 for unit in open_units))
        ]
        gains_NU[:, open_units] = gains_of(torch.stack(kl_N, 1), base)
        for unit in open_units:
            last_round[unit] = round_
    return gains_NU, last_round


def _trained_kl(
    supernet: Supernet,
    plan: Plan,
    text_NT: Tensor,
    stride: int,
    work: SelectionWork,
    train: Train,
    tokens: int,
    name: str,
) -> Tensor:
    """KL on every row of text, (N,), of a candidate with this plan after training it."""

    def measure(_: int) -> list[float]:
        student = type(supernet.student).from_teacher(supernet.teacher, plan, mixers_from=supernet.student)
        if student.replaced_layers():
            train(student, tokens, f"candidate-{name}")
        with torch.no_grad():
            rows = [row_T[None].to(student.device) for row_T in text_NT]
            pairs = [(student.final_hidden(ids_1T), final_hidden(supernet.teacher, ids_1T)) for ids_1T in rows]
            return [
                float(kl(student, student_1TM, supernet.teacher, teacher_1TM, stride))
                for student_1TM, teacher_1TM in pairs
            ]

    item_cost = TokenCost(forward_tokens=2 * text_NT.numel(), training_tokens=tokens)
    key = f"kl {stride} after {tokens} tokens, {name}"
    return work.map(key, 1, measure, item_cost=item_cost, all_processes=True)[0]
