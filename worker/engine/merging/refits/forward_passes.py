"""Forward passes of which a part is left out: they stop early, begin late, or repeat outputs that are known."""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

Read = TypeVar("Read")
Finished = tuple[nn.Module, Any]
"""A module that was called, and its output."""


@dataclass(frozen=True)
class Beside:
    """What a block gives beside the hidden states."""

    count: int | None = None
    """Number of further values in a tuple; None: it gives no tuple."""
    is_computed: bool = False
    """Whether any of these is a tensor, which the blocks after it may read."""

    @classmethod
    def of(cls, given: Any) -> "Beside":
        """Return what there is beside the hidden states in a block's output."""
        if not isinstance(given, tuple):
            return cls()
        return cls(len(given) - 1, any(isinstance(value, Tensor) for value in given[1:]))


class _AllCalled(Exception):
    """The rest of the pass is not needed."""


def first_calls(
    run: Callable[[], object],
    modules: Sequence[nn.Module],
    read: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Read],
    stops: bool = True,
) -> list[Read]:
    """Return what `read` makes of the first call of each module while `run` runs.

    Args:
        stops: stop it once all have been called.
    """
    calls: dict[nn.Module, Read] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module not in calls:
            calls[module] = read(module, args, kwargs)
        if stops and len(calls) == len(set(modules)):
            raise _AllCalled

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in dict.fromkeys(modules)]
    try:
        with suppress(_AllCalled):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return [calls[module] for module in modules]


@contextmanager
def giving(blocks: Sequence[nn.Module], hidden: Tensor | None, beside: Beside) -> Iterator[None]:
    """Let the last of these blocks give `hidden`, with what blocks give beside it, and those before what they read.

    What the first block computes for all others, as T5's biases of positions, it computes; the others give that on.
    """
    shared: list[Any] = [None] * (beside.count or 0)

    def give(given: Tensor | None, forward: Callable[..., Any] | None, read: Tensor, *args: Any, **kwargs: Any) -> Any:
        if forward is not None:
            shared[:] = forward(read, *args, **kwargs)[1:]
        output = read if given is None else given
        return output if beside.count is None else (output, *shared)

    for number, block in enumerate(blocks, start=1):
        computes = number == 1 and beside.is_computed
        block.forward = partial(give, hidden if number == len(blocks) else None, block.forward if computes else None)
    try:
        yield
    finally:
        for block in blocks:
            delattr(block, "forward")


@contextmanager
def recording(block: nn.Module, not_final: Collection[nn.Module]) -> Iterator[list[Finished]]:
    """Collect outputs of the block's modules, until the first call of one that is not final.

    Of modules within modules, the outer one's output is there. Nothing is collected where all are final.
    """
    finished: list[Finished] = []
    starts: list[int] = []
    is_final = True

    def before(module: nn.Module, args: object) -> None:
        nonlocal is_final
        is_final = is_final and module not in not_final
        starts.append(len(finished))

    def after(module: nn.Module, args: object, output: Any) -> None:
        start = starts.pop()
        if is_final:
            finished[start:] = [(module, output)]

    inner = [module for module in block.modules() if module is not block] if not_final else []
    handles = [module.register_forward_pre_hook(before) for module in inner]
    handles += [module.register_forward_hook(after) for module in inner]
    try:
        yield finished
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaying(finished: Sequence[Finished]) -> Iterator[None]:
    """Let modules give what they gave, call by call; further calls are computed."""
    outputs: dict[nn.Module, deque[Any]] = {}
    for module, output in finished:
        outputs.setdefault(module, deque()).append(output)

    def give(waiting: deque[Any], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return waiting.popleft() if waiting else forward(*args, **kwargs)

    for module, waiting in outputs.items():
        module.forward = partial(give, waiting, module.forward)
    try:
        yield
    finally:
        for module in outputs:
            delattr(module, "forward")


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of a module's output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for value in output:
            yield from tensors_of(value)
