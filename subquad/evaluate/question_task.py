"""A file of questions as a task of lm-eval; metrics are averaged over the questions.

With choices: `acc`, the right choice is the likeliest, and `acc_norm`, it is by log-probability per character. Without:
`acc`, every token of the answer is the likeliest; `exact_match`, what the model writes greedily up to the end of the
line is the answer; `logprob`, the natural log-probability of the answer, all its tokens together.

This module imports lm-eval; harness.py imports it when there is something to measure.
"""

from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from subquad.data.questions import read_questions
from subquad.errors import UserError


class _WrittenAnswers(ConfigurableTask):
    """Two requests a question: write the answer, and say how likely it is."""

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        # Tokenizers join a space to the word after it, so a prompt that ends in one is written on badly.
        written = super().construct_requests(doc, ctx.rstrip(" "), **kwargs)
        scored = Instance("loglikelihood", doc, (ctx, doc["answer"]), idx=1, metadata=kwargs["metadata"])
        return [written, scored]


def question_task(path: Path, fewshot: int) -> ConfigurableTask:
    """The task of a JSONL file, named like it; examples are other questions of the file.

    Raises UserError for a file that `read_questions` refuses, or one with too few questions for the examples.
    """
    questions = read_questions(path)
    if fewshot >= len(questions):
        raise UserError(f"the task file {path} has {len(questions)} questions, too few for {fewshot} examples and one")
    rows: list[dict[str, Any]]
    if questions[0].choices is None:
        kind, metrics = _WrittenAnswers, ["acc", "exact_match", "logprob"]
        rows = [{"prompt": question.spaced_prompt, "answer": question.answer} for question in questions]
        longest = max(len(row["answer"].encode()) for row in rows)  # a token has a byte at least
        settings = {
            "output_type": "generate_until",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": longest + 1, "do_sample": False},
            "process_results": _scores,
        }
    else:
        kind, metrics = ConfigurableTask, ["acc", "acc_norm"]
        rows = [
            {"prompt": question.spaced_prompt, "answer": question.right, "choices": question.choices}
            for question in questions
        ]
        settings = {"output_type": "multiple_choice", "doc_to_choice": "choices"}
    config = {
        "task": str(path),
        "custom_dataset": lambda: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
    }
    return kind(config=config | settings)


def _scores(doc: dict[str, Any], results: tuple[str, tuple[float, bool]]) -> dict[str, float]:
    text, (logprob, greedy) = results
    return {"acc": float(greedy), "exact_match": float(text.strip() == doc["answer"]), "logprob": logprob}
