"""Tokens without a row in the embedding never reach a model, whatever the text."""

import warnings

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from subquad.data.probes import make_probe
from subquad.data.text import load_corpus
from subquad.errors import UserError
from subquad.pretrained.load import load_pretrained
from subquad.pretrained.vocabulary import cut_to_rows
from tests.pretrained.teachers import VOCABULARY, logits

ROWS = len(VOCABULARY)


def test_added_tokens_without_rows_are_never_used(folder, tmp_path):
    before = load_pretrained(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new{number}>" for number in range(39)])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    with pytest.warns(UserWarning, match=rf"'teacher' has 40 tokens beyond the {ROWS} rows.*'<new0>': .* never used"):
        teacher = load_pretrained(str(folder))
    assert teacher.tokenizer.get_vocab() == before.tokenizer.get_vocab()
    assert teacher.tokenizer.pad_token is None
    text = "a <new3> b<pad>"
    assert teacher.tokenizer(text).input_ids == before.tokenizer(text).input_ids
    assert make_probe("copy", teacher.tokenizer, 64, 20).input_ids.max() < ROWS

    (tmp_path / "text.jsonl").write_text('{"text": "a <new3> b <pad> c"}\n' * 30)
    corpus = load_corpus([str(tmp_path / "text.jsonl")], teacher.tokenizer)
    assert corpus.train.max() < ROWS
    assert torch.isfinite(teacher.model(corpus.batch(0, batch=1, sequence_length=32, seed=0)).logits).all()

    # A student's folder gets the tokenizer as it is now
    teacher.tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == before.tokenizer.get_vocab()


def test_a_tokenizer_that_fits_stays_as_it_is(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher = load_pretrained(str(folder))
    assert torch.isfinite(logits(teacher.model)).all()
    assert len(teacher.tokenizer) == ROWS


def word_tokenizer(template: str = "$A", **changes: int) -> PreTrainedTokenizerFast:
    words = {"<unk>": 0, "a": 1, "b": 2, "</s>": 3, **changes}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("</s>", words["</s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")


def test_words_of_the_vocabulary_without_rows():
    tokenizer = word_tokenizer(far=70_000)
    with pytest.warns(UserWarning, match="1 tokens beyond the 4 rows"):
        cut_to_rows(tokenizer, 4, "t")
    assert tokenizer("a far b").input_ids == [1, 0, 2]


def test_merges_into_tokens_without_rows():
    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}
    core = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("ab", "c")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert tokenizer("abc").input_ids == [4]
    with pytest.warns(UserWarning):
        cut_to_rows(tokenizer, 4, "t")
    assert tokenizer("abc").input_ids == [3, 2]


def test_a_token_around_each_text_is_not_done_without():
    with pytest.raises(UserError, match=r"1 tokens beyond the 4 rows .*'</s>', and cannot do without them: resize"):
        cut_to_rows(word_tokenizer("$A </s>", **{"c": 3, "</s>": 4}), 4, "t")
