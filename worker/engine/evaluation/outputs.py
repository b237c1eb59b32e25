"""Outputs of models on rows. They are kept as statistics are, so that nothing of an expert is computed twice."""

import hashlib
import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from worker.engine.catalog.checkpoints.files import described_files, file_names
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.contracts.spec import EvaluationSpec
from worker.engine.catalog.contracts.statistics import HEAD_OUTPUTS, LOGITS, PREDICTIONS, Facts, Origin, Output
from worker.engine.catalog.data.spec import DatasetSpec, Generation
from worker.engine.checkpoints.reader import digest_file
from worker.engine.evaluation.evaluate import head_inputs, head_inputs_of_parts, head_of, predict
from worker.engine.inputs.examples import Example, digest_of
from worker.engine.models.loading import LoadedModel
from worker.engine.runtime.device import Precision, computing_in, hardware, rounded_weights
from worker.engine.runtime.progress import OnRows
from worker.engine.scoring.sample import tokens_of
from worker.engine.scoring.store import StatisticsStore
from worker.engine.tasks.metrics import Array

VALUES = "values"
"""Name of the one tensor of kept outputs."""


class KeptOutputs:
    """Outputs of models on rows: those that the store has, or else computed and kept there.

    Every function takes the digest of the model's checkpoint, and calls `on_rows` as rows are done; rows whose outputs
    were kept are done at once.
    """

    def __init__(self, store: StatisticsStore, precision: Precision) -> None:
        self._store = store
        self._precision = precision

    def predictions(
        self, loaded: LoadedModel, digest: str, examples: Sequence[Example], evaluation: EvaluationSpec, on_rows: OnRows
    ) -> Array:
        """Compute a model's predictions as `predict`."""

        def computed() -> Tensor:
            return torch.from_numpy(predict(loaded, examples, self._precision, on_rows, evaluation))

        kind = loaded.kind.evaluated(evaluation)
        read_as = f"{type(kind).__name__} {list(kind.shape)}"
        if kind is not loaded.kind:  # else all metrics read the same predictions
            settings = evaluation.model_dump(mode="json", include={"metric", *Generation.model_fields})
            read_as = f"{read_as} {json.dumps(settings, sort_keys=True)}"
        return self._kept(PREDICTIONS, loaded, digest, examples, evaluation, on_rows, computed, read_as).numpy()

    def head_outputs(
        self, loaded: LoadedModel, digest: str, examples: Sequence[Example], dataset: DatasetSpec, on_rows: OnRows
    ) -> Tensor:
        """Compute the outputs of the model's head, (outputs, labels), float64, to which it is aligned.

        They are those of the weights as they are held, so the caller must not have rounded them.
        """

        def computed() -> Tensor:
            head = head_of(loaded)
            weight, bias = head.weight.detach().cpu().double(), None if head.bias is None else head.bias.detach().cpu()
            found = torch.empty(sum(example.outputs for example in examples), len(weight), dtype=torch.float64)
            with rounded_weights(loaded.model, self._precision):
                for places, features in head_inputs_of_parts(loaded, examples, self._precision, on_rows):
                    products = features.double() @ weight.T
                    found[places] = products if bias is None else products + bias.double()
            return found

        return self._kept(HEAD_OUTPUTS, loaded, digest, examples, dataset, on_rows, computed)

    def logits(
        self, loaded: LoadedModel, digest: str, examples: Sequence[Example], evaluation: EvaluationSpec, on_rows: OnRows
    ) -> Tensor:
        """Compute the logits of the model's head, (outputs, labels), float32, see `logits_of`."""

        def computed() -> Tensor:
            head, features = head_of(loaded), head_inputs(loaded, examples, self._precision, on_rows)
            return logits_of(features, head.weight, head.bias, self._precision, loaded.device)

        return self._kept(LOGITS, loaded, digest, examples, evaluation, on_rows, computed)

    def _kept(
        self,
        output: Output,
        loaded: LoadedModel,
        digest: str,
        examples: Sequence[Example],
        dataset: DatasetSpec,
        on_rows: OnRows,
        computed: Callable[[], Tensor],
        read_as: str | None = None,
    ) -> Tensor:
        if not examples:
            return computed()
        facts = Facts(
            statistic=output,
            checkpoint=digest,
            rows=digest_of(examples),
            tokens=tokens_of(loaded, dataset),
            precision=self._precision,
            settings=_digest_of_settings(loaded.info),
            read_as=read_as or type(loaded.kind).__name__,
            hardware=hardware(loaded.device),
        )
        origin = Origin(checkpoint=loaded.info.source, dataset=dataset.source, examples=len(examples))
        parts = ({VALUES: make()} for make in (computed,))  # nothing is computed before the store asks
        kept, was_there = self._store.get_or_compute(facts, origin, parts, on_wait=lambda: on_rows(0))
        if was_there:
            on_rows(len(examples))
        return kept[VALUES]


def logits_of(
    features: Tensor, weight: Tensor, bias: Tensor | None, precision: Precision, device: torch.device
) -> Tensor:
    """Compute logits, (outputs, labels), float32, of inputs of the head, (outputs, width).

    They have the precision in which the whole model predicts, so that near ties end alike.
    """

    def given(values: Tensor) -> Tensor:
        return values.to(device, torch.float32)

    with torch.no_grad(), computing_in(precision, device):
        found = nn.functional.linear(given(features), given(weight), None if bias is None else given(bias))
    return found.float().cpu()


def _digest_of_settings(info: CheckpointInfo) -> str:
    """Return the sha256, in hexadecimal, over the files beside the weights: pooling and end tokens count too."""
    digest = hashlib.sha256()
    for path in (info.path, *(() if info.base is None else (info.base.path,))):
        for name in described_files({*file_names(path)}):
            digest.update(f"{name} {digest_file(path / name)}\n".encode())
    return digest.hexdigest()
