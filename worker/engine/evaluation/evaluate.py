"""Runs models on rows, for their predictions and the inputs of their heads."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn

from worker.engine.catalog.primitives.errors import NumericalError
from worker.engine.inputs.examples import Batch, Example, collate, plan_batches
from worker.engine.models.loading import LoadedModel
from worker.engine.runtime.device import Precision, computing_in
from worker.engine.tasks.metrics import Array

OnRows = Callable[[int], None]


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
) -> Array:
    """Compute predictions in the order of `examples`, see `HeadKind.predicted`."""
    predictions = _unknown(loaded, examples)
    for batch, places, judged in _judged(loaded, examples, precision):
        predictions[places.numpy()] = loaded.kind.predicted(judged)
        on_rows(len(batch))
    return predictions


def predict_with(
    loaded: LoadedModel,
    other: nn.Linear,
    examples: Sequence[Example],
    precision: Precision,
    on_rows: OnRows,
) -> tuple[Array, Array]:
    """Compute predictions as `predict`, with the model's own head and with another in its place, in one pass."""
    own, others = (_unknown(loaded, examples) for _ in range(2))
    for batch, places, features, judged in _forward(loaded, examples, precision):
        rows = places.numpy()
        own[rows] = loaded.kind.predicted(judged)
        with computing_in(precision, loaded.device):
            others[rows] = loaded.kind.predicted(other(features).float())
        on_rows(len(batch))
    return own, others


def head_inputs(loaded: LoadedModel, examples: Sequence[Example], precision: Precision, on_rows: OnRows) -> Tensor:
    """Compute inputs of the head's linear layer for each output, (outputs, width), float64 on the CPU, row by row."""
    inputs = torch.empty(sum(example.outputs for example in examples), head_of(loaded).in_features, dtype=torch.float64)
    for batch, places, features, _ in _forward(loaded, examples, precision):
        inputs[places] = features.cpu().double()
        on_rows(len(batch))
    return inputs


def _forward(
    loaded: LoadedModel, examples: Sequence[Example], precision: Precision
) -> Iterator[tuple[Batch, Tensor, Tensor, Tensor]]:
    """Run the model as `_judged`, and yield the head's input for each prediction too, (predictions, width)."""
    read: list[Tensor] = []
    handle = head_of(loaded).register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    try:
        for batch, places, judged in _judged(loaded, examples, precision):
            yield batch, places, batch.of_outputs(read.pop()), judged
    finally:
        handle.remove()


def _judged(
    loaded: LoadedModel, examples: Sequence[Example], precision: Precision
) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Run the model, and yield batches with the places of their predictions, (predictions,), and what decides them.

    Places are among the predictions of all examples. A batch's indices are places in `examples`, which may be only some
    of a data set's.
    """
    kind = loaded.kind
    numbered = [replace(example, index=index) for index, example in enumerate(examples)]
    first = [0, *accumulate(kind.predictions_of(example) for example in examples)]
    with torch.inference_mode():
        for batch in collate(plan_batches(numbered), loaded.padding, loaded.device):
            with computing_in(precision, loaded.device):
                judged = kind.judged(kind.run(batch.inputs), batch)
            if not bool(torch.isfinite(judged).all()):
                raise NumericalError(f"{loaded.info.source} gives logits that are NaN or infinite")
            places = [place for row in batch.indices.tolist() for place in range(first[row], first[row + 1])]
            yield batch, torch.tensor(places), judged


def _unknown(loaded: LoadedModel, examples: Sequence[Example]) -> Array:
    """Make an array for the predictions."""
    return np.full((sum(map(loaded.kind.predictions_of, examples)), *loaded.kind.shape), np.nan)
