"""Kinds of head as the engine runs them, one file for each kind in the catalog's tasks."""

from importlib import import_module
from typing import Any

from torch import nn

from worker.engine.catalog.tasks import TASKS, Task
from worker.engine.tasks.kind import EstimatorName, HeadKind


def _kind(task: type[Task]) -> type[HeadKind[Any]]:
    """Return `KIND` of the module that has the name of the task's module."""
    kind: type[HeadKind[Any]] = import_module(f"{__name__}.{task.__module__.rpartition('.')[2]}").KIND
    return kind


KINDS = {task: _kind(task) for task in TASKS}


def kind_of(task: Task, model: nn.Module | None = None) -> HeadKind[Any]:
    """Return the head of a task, as the engine runs it; `model` is the one that has it."""
    return KINDS[type(task)](task, model)


__all__ = ["EstimatorName", "HeadKind", "kind_of"]
