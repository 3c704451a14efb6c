"""Forward passes that begin in the middle: candidates that differ in one layer share all layers below it.

`record_outputs` records the output of every block in a pass. Within `skip_below`, the blocks below a layer compute
nothing and return their recorded outputs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from subquad.model.base import BaseStudent


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
def skip_below(student: BaseStudent, layer: int, outputs: Sequence[Any], times: int = 1) -> Iterator[None]:
    """Within, the blocks below `layer` return their recorded `outputs`, repeated `times` along the batch.

    Blocks whose keys other layers read do run, on the recorded output of the block before. In a teacher that calls an
    attention module several times in a pass, all blocks run.
    """
    blocks, shapes = student.blocks(), student.plan.shapes
    if any(shape.calls for shape in shapes):
        yield
        return
    sources = {shape.kv_from for shape in shapes if shape.kv_from is not None}
    inputs_of_running = {index - 1 for index in (*sources, layer)}  # blocks whose output a running block reads
    with ExitStack() as stack:
        for index in {*range(layer)} - sources:
            output = repeat_output(outputs[index], times) if index in inputs_of_running else outputs[index]
            stack.enter_context(replace_forward(blocks[index], lambda *args, _output=output, **kwargs: _output))
        yield


def repeat_output(output: Any, times: int) -> Any:
    """A block's output, repeated `times` along the batch: copies of a row are `batch` rows apart.

    Hidden states are (B, T, M), or several of them in one tensor, (P, B, T, M) (Gemma 3n).
    """
    if isinstance(output, Tensor):
        dim = max(0, output.dim() - 3)
        return output.repeat(*[1] * dim, times, *[1] * (output.dim() - dim - 1))
    return tuple(repeat_output(part, times) for part in output) if isinstance(output, tuple) else output
