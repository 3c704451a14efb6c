"""Keys and values that grow in place: the same as copies of them, whatever the cache goes through."""

from copy import deepcopy

import pytest
import torch

from subquad.model.cache import append
from subquad.model.interface import shapes_of
from subquad.model.student import Student
from subquad.plan import Plan
from tests.helpers import tiny


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("heads", [(1, 1), (2, 3)])
def test_appending_is_joining(heads, window, mode):
    copies = 0
    with mode():
        appended_BGTD = joined_BGTD = torch.randn(*heads, 200, 4)
        for step in range(60):
            new_BGTD = torch.randn(*heads, 1 + step % 3, 4)
            pointer = appended_BGTD.untyped_storage().data_ptr()
            appended_BGTD, joined_BGTD = append(appended_BGTD, new_BGTD), torch.cat([joined_BGTD, new_BGTD], 2)
            copies += appended_BGTD.untyped_storage().data_ptr() != pointer
            if window:
                appended_BGTD, joined_BGTD = appended_BGTD[:, :, -window:], joined_BGTD[:, :, -window:]
            assert torch.equal(appended_BGTD, joined_BGTD)
    assert 2 <= copies < 20
    assert appended_BGTD.untyped_storage().nbytes() <= appended_BGTD.nbytes * 9 / 8


def test_gradients_pass_through():
    old, new = (torch.randn(1, 2, tokens, 4, requires_grad=True) for tokens in (40, 1))
    (append(append(old, new), new) ** 2).sum().backward()
    assert torch.equal(old.grad, 2 * old) and torch.equal(new.grad, 4 * new)


@torch.no_grad()
def test_a_copied_prefix_goes_on_by_itself():
    """Two continuations of one prompt, each with its own copy of the cache; and one that changes inference mode."""
    teacher = tiny("llama")
    student = Student.from_teacher(teacher, Plan.by_layer(shapes_of(teacher), [0, 2], "hedgehog", {"window": 33}))
    prompt, first, second = torch.randint(3, 97, (3, 1, 50)).unbind(0)
    cache = student.new_cache()
    student(prompt, past_key_values=cache)
    student(first[:, :1], past_key_values=cache)  # which makes room
    copied_cache = deepcopy(cache)
    logits = {}
    for step in range(1, 6):
        for name, tokens, student_cache in (("first", first, cache), ("second", second, copied_cache)):
            with (torch.no_grad, torch.inference_mode)[step % 2]():
                logits[name] = student(tokens[:, step : step + 1], past_key_values=student_cache).logits[:, -1]
    for name, tokens in (("first", first), ("second", second)):
        full_logits = student(torch.cat([prompt, first[:, :1], tokens[:, 1:6]], 1)).logits[:, -1]
        torch.testing.assert_close(logits[name], full_logits, rtol=1e-4, atol=1e-5)
