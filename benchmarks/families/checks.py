"""What a student of a family can do: every check on a tiny random model, and the family's outcome.

Notable:
- Two references are exact: a student that keeps all its attention, and a mixed student whose layers are all restored
  (`attending`). Both must be the teacher. Token-by-token decoding is compared with the teacher's own.
- A family in which the teacher itself deviates (cached from uncached, padded from alone) is held to no more than that.

Legend: B batch, T tokens, V vocabulary.
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.families.tiny import make_tiny, task_of
from subquad.errors import UserError
from subquad.model.cache import CACHE
from subquad.model.conformance import TOLERANCE, ConformanceError, check_student
from subquad.model.image_student import ImageStudent
from subquad.model.interface import image_size, shapes_of
from subquad.model.layer_call import attending
from subquad.model.output_head import check_head, final_hidden
from subquad.model.student import Student
from subquad.model.teacher_check import check_causal, check_shared, check_students, refused_by_name
from subquad.model.text_part import text_part
from subquad.plan import AttentionShape, Plan

OUTCOMES = ("works", "refused", "teacher", "crashes", "deviates")
LENGTH, PROMPT, NEW_TOKENS = 16, 10, 6
SECOND, THIRD = "discrete_mamba2", "sliding_window"  # beside attention in a mixed layer
RECURRENT = "gated_deltanet"
OPTIONS: dict[str, dict[str, Any]] = {SECOND: {"rotary": False}, THIRD: {"window": 6}, RECURRENT: {}}


@dataclass
class Outcome:
    """Result for one family: `detail` is a sentence or a number, `numbers` are deviations by check.

    `outcome`: works; refused (Subquad says so in one sentence); teacher (the model cannot be made or run, or deviates
    from itself); crashes (any other exception); deviates (a student computes something else than it should).
    """

    family: str
    model: str = ""
    outcome: str = "works"
    detail: str = ""
    step: str = ""
    numbers: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Entry of the JSON."""
        return asdict(self)


class Deviation(Exception):
    """A student that computes something else than it should."""


class TeacherFault(Exception):
    """A teacher that cannot be made, or deviates from itself."""


def try_family(model_type: str, make: Callable[[str], PreTrainedModel] = make_tiny) -> Outcome:
    """Outcome of all checks of one family."""
    outcome = Outcome(model_type)
    try:
        with _of_teacher():
            outcome.step = "make the teacher"
            teacher = make(model_type)
            teacher = teacher if task_of(model_type).of_images else text_part(teacher)
            outcome.model = type(teacher).__name__
        checks = _image_checks if task_of(model_type).of_images else _text_checks
        for step in checks(teacher, outcome.numbers):
            outcome.step = step
        outcome.step = ""
        if "other head" in outcome.numbers:
            outcome.detail = "as a student in Python; subquad convert needs a linear output head"
    except UserError as error:
        outcome.outcome, outcome.detail = "refused", str(error)
    except TeacherFault as error:
        outcome.outcome, outcome.detail = "teacher", str(error)
    except (Deviation, ConformanceError) as error:
        outcome.outcome, outcome.detail = "deviates", str(error)
    except Exception as error:
        outcome.outcome, outcome.detail = "crashes", _gist(error)
    return outcome


def mixed_plan(shapes: list[AttentionShape], third: str = THIRD, **options: Any) -> Plan:
    """Every layer divided by heads: attention, a recurrence without rotary embedding, and a third mixer.

    `options`: options of the two other mixers.
    """
    names = ("attention", SECOND, third)
    layers = [{name: [*range(start, shape.heads, 3)] for start, name in enumerate(names)} for shape in shapes]
    layers = [{name: heads for name, heads in layer.items() if heads} for layer in layers]
    mixers = {"attention": {}, **{name: {**OPTIONS[name], **options} for name in names[1:]}}
    return Plan(shapes=shapes, mixers=mixers, layers=layers)


def deviation(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest expected value; infinite where the difference is no number."""
    difference = ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-6)).item()
    return difference if math.isfinite(difference) else math.inf


@torch.no_grad()
def _text_checks(teacher: Any, numbers: dict[str, float]) -> Iterator[str]:
    """Runs the checks of a causal language model; yields the name of each before it runs."""
    yield "run the teacher"
    with _of_teacher():
        rows = teacher.get_input_embeddings().weight.shape[0]
        tokens_BT = torch.randint(3, rows, (2, LENGTH), generator=torch.Generator().manual_seed(0))
        logits_BTV = teacher(input_ids=tokens_BT, use_cache=False).logits
        cached_BTV = _decoded(teacher, tokens_BT)
        texts_BT = _generated(teacher, tokens_BT)
        changed_BT = tokens_BT.clone()
        changed_BT[:, -1] = 3 + (tokens_BT[:, -1] - 2) % (rows - 3)
        earlier_BTV = teacher(input_ids=changed_BT, use_cache=False).logits[:, :-1]
    numbers["teacher: cached"] = deviation(cached_BTV, logits_BTV)
    numbers["teacher: later token"] = deviation(earlier_BTV, logits_BTV[:, :-1])
    if not bool(logits_BTV.isfinite().all()):
        raise TeacherFault("its logits are not finite")

    def compare(check: str, actual: Tensor, expected: Tensor) -> None:
        numbers[check] = deviation(actual, expected)
        if not numbers[check] <= TOLERANCE:
            raise Deviation(f"{check}: {numbers[check]:.1e} of the largest logit")

    yield "find its attention"
    shapes = shapes_of(teacher)

    yield "open it"
    with refused_by_name(teacher):
        check_shared(teacher)
        check_causal(teacher)
        kept = Student.from_teacher(teacher, Plan.all_attention(shapes))
        check_students(teacher, {"attention": kept})
    if numbers["teacher: later token"] > TOLERANCE:
        number = f"{numbers['teacher: later token']:.1e}"
        raise Deviation(f"taken as a causal model, although a later token changes earlier logits by {number}")

    yield "keep all attention"
    compare("all attention", kept(input_ids=tokens_BT, use_cache=False).logits, logits_BTV)
    kept_BTV = _decoded(kept, tokens_BT)
    nearest_BTV = min((cached_BTV, logits_BTV), key=partial(deviation, kept_BTV))  # a teacher's own cache may be wrong
    compare("all attention, cached", kept_BTV, nearest_BTV)
    if not torch.equal(_generated(kept, tokens_BT), texts_BT):
        if torch.equal(_greedy(teacher, tokens_BT), texts_BT):
            raise Deviation("all attention, generated: other tokens than the teacher's")
        numbers["teacher: generated"] = 1.0

    yield "restore every layer of a mixed plan"
    mixed = Student.from_teacher(teacher, mixed_plan(shapes))
    restored_BTM = mixed.final_hidden(tokens_BT, forward_context=attending(range(len(shapes))))
    compare("restored", restored_BTM, final_hidden(teacher, tokens_BT))

    for name, student in (("mixed", mixed), ("recurrent", _recurrent(Student, teacher, shapes))):
        yield f"conform with a {name} plan"
        deviations = check_student(student, length=LENGTH)
        numbers[name] = max(deviations.values())
        padded = max(number for check, number in deviations.items() if check.startswith("left-padded"))
        others = max(number for check, number in deviations.items() if not check.startswith("left-padded"))
        for check, number in (("padded", padded), ("cached", others)):  # allowed, as the teacher deviates, too
            numbers[f"teacher: {check}"] = max(numbers.get(f"teacher: {check}", 0.0), number)
    yield "compute its likelihoods in chunks"
    with refused_by_name(teacher):
        try:
            check_head(teacher)
        except UserError:
            numbers["other head"] = 1.0
    for check in ("cached", "padded", "generated"):
        if (number := numbers.get(f"teacher: {check}", 0.0)) > TOLERANCE:
            raise TeacherFault(f"{check}, it deviates from itself by {number:.1e}; all else works")


@torch.no_grad()
def _image_checks(teacher: Any, numbers: dict[str, float]) -> Iterator[str]:
    """Runs the checks of an image encoder; yields the name of each before it runs."""
    yield "run the teacher"
    with _of_teacher():
        inputs = _image_inputs(teacher)
        expected = _answer(teacher(**inputs))
    if not bool(expected.isfinite().all()):
        raise TeacherFault("its outputs are not finite")

    def compare(check: str, actual: Tensor, expected: Tensor) -> None:
        numbers[check] = deviation(actual, expected)
        if not numbers[check] <= TOLERANCE:
            raise Deviation(f"{check}: {numbers[check]:.1e} of the largest output")

    yield "find its attention"
    shapes = shapes_of(teacher)

    yield "keep all attention"
    kept = ImageStudent.from_teacher(teacher, Plan.all_attention(shapes))
    compare("all attention", _answer(kept(**inputs)), expected)

    yield "restore every layer of a mixed plan"
    mixed = ImageStudent.from_teacher(teacher, mixed_plan(shapes, RECURRENT, bidirectional=True))
    (pixels_BCHW,) = inputs.values()
    restored_BTM = mixed.final_hidden(pixels_BCHW, forward_context=attending(range(len(shapes))))
    compare("restored", restored_BTM, kept.final_hidden(pixels_BCHW))

    recurrent = _recurrent(ImageStudent, teacher, shapes, bidirectional=True)
    for name, student in (("mixed", mixed), ("recurrent", recurrent)):
        yield f"save and load a {name} plan"
        if not bool(_answer(student(**inputs)).isfinite().all()):
            raise Deviation(f"{name}: outputs that are not finite")
        _saved_and_loaded(student, inputs, partial(compare, f"{name}, saved and loaded"))


def _image_inputs(teacher: Any) -> dict[str, Tensor]:
    """Two random images, or two videos for a model that takes no images."""
    config, generator = teacher.config, torch.Generator().manual_seed(0)
    size = image_size(config) if hasattr(config, "image_size") else (64, 64)
    pixels_BCHW = torch.randn(2, getattr(config, "num_channels", 3), *size, generator=generator)
    images = {teacher.main_input_name: pixels_BCHW}
    try:
        teacher(**images)
    except ValueError:
        if not hasattr(config, "num_frames"):
            raise
        return {teacher.main_input_name: pixels_BCHW[:, None].repeat_interleave(config.num_frames, 1)}
    return images


def _recurrent(student: Any, teacher: Any, shapes: list[AttentionShape], **options: Any) -> Any:
    """Student without any attention."""
    return student.from_teacher(teacher, Plan.by_layer(shapes, [], RECURRENT, {**OPTIONS[RECURRENT], **options}))


def _saved_and_loaded(student: Any, inputs: dict[str, Tensor], compare: Callable[[Tensor, Tensor], None]) -> None:
    """Compares a student that was saved and loaded with itself."""
    with tempfile.TemporaryDirectory() as folder:
        student.save_pretrained(folder)
        loaded = type(student).from_pretrained(folder, dtype=student.dtype).eval()
    compare(_answer(loaded(**inputs)), _answer(student(**inputs)))


def _answer(output: Any) -> Tensor:
    """Logits of a classifier, or the last hidden states of an encoder."""
    answer: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return answer


def _decoded(model: Any, tokens_BT: Tensor) -> Tensor:
    """Logits (B, T, V) of a prompt and single tokens after it, with the cache that the model makes by itself.

    A model that returns no cache reads all tokens at once.
    """
    output = model(input_ids=tokens_BT[:, :PROMPT], use_cache=True)
    logits = [output.logits]
    if output.get(CACHE) is None:
        return model(input_ids=tokens_BT, use_cache=False).logits  # type: ignore[no-any-return]
    for t in range(PROMPT, tokens_BT.shape[1]):
        output = model(input_ids=tokens_BT[:, t : t + 1], use_cache=True, **{CACHE: output[CACHE]})
        logits.append(output.logits)
    return torch.cat(logits, 1)


def _generated(model: Any, tokens_BT: Tensor) -> Tensor:
    """Greedy continuation of the first tokens."""
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    prompt_BT = tokens_BT[:, :PROMPT]
    tokens: Tensor = model.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), **settings)
    return tokens


def _greedy(model: Any, tokens_BT: Tensor) -> Tensor:
    """Likeliest continuation of the first tokens, without a cache."""
    tokens_BT = tokens_BT[:, :PROMPT]
    for _ in range(NEW_TOKENS):
        next_B1 = model(input_ids=tokens_BT, use_cache=False).logits[:, -1:].argmax(-1)
        tokens_BT = torch.cat([tokens_BT, next_B1], 1)
    return tokens_BT


@contextmanager
def _of_teacher() -> Iterator[None]:
    """Context in which any exception is the teacher's fault."""
    try:
        yield
    except Exception as error:
        raise TeacherFault(_gist(error)) from error


def _gist(error: Exception) -> str:
    """Type of an exception and the beginning of its message, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
