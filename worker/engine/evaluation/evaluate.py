"""Predictions of a model over rows."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from worker.engine.catalog.errors import NumericalError
from worker.engine.checkpoints.loading import LoadedModel
from worker.engine.device import Precision, computing_in
from worker.engine.evaluation.metrics import Array
from worker.engine.scoring.data import Example, collate, plan_batches


def predict(
    loaded: LoadedModel, examples: Sequence[Example], precision: Precision, on_rows: Callable[[int], None]
) -> Array:
    """Predicted class ids, or values for regression, (rows,), in the order of `examples`."""
    predictions = np.empty(len(examples), dtype=np.float64)
    with torch.inference_mode():
        for batch in collate(plan_batches(examples), loaded.padding, loaded.device):
            with computing_in(precision, loaded.device):
                logits = loaded.model(**batch.inputs).logits.float()
            if not bool(torch.isfinite(logits).all()):
                raise NumericalError(f"{loaded.info.source} gives logits that are NaN or infinite")
            values = logits[:, 0] if loaded.task.problem == "regression" else logits.argmax(-1)
            predictions[batch.indices.numpy()] = values.cpu().double().numpy()
            on_rows(len(batch))
    return predictions
