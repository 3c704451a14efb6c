"""Tasks of models, by the Hub's names: their auto classes, the classes of their students, and words for messages."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from subquad.model.base import BaseStudent
from subquad.model.image_student import ImageStudent
from subquad.model.saliency import SaliencyConfig, SaliencyModel
from subquad.model.student import Student
from subquad.model.text_part import has_text_class

TEXT = "text-generation"


@dataclass(frozen=True)
class Task:
    """Task: auto class of its models, classes by model type, class of its students, and words for messages."""

    name: str
    auto: Any
    families: Mapping[str, Any]
    student: type[BaseStudent]
    noun: str
    hint: str

    @property
    def student_type(self) -> str:
        """Model type of a student's configuration."""
        config: Any = self.student.config_class
        return str(config.model_type)

    @property
    def of_images(self) -> bool:
        """Whether models of this task read images; the models of any other task read text."""
        return issubclass(self.student, ImageStudent)

    @property
    def answers(self) -> str:
        """Name of the set of a model's possible outputs."""
        return "set of classes" if self.of_images else "vocabulary"

    def classes(self, config: Any) -> list[str]:
        """Names of the classes of a configuration's type for this task; empty if there are none.

        For text, models that also read images are among them, where their text part can be had alone.
        """
        names = [self.families.get(config.model_type, [])]
        if self.name == TEXT and config.get_text_config() is not config:
            names += [MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type, [])]
            names = names if has_text_class(config) else []
        return [name for part in names for name in ([part] if isinstance(part, str) else part)]

    def auto_class(self, config: Any) -> Any:
        """Auto class that loads the models of a configuration's type."""
        wraps = self.name == TEXT and config.model_type not in self.families and self.classes(config)
        return AutoModelForImageTextToText if wraps else self.auto


TASKS = {
    task.name: task
    for task in (
        Task(
            TEXT,
            AutoModelForCausalLM,
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            Student,
            "causal language model",
            "a decoder-only language model",
        ),
        Task(
            "image-classification",
            AutoModelForImageClassification,
            MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
            ImageStudent,
            "model for image classification",
            "one with a classifier, or set the task to image-feature-extraction",
        ),
        Task(
            "image-feature-extraction",
            AutoModel,
            {**MODEL_MAPPING_NAMES, SaliencyConfig.model_type: SaliencyModel.__name__},
            ImageStudent,
            "image encoder without a head",
            "an encoder, or set the task to image-classification",
        ),
    )
}
