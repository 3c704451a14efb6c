"""The commands that make teachers: write one's answers down, or train a small one from nothing."""

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
            help="How much of the training text, from its start: 50000, 50k or 1.5M tokens.",
            show_default="those of the recipe's first stage on logits",
        ),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            "--sequence-length",
            min=1,
            help="Tokens of a row. Training must use the same.",
            show_default="that of the recipe's first stage on logits",
        ),
    ] = None,
    top_k: Annotated[
        int,
        typer.Option("--top-k", "-k", min=1, help="Likeliest next tokens to keep at each position: 4 to 6 bytes each."),
    ] = 64,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch",
            min=1,
            help="Rows that go through the teacher at a time.",
            show_default="as the recipe's stage trains",
        ),
    ] = None,
    changes: SetOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a cache in --out that was interrupted, or make it longer.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete an earlier cache in --out (never a folder of anything else).")
    ] = False,
    allow_pickle: PickleOption = False,
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Write the teacher's answers to disk once, so that training on logits needs no teacher.

    Keeps the likeliest next tokens at every position of the training text, and the mass of all others. Give the
    teacher, recipe and data that you will train with; the last line says what the tokens left out lose.

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
        str, typer.Option("--tokens", metavar="COUNT", help="Tokens to train on at most, such as 14M or 500k.")
    ] = "14M",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the weights and of what they learn from.")] = 0,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Train a small teacher for experiments, from nothing, on text and retrieval tasks.

    It stops when it copies and looks up without a fault, or when the tokens are spent, and says which. Leaves in
    --out a model that `convert` takes as a teacher, its model card, the metrics and the log.

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
            help="Labelled images: a folder of idx files, a folder with one of images for each class, or the id of a "
            "`datasets` data set.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write to.")] = Path(
        "runs/small-vit"
    ),
    epochs: Annotated[float, typer.Option("--epochs", help="Times that every image is read.")] = 5.0,
    size: Annotated[int, typer.Option("--size", min=1, help="Height and width of the images, in pixels.")] = 28,
    patch: Annotated[int, typer.Option("--patch", min=1, help="Height and width of a patch, in pixels.")] = 4,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the weights and of the order of the images.")] = 0,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Train a small vision transformer for experiments, from nothing, on labelled images.

    Leaves in --out a model that `convert --task image-classification` takes as a teacher, its model card with its
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
