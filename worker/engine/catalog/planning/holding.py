"""The ways of holding a model that is run, which take less memory and more time from the first to the last."""

from collections.abc import Sequence
from enum import IntEnum

from worker.engine.catalog.methods import PARAMETER_FISHER, BaseParameters
from worker.engine.catalog.planning.plan import MergePlan


class Holding(IntEnum):
    """A way of holding the weights of a model that is run. All ways give the same results, bit for bit."""

    WHOLE = 0
    """The weights are in memory in float32."""
    STORED = 1
    """The weights are in memory in the format of the files; a layer's are converted while it is at work."""
    STREAMED = 2
    """The weights stay in the files; a layer's are read while it is at work, and a backward pass computes it again."""


def holdings(plan: MergePlan, method: BaseParameters) -> Sequence[Holding]:
    """Return the ways of holding models that a job may choose among.

    What searches and refits keep beside the models is as large as these, and Fisher information of every parameter is
    larger. Where all layers share their weights, one layer is the model. Models of an encoder and a decoder are held
    whole.
    """
    needs_whole = method.search is not None or method.refits_layers or PARAMETER_FISHER in method.statistics
    family = plan.family
    is_one_stack = family is not None and not family.shares_layers and family.decoder is None
    return list(Holding) if is_one_stack and not needs_whole else [Holding.WHOLE]
