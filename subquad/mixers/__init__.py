"""Token mixers, one file each.

To add a mixer, write its file, add a row to MIXERS here and one to the table in tests/mixers/test_mixers.py.
"""

from typing import Any

from pydantic import ValidationError

from subquad.errors import UserError, nearest
from subquad.mixers.attention import Attention
from subquad.mixers.base import HeadGroup, Mixer, MixerInputs, Options, State
from subquad.mixers.discrete_mamba2 import DiscreteMamba2
from subquad.mixers.gated_deltanet import GatedDeltaNet
from subquad.mixers.gla import GLA
from subquad.mixers.hedgehog import Hedgehog
from subquad.mixers.kda import KDA
from subquad.mixers.liger import Liger
from subquad.mixers.linear import Linear
from subquad.mixers.mamba2 import Mamba2
from subquad.mixers.retention import Retention
from subquad.mixers.rwkv7 import RWKV7
from subquad.mixers.sliding_window import SlidingWindow

MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "sliding_window": SlidingWindow,
    "linear": Linear,
    "hedgehog": Hedgehog,
    "liger": Liger,
    "retention": Retention,
    "gla": GLA,
    "mamba2": Mamba2,
    "discrete_mamba2": DiscreteMamba2,
    "gated_deltanet": GatedDeltaNet,
    "kda": KDA,
    "rwkv7": RWKV7,
}


def mixer_class(name: str) -> type[Mixer]:
    """Look up a mixer by name. Raises UserError with the nearest valid name."""
    if name not in MIXERS:
        raise UserError(f"unknown mixer '{name}': {nearest(name, MIXERS)}")
    return MIXERS[name]


def mixer_options(name: str, options: dict[str, Any]) -> Options:
    """Validate the options of a mixer and fill in the defaults. Raises UserError naming the invalid option."""
    kind = mixer_class(name).options_class
    unknown = set(options) - set(kind.model_fields)
    if unknown:
        key = sorted(unknown)[0]
        raise UserError(f"mixer '{name}' has no option '{key}': {nearest(key, kind.model_fields) or 'it has none'}")
    try:
        return kind(**options)
    except ValidationError as error:
        details = error.errors()[0]
        raise UserError(f"mixer '{name}', option '{details['loc'][0]}': {details['msg'].lower()}") from None


__all__ = ["MIXERS", "HeadGroup", "Mixer", "MixerInputs", "Options", "State", "mixer_class", "mixer_options"]
