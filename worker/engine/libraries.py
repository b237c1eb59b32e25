"""Libraries that take seconds to import, each imported when something of it is first used.

A merge that loads no model and evaluates nothing needs none of them; importing is half of what it would take.
"""

from importlib import import_module
from threading import RLock
from typing import Any

_importing = RLock()  # what imports itself in circles must not do so in two threads at once


class Library:
    """A module, imported when one of its attributes is first asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        with _importing:
            return getattr(import_module(self._name), name)


transformers = Library("transformers")
conversion_mapping = Library("transformers.conversion_mapping")
masking_utils = Library("transformers.masking_utils")
optuna = Library("optuna")
optimize = Library("scipy.optimize")
sparse = Library("scipy.sparse")
stats = Library("scipy.stats")
sk = Library("sklearn.metrics")


def preload() -> None:
    """Import all of them, one after the other; who wants one meanwhile waits for no more than the one at hand."""
    for name in (
        "optuna",
        "scipy.optimize",
        "scipy.sparse",
        "scipy.stats",
        "sklearn.metrics",
        "transformers.conversion_mapping",
        "transformers.modeling_utils",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
    ):
        with _importing:
            import_module(name)


def is_of_library(error: BaseException) -> bool:
    """Whether it is an error, or a panic of compiled code, as tokenizers has at some files; no signal to stop."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def in_one_line(error: BaseException) -> str:
    """What it says, which may be on several lines; at most 300 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
