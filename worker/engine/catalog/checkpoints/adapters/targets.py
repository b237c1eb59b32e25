"""Finds the modules of a model that PEFT adapts, by an adapter's configuration.

PEFT decides by the configuration alone: it leaves out tensors of other modules that are in the file too, and only a
warning says so.
"""

import re
from typing import Annotated

from pydantic import BaseModel, Field, StrictInt

from worker.engine.catalog.checkpoints.adapters.peft import ALL_LINEAR, ANY_LAYERS, WHOLE_HEADS
from worker.engine.catalog.checkpoints.patterns import Budget, Pattern, beginnings
from worker.engine.catalog.checkpoints.tensor_names import OUTPUT_EMBEDDINGS, ends_with

PLAIN = re.compile(r"[\w\-]+(\.[\w\-]+)*", re.ASCII)


class TargetConfig(BaseModel):
    """The part of an adapter's configuration that names the modules that it adapts."""

    task_type: str | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: Annotated[list[str], Field(max_length=50)] | None = None
    layers_to_transform: list[StrictInt] | StrictInt | None = None
    layers_pattern: Annotated[list[str], Field(max_length=100)] | str | None = None


class Targets:
    """The modules that an adapter's configuration names, as PEFT understands it.

    Raises:
        ValueError: PEFT refuses the configuration, or a pattern is not available, see `patterns`; names the key.
    """

    def __init__(self, config: TargetConfig) -> None:
        if config.target_modules is None:
            raise ValueError("target_modules is missing, so that which modules are adapted is not known")
        self._budget = Budget()
        self._targets = _Names("target_modules", config.target_modules, self._budget)
        self._is_all_linear = str(config.target_modules).lower() == ALL_LINEAR
        self._excluded = _Names("exclude_modules", config.exclude_modules or [], self._budget)
        whole = [*(config.modules_to_save or ()), *WHOLE_HEADS.get(config.task_type or "", ())]
        self._whole = [_pattern("modules_to_save", _plain("modules_to_save", name), self._budget) for name in whole]
        chosen, lists = config.layers_to_transform, config.layers_pattern
        for key, value in (("layers_to_transform", chosen), ("layers_pattern", lists)):
            if isinstance(config.target_modules, str) and value is not None:
                raise ValueError(f"{key} is only for a target_modules that is a list")
        if lists and chosen is None:
            raise ValueError("layers_pattern is only for a layers_to_transform")
        self._layers = set() if chosen is None else {chosen} if isinstance(chosen, int) else set(chosen)
        lists = [lists] if isinstance(lists, str) else lists
        patterns = [rf"(?:^|.*?\.){_plain('layers_pattern', one)}" for one in lists or () if lists != [""]]
        self._numbers = [re.compile(rf"{one}\.(?P<number>\d+)\.") for one in patterns or [ANY_LAYERS]]

    def left_out_by(self, module: str, is_embedding: bool) -> str | None:
        """Return the key by which PEFT leaves the module out; None if it is adapted.

        Raises:
            ValueError: the patterns take too long to match.
        """
        if self._excluded.have(module):
            return "exclude_modules"
        if any(pattern.is_part_of(module) for pattern in self._whole):
            return "modules_to_save, or the head that task_type stores whole,"
        if self._is_all_linear:
            return "target_modules" if is_embedding or ends_with(f"{module}.weight", OUTPUT_EMBEDDINGS) else None
        if not self._targets.have(module):
            return "target_modules"
        if self._layers and not self._targets.have_exactly(module) and self._number(module) not in self._layers:
            return "layers_to_transform"
        return None

    def _number(self, module: str) -> int | None:
        match = next((found for one in self._numbers if (found := one.match(module))), None)
        return None if match is None else int(match["number"])


class _Names:
    """Names of modules, or their ends after a dot, or one pattern for whole names."""

    def __init__(self, key: str, names: list[str] | str, budget: Budget) -> None:
        self._pattern = _pattern(key, names, budget) if isinstance(names, str) and names else None
        self._names = set() if isinstance(names, str) else set(names)
        self._longest = max((len(name) for name in self._names), default=0)

    def have(self, module: str) -> bool:
        if self._pattern is not None:
            return self._pattern.is_all_of(module)
        longest = len(module) - self._longest
        return any(start >= longest and module[start:] in self._names for start in beginnings(module))

    def have_exactly(self, module: str) -> bool:
        return module in self._names


def _pattern(key: str, text: str, budget: Budget) -> Pattern:
    try:
        return Pattern(text, budget)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _plain(key: str, name: str) -> str:
    if PLAIN.fullmatch(name) is None:
        raise ValueError(f"{key} has '{name[:100]}', which is no name of a module")
    return name
