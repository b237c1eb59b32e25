"""Runs models on rows, for their predictions and the inputs of their heads."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from worker.engine.catalog.contracts.prediction import Answer
from worker.engine.catalog.contracts.spec import EvaluationSpec
from worker.engine.inputs.examples import Example
from worker.engine.models.loading import LoadedModel
from worker.engine.runtime.device import Precision, computing_in
from worker.engine.runtime.progress import OnRows
from worker.engine.tasks.kind import PlacedBatch, Running
from worker.engine.tasks.metrics import Array


def head_of(loaded: LoadedModel) -> nn.Linear:
    """Return the linear layer that gives the logits, which the model keeps for itself."""
    module = loaded.model.get_submodule(loaded.family.head.logits)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{loaded.info.architecture} has no linear head")
    return module


def predict(
    loaded: LoadedModel,
    examples: Sequence[Example],
    precision: Precision,
    on_rows: OnRows,
    evaluation: EvaluationSpec | None = None,
) -> Array:
    """Compute predictions in the order of `examples`, see `HeadKind.predicted`.

    Args:
        evaluation: names the metric that they are for; None: one that reads rows and runs the model as most do.
    """
    kind = loaded.kind if evaluation is None else loaded.kind.evaluated(evaluation)
    return kind.predictions(examples, _running(loaded, precision, on_rows, evaluation))


def answer(
    loaded: LoadedModel, examples: Sequence[Example], precision: Precision, on_rows: OnRows, evaluation: EvaluationSpec
) -> list[Answer]:
    """Compute the model's answers to rows, see `HeadKind.answered`. The metric says how it is run, as for `predict`."""
    return loaded.kind.evaluated(evaluation).answered(examples, _running(loaded, precision, on_rows, evaluation))


def predict_with(
    loaded: LoadedModel,
    other: nn.Linear,
    examples: Sequence[Example],
    precision: Precision,
    on_rows: OnRows,
    evaluation: EvaluationSpec | None = None,
) -> tuple[Array, Array]:
    """Compute predictions as `predict`, with the model's own head and with another in its place, in one pass."""
    own, others = (loaded.kind.unknown(examples) for _ in range(2))
    for part, features, judged in _forward(loaded, examples, precision, evaluation):
        own[part.predictions] = loaded.kind.predicted(judged, part.examples)
        with computing_in(precision, loaded.device):
            others[part.predictions] = loaded.kind.predicted(other(features).float(), part.examples)
        on_rows(len(part.batch))
    return own, others


def head_inputs(loaded: LoadedModel, examples: Sequence[Example], precision: Precision, on_rows: OnRows) -> Tensor:
    """Compute inputs of the head's linear layer for each output, (outputs, width), float32 on the CPU, row by row."""
    inputs = torch.empty(sum(example.outputs for example in examples), head_of(loaded).in_features)
    for places, features in head_inputs_of_parts(loaded, examples, precision, on_rows):
        inputs[places] = features
    return inputs


def head_inputs_of_parts(
    loaded: LoadedModel, examples: Sequence[Example], precision: Precision, on_rows: OnRows
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Yield the places of some outputs at a time, and what the head's linear layer reads for them, as `head_inputs`."""
    for part, features, _ in _forward(loaded, examples, precision):
        yield part.outputs, features.cpu().float()
        on_rows(len(part.batch))


def _forward(
    loaded: LoadedModel, examples: Sequence[Example], precision: Precision, evaluation: EvaluationSpec | None = None
) -> Iterator[tuple[PlacedBatch, Tensor, Tensor]]:
    """Run the model as `HeadKind.parts`, and yield the head's input for each output too, (outputs, width)."""
    read: list[Tensor] = []
    handle = head_of(loaded).register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    try:
        for part, judged in loaded.kind.parts(examples, _running(loaded, precision, evaluation=evaluation)):
            yield part, part.batch.of_outputs(read.pop()), judged
    finally:
        handle.remove()


def _running(
    loaded: LoadedModel,
    precision: Precision,
    on_rows: OnRows = lambda _: None,
    evaluation: EvaluationSpec | None = None,
) -> Running:
    named = (loaded.info.source, "its rows" if evaluation is None else evaluation.source)
    return Running(*named, loaded.tokenizer, loaded.padding, loaded.device, precision, on_rows)
