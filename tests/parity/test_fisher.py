"""Fisher information of every parameter against plain autograd: one row at a time, no padding, float64."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from tests.parity.test_merging import assert_merged, backbone, merge
from tests.parity.test_methods import dense_fisher
from tests.parity.test_scores import Case, make_case
from tests.tiny import float64_model, silent, tiny_checkpoint
from tests.tiny_families import TINY_FAMILIES
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.primitives.errors import NumericalError
from worker.engine.inputs.examples import Example
from worker.engine.jobs.engine import Engine
from worker.engine.merging.methods import MeasuredModel
from worker.engine.models.loading import load
from worker.engine.scoring.estimators import estimator_for
from worker.engine.scoring.fisher import fisher
from worker.engine.tasks import EstimatorName

ROWS = 20  # more than a block
ROUNDING = 1e-11  # squares of gradients that are zero but for float32
HEAD = "classifier."


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Case]:
    """By number of labels; one label is regression."""
    root = tmp_path_factory.mktemp("fisher")
    return {labels: make_case(root, labels=labels, count=ROWS) for labels in (1, 2, 3)}


def found(case: Case, estimator: EstimatorName = "auto", examples: list[Example] | None = None) -> dict[str, Tensor]:
    chosen = estimator_for(estimator, case.loaded.task, seed=0)
    return fisher(case.loaded, case.examples if examples is None else examples, chosen, "float32", "rows", silent)


def dense(case: Case, model: nn.Module | None = None, *, own_label: bool = False) -> dict[str, Tensor]:
    """The mean over rows of `sum_y p(y|x) (d log p(y|x) / d theta)^2`, or of the row's own label alone."""
    model = float64_model(case.checkpoint) if model is None else model
    tokenizer = AutoTokenizer.from_pretrained(case.checkpoint)
    names = [name for name, _ in model.named_parameters() if not name.startswith(HEAD)]
    parameters = [model.get_parameter(name) for name in names]
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    for row in case.rows:
        logits = model(**tokenizer(row.text, return_tensors="pt")).logits[0]
        if len(logits) == 1:
            weighted = [(1.0, logits[0])]
            if own_label:
                weighted = [(1.0, -0.5 * (logits[0] - float(row.label or 0)) ** 2)]
        else:
            likelihoods = logits.log_softmax(-1)
            labels = [int(row.label or 0)] if own_label else range(len(logits))
            weighted = [(1.0 if own_label else float(likelihoods[y].detach().exp()), likelihoods[y]) for y in labels]
        for weight, output in weighted:
            gradients = torch.autograd.grad(output, parameters, retain_graph=True)
            for total, gradient in zip(totals, gradients, strict=True):
                total += weight * gradient**2
    return {name: (total / len(case.rows)).detach() for name, total in zip(names, totals, strict=True)}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative in norm of each tensor. A key's bias changes no attention, so its gradients are rounding alone."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        assert found[name].dtype == torch.float32
        error = float((found[name] - tensor).norm())
        assert error <= max(tolerance * float(tensor.norm()), ROUNDING), name


@pytest.mark.parametrize("labels", [1, 2, 3])
def test_it_is_the_expectation_over_the_models_own_labels(cases: dict[int, Case], labels: int) -> None:
    assert_same(found(cases[labels]), dense(cases[labels]), 1e-5)


@pytest.mark.parametrize("labels", [1, 3])
def test_empirical_is_of_the_rows_own_labels(cases: dict[int, Case], labels: int) -> None:
    assert_same(found(cases[labels], "empirical"), dense(cases[labels], own_label=True), 1e-5)


def test_sampled_draws_the_same_label_for_a_row_wherever_it_stands(cases: dict[int, Case]) -> None:
    case = cases[3]
    backwards = found(case, "sampled", case.examples[::-1])
    assert_same(backwards, found(case, "sampled"), 1e-5)
    assert float((backwards["bert.pooler.dense.weight"] - dense(case)["bert.pooler.dense.weight"]).abs().max()) > 1e-6


@pytest.mark.parametrize("labels", [1, 3])
def test_it_depends_neither_on_the_order_of_the_rows_nor_on_padding(cases: dict[int, Case], labels: int) -> None:
    case = cases[labels]
    expected = found(case)
    assert_same(found(case, examples=case.examples[::-1]), expected, 1e-5)

    def padded(example: Example) -> Example:
        more = case.loaded.max_length - example.length
        return replace(example, encoding={n: [*v, *[0] * more] for n, v in example.encoding.items()})

    assert_same(found(case, examples=[padded(example) for example in case.examples]), expected, 1e-5)


def test_a_shared_parameter_has_the_square_of_its_whole_gradient(tmp_path: Path) -> None:
    case = make_case(tmp_path, labels=3, count=5)
    reference = float64_model(case.checkpoint)
    shared = "bert.encoder.layer.{}.attention.self.value"
    for model in (case.loaded.model, reference):
        model.get_submodule(shared.format(1)).weight = model.get_submodule(shared.format(0)).weight
    expected = dense(case, reference)
    expected[shared.format(1) + ".weight"] = expected[shared.format(0) + ".weight"]
    assert_same(found(case), expected, 1e-5)


@pytest.mark.parametrize("family", ["distilbert", "electra", "deberta-v2", "mpnet", "albert", "modernbert"])
def test_every_backbone_tensor_of_a_checkpoint_has_it(tmp_path: Path, family: str) -> None:
    """Convolutions and relative positions too, whose modules are no linear layers."""
    chosen = TINY_FAMILIES[family]
    case = make_case(tmp_path, labels=2, count=3)
    checkpoint = tiny_checkpoint(tmp_path / family, family=chosen, labels=2)
    loaded = load(inspect_checkpoint(checkpoint, "tiny"), torch.device("cpu"))
    encoded = [{n: v for n, v in loaded.tokenizer(row.text).items() if n in loaded.padding} for row in case.rows]
    encoded = [{n: v for n, v in e.items() if n in loaded.tokenizer.model_input_names} for e in encoded]
    examples = [replace(e, encoding=encoding) for e, encoding in zip(case.examples, encoded, strict=True)]
    information = found(replace(case, loaded=loaded, examples=examples))
    model = float64_model(checkpoint)
    expected = {}
    for name, parameter in model.named_parameters():
        if not name.startswith(chosen.head):
            expected[name] = torch.zeros_like(parameter.detach())
    for encoding in encoded:
        logits = model(**{name: torch.tensor([ids]) for name, ids in encoding.items()}).logits[0]
        p = logits.detach().softmax(-1)
        gradients = torch.autograd.grad(
            logits[1] - logits[0], [model.get_parameter(name) for name in expected], allow_unused=True
        )
        for name, gradient in zip(expected, gradients, strict=True):
            if gradient is not None:
                expected[name] += p[0] * p[1] * gradient**2 / len(encoded)
    assert_same(information, expected, 1e-4)


def test_a_gradient_that_is_no_number_names_the_row(tmp_path: Path) -> None:
    case = make_case(tmp_path, labels=2, count=3)
    word = case.examples[1].encoding["input_ids"][1]
    with torch.no_grad():
        case.loaded.model.get_parameter("bert.embeddings.word_embeddings.weight")[word] = float("nan")
    first = next(e for e in case.examples if word in e.encoding["input_ids"])
    with pytest.raises(NumericalError, match=rf"NaN or infinite at rows, {first.place};") as raised:
        found(case)
    assert raised.value.detail["line"] == first.place.number
    assert not any(parameter.requires_grad for parameter in case.loaded.model.parameters())


def test_it_leaves_the_model_as_it_was(cases: dict[int, Case]) -> None:
    case = cases[2]
    before = {name: parameter.clone() for name, parameter in case.loaded.model.state_dict().items()}
    rows: list[int] = []
    chosen = estimator_for("auto", case.loaded.task, seed=0)
    fisher(case.loaded, case.examples, chosen, "float32", "rows", rows.append)
    model = case.loaded.model
    assert rows == [1] * ROWS
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert not any(module.sparse for module in model.modules() if isinstance(module, nn.Embedding))


def test_bfloat16_is_near_float32(cases: dict[int, Case]) -> None:
    case = cases[3]
    chosen = estimator_for("auto", case.loaded.task, seed=0)
    rough = fisher(case.loaded, case.examples, chosen, "bfloat16", "rows", silent)
    for name, exact in found(case).items():
        if not name.endswith("key.bias"):
            assert float((rough[name] - exact).norm() / exact.norm()) < 0.1, name


def test_a_merge_is_the_dense_computation_with_the_dense_information(cases: dict[int, Case], tmp_path: Path) -> None:
    checkpoints, weights = [cases[labels].checkpoint for labels in (2, 3)], (1.0, 2.0)
    models = [MeasuredModel(w, fisher=dense(cases[labels])) for labels, w in zip((2, 3), weights, strict=True)]
    expected = dense_fisher(models, [backbone(path) for path in checkpoints], normalize=True, floor=1e-6)
    assert_merged(merge(Engine(), tmp_path, checkpoints, {"name": "fisher"}, weights), expected, 1e-4)
