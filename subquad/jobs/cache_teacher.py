"""Job of `subquad cache-teacher`: writes a teacher's top logits to disk once."""

from pathlib import Path

from rich.console import Console

from subquad.data.packing import tokenizer_hash
from subquad.distill.cache_writer import claim_cache, write_cache
from subquad.distill.teacher_cache import TeacherCache
from subquad.errors import UserError
from subquad.jobs.conversion import checked_recipe, open_teacher, read_text
from subquad.jobs.run import Run, make_accelerator
from subquad.model.tasks import TASKS
from subquad.model.teacher_check import longest_input
from subquad.recipes.schema import Recipe
from subquad.utils.environment import environment
from subquad.utils.format import nats, percent, size


def cache_teacher(
    teacher: str = "default",
    recipe: Recipe | str | Path = "quick",
    out: str | Path = "teacher-cache",
    *,
    data: list[str] | None = None,
    tokens: int | None = None,
    sequence_length: int | None = None,
    top_k: int = 64,
    batch: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    command: str | None = None,
) -> TeacherCache:
    """Writes the teacher's `top_k` most likely next tokens on the text of `convert` into the folder `out`.

    `tokens`, `sequence_length` and `batch` (rows at a time) default to those of the recipe's first stage on logits.
    `resume`: continue an interrupted cache in `out`; `overwrite`: delete an earlier one first. Raises UserError for
    invalid arguments.
    """
    # Settings: those of the caller, else those of the recipe's first stage on logits
    recipe = checked_recipe(recipe, teacher, data)
    if TASKS[recipe.task].of_images:
        raise UserError(
            f"only a language model's logits can be cached, and the recipe '{recipe.name}' is for {recipe.task}: "
            "give a recipe for text"
        )
    out = Path(out)
    stage = next((stage for stage in recipe.stages if "logits" in stage.weights), None)
    if stage is not None:
        tokens, sequence_length = tokens or stage.tokens, sequence_length or stage.sequence_length
        batch = batch or stage.batch // stage.accumulate
    if tokens is None or sequence_length is None:
        raise UserError(f"the recipe '{recipe.name}' has no stage on logits: give --tokens and --sequence-length")

    # The folder, the teacher and its text
    run = Run(recipe, out, make_accelerator(out), Console(), resume)
    if run.accelerator.num_processes > 1:
        raise UserError("the teacher's cache is written by one process: start the command without accelerate launch")
    claim_cache(out, resume=resume, overwrite=overwrite)  # before the slow part
    device = str(run.accelerator.device)
    loaded_teacher = open_teacher(recipe, device, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    if (longest := longest_input(loaded_teacher.model, sequence_length)) < sequence_length:
        run.say(f"{loaded_teacher.name} takes rows of at most {longest:,} tokens, not {sequence_length:,}")
        sequence_length = longest
    corpus = read_text(recipe, loaded_teacher)
    for remark in corpus.remarks:
        run.say(remark)
    run.say(f"teacher: {loaded_teacher.name}; {corpus.amount}")
    if len(corpus.train) < tokens:
        run.say(f"the text is shorter than the {tokens:,} tokens that were asked for: all of it is cached")

    # Write the cache, and open it as training will
    write_cache(
        out,
        loaded_teacher,
        corpus,
        tokens=tokens,
        sequence_length=sequence_length,
        top_k=top_k,
        batch=batch or 1,
        resume=resume,
        console=run.console,
        about=environment(run.accelerator.device, command, run.accelerator.num_processes),
    )
    cache = TeacherCache.open(
        out, teacher_fingerprint=loaded_teacher.fingerprint, tokenizer_hash=tokenizer_hash(loaded_teacher.tokenizer)
    )
    meta = cache.meta
    run.say(
        f"{out}: {cache.tokens:,} tokens at {meta['bytes_per_token']:,.0f} bytes, "
        f"{size(meta['bytes_per_token'] * cache.tokens)} in all; the top {top_k} keep {percent(meta['mass_kept'])} of "
        f"the mass and lose {nats(meta['kl_lost'])} nats/token; {meta['tokens_per_second']:,.0f} tokens/s"
    )
    return cache
