"""A prompt keeps what a tokenizer puts before a text, and loses what it puts behind."""

import pytest
import torch
from tokenizers import processors

from subquad.data.prompts import encode_prompt
from subquad.evaluate.samples import samples
from subquad.jobs.generate import generate
from tests.helpers import byte_tokenizer, make_teacher, tiny

BOS, EOS = 0, 1


def framing_tokenizer(template: str):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return tokenizer


@pytest.mark.parametrize(
    "template, before, behind",
    [
        ("$A", 0, 0),
        ("$A <eos>", 0, 1),
        ("<bos> $A <eos>", 1, 1),
        ("<bos> $A", 1, 0),
        ("<bos> <eos> $A <eos> <bos>", 2, 2),
    ],
)
@pytest.mark.parametrize("prompt", ["The king", "The end<eos>", "<bos>The king", ""])
def test_a_prompt_has_no_end(template, before, behind, prompt):
    tokenizer = framing_tokenizer(template)
    bare, framed = tokenizer(prompt, add_special_tokens=False).input_ids, tokenizer(prompt).input_ids
    encoded = encode_prompt(tokenizer, prompt)
    assert encoded["input_ids"].tolist() == [framed[:before] + bare]
    assert len(framed) == before + len(bare) + behind
    assert encoded["attention_mask"].shape == encoded["input_ids"].shape
    assert encode_prompt(tokenizer, prompt + "x", framed=False)["input_ids"].tolist() == [
        tokenizer(prompt + "x", add_special_tokens=False).input_ids
    ]


def test_texts_are_continued_as_without_the_end(tmp_path):
    model = tiny("llama", vocab_size=300)
    plain, ending = framing_tokenizer("$A"), framing_tokenizer("$A <eos>")
    expected = samples(model, plain, ["The king"], 6)
    assert samples(model, ending, ["The king"], 6) == expected
    with torch.no_grad():  # the end would change the text
        ended_BT = model.generate(**ending("The king", return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert ending.decode(ended_BT[0, -6:], skip_special_tokens=True) != expected[0]["text"]

    make_teacher(tmp_path)
    model.save_pretrained(tmp_path)
    texts = []
    for tokenizer in (plain, ending):
        tokenizer.save_pretrained(tmp_path)
        texts.append(generate(tmp_path, "The king", max_new_tokens=6))
    assert texts == [expected[0]["text"]] * 2
