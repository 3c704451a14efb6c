"""The commands that prepare teachers: `cache-teacher`, `train-teacher`, `train-vit`."""

from pathlib import Path
from typing import Annotated

import typer

from subquad.cli.options import (
    DataOption,
    OverwriteOption,
    PickleOption,
    RecipeOption,
    RemoteCodeOption,
    ResumeOption,
    SetOption,
    TeacherArgument,
    command_line,
    recipe_of,
)


def cache_teacher(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write the cache to.")],
    teacher: TeacherArgument = None,
    recipe: RecipeOption = None,
    data: DataOption = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            "--tokens",
            metavar="COUNT",
            help="Tokens of training text to cache, from its start: 50000, 50k or 1.5M.",
            show_default="those of the recipe's first stage on logits",
        ),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            "--sequence-length",
            min=1,
            help="Tokens per row. Training must use the same length.",
            show_default="that of the recipe's first stage on logits",
        ),
    ] = None,
    top_k: Annotated[
        int,
        typer.Option(
            "--top-k", "-k", min=1, help="Most likely next tokens to store at each position: 4 to 6 bytes each."
        ),
    ] = 64,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch",
            min=1,
            help="Rows per forward pass of the teacher.",
            show_default="that of the recipe's stage",
        ),
    ] = None,
    changes: SetOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted cache in --out, or extend a finished one.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Delete an earlier cache in --out first (never a folder with other contents)."
        ),
    ] = False,
    allow_pickle: PickleOption = False,
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Store the teacher's logits on disk once, so that training on logits does not run the teacher.

    Stores the most likely next tokens at every position of the training text, and the probability mass of the rest.
    Give the teacher, recipe and data that you will train with. The last line reports the loss from leaving out the
    other tokens.

    Examples:

        subquad cache-teacher --out caches/quick

        subquad cache-teacher Qwen/Qwen2.5-1.5B --recipe kl-guided --tokens 50M --top-k 128 --out caches/qwen

        subquad cache-teacher --out caches/quick --tokens 1M --resume
    """
    chosen = recipe_of(recipe, changes)
    from subquad.jobs.cache_teacher import cache_teacher as run
    from subquad.recipes.stage import count_of

    run(
        teacher=teacher or chosen.teacher,
        recipe=chosen,
        out=out,
        data=data,
        tokens=None if tokens is None else count_of(tokens, "--tokens"),
        sequence_length=sequence_length,
        top_k=top_k,
        batch=batch,
        resume=resume,
        overwrite=overwrite,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        command=command_line(),
    )


def train_teacher(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write to.")] = Path(
        "runs/small-teacher"
    ),
    layers: Annotated[int, typer.Option("--layers", metavar="4-8", help="Layers of the new model.")] = 4,
    tokens: Annotated[
        str, typer.Option("--tokens", metavar="COUNT", help="Maximum number of training tokens, such as 14M or 500k.")
    ] = "14M",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the weights and of the training data.")] = 0,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Train a small text teacher from scratch, for experiments, on text and retrieval tasks.

    Stops when the model copies and looks things up without errors, or when the tokens are used up, and reports which.
    Writes to --out a model that `convert` accepts as a teacher, its model card, the metrics and the log.

    Examples:

        subquad train-teacher --out runs/small-teacher

        subquad train-teacher --out runs/deeper --layers 8 --tokens 50M --seed 1
    """
    from subquad.jobs.train_teacher import train_teacher as run

    run(out, layers=layers, tokens=tokens, seed=seed, resume=resume, overwrite=overwrite, command=command_line())


def train_vit(
    data: Annotated[
        str,
        typer.Option(
            "--data",
            "-d",
            metavar="SOURCE",
            help="Labelled images: a folder of idx files, a folder with one subfolder of images per class, or the id "
            "of a `datasets` data set.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write to.")] = Path(
        "runs/small-vit"
    ),
    epochs: Annotated[float, typer.Option("--epochs", help="Passes over the training images.")] = 5.0,
    size: Annotated[int, typer.Option("--size", min=1, help="Height and width of the images, in pixels.")] = 28,
    patch: Annotated[int, typer.Option("--patch", min=1, help="Height and width of a patch, in pixels.")] = 4,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the weights and of the order of the images.")] = 0,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Train a small vision transformer from scratch, for experiments, on labelled images.

    Writes to --out a model that `convert --task image-classification` accepts as a teacher, its model card with the
    accuracy on test images, the metrics and the log.

    Examples:

        subquad train-vit --data /usr/share/datasets/fashion-mnist --out runs/small-vit

        subquad train-vit --data ./my-images --size 64 --patch 8 --epochs 20
    """
    from subquad.jobs.train_vit import train_vit as run

    run(
        data,
        out,
        epochs=epochs,
        size=size,
        patch=patch,
        seed=seed,
        resume=resume,
        overwrite=overwrite,
        command=command_line(),
    )
