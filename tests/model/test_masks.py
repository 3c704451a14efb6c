"""Attention masks: what means causality and padding is obeyed in any form, and anything else is refused."""

import pytest
import torch

from subquad.model.masks import padding_mask
from tests.model.test_packing import TOLERANCE, deviation, random_ids, student_of

PADDING = torch.ones(2, 12, dtype=torch.bool)
PADDING[0, :4] = False
PADDING[1, 9:] = PADDING[1, 3] = False
CAUSAL = torch.ones(12, 12, dtype=torch.bool).tril()
VISIBLE = (CAUSAL & PADDING[:, None])[:, None]  # (B, 1, T, L)


def additive(visible, hidden=-1e38):
    return torch.where(visible, 0.0, hidden)


FORMS = {
    "bool": VISIBLE,
    "additive": additive(VISIBLE),
    "additive, -inf": additive(VISIBLE, -torch.inf),
    "a mask a head": VISIBLE.expand(2, 6, 12, 12),
    "pads see nothing": VISIBLE & PADDING[:, None, :, None],
    "pads that see nothing see everything": VISIBLE | ~VISIBLE.any(-1, keepdim=True),
}


@pytest.mark.parametrize("mask", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_masks_of_four_dimensions_mean_their_padding(mask, attention):
    assert torch.equal(padding_mask(mask, 2, 0, 12), PADDING)
    student, ids = student_of("hedgehog", attention=attention), random_ids(2, 12)
    positions = (PADDING.cumsum(-1) - 1).clamp_min(0)
    expected = student(ids, attention_mask=PADDING.long(), position_ids=positions).logits
    prefill = student(ids[:, :7], attention_mask=mask[:, :, :7, :7], position_ids=positions[:, :7])
    rest = student(
        ids[:, 7:],
        attention_mask=mask[:, :, 7:],
        position_ids=positions[:, 7:],
        past_key_values=prefill.past_key_values,
    )
    logits = torch.cat([prefill.logits, rest.logits], 1)
    assert deviation(logits[PADDING], expected[PADDING]) < TOLERANCE


@torch.no_grad()
def test_plain_causal_masks_are_no_mask():
    student, ids = student_of("hedgehog"), random_ids(2, 12)
    expected = student(ids).logits
    for mask in (CAUSAL[None, None], additive(CAUSAL[None, None]), CAUSAL.expand(2, 1, 12, 12)):
        assert padding_mask(mask, 2, 0, 12) is None
        assert torch.equal(student(ids, attention_mask=mask).logits, expected)


def changed(mask, index, value):
    mask = mask.clone()
    mask[index] = value
    return mask


REFUSED = {
    "ones": torch.ones(2, 1, 12, 12),
    "ones, bool": torch.ones(2, 1, 12, 12, dtype=torch.bool),
    "zeros": torch.zeros(1, 1, 12, 12),
    "a window": CAUSAL.triu(-5)[None, None],
    "documents": torch.block_diag(CAUSAL[:5, :5], CAUSAL[:7, :7])[None, None].bool(),
    "a prefix that sees itself": changed(CAUSAL, (slice(3), slice(3)), True)[None, None],
    "one key less": changed(VISIBLE, (1, 0, 8, 4), False),
    "a bias": changed(additive(VISIBLE), (1, 0, 8, 4), -0.5),
    "another head": changed(VISIBLE.repeat(1, 6, 1, 1), (1, 3, 8, 4), False),
    "integers": VISIBLE.long(),
}


@pytest.mark.parametrize("mask", REFUSED.values(), ids=REFUSED)
def test_other_masks_of_four_dimensions_are_refused(mask):
    with pytest.raises(ValueError, match="must hide later tokens and pads, and nothing else"):
        student_of("hedgehog")(random_ids(2, 12), attention_mask=mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_masks_of_any_type(dtype):
    student, ids = student_of("hedgehog"), random_ids(2, 12)
    expected = student(ids, attention_mask=PADDING.long()).logits
    assert deviation(student(ids, attention_mask=PADDING.to(dtype)).logits[PADDING], expected[PADDING]) == 0


WRONG = {
    "too short": (torch.ones(2, 11), r"here \(2, 12\), not \(2, 11\)"),
    "too long": (torch.ones(2, 13), r"here \(2, 12\), not \(2, 13\)"),
    "other rows": (torch.ones(1, 12), r"here \(2, 12\), not \(1, 12\)"),
    "additive": (additive(PADDING), "must be 1 at tokens and 0 at pads: it has negative numbers"),
    "three dimensions": (VISIBLE[:, 0], r"must be \(batch, tokens\), not \(2, 12, 12\)"),
    "a dictionary": ({"full_attention": VISIBLE}, r"must be \(batch, tokens\), not dict"),
    "other queries": (VISIBLE[:, :, 1:], r"must be \(batch, 1, 12, 12\) here, not \(2, 1, 11, 12\)"),
}


@pytest.mark.parametrize(("mask", "message"), WRONG.values(), ids=WRONG)
def test_wrong_masks_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        student_of("hedgehog")(random_ids(2, 12), attention_mask=mask)
