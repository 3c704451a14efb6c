"""Forward passes that begin in the middle: candidates that differ in one layer share all layers below it.

`record_outputs` records the output of every block in a pass. Within `skip_below`, the blocks below a layer compute
nothing and return their recorded outputs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def replace_forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Within, calls of a module go to a function. These contexts nest."""
    outer = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        if outer is None:
            del module.forward
        else:
            module.forward = outer


@contextmanager
def skip_below(blocks: Sequence[nn.Module], layer: int, outputs: Sequence[Any]) -> Iterator[None]:
    """Within, the blocks below `layer` return the recorded `outputs`."""
    with ExitStack() as stack:
        for block, output in zip(blocks[:layer], outputs[:layer], strict=True):
            stack.enter_context(replace_forward(block, lambda *args, _output=output, **kwargs: _output))
        yield


def repeat_output(output: Any, times: int) -> Any:
    """A block's output, repeated `times` along the batch: copies of a row are `batch` rows apart."""
    if isinstance(output, Tensor):
        return output.repeat(times, *[1] * (output.dim() - 1))
    return tuple(repeat_output(part, times) for part in output) if isinstance(output, tuple) else output
