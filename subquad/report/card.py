"""README.md of a converted model: the Hub's metadata, how to load it, its numbers, its limits."""

import re
from pathlib import Path

from huggingface_hub import ModelCardData

from subquad.model.tasks import TASKS, TEXT
from subquad.report.page import templates, write_text
from subquad.report.run_files import RunFiles, read_run
from subquad.results.metrics import VARIANTS
from subquad.utils import format as fmt

DEFAULT_TEACHER = {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_model_card(run_dir: Path | str) -> Path:
    """Writes the run folder's README.md. Raises `UserError` when the folder holds no run, or a damaged one."""
    run = read_run(run_dir)
    task = TASKS[(run.settings or {}).get("task", TEXT)]  # older recipes name none
    teacher = _teacher(run)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task.name,
        tags=_tags(run),
        base_model=DEFAULT_TEACHER["base_model"] if teacher == "default" else _hub_id(teacher),
        license=DEFAULT_TEACHER["license"] if teacher == "default" else None,
    )
    card = templates(autoescape=False).get_template("model_card.md.j2").render(
        metadata=data.to_yaml(),
        run=run,
        metrics=run.metrics,
        variants=VARIANTS,
        quantised=teacher == "default",
        auto=task.auto.__name__,
        reader="AutoImageProcessor" if task.of_images else "AutoTokenizer",
        of_images=task.of_images,
        folder=run.folder.name if run.folder.is_absolute() else run.folder.as_posix(),
        longest=fmt.context(max(run.metrics.contexts, default=0)),
    )  # fmt: skip
    return write_text(run.folder / "README.md", card)


def _teacher(run: RunFiles) -> str | None:
    """The teacher as the recipe names it: "default", a Hub id, a folder or a file; None without a recipe."""
    settings = run.settings
    return None if settings is None else str(settings.get("teacher", "default"))


def _hub_id(teacher: str | None) -> str | None:
    """A Hub id, and not a folder that happens to look like one."""
    return teacher if teacher and HUB_ID.fullmatch(teacher) and not Path(teacher).exists() else None


def _tags(run: RunFiles) -> list[str]:
    mixers = {mixer for heads in run.plan.head_table() for mixer in heads} - {"attention"} if run.plan else set()
    return ["subquad", "linear-attention", "hybrid", "distillation", *sorted(mixers)]
