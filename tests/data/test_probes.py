"""Retrieval probes: right answers at the end, exact lengths, determined by the seed, for any tokenizer."""

import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from subquad.data.clozes import Cloze, clozes
from subquad.data.probes import MAX_PAIRS, PROBE_TASKS, WORDS, Probe, make_probe
from subquad.errors import UserError
from tests.helpers import ALPHABET, SALES, TEXT, _byte_level, byte_tokenizer, task_probe


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with words as tokens, single digits, and a <bos> before every text."""
    tokenizer = _byte_level(merges=600, digits=True)
    bos = tokenizer.convert_tokens_to_ids("<bos>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    return tokenizer


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer like SentencePiece's: the space belongs to the word, and every text starts with one."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    specials = ["<unk>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=specials, initial_alphabet=list(ALPHABET))
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")


TOKENIZERS = {"bytes": byte_tokenizer(), "bpe": bpe_tokenizer(), "metaspace": metaspace_tokenizer()}


@pytest.fixture(params=TOKENIZERS, scope="module")
def tokenizer(request):
    return TOKENIZERS[request.param]


def answer_text(tokenizer, probe: Probe, row: int) -> str:
    return tokenizer.decode(probe.input_ids[row][probe.answer_mask[row]]).strip()


@pytest.mark.parametrize("name", PROBE_TASKS)
@pytest.mark.parametrize("context", [257, 512])
def test_rows_have_the_context_and_end_with_the_answer(name, context, tokenizer):
    probe = task_probe(name, tokenizer, context, 5, seed=3)
    assert probe.input_ids.shape == probe.answer_mask.shape == (5, context)
    assert probe.input_ids.dtype == torch.int64 and probe.answer_mask.dtype == torch.bool
    assert probe.per_token == (name in ("copy", "associative"))
    for mask, start in zip(probe.answer_mask, probe.question_start, strict=True):
        if name == "associative":  # every other token of the question
            assert not mask[start::2].any() and mask[start + 1 :: 2].all() and mask.sum() == (context - start) // 2
        else:  # one run of answer tokens, at the very end
            assert start < context - mask.sum() and mask[-int(mask.sum()) :].all()
    same_seed, other_seed = (task_probe(name, tokenizer, context, 5, seed=seed) for seed in (3, 4))
    assert torch.equal(probe.input_ids, same_seed.input_ids) and torch.equal(probe.answer_mask, same_seed.answer_mask)
    assert not torch.equal(probe.input_ids, other_seed.input_ids)
    assert len(set(map(tuple, probe.input_ids.tolist()))) == 5
    more_rows = task_probe(name, tokenizer, context, 9, seed=3)
    assert torch.equal(more_rows.input_ids[:5], probe.input_ids)


def test_copy_repeats_a_random_sequence_of_plain_tokens(tokenizer):
    probe = make_probe("copy", tokenizer, 101, 3, seed=0)
    start = len(tokenizer("")["input_ids"])
    length = (101 - start) // 2
    for ids, mask in zip(probe.input_ids, probe.answer_mask, strict=True):
        assert torch.equal(ids[-length:], ids[-2 * length : -length])
        assert mask.sum() == length - 1
        assert len(ids[-length:].unique()) == length  # a token names its successor
        assert not set(ids[start:].tolist()) & set(tokenizer.all_special_ids)
    # A sequence longer than the vocabulary has to repeat tokens.
    assert make_probe("copy", tokenizer, 4000, 1, seed=0).input_ids.shape == (1, 4000)


@pytest.mark.parametrize("context", [400, 4000])
def test_dictionary_is_the_prompt_of_the_paper(context):
    tokenizer = TOKENIZERS["bytes"]  # decoding restores the text exactly
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
        if context == 4000:  # longer than 100 pairs, so text fills the rest before the question
            assert len(pairs) == MAX_PAIRS and "The sky is blue." in body
        else:  # no further pair fits
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


@pytest.mark.parametrize("context", [101, 256, 1500])
def test_associative_recall_asks_pairs_of_distinct_tokens_in_another_order(context, tokenizer):
    probe = make_probe("associative", tokenizer, context, 3, seed=0)
    for ids, mask, start in zip(probe.input_ids, probe.answer_mask, probe.question_start.tolist(), strict=True):
        pairs_start = len(tokenizer("")["input_ids"]) + (context - len(tokenizer("")["input_ids"])) % 2
        tokens = ids[pairs_start:start].tolist()
        pairs = dict(zip(tokens[::2], tokens[1::2], strict=True))
        assert len(set(tokens)) == len(tokens) and not set(tokens) & set(tokenizer.all_special_ids)
        keys, values = ids[start::2].tolist(), ids[mask].tolist()
        assert values == [pairs[key] for key in keys]
        assert keys[: len(pairs)] != tokens[::2] and set(keys) <= set(pairs)
        if context == 1500 and tokenizer is TOKENIZERS["bytes"]:  # too few tokens: all pairs, several times
            assert len(pairs) == 127 and set(keys[:127]) == set(keys[127:254]) == set(pairs)
        else:
            assert len(set(keys)) == len(keys) >= len(pairs) - 1


def follow(text: str) -> tuple[str, int, int]:
    """Solve a row of `variables` by its text. Returns the value, the number of chains, and the hops to the value."""
    assignments = dict(re.findall(r"^VAR ([A-Z]) = (\w+)$", text, re.MULTILINE))
    variable = re.search(r"What is the value of VAR ([A-Z])\?", text)[1]
    assert variable not in assignments.values()  # the last of its chain
    for target, source in assignments.items():
        assert source.isdigit() or text.index(f"VAR {source} =") < text.index(f"VAR {target} =")
    value, hops = assignments[variable], 0
    while not value.isdigit():
        value, hops = assignments[value], hops + 1
    return value, sum(source.isdigit() for source in assignments.values()), hops


@pytest.mark.parametrize(("context", "chains", "hops"), [(200, 2, 1), (257, 2, 1), (512, 3, 3), (1024, 5, 4)])
def test_variables_are_chains_through_the_haystack(context, chains, hops):
    tokenizer = TOKENIZERS["bytes"]
    probe = make_probe("variables", tokenizer, context, 12, seed=1)
    for row in range(12):
        text = tokenizer.decode(probe.input_ids[row])
        answer = answer_text(tokenizer, probe, row)
        assert follow(text) == (answer, chains, hops)
        assert text.count(answer) == 2 and text.endswith(f" is {answer}") and answer.isdigit() and len(answer) == 5


def test_variables_lie_at_all_depths():
    tokenizer = TOKENIZERS["bytes"]
    probe = make_probe("variables", tokenizer, 4000, 20, seed=1)
    texts = [tokenizer.decode(ids) for ids in probe.input_ids]
    depths = [match.start() / 4000 for text in texts for match in re.finditer("^VAR", text, re.MULTILINE)]
    assert min(sum(low <= depth < low + 1 / 4 for depth in depths) for low in (0, 1 / 4, 2 / 4, 3 / 4)) > 60


def test_questions_are_answered_by_their_text_alone(tokenizer):
    probe = task_probe("questions", tokenizer, 400, 12, seed=1)
    depths = []
    for row, start in enumerate(probe.question_start.tolist()):
        text, question = (str(tokenizer.decode(ids)) for ids in probe.input_ids[row].tensor_split([start]))
        answer = answer_text(tokenizer, probe, row)
        lead = question.split("Complete this sentence of the text:")[1].removesuffix(answer).strip()
        assert question.startswith("\n") and len(lead.split()) >= 5
        assert text.count(lead) == text.count(answer) == 1 and SALES.count(answer) == 1
        continuation = text.split(lead)[1]  # an oracle's answer
        assert continuation.strip().startswith(answer) and re.match(r"\W", continuation.strip().removeprefix(answer))
        assert not set(probe.input_ids[row, 1:].tolist()) & set(tokenizer.all_special_ids)
        depths.append(SALES.index(lead) / len(SALES))
    thirds = [sum(low <= depth < low + 1 / 3 for depth in depths) for low in (0, 1 / 3, 2 / 3)]
    assert min(thirds) >= 2


def test_questions_need_a_text_that_can_be_asked_about(tokenizer):
    repetitive_ids = tokenizer("It was sold for 12 dollars. " * 99, add_special_tokens=False, return_tensors="pt")[
        "input_ids"
    ]
    for haystack_ids in (None, repetitive_ids):
        with pytest.raises(
            UserError, match="'questions' finds nothing to ask in .* 300 at a time: give it more real text"
        ):
            make_probe("questions", tokenizer, 300, 2, haystack_ids=haystack_ids)
    with pytest.raises(UserError, match="3 at a time: .* longer context"):
        task_probe("questions", tokenizer, 3, 2)


CLOZES = [
    ("The bill that was passed on March 4, 1921, went far.", ["March 4, 1921"]),
    ("We spent as much as all of $2.5 trillion, and more.", ["$2.5 trillion"]),
    ("It had been known since the winter of 1776.", ["1776"]),
    ("No one in all the land was as tall as John Smith was.", ["John Smith"]),
    (
        "No one in all the land was as tall as Mister John Adam Smith was.",
        [],
    ),  # a name is asked completely or not at all
    ("No one in all the land was as tall as O'Neil was.", []),
    ("No one in all the land was as old as 1,234,56 or 12th or 3rd-born men.", []),
    ("It was in 1776.", []),  # too short a lead to recognise
    ("It was never seen again. Then came the year 1776.", []),
    ("It had been known since the winter of 1776, so of 1776 we speak.", []),
    ("It was in the month of 12 men. It was in the month of 13 men.", []),  # one lead, two answers
]


@pytest.mark.parametrize(("text", "answers"), CLOZES)
def test_clozes(text, answers):
    questions = clozes(text)
    assert [cloze.answer for cloze in questions] == answers
    assert all(str(cloze) in text for cloze in questions)


def test_a_cloze_quotes_no_more_than_it_needs():
    assert clozes(f"{' '.join(WORDS[:40])} 1776, {' '.join(WORDS[40:])}") == [Cloze(" ".join(WORDS[28:40]), "1776")]


@pytest.mark.parametrize("name", ["dictionary", "passkey", "variables"])
def test_answers_are_scored_without_the_space_before_them(name, tokenizer):
    probe = make_probe(name, tokenizer, 300, 4, seed=0)
    for row in range(4):
        first_id = probe.input_ids[row][probe.answer_mask[row]][0]
        assert tokenizer.decode([first_id]).strip().isdigit()
        assert answer_text(tokenizer, probe, row).isdigit()


def test_rows_start_as_the_tokenizer_starts_a_text():
    tokenizer = TOKENIZERS["bpe"]
    for name in PROBE_TASKS:
        ids = task_probe(name, tokenizer, 300, 3).input_ids
        assert (ids[:, 0] == tokenizer.bos_token_id).all()
        assert not (ids[:, 1:] == tokenizer.bos_token_id).any()


@pytest.mark.parametrize("name", PROBE_TASKS)
def test_the_depth_is_where_the_answer_is_first_written(name, tokenizer):
    probe = task_probe(name, tokenizer, 700, 12)
    if name in ("copy", "associative", "variables"):  # there is more than one fact
        assert probe.depth is None
        return
    assert probe.depth.shape == (12,) and 0 <= probe.depth.min() < 0.2 and 0.5 < probe.depth.max() <= 1
    title = {"dictionary": "dictionary:\n", "passkey": "memorize it.\n", "questions": "Near"}[name]
    for row, start in enumerate(probe.question_start.tolist()):
        text = tokenizer.decode(probe.input_ids[row, :start]).partition(title)[2]
        answer = answer_text(tokenizer, probe, row)
        position = text.index(f":{answer}\n" if name == "dictionary" else answer) / len(text)
        assert position == pytest.approx(probe.depth[row].item(), abs=0.2)
    assert torch.equal(probe.rows(slice(2, 5)).depth, probe.depth[2:5])
    assert torch.equal(probe.repeated(2).depth, probe.depth.repeat(2)) and probe.exchanged().depth is None


@pytest.mark.parametrize("name", ["dictionary", "passkey", "variables"])
def test_a_given_haystack_fills_the_room_without_its_separators(name):
    tokenizer = TOKENIZERS["bytes"]
    z = tokenizer("z", add_special_tokens=False)["input_ids"][0]
    haystack = torch.tensor([[z] * 30 + [tokenizer.eos_token_id]])
    ids = make_probe(name, tokenizer, 3000, 2, seed=0, haystack_ids=haystack).input_ids
    assert ((ids == z).sum(dim=1) > 1000).all()
    assert not (ids == tokenizer.eos_token_id).any()
    with pytest.raises(UserError, match="haystack"):
        make_probe(name, tokenizer, 3000, 2, seed=0, haystack_ids=torch.tensor([tokenizer.eos_token_id]))


@pytest.mark.parametrize("name", [name for name in PROBE_TASKS if name != "questions"])
def test_too_short_a_context_says_how_long_it_must_be(name, tokenizer):
    with pytest.raises(UserError, match=f"context of 3 tokens is too short .* '{name}'") as error:
        make_probe(name, tokenizer, 3, 1, seed=0)
    if name not in ("dictionary", "variables"):  # their words differ in length with the context's draw
        needed = int(str(error.value).split(" give it ")[1].split()[0])
        assert make_probe(name, tokenizer, needed, 1, seed=0).input_ids.shape == (1, needed)


def test_bad_requests():
    tokenizer = TOKENIZERS["bytes"]
    with pytest.raises(UserError, match="did you mean 'dictionary'"):
        make_probe("dictionnary", tokenizer, 300, 1)
    with pytest.raises(UserError, match="at least one row"):
        make_probe("copy", tokenizer, 300, 0)
    letters = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "key": 2, "a": 3}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    for name in ("passkey", "variables"):
        with pytest.raises(UserError, match="no tokens for"):
            make_probe(name, PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="<unk>"), 300, 1)


@pytest.mark.parametrize("name", PROBE_TASKS)
def test_exchanged_rows_keep_their_questions_and_lose_their_facts(name, tokenizer):
    probe = task_probe(name, tokenizer, 300, 4)
    exchanged = probe.exchanged()
    assert torch.equal(exchanged.answer_mask, probe.answer_mask) and exchanged.per_token == probe.per_token
    for row, start in enumerate(probe.question_start.tolist()):
        assert torch.equal(exchanged.input_ids[row, start:], probe.input_ids[row, start:])
        assert torch.equal(exchanged.input_ids[row, :start], probe.input_ids[row - 1, :start])


def test_a_probe_is_well_formed():
    ids, mask = torch.zeros(1, 4, dtype=torch.long), torch.tensor([[False, False, True, True]])
    Probe(ids, mask, torch.tensor([1]))
    for message, answers, start in (
        ("same shape", mask[:, 1:], [1]),
        ("needs an answer", torch.zeros_like(mask), [1]),
        ("first token", torch.ones_like(mask), [0]),
        ("one question_start", mask, [1, 1]),
        ("belong to its questions", mask, [3]),
    ):
        with pytest.raises(ValueError, match=message):
            Probe(ids, answers, torch.tensor(start))


def test_words():
    assert len(set(WORDS)) == len(WORDS) >= 2 * MAX_PAIRS
