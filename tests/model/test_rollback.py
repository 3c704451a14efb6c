"""Tokens removed from a student's cache: as if they had never been read, for every mixer, and in assisted decoding."""

from copy import deepcopy

import pytest
import torch

from subquad.errors import UserError
from subquad.mixers import MIXERS
from subquad.model.interface import shapes_of
from subquad.model.student import Student
from subquad.plan import Plan
from tests.helpers import tiny

TOKENS = torch.randint(3, 97, (2, 30), generator=torch.Generator().manual_seed(0))
OPTIONS = {"sliding_window": {"window": 6, "sinks": 2}, "hedgehog": {"window": 6, "sinks": 2}, "liger": {"window": 6}}


def make(mixer, family="llama", join="split"):
    """Student with a replaced layer, a hybrid one, and one that attends."""
    teacher = tiny(family)
    heads = [*((1, head) for head in (0, 3)), *((2, head) for head in range(6))]
    return Student.from_teacher(teacher, Plan.by_head(shapes_of(teacher), heads, mixer, OPTIONS.get(mixer), join=join))


def read(student, cache, start, stop, **wishes):
    return student(TOKENS[:, start:stop], cache=cache, use_cache=True, **wishes).logits


@pytest.mark.parametrize("mixer", sorted(MIXERS.keys() - {"attention"}))
@torch.no_grad()
def test_removed_tokens_leave_no_trace(mixer):
    student = make(mixer)
    expected, cropped = student.new_cache(), student.new_cache()
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :3] = 0
    cropped.activate_past_recording()
    read(student, expected, 0, 9, attention_mask=mask[:, :9])
    read(student, cropped, 0, 12, attention_mask=mask[:, :12])
    cropped.crop(-3)  # the end of a prefill
    for start, stop, kept in ((9, 15, 13), (13, 19, 19), (19, 25, 19)):  # a part of a draft, none of it, all of it
        read(student, cropped, start, stop, attention_mask=mask[:, :stop])
        cropped.crop(kept - stop)
        assert cropped.get_seq_length() == kept
        assert all(not layer.passes for layer in cropped.layers)
    read(student, cropped, 19, 21, attention_mask=mask[:, :21])
    read(student, cropped, 21, 23, attention_mask=mask[:, :23])
    cropped.crop(-3)  # over the border of two passes
    read(student, expected, 9, 20, attention_mask=mask[:, :20])
    assert cropped.nbytes() == expected.nbytes() == student.plan.cache_bytes(20, 2, "float32")
    logits, expected_logits = (read(student, c, 20, 24, attention_mask=mask[:, :24]) for c in (cropped, expected))
    torch.testing.assert_close(logits[1:], expected_logits[1:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[:1], expected_logits[:1], atol=1e-4, rtol=1e-4)
    cropped.crop(0)
    cropped.crop(-24)
    assert cropped.get_seq_length() == cropped.nbytes() == 0
    first = read(student, cropped, 0, 5)
    torch.testing.assert_close(first, read(student, student.new_cache(), 0, 5))


@pytest.mark.parametrize(
    ("mixer", "family", "join"),
    [("gated_deltanet", "llama", "split"), ("hedgehog", "mistral", "parallel"), ("kda", "gemma2", "split")],
)
def test_assisted_decoding_gives_the_greedy_tokens(mixer, family, join):
    """Student as assistant of its teacher, the teacher as its assistant, and drafts looked up in the prompt."""
    student, teacher = make(mixer, family, join), tiny(family)
    prompt = TOKENS[:1, :8].repeat(1, 4)  # longer than the windows of Mistral and Gemma 2
    wishes = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    greedy = {model: model.generate(prompt, **wishes) for model in (student, teacher)}
    for model, draft in (
        (teacher, {"assistant_model": student}),
        (student, {"assistant_model": teacher}),
        (student, {"assistant_model": student}),
        (student, {"prompt_lookup_num_tokens": 4}),
    ):
        lengths = []
        hook = model.register_forward_pre_hook(
            lambda module, args, kwargs, lengths=lengths: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        output = model.generate(prompt, **wishes, **draft, return_dict_in_generate=True)
        hook.remove()
        assert torch.equal(output.sequences, greedy[model])
        assert {*lengths} - {1, 32}  # a draft was read in one pass
        assert output.cache.get_seq_length() == 43


@torch.no_grad()
def test_unrecorded_tokens_are_removed_where_all_heads_attend():
    teacher = tiny("llama")
    student = Student.from_teacher(teacher, Plan.all_attention(shapes_of(teacher)))
    cache = student.new_cache()
    read(student, cache, 0, 12)
    cache.crop(-5)
    read(student, cache, 7, 12)
    cache.crop(9)  # transformers before 5.24: tokens that are kept
    assert cache.get_seq_length() == 9
    torch.testing.assert_close(read(student, cache, 9, 14), student(TOKENS[:, :14]).logits[:, 9:])
    student = make("gla")
    cache = student.new_cache()
    read(student, cache, 0, 12)
    before = deepcopy(cache)
    with pytest.raises(UserError, match="the last 5 tokens cannot be removed .*activate_past_recording"):
        cache.crop(-5)
    torch.testing.assert_close(read(student, cache, 12, 14), read(student, before, 12, 14), atol=0, rtol=0)


@torch.no_grad()
def test_a_recorded_cache_is_copied_without_the_mixers():
    student = make("gla")
    cache = student.new_cache()
    cache.activate_past_recording()
    read(student, cache, 0, 12)
    copied = deepcopy(cache)
    assert copied.layers[0].passes[0].mixers["gla"].mixer is student.mixers(0)["gla"]
    for other in (cache, copied):
        other.crop(-4)
    torch.testing.assert_close(read(student, copied, 8, 14), read(student, cache, 8, 14), atol=0, rtol=0)
    cache.reorder_cache(torch.tensor([1, 0]))  # which has no rows to go back to
    with pytest.raises(UserError, match="the last 2 tokens"):
        cache.crop(-2)


@torch.no_grad()
def test_tokens_before_a_rows_last_document_do_not_come_back():
    """The states are those of the last document; its own tokens can be removed, if a later pass read them."""
    student = make("gla")
    cache = student.new_cache()
    cache.activate_past_recording()
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None].expand(2, -1)
    read(student, cache, 0, 12, position_ids=positions)
    with pytest.raises(UserError, match="the first 3 tokens end before a row's last document"):
        cache.crop(-9)
    with pytest.raises(UserError, match="tokens of packed documents"):
        cache.crop(-2)
    assert cache.get_seq_length() == 12
    later = torch.arange(7, 10)[None].expand(2, -1)
    read(student, cache, 12, 15, position_ids=later)
    cache.crop(-3)
    logits = read(student, cache, 12, 15, position_ids=later)
    alone = student(TOKENS[:, 5:15], position_ids=torch.arange(10)[None].expand(2, -1), use_cache=False).logits[:, 7:]
    torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)
