"""Generation with a student: its own cache, and all else as its backbone's class does it.

transformers lets a family change parts of `generate`: Phi-3 drops the cache where its long rotary factors begin, and
others make positions of their own. So each hook of `generate` that a family may override is asked of the backbone.
"""

from typing import Any, NoReturn

from transformers import GenerationConfig, GenerationMixin

from subquad.errors import UserError
from subquad.model.cache import CACHE, StudentCache

CACHE_IMPLEMENTATIONS = (None, "dynamic")  # values of `cache_implementation` that a student's own cache fulfils


class StudentGenerationMixin(GenerationMixin):
    """`generate` of a student; its class has a `backbone` and `new_cache`."""

    backbone: Any  # a causal language model of transformers; its hooks are not typed

    def new_cache(self) -> StudentCache:
        """Empty cache for this student's plan."""
        raise NotImplementedError

    @property
    def generation_config(self) -> GenerationConfig:
        """Backbone's defaults of `generate`."""
        config: GenerationConfig = self.backbone.generation_config
        return config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        if hasattr(self, "backbone"):  # else transformers sets defaults, which the backbone has already
            self.backbone.generation_config = config

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Keyword arguments of the next forward pass, as the backbone's class makes them."""
        return self.backbone.prepare_inputs_for_generation(*args, **kwargs)

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.backbone._update_model_kwargs_for_generation(*args, **kwargs)

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs: Any) -> Any:
        prepared_config, model_kwargs = self.backbone._prepare_generation_config(generation_config, **kwargs)
        if generation_config is None and "cache_implementation" not in kwargs:
            prepared_config.cache_implementation = None  # a default of the teacher's
        return prepared_config, model_kwargs

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> Any:
        return self.backbone._prepare_model_inputs(*args, **kwargs)

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.backbone._prepare_position_ids_for_generation(*args, **kwargs)

    def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.backbone._expand_inputs_for_generation(*args, **kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        self.backbone._validate_model_kwargs(model_kwargs)

    def _supports_logits_to_keep(self) -> bool:
        return bool(self.backbone._supports_logits_to_keep())

    def _prepare_cache_for_generation(  # type: ignore[override]  # returns nothing there, too
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Puts the student's own cache into `model_kwargs`. Raises UserError for an option that asks for another."""
        implementation = generation_config.cache_implementation
        if implementation not in CACHE_IMPLEMENTATIONS:
            raise UserError(
                f"a student keeps its states in a cache of its own: generate without cache_implementation="
                f"'{implementation}'"
            )
        cache = model_kwargs.get(CACHE)
        if cache is not None:
            cache._is_user_defined = True
        elif generation_config.use_cache is not False:
            cache = model_kwargs[CACHE] = self.new_cache()
            if generation_config.is_assistant:  # its drafts are taken back
                cache.activate_past_recording()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises UserError: pages of keys and values cannot hold the states of mixers."""
        raise UserError(
            "continuous batching (generate_batch, cache_implementation='paged') keeps keys and values in pages, which "
            "cannot hold a student's states: call generate with a padded batch"
        )
