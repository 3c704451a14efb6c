"""Checks of a language model when it is opened as a teacher: what would fail only after its student is trained.

- `check_causal`: a changed later token must leave earlier logits alone. An encoder fails.
- `check_finite`: logits are numbers.
- `check_shared`: weights that modules share are those that the model's class ties, so that a student can be saved.
- `longest_input`: the number of tokens that the model takes, by trial. Tables of learned positions end; rotary
  embeddings do not.
- `check_students`: two cached steps and left padding change no logits, in students made of the teacher. Where the
  teacher itself deviates, its students may.

All passes are over a few tokens, except for a model that is asked for more tokens than its configuration states: a row
just longer than that is tried. They leave the model as it was.

Legend: B batch, T tokens, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel

from subquad.errors import UserError
from subquad.model.cache import CACHE
from subquad.model.interface import input_device
from subquad.model.placement import is_quantised
from subquad.utils.logging import quiet

TOLERANCE = 1e-2  # of the largest logit's size, in float32; narrower dtypes get more. `check_student` is the exact test
MOVED = 1e-3  # the same, for logits before a changed token, which a causal model computes alike, up to rounding
TRIAL_TOKENS, TRIAL_STEPS, TRIAL_PADS = 8, 2, 3
UNSTATED = 4096  # tokens of a trial row of a model that states no number of positions, at most
OFFSET = 8  # rows at the start of a table of positions that no token uses, at most

_causal: WeakSet[PreTrainedModel] = WeakSet()  # models that passed `check_causal`


@contextmanager
def refused_by_name(model: PreTrainedModel) -> Iterator[None]:
    """Context in which any error of a trial pass becomes a UserError that names the model's class."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise UserError(
            f"{type(model).__name__} cannot be converted: a trial pass fails ({_in_words(error)})"
        ) from error


def check_causal(model: PreTrainedModel) -> None:
    """Raises UserError for a model whose earlier logits change with a later token; a success is remembered.

    Quantised weights are not asked: LLM.int8 rounds all tokens of a batch together.
    """
    if model in _causal or is_quantised(model):
        return
    half = TRIAL_TOKENS // 2
    ids_BT = _trial_ids(model)
    changed_BT = torch.cat([ids_BT[:, :half], ids_BT[:, half:].roll(1, 0)], 1)
    with _trial(model):
        earlier_BTV, changed_BTV = (_logits(model, ids)[:, :half] for ids in (ids_BT, changed_BT))
    if _deviation(changed_BTV, earlier_BTV) > _tolerance(model, MOVED):
        is_decoder = getattr(model.config, "is_decoder", None)
        reason = "its configuration says is_decoder: false" if is_decoder is False else "as an encoder does"
        raise UserError(
            f"{type(model).__name__} is no causal language model: a token changes what it predicts before that token "
            f"({reason}); give a decoder"
        )
    _causal.add(model)


def check_finite(model: PreTrainedModel) -> None:
    """Raises UserError for a model whose logits are NaN, infinite or all forbidden (-inf)."""
    with _trial(model):
        logits_BTV = _logits(model, _trial_ids(model))
    if logits_BTV.isnan().any() or not logits_BTV.amax(-1).isfinite().all():
        raise UserError(
            f"{type(model).__name__} gives logits that are no finite numbers in {model.dtype}, so nothing can be "
            "learned from it: look for damaged weights, or load it in another dtype"
        )


def check_shared(model: PreTrainedModel) -> None:
    """Raises UserError for weights that modules share without their class saying so: transformers cannot save them."""
    tied = {*getattr(model, "all_tied_weights_keys", {})}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in tied:
            names.setdefault(id(parameter), []).append(name)
    shared = [group for group in names.values() if len(group) > 1]
    if shared:
        raise UserError(
            f"{type(model).__name__} shares {shared[0][0]} with {shared[0][1]}, and its class does not tie them, so no "
            "student of it could be saved: give each module its own weights"
        )


def longest_input(model: PreTrainedModel, wanted: int) -> int:
    """Number of tokens that the model takes in one row, at most `wanted`.

    Where the configuration states fewer positions, the last position of the row is tried, and a row that is just longer
    than what is stated. Raises UserError if there is no memory for it.
    """
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    stated = stated if isinstance(stated, int) else 0
    row = min(wanted, stated + OFFSET + 1 if stated else UNSTATED)  # longer ones would only take longer

    def takes(length: int) -> bool:
        return takes_position(model, length - 1) and (length > row or _takes(model, length))

    if wanted <= stated - OFFSET or (takes(wanted) and _takes(model, row)):
        return wanted
    shortest, fails = 0, wanted if _takes(model, row) else row
    for length in (stated, stated + 1):  # where most tables end
        if shortest < length < fails:
            shortest, fails = (length, fails) if takes(length) else (shortest, length)
    while fails - shortest > 1:
        middle = (shortest + fails) // 2
        shortest, fails = (middle, fails) if takes(middle) else (shortest, middle)
    return shortest


def takes_position(model: PreTrainedModel, position: int) -> bool:
    """Whether the model computes a token at this position; true for a model that is not given positions."""
    if not _is_given_positions(model):
        return True
    ids_11 = _trial_ids(model)[:1, :1]
    return _passes(model, ids_11, position_ids=torch.full_like(ids_11, position))


def check_students(teacher: PreTrainedModel, students: Mapping[str, PreTrainedModel]) -> list[str]:
    """Tries what generation needs on the teacher and on students made of it, whose keys are their names for people.

    Returns a sentence for every property that the teacher itself lacks. Raises UserError for a student that fails, or
    deviates where the teacher does not.
    """
    family, limit = type(teacher).__name__, _tolerance(teacher)
    notes = []
    for what, deviation in (("two cached steps", _cached_deviation), ("left padding", _padded_deviation)):
        try:
            own_deviation = deviation(teacher)
            own_result = f"deviates by {own_deviation:.1e} of its largest logit"
        except Exception as error:
            own_deviation, own_result = float("inf"), f"fails ({_in_words(error)})"
        teacher_is_right = own_deviation <= limit
        if not teacher_is_right:
            notes.append(f"with {what}, {family} itself {own_result}; its students may, too")
        for name, student in students.items():
            try:
                student_deviation = deviation(student)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                raise UserError(
                    f"{family} cannot be converted: a student with {name} fails with {what} ({_in_words(error)})"
                ) from error
            if teacher_is_right and not student_deviation <= limit:  # a NaN fails too
                raise UserError(
                    f"{family} cannot be converted: with {what}, the logits of a student with {name} change by "
                    f"{student_deviation:.1e} of the largest, and the teacher's do not"
                )
    return notes


def check_same(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Raises UserError if the student, all of whose heads attend, predicts something else than its teacher."""
    ids_BT = _trial_ids(teacher)
    with _trial(teacher), _trial(student):
        deviation = _deviation(_logits(student, ids_BT), _logits(teacher, ids_BT))
    if not deviation <= _tolerance(teacher):
        raise UserError(
            f"{type(teacher).__name__} cannot be converted: a student in which every head attends deviates from it by "
            f"{deviation:.1e} of the largest logit"
        )


def _cached_deviation(model: PreTrainedModel) -> float:
    """Deviation of logits that are computed step by step with a cache."""
    ids_BT = _trial_ids(model)
    with _trial(model):
        expected_BTV = _logits(model, ids_BT)
        new_cache: Any = getattr(model, "new_cache", None)  # of a student
        cache = DynamicCache(config=model.config) if new_cache is None else new_cache()
        pieces = ids_BT.split([TRIAL_TOKENS - TRIAL_STEPS, *[1] * TRIAL_STEPS], 1)
        logits = [model(input_ids=piece_BT, use_cache=True, **{CACHE: cache}).logits for piece_BT in pieces]
    return _deviation(torch.cat(logits, 1), expected_BTV)


def _padded_deviation(model: PreTrainedModel) -> float:
    """Deviation of the logits of a row with pads on its left."""
    ids_BT = _trial_ids(model)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :TRIAL_PADS] = 0
    positions = {"position_ids": (mask_BT.cumsum(-1) - 1).clamp_min(0)} if _is_given_positions(model) else {}
    with _trial(model):
        expected_1TV = _logits(model, ids_BT[:1, TRIAL_PADS:])
        padded_BTV = _logits(model, ids_BT, attention_mask=mask_BT, **positions)
    return _deviation(padded_BTV[:1, TRIAL_PADS:], expected_1TV)


def _is_given_positions(model: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _trial_ids(model: PreTrainedModel, rows: int = 2, length: int = TRIAL_TOKENS) -> Tensor:
    """Random token ids (rows, length), always the same; none is the padding token."""
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(3, max(5, config.vocab_size), (rows, length), generator=generator)
    pad_id = getattr(config, "pad_token_id", None)
    ids_BT = ids_BT if pad_id is None else torch.where(ids_BT == pad_id, ids_BT - 1, ids_BT)
    return ids_BT.to(input_device(model))


def _logits(model: PreTrainedModel, ids_BT: Tensor, **kwargs: Any) -> Tensor:
    output: Any = model(input_ids=ids_BT, use_cache=False, **kwargs)
    logits_BTV: Tensor = output.logits
    return logits_BTV.float()


def _deviation(logits: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest finite logit. Equal infinities do not differ."""
    difference = torch.where(logits == expected, 0.0, (logits - expected).abs())
    scale = expected.masked_fill(~expected.isfinite(), 0.0).abs().max().clamp_min(1e-6)
    return float(difference.max() / scale)


def _tolerance(model: PreTrainedModel, tolerance: float = TOLERANCE) -> float:
    """Allowed deviation in the model's dtype: `tolerance` in float32, at most 50 times as much in narrower ones."""
    ratio = torch.finfo(model.dtype).eps / torch.finfo(torch.float32).eps
    return tolerance * min(50.0, max(1.0, ratio))


def _takes(model: PreTrainedModel, length: int) -> bool:
    """Whether the model takes a row of this many tokens."""
    return _passes(model, _trial_ids(model, 1, length))


def _passes(model: PreTrainedModel, ids_BT: Tensor, **kwargs: Any) -> bool:
    """Whether the decoder computes its last hidden states; no logits are made, which would take much memory."""
    try:
        with _trial(model), WithinTables():
            model.base_model(input_ids=ids_BT, use_cache=False, **kwargs)
        return True
    except torch.OutOfMemoryError:
        raise UserError(
            f"{type(model).__name__} has no memory for a row of {ids_BT.shape[1]:,} tokens, the longest of the recipe: "
            "give shorter contexts and sequences"
        ) from None
    except Exception:  # of whatever type a model raises at the end of its table
        return False


def _in_words(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def _trial(model: PreTrainedModel) -> Iterator[None]:
    """Context of a pass in evaluation mode without gradients, after which every module is as it was before.

    Some position embeddings keep tables for the longest input so far.
    """
    before = [(module, {**module.__dict__}, {**module._buffers}) for module in model.modules()]
    try:
        with torch.no_grad(), quiet():
            model.eval()
            yield
    finally:
        for module, attributes, buffers in before:
            for current, previous in ((module.__dict__, attributes), (module._buffers, buffers)):
                for name in current.keys() - previous.keys():
                    del current[name]
                current.update(previous)


class WithinTables(TorchDispatchMode):
    """Raises IndexError where an index is beyond a table; on a GPU such a look-up would end the process's use of it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LOOK_UPS:
            size, index = _LOOK_UPS[func](*args)
            if index.dtype in (torch.int32, torch.int64) and index.numel() and int(index.max()) >= size:
                raise IndexError(f"index {int(index.max())} is beyond a table of {size}")
        return func(*args, **(kwargs or {}))


# Look-ups by index: their arguments -> rows of the table, and the indices
_LOOK_UPS: dict[Any, Callable[..., tuple[int, Tensor]]] = {
    torch.ops.aten.embedding.default: lambda table, index, *_: (table.shape[0], index),
    torch.ops.aten.index_select.default: lambda table, dim, index: (table.shape[dim], index),
    torch.ops.aten.gather.default: lambda table, dim, index, *_: (table.shape[dim], index),
}
