"""Metrics by how clearly rows are predicted, which vary less from one set of rows to the next."""

import numpy as np
from torch import Tensor

from worker.engine.catalog.contracts.spec import MetricName
from worker.engine.catalog.data.labels import Task
from worker.engine.evaluation.evaluate import predicted
from worker.engine.evaluation.metrics import Array, metric_for, of_classes, of_decisions

WIDTH = 0.3
"""Of the step from wrong to right, in root mean squares of what decides; found in bench/auto.py's combinations."""


def smoothed(name: MetricName, task: Task, labels: Array, logits: Tensor) -> float:
    """The metric where a prediction counts as partly right, by its distance from the border to another.

    A smoothed estimator, as of error rates (Glick 1978, Snapinn and Knoke 1985): each row is predicted to be of class c
    with probability `softmax(z / (WIDTH s))_c`, z its centred logits and s their root mean square over all rows; with
    several labels at once, each applies with probability `sigmoid(z / (WIDTH s))`, z not centred. The metric is that of
    the expected table of labels and predictions. As WIDTH goes to 0 it goes to the metric itself. Since s is the
    model's own, it does not matter how large its logits are. A correlation has no steps, and is what it is.

    Args:
        labels: (rows,), or of a multi-label head (rows, labels).
        logits: (rows, outputs), finite.
    """
    if task.problem == "regression":
        return metric_for(name, task)(labels, predicted(logits, task))
    decisive = logits.double()
    each_row_once = np.ones((len(labels), 1))
    if task.problem == "multi_label":
        applies = (decisive / _step(decisive)).sigmoid().numpy()
        return float(of_decisions(name, labels, [applies])(each_row_once)[0, 0])
    decisive = decisive - decisive.mean(1, keepdim=True)
    is_of_class = (decisive / _step(decisive)).softmax(1).numpy()
    return float(of_classes(name, labels, [is_of_class.T])(each_row_once)[0, 0])


def _step(decisive: Tensor) -> float:
    return WIDTH * float(decisive.square().mean().sqrt()) or 1.0
