"""Questions of the user: a JSONL file of prompts, each with an answer or with choices.

    {"prompt": "Question: What is the capital of France?\\nAnswer:", "answer": "Paris"}
    {"prompt": "The sky is", "choices": ["blue", "green"], "answer": 0}

The two kinds are measured differently, so a file has only one of them. A file contains plain text only: no templates
and no code.
"""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, StrictInt, StringConstraints, ValidationError, model_validator

from subquad.errors import UserError

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Question(BaseModel):
    """One line of the file; other keys are ignored. The answer follows the prompt, after a space if it has none."""

    prompt: Annotated[str, StringConstraints(pattern=r"\S")]
    answer: StrictInt | Text
    """Without choices, the text that should follow, on one line; with choices, the right one or its index from 0."""
    choices: list[Text] | None = None

    @model_validator(mode="after")
    def _answerable(self) -> "Question":
        if self.choices is None:
            if not isinstance(self.answer, str) or "\n" in self.answer:
                raise ValueError("'answer' should be one line of text where there are no 'choices'")
            return self
        if len(set(self.choices)) < max(2, len(self.choices)):
            raise ValueError("'choices' should be at least two, all different")
        if self.answer not in self.choices and self.answer not in range(len(self.choices)):
            raise ValueError(
                f"'answer' should be one of the choices, or a number from 0 to {len(self.choices) - 1}, "
                f"not {self.answer!r}"
            )
        return self

    @property
    def spaced_prompt(self) -> str:
        """Prompt with the whitespace that separates it from the answer."""
        return self.prompt if self.prompt[-1].isspace() else f"{self.prompt} "

    @property
    def right(self) -> int:
        """Index of the right choice."""
        return self.answer if isinstance(self.answer, int) else (self.choices or []).index(self.answer)


def read_questions(path: Path) -> list[Question]:
    """Read the questions of a JSONL file, all of one kind. Empty lines are ignored.

    Raises UserError for a file that is missing, empty or not text, and for the first line that is not a question.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split(
            "\n"
        )  # splitlines splits at more characters than JSON allows
    except OSError as error:
        raise UserError(f"the task file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the task file {path} is not UTF-8 text (byte {error.start})") from error
    questions: list[Question] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            questions.append(_question(line, f"line {number} of the task file {path}"))
            if (questions[-1].choices is None) != (questions[0].choices is None):
                raise UserError(
                    f"line {number} of the task file {path} is of another kind than those before it: "
                    "put questions with 'choices' and questions without into files of their own"
                )
    if not questions:
        raise UserError(f"the task file {path} holds no questions: write a JSON object a line, with prompt and answer")
    return questions


def _question(line: str, location: str) -> Question:
    try:
        return Question.model_validate_json(line)
    except ValidationError as error:
        details = error.errors()[0]
    key = next((part for part in details["loc"] if isinstance(part, str)), "")
    match details["type"]:
        case "json_invalid" | "model_type":
            reason = 'is no JSON object such as {"prompt": "...", "answer": "..."}'
        case "missing":
            reason = f"lacks the key '{key}'"
        case "value_error":
            reason = f"is no question: {details['ctx']['error']}"
        case _:
            reason = f"is no question: '{key}' should be {'a list of texts' if key == 'choices' else 'a text'}"
            reason += ", and none of them empty" if key == "choices" else " that is not empty"
    raise UserError(f"{location} {reason}")
