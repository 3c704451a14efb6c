"""KL-guided scores: how much nearer the teacher is a student in which one unit has its attention back?

Two base points, and any amount of training for each candidate:

- `restore`: the all-linear, aligned student; the score of a unit is what its attention gains, KL(all linear) - KL(unit
  restored). Without training this is SMART's score (Zebra-Llama, arXiv 2505.17272), with a short stage on logits for
  each candidate KL-guided selection's "greedy addition" (GA-S2, arXiv 2512.20569).
- `remove`: the teacher with one unit linear; the score is the KL that this costs ("greedy removal", GR-S2).

Notable:
- Without training, candidates share the aligned mixers and every layer below the one that they change: the base's pass
  keeps what each block returns, and a candidate's pass starts where it differs, so that L layers cost about L / 2
  passes. The KL is taken at every `stride`-th position.
- Trained candidates are compared on held-out text. (The paper's code compares training losses at a logged step.)
- With `rounds`, candidates are trained a little at first, and only the quarter of them whose place at the cut is still
  open is trained again, with four times the tokens: successive halving, around the cut instead of the best.

Legend: B rows, T tokens, M model width, N rows of text, U units.
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
from subquad.select.work import SelectionCost, Work
from subquad.utils.token_cost import TokenCost

Base: TypeAlias = Literal["restore", "remove"]

KEPT = 4  # of the candidates, one in so many goes to the next round, with so many times the tokens


@selector("kl", aligned=True)
class Kl(Selector):
    """Units whose restored attention brings the all-linear student nearest to the teacher."""

    base: ClassVar[Base] = "restore"
    stride: Length = 4
    """The KL is taken at every `stride`-th position."""
    retrain_tokens: int = Field(default=0, ge=0)
    """Tokens to train each candidate on before it is measured."""
    rounds: Length = 1
    """Rounds of successive halving."""

    def cost(self, inputs: SelectorInputs) -> SelectionCost:
        plans, text_NT = self._plans(inputs, inputs.new_board()), inputs.text_BT
        if self.retrain_tokens:
            self._train(inputs)
            tokens = training_cost(len(plans), text_NT, self.retrain_tokens, self.rounds)
        else:
            tokens = TokenCost(forward_tokens=(1 + passes(plans)) * text_NT.numel())
        return SelectionCost(f"{self.name}, {len(inputs.units)} units", tokens)

    def choose(self, inputs: SelectorInputs) -> Ranking:
        board, units = inputs.new_board(), inputs.units
        plans = self._plans(inputs, board)
        if self.retrain_tokens == 0:
            return self._without_training(inputs, board, plans)
        gains_NU, last_round = gains_with_training(
            board,
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
        more = {"retrain_tokens": self.retrain_tokens, "last_round": by_layer(last_round, units)}
        return Ranking.by_rows(units, gains_NU, inputs.unit, more)

    def _plans(self, inputs: SelectorInputs, board: Supernet) -> list[Plan]:
        """The base's plan, those with one unit changed, and those with an alternative mixer in one unit."""
        alternatives = [board.having(name, layers_in(unit)) for name in inputs.alternatives for unit in inputs.units]
        return candidates(board, inputs.units, self.base) + alternatives

    def _train(self, inputs: SelectorInputs) -> Train:
        if inputs.train is None:
            raise UserError(
                f"the selector '{self.name}' with retrain_tokens trains as the recipe does, and the recipe has no "
                "stage on logits with scope 'plan': add one, or leave out retrain_tokens"
            )
        return inputs.train

    def _without_training(self, inputs: SelectorInputs, board: Supernet, plans: Sequence[Plan]) -> Ranking:
        units = inputs.units
        kl_NP = kl_without_training(board, plans, inputs.text_BT, self.stride, inputs.work)
        gains_NU, *alternatives = gains_of(kl_NP, self.base).split(len(units), 1)
        gains = {name: x_NU.mean(0).tolist() for name, x_NU in zip(inputs.alternatives, alternatives, strict=True)}
        more = {"kl_base": float(kl_NP[:, 0].mean()), "alternatives": gains}
        return replace(Ranking.by_rows(units, gains_NU, inputs.unit, more), alternatives=gains)


@selector("kl-removal", aligned=True)
class KlRemoval(Kl):
    """Units whose attention the teacher misses most, in KL, when they alone are linear."""

    base: ClassVar[Base] = "remove"


def candidates(board: Supernet, units: Sequence[Unit], base: Base) -> list[Plan]:
    """The base's plan, and those with one unit changed."""
    everything = board.everything
    kept = [[], *units] if base == "restore" else [everything, *(without(everything, unit) for unit in units)]
    return [board.keeping(heads) for heads in kept]


def kl_without_training(board: Supernet, plans: Sequence[Plan], text_NT: Tensor, stride: int, work: Work) -> Tensor:
    """KL(teacher, student) in nats per token of every plan on every row of text: (N, plans)."""

    @torch.no_grad()
    def piece(row: int) -> list[float]:
        ids_1T = text_NT[row : row + 1].to(board.student.device)
        theirs_BTM = final_hidden(board.teacher, ids_1T)
        return board.shared(
            plans, lambda student: float(kl(student, student.final_hidden(ids_1T), board.teacher, theirs_BTM, stride))
        )

    board.prepare(plans)
    each = TokenCost(forward_tokens=(1 + passes(plans)) * text_NT.shape[1])
    return work.pieces(f"kl {stride}", len(text_NT), piece, each=each)


def kl(
    student: BaseStudent, student_BTM: Tensor, teacher: PreTrainedModel, teacher_BTM: Tensor, stride: int = 1
) -> Tensor:
    """Nats per token, (), at every `stride`-th position, from the last hidden states."""
    return chunked_loss(
        student_BTM[:, ::stride],
        OutputHead.of(student),
        weights={"logits": 1.0},
        teacher=FromHidden(teacher_BTM[:, ::stride], OutputHead.of(teacher)),
    ).total


def round_tokens(tokens: int, rounds: int) -> list[int]:
    """Tokens that a candidate is trained on in each round."""
    return [max(1, round(tokens / KEPT**left)) for left in range(rounds - 1, -1, -1)]


def training_cost(plans: int, text_NT: Tensor, tokens: int, rounds: int) -> TokenCost:
    """Of all rounds: the first trains every plan, each later one a quarter of the candidates, and the base again."""
    counts = [plans, *(_open(plans - 1, later) + 1 for later in range(1, rounds))]
    trained = sum(count * amount for count, amount in zip(counts, round_tokens(tokens, rounds), strict=True))
    return TokenCost(forward_tokens=2 * sum(counts) * text_NT.numel(), training_tokens=trained)


def _open(units: int, later: int) -> int:
    return max(2, round(units / KEPT**later))


def gains_of(kl_NP: Tensor, base: Base) -> Tensor:
    """What the units are worth, (N, U), from the KL of the base's plan and of those with one unit changed."""
    gains_NU = kl_NP[:, :1] - kl_NP[:, 1:]
    return gains_NU if base == "restore" else -gains_NU


def gains_with_training(
    board: Supernet,
    plans: Sequence[Plan],
    text_NT: Tensor,
    stride: int,
    work: Work,
    train: Train,
    *,
    base: Base,
    tokens: int,
    rounds: int,
    cut: int,
) -> tuple[Tensor, list[int]]:
    """What the units are worth after training their candidates (N, U), and the last round that each was in.

    `cut`: how many units will be kept; a later round trains those whose worth is nearest to the cut.
    """
    units = len(plans) - 1
    gains_NU = torch.zeros(len(text_NT), units, dtype=torch.float64)
    last = [0] * units
    wanted = [*range(units)]
    for turn, amount in enumerate(round_tokens(tokens, rounds)):
        if turn:
            worth_U = gains_NU.mean(0)
            ordered = worth_U.sort(descending=True).values
            place = min(max(cut, 1), units - 1)
            distance_U = (worth_U - (ordered[place - 1] + ordered[place]) / 2).abs()
            wanted = sorted(sorted(wanted, key=distance_U.tolist().__getitem__)[: _open(units, turn)])
        kl_N = [
            _trained(board, plans[index], text_NT, stride, work, train, amount, f"{index}-{turn}")
            for index in (0, *(unit + 1 for unit in wanted))
        ]
        gains_NU[:, wanted] = gains_of(torch.stack(kl_N, 1), base)
        for unit in wanted:
            last[unit] = turn
    return gains_NU, last


def _trained(
    board: Supernet, plan: Plan, text_NT: Tensor, stride: int, work: Work, train: Train, tokens: int, name: str
) -> Tensor:
    each = TokenCost(forward_tokens=2 * text_NT.numel(), training_tokens=tokens)

    def piece(_: int) -> list[float]:
        student = type(board.student).from_teacher(board.teacher, plan, mixers_from=board.student)
        if student.replaced_layers():
            train(student, tokens, f"candidate-{name}")
        with torch.no_grad():
            rows = [row[None].to(student.device) for row in text_NT]
            pairs = [(student.final_hidden(row), final_hidden(board.teacher, row)) for row in rows]
            return [float(kl(student, mine, board.teacher, theirs, stride)) for mine, theirs in pairs]

    return work.pieces(f"kl {stride} after {tokens} tokens, {name}", 1, piece, each=each, together=True)[0]
