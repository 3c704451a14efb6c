"""Packed documents equal the same documents alone, and pads change nothing, wherever they are."""

from functools import cache

import pytest
import torch
from transformers import DataCollatorWithFlattening

from subquad.model.interface import shapes_of
from subquad.model.packing import Documents, Layout
from subquad.model.student import Student
from subquad.plan import Plan
from tests.helpers import FAMILIES, tiny
from tests.model.test_student import MIXERS, mixed_plan

TOLERANCE = 1e-5
every_mixer = pytest.mark.parametrize("mixer", MIXERS)
LENGTHS = [[37, 3, 1, 19], [20, 40], [60]]  # documents of each row


@cache
def student_of(mixer, family="llama", attention=None, join="split", dtype=torch.float32):
    teacher = tiny(family, dtype)
    if attention:
        teacher.set_attn_implementation(attention)
    plan = mixed_plan(shapes_of(teacher), mixer)
    if join == "parallel":
        heads = [*range(6)]
        layers = [{mixer: heads}, {"attention": [0, 4], mixer: heads}, {"attention": heads}]
        plan = Plan(shapes=plan.shapes, mixers=plan.mixers, layers=layers, join="parallel")
    student = Student.from_teacher(teacher, plan)
    student.calibrate(torch.randint(3, 97, (2, 64), generator=torch.Generator().manual_seed(0)))
    return student


def random_ids(*shape):
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(1))


def positions_of(lengths):
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])


def alone(student, ids_BT, lengths):
    """Logits of each document by itself."""
    rows = [
        torch.cat([student(part[None], use_cache=False).logits[0] for part in ids_T.split(row)])
        for ids_T, row in zip(ids_BT, lengths, strict=True)
    ]
    return torch.stack(rows)


def deviation(logits, expected):
    return ((logits - expected).abs().max() / expected.abs().max()).item()


@every_mixer
@torch.no_grad()
def test_packed_documents_are_the_documents_alone(mixer):
    """Without a cache, with one, and with a mask of ones; then every row continues its last document."""
    student, ids, positions = student_of(mixer), random_ids(3, 60), positions_of(LENGTHS)
    expected = alone(student, ids, LENGTHS)
    assert deviation(student(ids, use_cache=False).logits, expected) > 0.1
    assert deviation(student(ids, position_ids=positions, use_cache=False).logits, expected) < TOLERANCE
    ones = torch.ones_like(ids)
    assert deviation(student(ids, position_ids=positions, attention_mask=ones).logits, expected) < TOLERANCE

    prefill = student(ids, position_ids=positions)
    assert deviation(prefill.logits, expected) < TOLERANCE
    prefill.past_key_values.reorder_cache(torch.tensor([1, 2, 0]))
    more = random_ids(3, 9)
    new_logits = []
    for start, stop in ((0, 1), (1, 8), (8, 9)):
        steps = positions[[1, 2, 0], -1:] + 1 + torch.arange(start, stop)
        output = student(more[:, start:stop], position_ids=steps, past_key_values=prefill.past_key_values)
        new_logits.append(output.logits)
    for row, (source, length) in enumerate(((1, 40), (2, 60), (0, 19))):
        whole = torch.cat([ids[source, -length:], more[row]])[None]
        expected_row = student(whole, use_cache=False).logits[:, -9:]
        assert deviation(torch.cat(new_logits, 1)[row : row + 1], expected_row) < TOLERANCE


@pytest.mark.parametrize(
    ("mixer", "join"), [*((mixer, "split") for mixer in MIXERS), ("hedgehog", "parallel"), ("mamba2", "parallel")]
)
def test_gradients_of_packed_documents_are_those_of_the_documents_alone(mixer, join):
    student, ids = student_of(mixer, join=join, dtype=torch.float64), random_ids(2, 60)
    parameters = [*student.parameters()]
    student.train().requires_grad_(True)

    def gradients(logits):
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        return torch.autograd.grad((logits * weights).sum(), parameters, allow_unused=True)

    expected = gradients(alone(student, ids, LENGTHS[:2]))
    actual = gradients(student(ids, position_ids=positions_of(LENGTHS[:2])).logits)
    student.eval().requires_grad_(False)
    size = max(gradient.abs().max() for gradient in expected if gradient is not None)
    for gradient, expected_gradient in zip(actual, expected, strict=True):
        assert (gradient is None) == (expected_gradient is None)
        if gradient is not None:
            assert (gradient - expected_gradient).abs().max() < 1e-9 * size


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_documents_in_every_family(family):
    """With windows of the teacher's own shorter than the documents, and with learned positions."""
    student, ids = student_of("hedgehog", family), random_ids(3, 60)
    expected = alone(student, ids, LENGTHS)
    for use_cache in (False, True):
        logits = student(ids, position_ids=positions_of(LENGTHS), use_cache=use_cache).logits
        assert deviation(logits, expected) < TOLERANCE


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("given", ["position_ids", "seq_idx", "cu_seq_lens_q", "all"])
@torch.no_grad()
def test_batches_of_the_flattening_collator(given, attention):
    """Whatever it gives of positions, indices and cumulative lengths; without positions, rotary ones go on counting."""
    collator = DataCollatorWithFlattening(
        return_position_ids=given in ("position_ids", "all"),
        return_seq_idx=given in ("seq_idx", "all"),
        return_flash_attn_kwargs=given in ("cu_seq_lens_q", "all"),
    )
    documents = [*random_ids(60).split(LENGTHS[0])]
    batch = collator([{"input_ids": document.tolist()} for document in documents])
    student = student_of("gated_deltanet", attention=attention)
    expected = torch.cat([student(document[None], use_cache=False).logits[0] for document in documents])
    student.train()  # the mask of transformers sees packed positions in this mode only
    loss, logits = (student(**batch)[key] for key in ("loss", "logits"))
    student.eval()
    assert loss.isfinite() and deviation(logits[0], expected) < TOLERANCE


@torch.no_grad()
def test_a_packed_prompt_is_continued():
    student, ids = student_of("gated_deltanet"), random_ids(1, 60)
    kwargs = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    packed = student.generate(
        ids, position_ids=positions_of(LENGTHS[:1]), attention_mask=torch.ones_like(ids), **kwargs
    )
    document = student.generate(ids[:, -19:], attention_mask=torch.ones(1, 19), **kwargs)
    assert torch.equal(packed[:, 60:], document[:, 19:])


@every_mixer
@torch.no_grad()
def test_documents_with_pads_between_and_behind_a_cache(mixer):
    """Rows of different counts and lengths, filled with pads, in two pieces with a border in each."""
    student, ids = student_of(mixer), random_ids(2, 60)
    lengths, pads = [[12, 20, 15], [40, 11]], [[(12, 15), (50, 60)], [(0, 4), (30, 35)]]
    mask = torch.ones_like(ids)
    positions = torch.zeros_like(ids)
    for row in range(2):
        for start, stop in pads[row]:
            mask[row, start:stop] = 0
        positions[row, mask[row].bool()] = positions_of([lengths[row]])[0]
    states = student.new_cache()
    logits = torch.cat(
        [
            student(
                ids[:, start:stop],
                position_ids=positions[:, start:stop],
                attention_mask=mask[:, :stop],
                past_key_values=states,
            ).logits
            for start, stop in ((0, 20), (20, 60))
        ],
        1,
    )
    for row in range(2):
        real_T = mask[row].bool()
        expected = alone(student, ids[row, real_T][None], [lengths[row]])[0]
        assert deviation(logits[row, real_T], expected) < TOLERANCE


# name -> (pads of each of three rows, where the pieces end)
PADS = {
    "in one piece": ([(3, 4, 2), (0, 9, 0), (1, 1, 1)], [30]),
    "in every turn": ([(0, 0, 5), (2, 6, 0), (0, 3, 8)], [8, 20, 21, 22, 30]),
}


@every_mixer
@pytest.mark.parametrize(("pads", "pieces"), PADS.values(), ids=PADS)
@torch.no_grad()
def test_pads_anywhere_change_nothing(mixer, pads, pieces):
    student, ids = student_of(mixer), random_ids(3, 30)
    mask = torch.ones_like(ids)
    for row, counts in enumerate(pads):
        for stop, count in zip((3, 15, 20), counts, strict=True):
            mask[row, stop - min(stop, count) : stop] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    states, logits, start = student.new_cache(), [], 0
    for stop in pieces:
        output = student(
            ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=states,
        )
        logits.append(output.logits)
        start = stop
    logits = torch.cat(logits, 1)
    for row in range(3):
        real_T = mask[row].bool()
        expected = student(ids[row : row + 1, real_T], use_cache=False).logits[0]
        assert deviation(logits[row, real_T], expected) < TOLERANCE


def layout(positions, mask=None, past=0, **packing):
    student = student_of("gla")
    states = student.new_cache() if past else None
    if past:
        student(torch.full((positions.shape[-2], past), 5), past_key_values=states)
    return Layout.of(mask, states, torch.zeros(positions.shape[-2:]), positions, packing)


def test_positions_that_are_no_documents():
    left_padded = torch.tensor([[1, 1, 1, 0, 1, 2]])
    assert layout(left_padded, (torch.arange(6) > 2)[None]).documents is None
    assert layout(left_padded + 57, torch.arange(63)[None] > 59, past=57).documents is None
    assert layout(torch.arange(57, 63)[None], past=57).documents is None
    assert layout(torch.arange(5)[None]).documents is None
    assert layout(torch.tensor([[0, 1, 2, 0, 1]]).expand(3, 1, 5)).documents is None  # time, height and width
    assert layout(torch.tensor([[0, 1, 2, 0, 1]]).expand(4, 1, 5)).documents.packed  # text, and these three
    skipping = torch.tensor([[0, 1, 2, 70, 71]])
    assert layout(skipping).documents.packed  # as in transformers, without a mask
    assert layout(skipping, torch.ones(1, 5)).documents is None


def test_wrong_arguments_of_packing_are_named():
    with pytest.raises(ValueError, match="cu_seq_lens_q ends at 4, and the batch has 5 tokens"):
        layout(torch.arange(5)[None], cu_seq_lens_q=torch.tensor([0, 2, 4]))
    with pytest.raises(ValueError, match=r"seq_idx must be .*\(1, 5\), not \(1, 4\)"):
        layout(torch.arange(5)[None], seq_idx=torch.zeros(1, 4))


def test_a_long_document_does_not_pad_the_short_ones():
    """The gathered batches hold at most twice the tokens, and 32 a short document."""
    border_BT = torch.zeros(1, 4000, dtype=torch.bool)
    border_BT[0, 2500::10] = True
    documents = Documents.of(torch.ones_like(border_BT), border_BT, 0)
    assert sum(batch.token_NU.numel() for batch in documents.batches) <= 4000 + 32


def test_flash_attention_gets_the_ends_of_the_documents():
    documents = layout(positions_of(LENGTHS)).documents
    mask, arguments = documents.attention("flash_attention_2", None, 60)
    assert mask is None and arguments["max_length_q"] == 60
    assert arguments["cu_seq_lens_q"].tolist() == [0, 37, 40, 41, 60, 80, 120, 180]
    with pytest.raises(ValueError, match="'flash_attention_2' cannot keep these packed documents apart: use sdpa"):
        documents.attention("flash_attention_2", torch.ones(3, 60), 60)
