"""The retrieval probes: right answers at the end, exact lengths, seeded, for any tokenizer."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from subquad.data.retrieval import MAX_PAIRS, TASKS, WORDS, Probe, make_probe
from subquad.errors import UserError

TEXT = [
    "Memorize the following dictionary: The value of the key is. The pass key is 12 34 56. Remember it.",
    "There is important information hidden in a lot of irrelevant text. Find it and memorize it. What is the pass key?",
    " ".join(WORDS),
]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: a space of its own before every number."""
    return _byte_level(merges=0, digits=False)


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Words as tokens, digits one by one, and a <bos> before every text."""
    tokenizer = _byte_level(merges=600, digits=True)
    bos = tokenizer.convert_tokens_to_ids("<bos>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    return tokenizer


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece's way: the space belongs to the word, and every text starts with one."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    specials = ["<unk>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=specials, initial_alphabet=list("0123456789:'\n"))
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")


def _byte_level(merges: int, digits: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    splits = [pre_tokenizers.Digits(individual_digits=True), byte_level] if digits else [byte_level]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=258 + merges, special_tokens=["<bos>", "<eos>"], initial_alphabet=byte_level.alphabet()
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


TOKENIZERS = {"bytes": byte_tokenizer(), "bpe": bpe_tokenizer(), "metaspace": metaspace_tokenizer()}


@pytest.fixture(params=TOKENIZERS, scope="module")
def tokenizer(request):
    return TOKENIZERS[request.param]


def answer_text(tokenizer, probe: Probe, row: int) -> str:
    return tokenizer.decode(probe.input_ids[row][probe.answer_mask[row]]).strip()


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("context", [257, 512])
def test_rows_have_the_context_and_end_with_the_answer(name, context, tokenizer):
    probe = make_probe(name, tokenizer, context, 5, seed=3)
    assert probe.input_ids.shape == probe.answer_mask.shape == (5, context)
    assert probe.input_ids.dtype == torch.int64 and probe.answer_mask.dtype == torch.bool
    assert probe.per_token == (name == "copy")
    for mask in probe.answer_mask:  # one run of answer tokens, at the very end
        assert mask[-int(mask.sum()) :].all()
    again, other = (make_probe(name, tokenizer, context, 5, seed=seed) for seed in (3, 4))
    assert torch.equal(probe.input_ids, again.input_ids) and torch.equal(probe.answer_mask, again.answer_mask)
    assert not torch.equal(probe.input_ids, other.input_ids)
    assert len(set(map(tuple, probe.input_ids.tolist()))) == 5
    more = make_probe(name, tokenizer, context, 9, seed=3)
    assert torch.equal(more.input_ids[:5], probe.input_ids)


def test_copy_repeats_a_random_sequence_of_plain_tokens(tokenizer):
    probe = make_probe("copy", tokenizer, 101, 3, seed=0)
    start = len(tokenizer("")["input_ids"])
    length = (101 - start) // 2
    for ids, mask in zip(probe.input_ids, probe.answer_mask, strict=True):
        assert torch.equal(ids[-length:], ids[-2 * length : -length])
        assert mask.sum() == length - 1
        assert len(ids[-length:].unique()) == length  # a token names its successor
        assert not set(ids[start:].tolist()) & set(tokenizer.all_special_ids)
    # Longer than the vocabulary: tokens have to come more than once.
    assert make_probe("copy", tokenizer, 4000, 1, seed=0).input_ids.shape == (1, 4000)


@pytest.mark.parametrize("context", [400, 4000])
def test_dictionary_is_the_prompt_of_the_paper(context):
    tokenizer = TOKENIZERS["bytes"]  # decodes to what was encoded, to the letter
    probe = make_probe("dictionary", tokenizer, context, 8, seed=1)
    for row in range(8):
        text = tokenizer.decode(probe.input_ids[row])
        head, body = text.split("\n", 1)
        assert head == "Memorize the following dictionary:"
        body, question = body.rsplit("\n", 1)
        pairs = dict(line.split(":") for line in body.split("\n") if line.count(":") == 1)
        key = question.split("'")[1]
        assert question == f"The value of the key '{key}' is {pairs[key]}"
        assert answer_text(tokenizer, probe, row) == pairs[key]
        assert len(set(pairs.values())) == len(pairs) and all(0 <= int(value) <= 99 for value in pairs.values())
        assert set(pairs) <= set(WORDS)
        if context == 4000:  # more room than 0-99 can fill: the rest is text before the question
            assert len(pairs) == MAX_PAIRS and "The sky is blue." in body
        else:  # no further pair would have fitted
            assert 2 <= len(pairs) < MAX_PAIRS and len(body) - len("\n".join(f"{k}:{v}" for k, v in pairs.items())) < 14


def test_passkey_lies_at_all_depths_of_the_haystack():
    tokenizer = TOKENIZERS["bytes"]
    probe = make_probe("passkey", tokenizer, 2000, 12, seed=1)
    depths = []
    for row in range(12):
        text = tokenizer.decode(probe.input_ids[row])
        key = answer_text(tokenizer, probe, row)
        assert len(key) == 5 and key.isdigit()
        assert text.count(key) == 3 and text.endswith(f"The pass key is {key}")
        depths.append(text.index(f"The pass key is {key}. Remember it.") / len(text))
    thirds = [sum(low <= depth < low + 1 / 3 for depth in depths) for low in (0, 1 / 3, 2 / 3)]
    assert min(thirds) >= 2


@pytest.mark.parametrize("name", ["dictionary", "passkey"])
def test_answers_are_scored_without_the_space_before_them(name, tokenizer):
    probe = make_probe(name, tokenizer, 300, 4, seed=0)
    for row in range(4):
        first = probe.input_ids[row][probe.answer_mask[row]][0]
        assert tokenizer.decode([first]).strip().isdigit()
        assert answer_text(tokenizer, probe, row).isdigit()


def test_rows_start_as_the_tokenizer_starts_a_text():
    tokenizer = TOKENIZERS["bpe"]
    for name in TASKS:
        ids = make_probe(name, tokenizer, 300, 3, seed=0).input_ids
        assert (ids[:, 0] == tokenizer.bos_token_id).all()
        assert not (ids[:, 1:] == tokenizer.bos_token_id).any()


@pytest.mark.parametrize("name", ["dictionary", "passkey"])
def test_a_given_haystack_fills_the_room_without_its_separators(name):
    tokenizer = TOKENIZERS["bytes"]
    z = tokenizer("z", add_special_tokens=False)["input_ids"][0]
    haystack = torch.tensor([[z] * 30 + [tokenizer.eos_token_id]])
    ids = make_probe(name, tokenizer, 3000, 2, seed=0, haystack_ids=haystack).input_ids
    assert ((ids == z).sum(dim=1) > 1000).all()
    assert not (ids == tokenizer.eos_token_id).any()
    with pytest.raises(UserError, match="haystack"):
        make_probe(name, tokenizer, 3000, 2, seed=0, haystack_ids=torch.tensor([tokenizer.eos_token_id]))


@pytest.mark.parametrize("name", TASKS)
def test_too_short_a_context_says_how_long_it_must_be(name, tokenizer):
    with pytest.raises(UserError, match=f"context of 3 tokens is too short .* '{name}'") as caught:
        make_probe(name, tokenizer, 3, 1, seed=0)
    if name != "dictionary":  # its words differ in length with the context's draw
        needed = int(str(caught.value).split(" give it ")[1].split()[0])
        assert make_probe(name, tokenizer, needed, 1, seed=0).input_ids.shape == (1, needed)


def test_bad_requests():
    tokenizer = TOKENIZERS["bytes"]
    with pytest.raises(UserError, match="did you mean 'dictionary'"):
        make_probe("dictionnary", tokenizer, 300, 1)
    with pytest.raises(UserError, match="at least one row"):
        make_probe("copy", tokenizer, 300, 0)
    letters = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "key": 2, "a": 3}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="no tokens for"):
        make_probe("passkey", PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="<unk>"), 300, 1)
    with pytest.raises(ValueError, match="needs an answer"):
        Probe(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.bool))


def test_words():
    assert len(set(WORDS)) == len(WORDS) >= 2 * MAX_PAIRS
