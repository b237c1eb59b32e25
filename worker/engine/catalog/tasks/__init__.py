"""Tasks of heads. A new kind of head is one file here, and one of its name in `worker.engine.tasks`."""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Literal

from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.library import architecture, model_type_of
from worker.engine.catalog.families import FAMILIES, Family, backbone_of
from worker.engine.catalog.primitives.errors import InvalidCheckpoint
from worker.engine.catalog.tasks.causal_language_model import CausalLanguageModel
from worker.engine.catalog.tasks.classification import Classification
from worker.engine.catalog.tasks.embedding import Embedding
from worker.engine.catalog.tasks.image_classification import ImageClassification
from worker.engine.catalog.tasks.labels import check_estimator, check_metric, column_problems, label_map
from worker.engine.catalog.tasks.masked_language_model import MaskedLanguageModel
from worker.engine.catalog.tasks.multi_label import MultiLabel
from worker.engine.catalog.tasks.multiple_choice import MultipleChoice
from worker.engine.catalog.tasks.question_answering import QuestionAnswering
from worker.engine.catalog.tasks.regression import Regression
from worker.engine.catalog.tasks.sequence_to_sequence import SequenceToSequence
from worker.engine.catalog.tasks.task import Label, LabelMap, Task
from worker.engine.catalog.tasks.token_classification import TokenClassification


def _found() -> tuple[type[Task], ...]:
    """Return the tasks in the files of this package; each is found by being there."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    named = [(module.__name__, value) for module in modules for value in vars(module).values()]
    return tuple(
        value
        for module, value in named
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == module and value is not Task
    )


TASKS = _found()

if TYPE_CHECKING:
    MetricName = str
else:
    MetricName = Literal[tuple(sorted({metric for task in TASKS for metric in task.metrics}))]


def family_of(info: CheckpointInfo) -> Family | None:
    """Return the table of a checkpoint's backbone under its head; None where either of them has no table."""
    family = backbone_of(info.model_type)
    if family is None or family.head.architecture == info.architecture:
        return family
    found = architecture(info.config, info.architecture)
    task = next((task for task in TASKS if task.is_of(info)), None)
    if found is None or task is None:
        return None
    head = task.head_on(family, found)
    return None if head is None else task.beside(family, head, found)


def reads_images(info: CheckpointInfo) -> bool:
    """Return whether the rows of a checkpoint's head are images."""
    return any(task.reads_images for task in TASKS if info.architecture.endswith(task.ending))


def task_of(info: CheckpointInfo) -> Task:
    """Find the task of a checkpoint's head from its configuration.

    Raises:
        InvalidCheckpoint: its architecture has no table, the head is not whole, or a setting of it is not available.
    """
    family = family_of(info)
    if family is None:
        raise InvalidCheckpoint(info.source, f"architecture '{info.architecture}' has no table")
    kinds = [kind for kind in TASKS if kind.is_of(info)]
    outputs = kinds[0].outputs_in(info, family.head)
    return next(task for kind in kinds if (task := kind.of(info, outputs)) is not None)


def architectures_of(family: Family) -> list[str]:
    """Return the names of the classes on a backbone whose heads have a table."""
    kind = model_type_of(family.model_type)
    found = [family.head.architecture]
    for one in kind.architectures.values() if kind else ():
        if any(one.name.endswith(task.ending) and task.head_on(family, one) is not None for task in TASKS):
            found.append(one.name)
    return list(dict.fromkeys(found))


def known_architectures() -> list[str]:
    """Return the names of the classes whose backbone and head both have a table."""
    return [name for family in FAMILIES.values() for name in architectures_of(family)]


__all__ = [
    "TASKS",
    "CausalLanguageModel",
    "Classification",
    "Embedding",
    "ImageClassification",
    "Label",
    "LabelMap",
    "MaskedLanguageModel",
    "MetricName",
    "MultiLabel",
    "MultipleChoice",
    "QuestionAnswering",
    "Regression",
    "SequenceToSequence",
    "Task",
    "TokenClassification",
    "architectures_of",
    "check_estimator",
    "check_metric",
    "column_problems",
    "family_of",
    "known_architectures",
    "label_map",
    "reads_images",
    "task_of",
]
