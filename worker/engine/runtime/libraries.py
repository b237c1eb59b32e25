"""Imports the libraries that take seconds to import, all together, when something of one is first used.

A job that its plan refuses needs none of them.
"""

import sys
from importlib import import_module
from threading import Lock
from typing import Any

IMPORTED = (
    "optuna",
    "scipy.optimize",
    "scipy.sparse",
    "scipy.stats",
    "sklearn.metrics",
    "transformers.configuration_utils",
    "transformers.conversion_mapping",
    "transformers.core_model_loading",
    "transformers.masking_utils",
    "transformers.modeling_rope_utils",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)
_importing = Lock()


def preload() -> None:
    """Import all of them; other threads that call it meanwhile wait.

    The libraries import themselves and each other in circles, and look whether others are imported. A thread that used
    one while another thread imports the next would sometimes find only a part of it.
    """
    with _importing:
        for name in IMPORTED:
            import_module(name)
        # Patterns of the names that kinds of models are stored under; loading the first model takes 0.3 s to make them.
        sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("")


class Library:
    """A module of `IMPORTED`, or one that these import."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        preload()
        return getattr(sys.modules[self._name], name)


transformers = Library("transformers")
configuration_utils = Library("transformers.configuration_utils")
conversion_mapping = Library("transformers.conversion_mapping")
core_model_loading = Library("transformers.core_model_loading")
masking_utils = Library("transformers.masking_utils")
modeling_rope_utils = Library("transformers.modeling_rope_utils")
import_utils = Library("transformers.utils.import_utils")
tokenization_auto = Library("transformers.models.auto.tokenization_auto")
optuna = Library("optuna")
optimize = Library("scipy.optimize")
sparse = Library("scipy.sparse")
stats = Library("scipy.stats")
sk = Library("sklearn.metrics")
