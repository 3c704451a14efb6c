"""Tasks of lm-eval and of JSONL files, on students and teachers.

What needs lm-eval is skipped where it is missing: it and what it needs take 290 MB, so it is no part of `make`'s
environment. To run it all: .venv/bin/pip install -e '.[eval]'.
"""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from subquad.data.questions import read_questions
from subquad.errors import UserError
from subquad.evaluate import harness
from subquad.evaluate.harness import load_tasks
from subquad.jobs import evaluate
from subquad.jobs.convert import convert
from subquad.model.interface import shapes_of
from subquad.model.student import Student
from subquad.plan import Plan
from subquad.recipes.schema import Recipe
from subquad.results.metrics import Metrics
from subquad.results.record import check_written
from subquad.select.task import task_score
from tests.helpers import RECIPE, byte_tokenizer, make_teacher, make_text, tiny

PAGE = Path(__file__).parents[2] / "docs" / "evaluate.md"
WRITTEN = [{"prompt": f"Repeat {'very ' * i}often\nAnswer:", "answer": "abcdef"[: 1 + i]} for i in range(6)]
CHOSEN = [
    {"prompt": f"The sky is{' very' * i}", "choices": ["blue", "green or so", "a red"], "answer": i % 3}
    for i in range(6)
]
ANSWERS = "\n".join(map(json.dumps, WRITTEN))


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]'")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name, lines in (("written.jsonl", WRITTEN), ("chosen.jsonl", CHOSEN)):
        (folder / name).write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    return [str(folder / "written.jsonl"), str(folder / "chosen.jsonl")]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def make_student(tokenizer, attention_layers, mixer="gla", **options):
    """A random teacher of bytes, and a student of it."""
    teacher = tiny("llama", vocab_size=len(tokenizer), pad_token_id=None, eos_token_id=tokenizer.eos_token_id)
    shapes = shapes_of(teacher)
    return teacher, Student.from_teacher(teacher, Plan.by_layer(shapes, attention_layers, mixer, options))


def logprobs(model, tokenizer, prompt, answer):
    """Of the answer's tokens, and whether all are the likeliest: one row, no padding, no cache."""
    context, whole = (torch.tensor([tokenizer(text)["input_ids"]]) for text in (prompt, f"{prompt} {answer}"))
    asked = whole.shape[1] - context.shape[1]
    logp_AV = model(whole[:, :-1], use_cache=False).logits[0, -asked:].log_softmax(-1)
    targets_A = whole[0, -asked:]
    return logp_AV.gather(-1, targets_A[:, None]).sum().item(), bool((logp_AV.argmax(-1) == targets_A).all())


def test_questions_are_read_as_they_stand(files):
    written, chosen = (read_questions(Path(file)) for file in files)
    assert [(question.prompt, question.answer) for question in written] == [(x["prompt"], x["answer"]) for x in WRITTEN]
    assert [question.right for question in chosen] == [0, 1, 2, 0, 1, 2]
    assert written[0].spaced_prompt.endswith("Answer: ")


def test_the_files_of_the_documentation_are_read(tmp_path):
    blocks = re.findall(r"^```jsonl\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        (tmp_path / f"{number}.jsonl").write_text(block, encoding="utf-8")
        assert len(read_questions(tmp_path / f"{number}.jsonl")) == 2


def test_an_answer_may_be_a_number_or_a_text(tmp_path):
    lines = [{"prompt": "a\n", "choices": [" x ", "y"], "answer": answer, "id": 7} for answer in ("x", "y ", 1)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8-sig")  # as some editors do
    questions = read_questions(tmp_path / "a.jsonl")
    assert [question.right for question in questions] == [0, 1, 1]
    assert questions[0].spaced_prompt == "a\n"


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "holds no questions"),
        ('{"prompt": "a", "answer": "b"}\n\n{"prompt": "a"', "line 3 of the task file .* is no JSON object"),
        ("[1]", "line 1 .* is no JSON object"),
        ('{"prompt": "a"}', "line 1 .* lacks the key 'answer'"),
        ('{"answer": "a"}', "lacks the key 'prompt'"),
        ('{"prompt": " ", "answer": "b"}', "'prompt' should be a text that is not empty"),
        ('{"prompt": "a", "answer": " "}', "'answer' should be a text that is not empty"),
        ('{"prompt": "a", "answer": true}', "'answer' should be a text"),
        ('{"prompt": "a", "answer": "\\ud800"}', "line 1 .* is no JSON object"),
        ('{"prompt": "a", "answer": 1}', "'answer' should be one line of text where there are no 'choices'"),
        ('{"prompt": "a", "answer": "b\\nc"}', "'answer' should be one line of text"),
        ('{"prompt": "a", "answer": 0, "choices": "bc"}', "'choices' should be a list of texts"),
        ('{"prompt": "a", "answer": 0, "choices": ["b", ""]}', "'choices' should be a list of texts, and none of them"),
        ('{"prompt": "a", "answer": 0, "choices": ["b"]}', "at least two, all different"),
        ('{"prompt": "a", "answer": 0, "choices": ["b", "b "]}', "at least two, all different"),
        ('{"prompt": "a", "answer": 2, "choices": ["b", "c"]}', "one of the choices, or a number from 0 to 1, not 2"),
        ('{"prompt": "a", "answer": "d", "choices": ["b", "c"]}', "one of the choices, .* not 'd'"),
        (
            f'{ANSWERS}\n{{"prompt": "a", "answer": 0, "choices": ["b", "c"]}}',
            "line 7 .* another kind than those before",
        ),
        (b"\xff\xfe", "is not UTF-8 text .byte 0."),
    ],
)
def test_a_bad_file_is_one_sentence(text, said, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=said) as raised:
        read_questions(file)
    assert "\n" not in str(raised.value) and "bad.jsonl" in str(raised.value)


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="none.jsonl cannot be read: No such file"):
        read_questions(tmp_path / "none.jsonl")


def test_without_lm_eval_a_recipe_with_tasks_is_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["subquad.evaluate.harness"], "find_spec", lambda name: None)
    assert load_tasks([]) == []
    recipe = Recipe(name="mine", evaluate={"tasks": ["arc_easy"], "task_limit": 5})
    with pytest.raises(UserError, match=r"the task 'arc_easy' needs lm-eval: run pip install -e '\.\[eval\]'"):
        convert("no/teacher", recipe, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_unknown_tasks_are_named_at_the_start(lm_eval, tmp_path):
    recipe = Recipe(name="mine", evaluate={"tasks": ["arc_esy"]})
    with pytest.raises(UserError, match="unknown task 'arc_esy': did you mean 'arc_easy' or .*valid: a .jsonl file"):
        convert("no/teacher", recipe, tmp_path / "out")
    (tmp_path / "mine.yaml").write_text("task: mine\nclass: !function evil.Task\n")
    with pytest.raises(UserError, match="unknown task"):
        load_tasks([str(tmp_path / "mine.yaml")])  # it could run code


def test_data_that_cannot_be_had_is_one_sentence(lm_eval, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to the Hub\nand much more")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(UserError, match=r"the task 'arc_easy' cannot be loaded \(no route to the Hub\): check"):
        load_tasks(["arc_easy"])


def test_the_tasks_of_the_documentation_are_there(lm_eval):
    names = re.findall(r"^\| [^|]+ \| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(names) == 6 and set(names) <= set(sys.modules["subquad.evaluate.harness"]._task_manager().all_tasks)


@pytest.mark.parametrize("mixer, options", [("gla", {}), ("hedgehog", {"window": 8, "sinks": 1}), ("kda", {})])
def test_scores_are_those_of_a_plain_computation(mixer, options, lm_eval, files, tokenizer):
    _, student = make_student(tokenizer, [1], mixer, **options)
    found = harness(student, tokenizer, files)
    written = [logprobs(student, tokenizer, line["prompt"], line["answer"]) for line in WRITTEN]
    assert found[files[0]]["logprob"]["value"] == pytest.approx(sum(logp for logp, _ in written) / 6, rel=1e-4)
    assert found[files[0]]["acc"]["value"] == sum(greedy for _, greedy in written) / 6
    hits, normed = 0, 0
    for line in CHOSEN:
        logps = [logprobs(student, tokenizer, line["prompt"], choice)[0] for choice in line["choices"]]
        per_character = [logp / len(choice) for logp, choice in zip(logps, line["choices"], strict=True)]
        hits += max(range(3), key=logps.__getitem__) == line["answer"]
        normed += max(range(3), key=per_character.__getitem__) == line["answer"]
    assert found[files[1]]["acc"]["value"] == pytest.approx(hits / 6)
    assert found[files[1]]["acc_norm"]["value"] == pytest.approx(normed / 6)
    assert 0 < found[files[1]]["acc"]["stderr"] < 1 or hits in (0, 6)


def test_a_student_that_knows_the_answers_gets_them_all(lm_eval, files, tokenizer):
    """Prompts of several lengths in one padded batch: what it learned by heart, it writes and finds the likeliest."""
    _, student = make_student(tokenizer, [1])
    student.unshare(name for name, _ in student.named_parameters())
    optimizer = torch.optim.Adam(student.requires_grad_(True).parameters(), lr=3e-3)
    rows = [torch.tensor([tokenizer(f"{x['prompt']} {x['answer']}\n")["input_ids"]]) for x in WRITTEN]
    for _ in range(40):
        optimizer.zero_grad()
        for row in rows:
            student(row, labels=row, use_cache=False).loss.backward()
        optimizer.step()
    for batch in (1, 4):
        scores = harness(student, tokenizer, files[:1], batch=batch)[files[0]]
        assert scores["exact_match"]["value"] == scores["acc"]["value"] == 1 and scores["logprob"]["value"] > -1


@pytest.mark.parametrize("mixer, options", [("gla", {}), ("hedgehog", {"window": 8, "sinks": 1}), ("rwkv7", {})])
def test_batches_and_padding_change_nothing(mixer, options, lm_eval, files, tokenizer):
    _, student = make_student(tokenizer, [0], mixer, **options)
    one, four = (harness(student, tokenizer, files, batch=batch) for batch in (1, 4))
    for file in files:
        for metric, measure in one[file].items():
            assert measure["value"] == pytest.approx(four[file][metric]["value"], rel=1e-4), (file, metric)


def test_documents_by_number_and_tasks_loaded_once(lm_eval, files, tokenizer):
    """The mean over all is that of the two halves; and a second model, or a second go, finds the tasks as they were."""
    _, student = make_student(tokenizer, [1])
    loaded = load_tasks(files[:1])
    whole = harness(student, tokenizer, files[:1])[files[0]]["logprob"]["value"]
    even, odd = (
        harness(student, tokenizer, loaded, documents=lambda n, first=first: [*range(first, n, 2)])[files[0]]
        for first in (0, 1)
    )
    assert (even["logprob"]["value"] + odd["logprob"]["value"]) / 2 == pytest.approx(whole, rel=1e-5)
    assert even["logprob"]["value"] != odd["logprob"]["value"]


def test_a_users_task_is_cut_into_two_halves(lm_eval, files, tokenizer):
    """What chose is not what is reported."""
    _, student = make_student(tokenizer, [1])
    task = task_score(files[0], metric="logprob")
    halves = [score(student, tokenizer) for score in (task.validation, task.test)]
    whole = harness(student, tokenizer, files[:1])[files[0]]["logprob"]["value"]
    assert sum(halves) / 2 == pytest.approx(whole, rel=1e-5) and halves[0] != halves[1]
    with pytest.raises(UserError, match="has no metric 'bleu'"):
        task_score(files[0], metric="bleu").test(student, tokenizer)


def test_a_student_that_keeps_all_attention_scores_like_its_teacher(lm_eval, files, tokenizer):
    teacher, student = make_student(tokenizer, [0, 1, 2])
    ours, theirs = (harness(model, tokenizer, files, limit=4) for model in (student, teacher))
    for file in files:
        assert ours[file].keys() == theirs[file].keys()
        for metric, measure in theirs[file].items():
            assert measure == pytest.approx(ours[file][metric], rel=1e-5), (file, metric)


def test_models_and_tokenizers_are_left_as_they_were(lm_eval, files, tokenizer):
    teacher, student = make_student(tokenizer, [1])
    student.train()
    student.untie()  # lm-eval ties weights that should be
    places = {name: parameter.data_ptr() for name, parameter in student.named_parameters()}
    before = (tokenizer.pad_token, tokenizer.padding_side)
    harness(student, tokenizer, files[:1], limit=2)
    assert student.training and (tokenizer.pad_token, tokenizer.padding_side) == before
    assert places == {name: parameter.data_ptr() for name, parameter in student.named_parameters()}


def test_examples_are_other_questions_of_the_file(lm_eval, files, tokenizer):
    _, student = make_student(tokenizer, [1])
    some, same, other, none = (
        harness(student, tokenizer, files, fewshot=count, seed=seed)[files[0]]["logprob"]["value"]
        for count, seed in ((2, 0), (2, 0), (2, 1), (None, 0))
    )
    assert some == same and len({some, other, none}) == 3
    with pytest.raises(UserError, match="has 6 questions, too few for 6 examples and one"):
        harness(student, tokenizer, files, fewshot=6)


def test_the_limit_takes_the_first_documents(lm_eval, files, tokenizer):
    _, student = make_student(tokenizer, [1])
    found = harness(student, tokenizer, files, limit=1)
    logp, _ = logprobs(student, tokenizer, WRITTEN[0]["prompt"], WRITTEN[0]["answer"])
    assert found[files[0]]["logprob"] == {"value": pytest.approx(logp, rel=1e-4), "stderr": None}


def test_convert_and_eval_measure_tasks(lm_eval, tmp_path):
    for name in ("teacher", "text"):
        (tmp_path / name).mkdir()
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"w1 w{i}", "answer": f"w{i}"}) for i in range(4)))
    recipe = Recipe(**RECIPE).model_copy(deep=True)
    recipe.evaluate.tasks, recipe.evaluate.task_limit = [str(file)], 3
    out = tmp_path / "out"
    convert(make_teacher(tmp_path / "teacher"), recipe, out, data=make_text(tmp_path / "text"))
    metrics = json.loads((out / "metrics.json").read_text())
    check_written(Metrics, metrics)
    for name in ("teacher", "student", "uniform", "window"):
        assert metrics[name]["tasks"][str(file)].keys() == {"acc", "exact_match", "logprob"}
    assert all("mine.jsonl" in (out / name).read_text(encoding="utf-8") for name in ("report.html", "README.md"))
    again = evaluate.evaluate_model(out)
    assert again["student"]["tasks"][str(file)]["logprob"] == pytest.approx(
        metrics["student"]["tasks"][str(file)]["logprob"], rel=1e-4
    )
    assert evaluate.evaluate_model(out, tasks=[])["student"]["tasks"] == {}
