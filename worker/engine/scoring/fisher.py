"""Fisher information of every backbone parameter, one example at a time.

`F_i = 1/n sum_x E_y (d log p(y|x) / d theta_i)^2` (Matena & Raffel 2022, arXiv 2111.09832, equation 4). A parameter's
gradient is summed over the batch inside the backward pass, so the squares of single examples need a pass for each.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from worker.engine.catalog.contracts.statistics import Facts
from worker.engine.catalog.families import Kind
from worker.engine.catalog.methods import PARAMETER_FISHER
from worker.engine.inputs.examples import Batch, Example, collate
from worker.engine.models.loading import LoadedModel
from worker.engine.runtime.device import Precision, computing_in
from worker.engine.runtime.progress import OnRows
from worker.engine.scoring.estimators import Estimator
from worker.engine.scoring.measurement import Measured, Measurement, StatisticPass, Subject
from worker.engine.scoring.scorer import not_finite
from worker.engine.tasks.kind import Passes

BLOCK_ROWS = 16  # squares of so few examples are summed in float32, and the blocks in float64


def fisher(
    loaded: LoadedModel,
    examples: Sequence[Example],
    estimator: Estimator,
    precision: Precision,
    source: str,
    on_rows: OnRows,
) -> dict[str, Tensor]:
    """Compute the diagonal Fisher information of the backbone's parameters.

    It does not depend on the order of the examples and on padding. A tensor of the checkpoint that the model does not
    read has zeros. Besides the model's activations it takes 16 bytes of memory a parameter.

    Returns:
        Fisher information by `Slot.name`, without heads: float32, in the tensor's shape, on the CPU.

    Raises:
        NumericalError: a gradient is NaN or infinite; the message names the row.
    """
    family = loaded.family
    shapes = {}
    for name, tensor in loaded.info.tensors.items():
        slot = family.slot(name)
        if slot is not None and slot.kind not in (Kind.HEAD, Kind.UNREAD):
            shapes[slot.name] = tensor.shape
    # A tied parameter has an entry for each of its names, with the same gradient.
    parameters = {n: p for n, p in loaded.model.named_parameters(remove_duplicate=False) if n in shapes}
    block = {name: torch.zeros(parameter.shape, device=loaded.device) for name, parameter in parameters.items()}
    totals = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    with _differentiable(loaded.model, loaded.model.get_submodule(family.embeddings), list(parameters.values())):
        for start in range(0, len(examples), BLOCK_ROWS):
            rows = examples[start : start + BLOCK_ROWS]
            for batch in collate([[row] for row in rows], loaded.padding, loaded.device):
                with computing_in(precision, loaded.device):
                    passes = estimator.passes(loaded, loaded.kind.run(batch.inputs), batch)
                _add_squares(block, parameters, passes, batch, source)
                on_rows(1)
            for name, squares in block.items():
                totals[name] += squares.cpu()
                squares.zero_()
    return {name: totals.pop(name).div_(len(examples)).float() for name in shapes}


def _add_squares(
    block: dict[str, Tensor],
    parameters: dict[str, nn.Parameter],
    passes: Passes,
    batch: Batch,
    source: str,
) -> None:
    """Add one example's expected squared gradients to `block`."""
    weights, sums = passes
    for k in range(weights.shape[1]):
        found = torch.autograd.grad(
            sums[k].sum(),
            list(parameters.values()),
            retain_graph=k < weights.shape[1] - 1,
            allow_unused=True,
        )
        gradients = {
            name: g.coalesce() if g.is_sparse else g for name, g in zip(parameters, found, strict=True) if g is not None
        }
        _check_finite(gradients, batch, source)
        weight = float(weights[0, k])
        for name, gradient in gradients.items():
            if gradient.is_sparse:
                block[name].index_add_(0, gradient.indices()[0], gradient.values() ** 2, alpha=weight)
            else:
                block[name].addcmul_(gradient, gradient, value=weight)


def _check_finite(gradients: dict[str, Tensor], batch: Batch, source: str) -> None:
    values = [g.values() if g.is_sparse else g for g in gradients.values()]
    finite = torch.stack([torch.linalg.vector_norm(v) for v in values]).isfinite()
    if not bool(finite.all()):
        name = list(gradients)[int((~finite).nonzero()[0])]
        raise not_finite(f"the gradient of {name}", batch.places[0], source)


@contextmanager
def _differentiable(model: nn.Module, embeddings: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let the backward pass reach `parameters`, whose gradients `load` has switched off."""
    tables = [module for module in embeddings.modules() if isinstance(module, nn.Embedding)]
    model.requires_grad_(False)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for table in tables:
            table.sparse = True  # an example has only a few rows of a vocabulary
        yield
    finally:
        model.requires_grad_(False)
        for table in tables:
            table.sparse = False


def _measure(work: Measurement, measured: Measured) -> Measured:
    return work.find_or_compute(measured, _facts(work, work.rows), _parts(work))


def _facts(subject: Subject, rows: int) -> Facts:
    return subject.facts_of_gradients(PARAMETER_FISHER, rows)


def _parts(work: Measurement) -> Iterator[Mapping[str, Tensor]]:
    yield fisher(work.loaded, work.examples, work.required_estimator, work.precision, work.sample.source, work.on_rows)


PASS = StatisticPass(_measure, _facts)
