"""A student with weights of its own: smaller than its teacher, or of another family.

Its model is made from a configuration, with random weights or with those of the teacher that fit, and takes the
teacher's place as what a plan is applied to.
"""

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from subquad.distill.parameters import Parameters
from subquad.errors import UserError, nearest
from subquad.model.interface import block_path, find_attention, layer_map
from subquad.model.tasks import TASKS
from subquad.pretrained.load import Teacher
from subquad.recipes.schema import StudentModelConfig

LISTS_BY_LAYER = ("layer_types", "mlp_layer_types")  # the configuration makes them again


def fresh_model(source: Teacher, settings: StudentModelConfig, seed: int) -> PreTrainedModel:
    """A model for the teacher's task with the given configuration, in the teacher's dtype and on its device.

    Raises UserError for a key that the configuration lacks, or a configuration that no model can be made of.
    """
    config = _config(source, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model: PreTrainedModel = TASKS[source.task].auto.from_config(config, dtype=source.model.dtype)
        except (ValueError, RuntimeError, TypeError) as error:
            raise UserError(f"no model can be made of student.changes {settings.changes}: {error}") from None
    if settings.start == "teacher":
        take_weights(model, source.model)
    model.to(source.model.device)  # type: ignore[arg-type]  # transformers' wrapper hides what it wraps
    return model.eval().requires_grad_(False)


def _config(source: Teacher, settings: StudentModelConfig) -> PreTrainedConfig:
    theirs = source.model.config
    config = theirs if settings.model is None else _described(settings.model)
    described = config.to_dict()
    for key in settings.changes:
        if key not in described and key not in config.attribute_map:
            raise UserError(f"student.changes names '{key}': {nearest(key, [*described, *config.attribute_map])}")
    described = {key: value for key, value in described.items() if key not in LISTS_BY_LAYER}
    described |= {config.attribute_map.get(key, key): value for key, value in settings.changes.items()}
    answers = "id2label" if TASKS[source.task].of_images else "vocab_size"
    described[answers] = getattr(theirs.get_text_config(), answers)  # the tokenizer, or the classes, are the teacher's
    return type(config).from_dict(described)


def _described(model: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"student.model '{model}' has no configuration: {str(error).splitlines()[0]}") from None


@torch.no_grad()
def take_weights(model: PreTrainedModel, teacher: PreTrainedModel) -> list[str]:
    """Copies what has the same name and shape, layer l's from the teacher's layer floor(l L_t / L_s); which those are.

    Raises UserError where nothing fits.
    """
    mine, theirs = ([block_path(site.path) for site in find_attention(one)] for one in (model, teacher))
    source_of = dict(zip(mine, (theirs[layer] for layer in layer_map(len(mine), len(theirs))), strict=True))
    given: Parameters = dict(teacher.named_parameters())
    taken = []
    for name, parameter in model.named_parameters():
        block = next((block for block in mine if name.startswith(f"{block}.")), None)
        source = given.get(name if block is None else source_of[block] + name[len(block) :])
        if source is not None and source.shape == parameter.shape:
            parameter.copy_(source)
            taken.append(name)
    if not taken:
        raise UserError(
            f"student.start is teacher, and no weight of {type(model).__name__} has the name and shape of one of "
            f"{type(teacher).__name__}'s: set it to random, or change less of the configuration"
        )
    return taken
