"""Measures against their plain definitions, on tiny random models."""

import copy
import math
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from subquad.data.probes import PROBE_TASKS, Probe, make_probe
from subquad.errors import UserError
from subquad.evaluate import answers, cache_table, held_cache_bytes, likelihood, retrieval, samples, usable
from subquad.model.cache import CACHE
from subquad.model.interface import find_attention, shapes_of
from subquad.model.student import Student
from subquad.plan import Plan
from subquad.utils.memory import peak_rss_bytes
from tests.helpers import byte_tokenizer, task_probe

SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=300,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)


def tiny(family: str = "llama", seed: int = 0, dropout: float = 0.0):
    torch.manual_seed(seed)
    # A large spread of weights, so that the models have opinions and differ in them.
    if family == "gemma2":  # squashes its logits: the head is more than a matrix
        config = Gemma2Config(
            **SIZES, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=3.0, initializer_range=0.3
        )
        return Gemma2ForCausalLM(config).eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3, attention_dropout=dropout)).eval()


def rows(count: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(300, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("chunk", [7, 256])
def test_likelihood_equals_its_definition(family, chunk):
    teacher, student = tiny(family, 0), tiny(family, 1)
    heldout = rows(3, 50)
    scores = likelihood({"student": student}, teacher, heldout, [2, 17, 50], chunk=chunk)
    with torch.no_grad():
        logits = {"teacher": teacher(heldout).logits.double(), "student": student(heldout).logits.double()}
    logp = {name: x.log_softmax(-1) for name, x in logits.items()}
    kl = F.kl_div(logp["student"], logp["teacher"], log_target=True, reduction="none").sum(-1)
    same = (logits["student"].argmax(-1) == logits["teacher"].argmax(-1)).double()
    for c in (2, 17, 50):
        got = {measure: by_context[c] for measure, by_context in scores["student"].items()}
        assert got["kl"] == pytest.approx(kl[:, :c].mean().item(), rel=1e-4)
        assert got["kl_samples"] == pytest.approx(kl[:, :c].mean(1).tolist(), rel=1e-4)
        assert got["kl_stderr"] == pytest.approx(kl[:, :c].mean(1).std().item() / math.sqrt(3), rel=1e-4)
        assert got["top1"] == pytest.approx(same[:, :c].mean().item())
        for name in logits:
            nll = F.cross_entropy(logits[name][:, : c - 1].flatten(0, 1), heldout[:, 1:c].flatten()).item()
            assert scores[name]["cross_entropy"][c] == pytest.approx(nll, rel=1e-5)
            assert scores[name]["perplexity"][c] == pytest.approx(math.exp(nll), rel=1e-4)
        start = {2: 0, 17: 2, 50: 17}[c]
        stretch = slice(max(start, 1), c)
        nll = F.cross_entropy(
            logits["student"][:, stretch.start - 1 : c - 1].flatten(0, 1), heldout[:, stretch].flatten()
        )
        assert got["buckets"] == {
            "start": start,
            "kl": pytest.approx(kl[:, start:c].mean().item(), rel=1e-4),
            "top1": pytest.approx(same[:, start:c].mean().item()),
            "cross_entropy": pytest.approx(nll.item(), rel=1e-5),
            "perplexity": pytest.approx(math.exp(nll.item()), rel=1e-4),
        }
        assert 0 < got["kl"]
        assert scores["teacher"]["kl"][c] == scores["teacher"]["kl_stderr"][c] == 0.0
        assert scores["teacher"]["top1"][c] == 1.0


def test_a_copy_of_the_teacher_has_exactly_no_kl():
    teacher = tiny()
    score = likelihood({"copy": copy.deepcopy(teacher)}, teacher, rows(2, 40), [40])["copy"]
    assert score["kl"][40] == 0.0 and score["top1"][40] == 1.0


def test_students_are_measured_through_their_mixers():
    teacher = tiny()
    shapes = shapes_of(teacher)
    plan = Plan(
        shapes=shapes,
        mixers={"attention": {}, "sliding_window": {"window": 4, "sinks": 1}},
        layers=[{"sliding_window": [0, 1, 2, 3]}, {"attention": [0, 1], "sliding_window": [2, 3]}],
    )
    student, heldout = Student.from_teacher(teacher, plan), rows(2, 40)
    score = likelihood({"student": student}, teacher, heldout, [4, 40])["student"]
    with torch.no_grad():
        logp = [model(input_ids=heldout).logits.log_softmax(-1) for model in (student, teacher)]
    kl = F.kl_div(*logp, log_target=True, reduction="none").sum(-1)
    assert score["kl"][40] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert score["kl"][4] < 1e-6 < 0.01 < score["kl"][40]  # all that there is fits into the window, and then does not


def test_likelihood_does_not_depend_on_company_or_longer_contexts():
    teacher, first, second = tiny(seed=0), tiny(seed=1), tiny(seed=2)
    heldout = rows(2, 60)
    together = likelihood({"first": first, "second": second}, teacher, heldout, [20, 60], chunk=16)
    assert list(together) == ["teacher", "first", "second"]
    alone = likelihood({"second": second}, teacher, heldout, [20], chunk=16)
    for measure, by_context in alone["second"].items():
        assert by_context[20] == pytest.approx(together["second"][measure][20], rel=1e-4), measure


def test_one_row_has_an_error_bar():
    score = likelihood({"student": tiny(seed=1)}, tiny(), rows(1, 64), [2, 64])["student"]
    assert 0 < score["kl_stderr"][64] < score["kl"][64]
    assert math.isfinite(score["kl_stderr"][2])


def test_likelihood_turns_dropout_off_and_leaves_modes_and_gradients_alone():
    teacher, student = tiny(), tiny(seed=1, dropout=0.5)
    student.train()
    student.model.layers[0].eval()  # a module with a mode of its own
    scores = [likelihood({"student": student}, teacher, rows(2, 30), [30])["student"] for _ in range(2)]
    assert scores[0] == scores[1]
    assert student.training and not student.model.layers[0].training and not teacher.training
    student(rows(1, 8), labels=rows(1, 8)).loss.backward()  # nothing left behind that autograd refuses
    assert student.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_likelihood_never_holds_logits_of_a_whole_row(monkeypatch):
    module = sys.modules["subquad.evaluate.likelihood"]
    widths, plain = [], module.head_logits

    def spy(model, hidden):
        widths.append(hidden.shape[:-1].numel())
        return plain(model, hidden)

    monkeypatch.setattr(module, "head_logits", spy)
    likelihood({"student": tiny(seed=1)}, tiny(), rows(2, 64), [64], chunk=16)
    assert widths == [16] * 16  # 2 rows x 4 chunks x 2 models


@pytest.mark.parametrize("contexts", [[51], [1], [20, 51]])
def test_a_context_beyond_the_rows_is_refused(contexts):
    with pytest.raises(UserError, match="context"):
        likelihood({}, tiny(), rows(2, 50), contexts)


def test_the_teachers_name_is_taken():
    with pytest.raises(ValueError, match="teacher"):
        likelihood({"teacher": tiny()}, tiny(), rows(1, 10), [10])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_retrieval_equals_its_definition(family, monkeypatch):
    module = sys.modules["subquad.evaluate.retrieval"]
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 100)  # 2 rows at once, the last alone
    monkeypatch.setattr(module, "POSITIONS_AT_ONCE", 5)
    model = tiny(family)
    ids = rows(5, 40)
    with torch.no_grad():
        for _ in range(4):  # make some answers right: the last tokens of a row become the model's own choice
            best = model(ids).logits.argmax(-1)
            ids[:4, 36:] = best[:4, 35:39]
    ids[3, 39] = (ids[3, 39] + 1) % 300  # and one row wrong in its last token only
    mask = torch.zeros(5, 40, dtype=torch.bool)
    mask[:, 37:] = True
    mask[0, 37] = False  # answers of different lengths
    with torch.no_grad():
        logits = model(ids).logits.double()[:, :-1]
    targets, scored = ids[:, 1:], mask[:, 1:]
    hit = logits.argmax(-1) == targets
    logprob = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0][scored].mean().item()
    start = torch.full((5,), 30)
    probes = [Probe(ids, mask, start, per_token=flag) for flag in (False, True)]
    whole, single = (retrieval(model, {"t": {40: probe}})["t"][40] for probe in probes)
    assert whole["accuracy"] == pytest.approx((hit | ~scored).all(1).double().mean().item())
    assert single["accuracy"] == pytest.approx(hit[scored].double().mean().item())
    assert 0 < whole["accuracy"] < single["accuracy"] < 1
    assert whole["logprob"] == pytest.approx(logprob, rel=1e-5) and whole["logprob"] == single["logprob"]

    by_row, by_token = (answers(model, probe) for probe in probes)
    rights, tokens = (hit & scored).sum(1).double(), scored.sum(1).double()
    logprobs = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0].masked_fill(~scored, 0).sum(1)
    assert torch.equal(by_token.hits_N, rights) and torch.equal(by_token.counted_N, tokens)
    assert torch.equal(by_row.hits_N, (rights == tokens).double()) and torch.equal(
        by_row.counted_N, torch.ones(5).double()
    )
    for got in (by_row, by_token):
        assert torch.equal(got.tokens_N, tokens)
        torch.testing.assert_close(got.logprob_N, logprobs, rtol=1e-5, atol=1e-5)


def test_retrieval_tells_a_model_that_copies_from_one_that_does_not():
    """A model that has learnt these rows by heart scores on them, and an untrained one does not."""
    tokenizer = byte_tokenizer()
    probes = {"copy": {32: make_probe("copy", tokenizer, 32, 2, seed=0)}}
    model = tiny()
    before = retrieval(model, probes)["copy"][32]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = probes["copy"][32].input_ids
    for _ in range(60):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    after = retrieval(model, probes)["copy"][32]
    assert before["accuracy"] < 0.2 and after["accuracy"] > 0.9
    assert before["logprob"] < -3 and after["logprob"] > -1


def test_retrieval_by_depth_is_that_of_the_rows_that_lie_there():
    """A window sees the facts that lie near the question, and the map says so."""
    tokenizer = byte_tokenizer()
    probe, ticks = make_probe("passkey", tokenizer, 400, 24), []
    blind = probe.input_ids.clone()
    for row, depth in enumerate(probe.depth):
        if depth < 0.4:  # what stands early is forgotten
            blind[row, : probe.question_start[row]] = tokenizer.convert_tokens_to_ids("x")
    score = retrieval(Copier(), {"passkey": {400: replace(probe, input_ids=blind)}}, ticks.append)["passkey"][400]
    bands = score["by_depth"]
    assert ticks == [24 * 400] and [band["accuracy"] for band in bands] == [0, 0, 1, 1, 1]
    assert sum(band["rows"] for band in bands) == 24 and min(band["rows"] for band in bands) >= 3
    rows = torch.tensor([band["rows"] for band in bands])
    assert score["accuracy"] == pytest.approx((rows[2:].sum() / 24).item())
    means = torch.tensor([band["logprob"] for band in bands])
    assert score["logprob"] == pytest.approx(((means * rows).sum() / 24).item(), rel=1e-4)
    assert "by_depth" not in retrieval(Copier(), {"copy": {64: make_probe("copy", tokenizer, 64, 2)}})["copy"][64]
    alone = retrieval(Copier(), {"passkey": {400: probe.rows(slice(1))}})["passkey"][400]["by_depth"]
    assert sorted(band["rows"] for band in alone) == [0, 0, 0, 0, 1] and {"rows": 0} in alone


class Copier(torch.nn.Module):
    """Says again what followed where the text last read as it does now: the longest match, and `logit` sure of it."""

    main_input_name = "input_ids"

    def __init__(self, logit: float = 10.0):
        super().__init__()
        self.head = torch.nn.Linear(300, 300, bias=False)
        self.config, self.device, self.logit = LlamaConfig(), torch.device("cpu"), logit
        torch.nn.init.eye_(self.head.weight)

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head

    def base_model(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        same = (input_ids[:, :, None] == input_ids[:, None, :]).long().tril(-1)
        match = same.clone()  # (t, s): how many tokens up to t equal those up to s
        for t in range(1, input_ids.shape[1]):
            match[:, t, 1:] = same[:, t, 1:] * (match[:, t - 1, :-1] + 1)
        best, place = match.max(-1)
        said = input_ids.gather(1, (place + 1).clamp_max(input_ids.shape[1] - 1))
        return SimpleNamespace(last_hidden_state=F.one_hot(said, 300) * (best > 0)[..., None] * self.logit)


@pytest.mark.parametrize("task", ["copy", "passkey", "associative", "questions"])
def test_a_probe_is_usable_with_a_teacher_that_can_answer_it(task):
    probe = task_probe(task, byte_tokenizer(), 240, 4)
    assert usable(Copier(), probe).usable
    verdict = usable(Copier(), probe, "logprob")
    assert verdict.usable and re.match(
        r"usable: its facts make an answer [4-9]\.\d\d nats/token likelier", verdict.reason
    )
    assert not usable(Copier(), probe, floor=1.01).usable and not usable(Copier(), probe, "logprob", floor=11).usable
    # Right, but hardly sure of it: good for accuracy alone.
    assert usable(Copier(0.1), probe).usable and not usable(Copier(0.1), probe, "logprob").usable


@pytest.mark.parametrize("task", PROBE_TASKS)
def test_no_probe_is_usable_with_a_random_teacher(task):
    probe = task_probe(task, byte_tokenizer(), 240, 16)
    verdict = usable(tiny(), probe)
    assert not verdict.usable
    assert re.fullmatch(
        r"unusable: the teacher gives \d\.\d% of the answers, and should give 50\.0% or more", verdict.reason
    )
    assert not usable(tiny(), probe, "logprob").usable


def test_a_teacher_that_only_likes_the_answers_passes_by_neither_measure():
    """Digits are likely everywhere to it, whatever it has read."""
    probe = make_probe("passkey", byte_tokenizer(), 240, 8, seed=0)
    model = Copier(0.0)
    digits = byte_tokenizer().convert_tokens_to_ids(list("0123456789"))
    model.head.bias = torch.nn.Parameter(torch.zeros(300).index_fill(0, torch.tensor(digits), 20.0))
    assert answers(model, probe).score()["logprob"] == pytest.approx(-math.log(10), abs=1e-3)
    assert not usable(model, probe).usable and not usable(model, probe, "logprob").usable


def test_facts_cannot_be_exchanged_in_one_row():
    with pytest.raises(UserError, match="raise the count"):
        usable(Copier(), make_probe("copy", byte_tokenizer(), 32, 1), "logprob")


def test_held_cache_bytes_counts_every_tensor_once():
    model = tiny()
    cache = model(rows(2, 10), use_cache=True)[CACHE]
    per_layer = 2 * 2 * 2 * 10 * 8 * 4  # keys and values, batch, kv heads, tokens, head_dim, float32
    assert held_cache_bytes(cache) == 2 * per_layer
    cache.layers[0].keys = cache.layers[0].keys[:, :, -1:]  # a short view saves nothing
    assert held_cache_bytes(cache) == 2 * per_layer
    cache.layers[0].keys = cache.layers[0].keys.clone()
    assert held_cache_bytes(cache) == 2 * per_layer - per_layer // 2 // 10 * 9
    cache.layers[1].state = {0: torch.zeros(3, dtype=torch.bfloat16), 1: (None, cache.layers[1].keys)}
    assert held_cache_bytes(cache) == 2 * per_layer - per_layer // 2 // 10 * 9 + 6
    assert held_cache_bytes(DynamicCache()) == 0


def test_cache_table_is_the_plans_arithmetic():
    shape = find_attention(tiny())[0].shape
    plan = Plan(shapes=[shape] * 2, mixers={"attention": {}}, layers=[{"attention": [0, 1, 2, 3]}] * 2)
    per_token = 2 * 2 * 2 * 8 * 2  # layers, keys and values, kv heads, head_dim, bfloat16
    assert cache_table(plan, [10, 20], "bfloat16") == {10: 10 * per_token, 20: 20 * per_token}


def test_peak_memory_is_this_process_in_bytes():
    block = torch.ones(200_000_000, dtype=torch.uint8)  # importing torch alone takes as much again
    assert block.nbytes * 1.2 < peak_rss_bytes() < 64 * 2**30


def test_samples_continue_the_prompt_greedily():
    tokenizer, model = byte_tokenizer(), tiny()
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=0)  # a model's own taste does not count
    prompts = ["The king said", "Once upon"]
    got = samples(model, tokenizer, prompts, max_new_tokens=6)
    assert [entry["prompt"] for entry in got] == prompts
    for entry in got:
        ids = tokenizer(entry["prompt"], return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        with torch.no_grad():
            for _ in range(6):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
                if ids[0, -1] == tokenizer.eos_token_id:
                    break
        assert entry["text"] == tokenizer.decode(ids[0, start:], skip_special_tokens=True)
