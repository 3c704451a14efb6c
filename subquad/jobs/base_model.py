"""Base model of a student with its own configuration: smaller than the teacher, or of another family.

The model is created from a configuration, with random weights or the teacher's weights where they fit. The plan is then
applied to this model instead of the teacher.
"""

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from subquad.distill.parameters import Parameters
from subquad.errors import UserError, nearest
from subquad.model.interface import block_path, find_attention, layer_map
from subquad.pretrained.load import Teacher
from subquad.recipes.schema import StudentModelConfig

LISTS_BY_LAYER = ("layer_types", "mlp_layer_types")  # recomputed by the configuration


def fresh_model(teacher: Teacher, settings: StudentModelConfig, seed: int) -> PreTrainedModel:
    """Model for the teacher's task with the given configuration, in the teacher's dtype and on its device.

    Raises UserError for a key that the configuration lacks, or a configuration from which no model can be created.
    """
    config = _config(teacher, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model: PreTrainedModel = teacher.kind.auto.from_config(config, dtype=teacher.model.dtype)
        except (ValueError, RuntimeError, TypeError) as error:
            raise UserError(f"no model can be made of student.changes {settings.changes}: {error}") from None
    if settings.start == "teacher":
        take_weights(model, teacher.model)
    model.to(teacher.model.device)  # type: ignore[arg-type]  # transformers' wrapper hides what it wraps
    return model.eval().requires_grad_(False)


def _config(teacher: Teacher, settings: StudentModelConfig) -> PreTrainedConfig:
    """Configuration of the settings' model, or the teacher's, with the settings' changes."""
    teacher_config = teacher.model.config
    config = teacher_config if settings.model is None else _load_config(settings.model)
    fields = config.to_dict()
    for key in settings.changes:
        if key not in fields and key not in config.attribute_map:
            raise UserError(f"student.changes names '{key}': {nearest(key, [*fields, *config.attribute_map])}")
    fields = {key: value for key, value in fields.items() if key not in LISTS_BY_LAYER}
    fields |= {config.attribute_map.get(key, key): value for key, value in settings.changes.items()}
    # The student keeps the teacher's tokenizer, or its classes
    output_field = "id2label" if teacher.kind.of_images else "vocab_size"
    fields[output_field] = getattr(teacher_config.get_text_config(), output_field)
    return type(config).from_dict(fields)


def _load_config(model: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"student.model '{model}' has no configuration: {str(error).splitlines()[0]}") from None


@torch.no_grad()
def take_weights(model: PreTrainedModel, teacher: PreTrainedModel) -> list[str]:
    """Copies the teacher's weights of the same name and shape into `model`; returns their names.

    Layer l gets the weights of the teacher's layer floor(l L_t / L_s). Raises UserError if no weight fits.
    """
    # The teacher's block for each of the model's blocks
    blocks, teacher_blocks = ([block_path(site.path) for site in find_attention(lm)] for lm in (model, teacher))
    teacher_layers = layer_map(len(blocks), len(teacher_blocks))
    teacher_block_of = dict(zip(blocks, (teacher_blocks[layer] for layer in teacher_layers), strict=True))

    # Copy parameter by parameter
    teacher_parameters: Parameters = dict(teacher.named_parameters())
    copied_names = []
    for name, parameter in model.named_parameters():
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        teacher_name = name if block is None else teacher_block_of[block] + name[len(block) :]
        weight = teacher_parameters.get(teacher_name)
        if weight is not None and weight.shape == parameter.shape:
            parameter.copy_(weight)
            copied_names.append(name)
    if not copied_names:
        raise UserError(
            f"student.start is teacher, and no weight of {type(model).__name__} has the name and shape of one of "
            f"{type(teacher).__name__}'s: set it to random, or change less of the configuration"
        )
    return copied_names
