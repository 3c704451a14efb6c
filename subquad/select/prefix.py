"""Passes that begin in the middle: candidates that differ from a pass in one layer share everything before it.

`recorded` keeps what every block of a pass returns; within `resumed`, the blocks below a layer compute nothing and
return what they did then.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def standing_in(module: nn.Module, other: Callable[..., Any]) -> Iterator[None]:
    """Within, calls of a module go to a function; these contexts nest."""
    before = module.__dict__.get("forward")
    module.forward = other
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def recorded(blocks: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Within, keeps what each block returns."""
    outputs: list[Any] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output)

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def resumed(blocks: Sequence[nn.Module], layer: int, outputs: Sequence[Any]) -> Iterator[None]:
    """Within, the blocks before `layer` return what is in `outputs`."""
    with ExitStack() as within:
        for block, output in zip(blocks[:layer], outputs[:layer], strict=True):
            within.enter_context(standing_in(block, lambda *args, _output=output, **kwargs: _output))
        yield


def repeated(output: Any, times: int) -> Any:
    """What a block returned, `times` over along the batch: each row's copies are `batch` apart."""
    if isinstance(output, Tensor):
        return output.repeat(times, *[1] * (output.dim() - 1))
    return tuple(repeated(part, times) for part in output) if isinstance(output, tuple) else output
