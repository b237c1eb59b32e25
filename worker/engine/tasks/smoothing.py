"""Metrics by how clearly rows are predicted, which vary less from one set of rows to the next.

A smoothed estimator, as of error rates (Glick 1978, Snapinn and Knoke 1985): each row is predicted to be of class c
with probability `softmax(z / (WIDTH s))_c`, z its centred logits and s their root mean square over all rows; with
several labels at once, each applies with probability `sigmoid(z / (WIDTH s))`, z not centred. The metric is that of
the expected table of labels and predictions. As WIDTH goes to 0 it goes to the metric itself. Since s is the model's
own, it does not matter how large its logits are. A correlation has no steps, and is what it is.
"""

from torch import Tensor

WIDTH = 0.3
"""Of the step from wrong to right, in root mean squares of what decides; found in bench/auto.py's combinations."""


def scaled(decisive: Tensor) -> Tensor:
    """What decides, in widths of the step."""
    return decisive / (WIDTH * float(decisive.square().mean().sqrt()) or 1.0)
