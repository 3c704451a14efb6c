"""Vocabulary of a tokenizer, cut to the rows of a model's embedding.

Notable:
- A tokenizer may have more tokens than its model has rows: tokens that were added without resizing. Their ids would end
  any run with an index error, at the first text that has them. Without them, such a text is split into other tokens.
"""

import json
import warnings
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from subquad.errors import UserError


def cut_to_rows(tokenizer: PreTrainedTokenizerBase, rows: int, name: str) -> None:
    """Removes, in place and with a warning, the tokens whose ids are `rows` or more.

    Raises:
        UserError: the tokenizer cannot do without them: it puts one around each text, or is not a fast one.
    """
    excess = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows}
    if not excess:
        return
    example = min(excess, key=excess.__getitem__)
    said = (
        f"the tokenizer of '{name}' has {len(excess)} tokens beyond the {rows} rows of the embedding, e.g. '{example}'"
    )
    advice = "resize the embedding (resize_token_embeddings) or give the model's own tokenizer"
    if not tokenizer.is_fast:
        raise UserError(f"{said}: {advice}")
    kept = {token: index for token, index in tokenizer.get_vocab().items() if index < rows}
    editable: Any = tokenizer
    editable._tokenizer = Tokenizer.from_str(json.dumps(_cut(json.loads(editable.backend_tokenizer.to_str()), rows)))
    for role, token in tokenizer.special_tokens_map.items():
        if isinstance(token, list):
            setattr(tokenizer, role, [part for part in token if str(part) not in excess])
        elif str(token) in excess:
            setattr(tokenizer, role, None)
    if tokenizer.get_vocab() != kept or any(index >= rows for index in tokenizer("a")["input_ids"]):
        raise UserError(f"{said}, and cannot do without them: {advice}")
    warnings.warn(f"{said}: they are never used, and a text that has them is split into other tokens", stacklevel=2)


def _cut(state: dict[str, Any], rows: int) -> dict[str, Any]:
    """State of a tokenizer without the ids from `rows` on, and without merges into or of their tokens."""
    model = state["model"]
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < rows]
    if isinstance(model["vocab"], list):
        model["vocab"] = model["vocab"][:rows]
    else:
        vocabulary = {token: index for token, index in model["vocab"].items() if index < rows}
        model["vocab"] = vocabulary
        if "merges" in model:
            pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
            model["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= vocabulary.keys()]
    return state
