"""Text part of a model that also reads images or sound, as a causal language model over the same weights.

Notable:
- The wrapper names its decoder and its head itself, and its configuration holds that of the decoder. The class that
  transformers has for that configuration computes with the decoder's own modules; nothing is copied.
- Whether it is the same model is tried, not known: both have to give the same logits for a text.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from subquad.errors import UserError
from subquad.model.interface import input_device, wraps_text
from subquad.model.layer_mixer import keep_initialised


def has_text_class(config: Any) -> bool:
    """Whether transformers has a causal language model for the text part of this configuration."""
    return config.get_text_config().model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


@torch.no_grad()
def text_part(model: PreTrainedModel) -> PreTrainedModel:
    """Causal language model made of the decoder and the head of `model`; of a model of text alone, the model itself.

    Its modules are the wrapper's own, so weights are shared, and so is the attention implementation.

    Raises:
        UserError: transformers has no class for the text part, or that class computes something else.
    """
    if not wraps_text(model):
        return model
    family, config = type(model).__name__, model.config.get_text_config()
    refused = UserError(
        f"{family} reads more than text, and its text part is no model of its own in transformers: give a model of text"
    )
    if not has_text_class(config):
        raise refused
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    with torch.device("meta"):
        text: Any = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    if type(decoder) is type(text):  # the wrapper holds the language model with its head
        return keep_initialised(decoder)
    if type(decoder) is not type(text.base_model) or head is None:
        raise refused
    setattr(text, text.base_model_prefix, decoder)
    text.set_output_embeddings(head)
    config.tie_word_embeddings = head.weight is text.get_input_embeddings().weight
    text.config = config
    text.all_tied_weights_keys = text.get_expanded_tied_weights_keys(all_submodels=False)
    text.generation_config = model.generation_config
    text.train(model.training)
    tokens_BT = torch.arange(4, device=input_device(model))[None] % config.vocab_size
    expected_BTV, logits_BTV = (lm(input_ids=tokens_BT, use_cache=False).logits for lm in (model, text))
    if not torch.allclose(logits_BTV, expected_BTV, rtol=1e-3, atol=1e-3 * expected_BTV.abs().max().item()):
        raise refused
    return keep_initialised(text)
