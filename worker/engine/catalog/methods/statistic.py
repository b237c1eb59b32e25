"""What a statistic is: a name, and the memory that measuring it takes. The passes are in `worker.engine.scoring`."""

from collections.abc import Callable, Sequence
from typing import Protocol, Self


class RunningModels(Protocol):
    """The bytes of models that are run, from which a statistic's own are counted."""

    @property
    def models(self) -> Sequence[int]:
        """Bytes of every model in float32."""

    @property
    def input_widths(self) -> Sequence[int]:
        """Widths of the inputs of the backbone's linear layers."""

    @property
    def longest_row(self) -> int:
        """Number of tokens of the longest row."""

    @property
    def tokens(self) -> int:
        """Number of padded tokens of the largest batch."""

    @property
    def value_bytes(self) -> int:
        """Bytes of an activation; 0 where activations lie on another device."""

    @property
    def batch(self) -> int:
        """Bytes of a forward pass of the largest batch."""

    def activations(self, tokens: int) -> int:
        """Return the bytes that all layers keep of `tokens` tokens for a backward pass."""


class Statistic(str):
    """A statistic that a method may need of every model, measured on the model's own rows.

    It is the name that is written and asked for. `measuring_bytes` counts the bytes of measuring it, besides the
    models, and of merging by it; `beside_bytes` those that it adds to the passes of another statistic, if it can be
    taken from these.
    """

    __slots__ = ("beside_bytes", "measuring_bytes")
    measuring_bytes: Callable[[RunningModels], int]
    beside_bytes: Callable[[RunningModels], int]

    def __new__(
        cls,
        name: str,
        measuring_bytes: Callable[[RunningModels], int],
        beside_bytes: Callable[[RunningModels], int] = lambda _: 0,
    ) -> Self:
        statistic = super().__new__(cls, name)
        statistic.measuring_bytes = measuring_bytes
        statistic.beside_bytes = beside_bytes
        return statistic
