"""Smoothed metrics, which count how clearly rows are predicted, and vary less from one set of rows to the next.

They are smoothed estimators, as those of error rates (Glick 1978, Snapinn and Knoke 1985). A row is predicted to have
class c with probability `softmax(z / (WIDTH s))_c`, with z its centred logits and s their root mean square over all
rows. For several labels at once, each applies with probability `sigmoid(z / (WIDTH s))`, with z not centred. The metric
is that of the expected table of labels and predictions. A row's answers to a question are its classes, each of which is
right as far as the metric says. As WIDTH goes to 0 it goes to the metric itself. Because s is
the model's own, the size of its logits does not matter. A correlation has no steps, and stays as it is.
"""

from torch import Tensor

WIDTH = 0.3
"""Width of the step from wrong to right, in root mean squares of the logits that decide; found with bench/auto.py."""


def scaled(decisive: Tensor) -> Tensor:
    """Scale the logits that decide to widths of the step."""
    return decisive / (WIDTH * float(decisive.square().mean().sqrt()) or 1.0)
