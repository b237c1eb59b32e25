"""The layout of a merge, and every reason to refuse one, from headers alone."""

import math
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.score_names import named
from tests.tiny import HEADS, LAYERS, NEURONS, Tensors, edit_json, edit_tensors, tiny_base, tiny_checkpoint
from tests.tiny_families import TINY_LLAMA
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.spec import EvaluationSpec, OutputSpec
from worker.engine.catalog.data.spec import NEW_TOKENS
from worker.engine.catalog.families import Kind, Owner, Part, Slot
from worker.engine.catalog.families.bert import BERT
from worker.engine.catalog.methods import (
    LARGEST_BATCH_TOKENS,
    AutoParameters,
    AverageParameters,
    MaskFisherParameters,
    MaskRegMeanParameters,
    MethodParameters,
    RegMeanParameters,
    TiesParameters,
)
from worker.engine.catalog.planning.memory import (
    HELD_TOKENS,
    KEPT_VECTORS,
    MOST_KEPT_BYTES,
    MemoryNeeds,
    estimate,
    most_new_tokens,
)
from worker.engine.catalog.planning.parameters import parameter_problems
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.catalog.planning.planner import plan_job, plan_merge
from worker.engine.catalog.primitives.errors import EngineError, IncompatibleCheckpoints, InvalidCheckpoint
from worker.engine.catalog.primitives.notes import Doubt
from worker.engine.catalog.primitives.values import Filtered

LAYER = "bert.encoder.layer.1"
VALUES = (Part(Kind.VALUE, named("layers.1.heads")),)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("planning")
    return [tiny_checkpoint(root / f"m{seed}", labels=labels, seed=seed) for seed, labels in enumerate((2, 3))]


@pytest.fixture
def pair(originals: list[Path], tmp_path: Path) -> list[Path]:
    """Two checkpoints that fit, to be spoilt."""
    return [Path(shutil.copytree(path, tmp_path / path.name)) for path in originals]


def plan(paths: list[Path], dtype: Any = "auto") -> MergePlan:
    return plan_merge([inspect_checkpoint(path, f"local:{path.name}") for path in paths], dtype)


def test_the_backbone_is_planned_once_and_each_head_per_model(pair: list[Path]) -> None:
    found = plan(pair)
    with safe_open(pair[0] / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    heads = {"classifier.weight", "classifier.bias"}
    assert {tensor.slot.name for tensor in found.backbone} == names - heads
    assert [{tensor.slot.name for tensor in head} for head in found.heads] == [heads, heads]
    assert [head[0].shape[0] for head in found.heads] == [2, 3]
    assert [task.outputs for task in found.tasks if task] == [2, 3]
    assert all(len(tensor.sources) == 2 for tensor in found.backbone)


def test_places_run_from_the_first_layer_to_the_last(pair: list[Path], tmp_path: Path) -> None:
    found = plan(pair)
    depths = {tensor.slot.name: tensor.place.depth for tensor in found.backbone}
    assert {depths[name] for name in depths if "embeddings" in name or ".layer.0." in name} == {0.0}
    assert {depths[name] for name in depths if "pooler" in name or ".layer.1." in name} == {1.0}
    assert found.layers == LAYERS == 2
    [query] = [t for t in found.backbone if t.slot.name == f"{LAYER}.attention.self.query.bias"]
    assert query.place in found.owned[named("layers.1.heads")]
    assert {len(places) for name, places in found.owned.items() if "heads" in name} == {7}
    one = plan([tiny_checkpoint(tmp_path / "one", layers=1)])
    assert {t.place.depth for t in one.backbone if t.slot.layer is not None} == {0.0}


def inspected(path: Path) -> CheckpointInfo:
    return inspect_checkpoint(path, f"local:{path.name}")


def with_base(pair: list[Path], base: Path) -> MergePlan:
    return plan_merge([inspected(path) for path in pair], base=inspected(base))


def test_a_base_is_found_under_names_with_and_without_the_familys_prefix(pair: list[Path], tmp_path: Path) -> None:
    bare, headed = tiny_base(tmp_path / "bare"), tiny_checkpoint(tmp_path / "headed", labels=5)
    for base, prefix in ((bare, ""), (headed, "bert.")):
        found = with_base(pair, base)
        assert found.bytes_to_read == plan(pair).bytes_to_read + inspected(base).nbytes
        for tensor in found.backbone:
            assert tensor.base is not None, tensor.slot.name
            assert tensor.base.name == prefix + tensor.slot.name.removeprefix("bert.")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda base: edit_tensors(base, without_norm), ["embeddings.LayerNorm.bias is missing in the base"]),
        (lambda base: edit_tensors(base, narrow_pooler), ["bert.pooler.dense.bias", "[16]", "in the base [8]"]),
        (lambda base: edit_json(base / "config.json", num_attention_heads=2), ["num_attention_heads differs: 4, 2"]),
        (lambda base: edit_json(base / "config.json", model_type="roberta"), ["architectures differ", "roberta"]),
    ],
)
def test_a_base_that_does_not_fit_is_refused_by_name(
    pair: list[Path], tmp_path: Path, spoil: Callable[[Path], None], words: list[str]
) -> None:
    base = tiny_base(tmp_path / "base")
    spoil(base)
    with pytest.raises(IncompatibleCheckpoints) as caught:
        with_base(pair, base)
    assert all(word in caught.value.message for word in [*words, "local:base"]), caught.value.message


def without_norm(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("embeddings.LayerNorm")}


def narrow_pooler(tensors: Tensors) -> Tensors:
    return {**tensors, "pooler.dense.bias": torch.zeros(8)}


def test_the_plan_says_what_linear_layers_read_and_counts_what_measuring_them_holds(pair: list[Path]) -> None:
    found = plan(pair)
    hidden = 16
    expected = {f"layers.{layer}.{what}": hidden for layer in range(LAYERS) for what in ("attention", "heads")}
    expected |= {f"layers.{layer}.feed_forward": hidden for layer in range(LAYERS)}
    expected |= {f"layers.{layer}.neurons": NEURONS for layer in range(LAYERS)} | {"pooler": hidden}
    assert {seen.name: seen.width for seen in found.linear_inputs} == expected
    least = MemoryNeeds(AverageParameters(), longest_row=10)
    for more in ({"method": MaskFisherParameters()}, {"method": RegMeanParameters()}, {"models_beside": 2}):
        assert estimate(found, replace(least, **more)) > estimate(found, least)
    held = estimate(found, replace(least, tokens_held=1000)) - estimate(found, replace(least, tokens_held=400))
    assert held == 600 * (2 + KEPT_VECTORS) * 4 * hidden
    most = MOST_KEPT_BYTES // (4 * KEPT_VECTORS * hidden)
    kept = estimate(found, replace(least, tokens_held=3 * most)) - estimate(found, replace(least, tokens_held=2 * most))
    assert kept == most * 2 * 4 * hidden
    searched = estimate(found, replace(least, outputs_held=1000)) - estimate(found, replace(least, outputs_held=400))
    assert searched == 600 * 2 * 4 * hidden
    both = estimate(found, replace(least, method=MaskRegMeanParameters()))
    alone = estimate(found, replace(least, method=MaskFisherParameters()))
    sums = 8 * sum(seen.width**2 for seen in found.linear_inputs)
    assert both - alone == sums + 4 * max(LARGEST_BATCH_TOKENS, 10) * NEURONS


def test_what_a_model_writes_is_counted(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", family=TINY_LLAMA, task="CausalLM")
    found = plan_merge([inspect_checkpoint(folder, "model")])
    writes = EvaluationSpec(source="rows", metric="exact_match", max_new_tokens=15)
    assert most_new_tokens(found, [writes]) == 15
    assert most_new_tokens(found, [writes.model_copy(update={"max_new_tokens": None})]) == NEW_TOKENS
    assert most_new_tokens(found, [writes.model_copy(update={"metric": "loss"})]) == 0
    assert most_new_tokens(found, [None]) == 0
    least = MemoryNeeds(AverageParameters(), longest_row=10)
    keys_and_values = HELD_TOKENS * 2 * (2 * 4) * 4 * (LAYERS + 1)
    more = estimate(found, replace(least, new_tokens=15)) - estimate(found, least)
    assert more > keys_and_values


def test_methods_that_solve_for_layers_hold_no_matrix_of_tokens_whole(pair: list[Path]) -> None:
    found = plan(pair)
    needs = MemoryNeeds(RegMeanParameters(), longest_row=10, threads=1)
    largest = max(found.backbone, key=lambda tensor: math.prod(tensor.shape))
    assert largest.slot.kind is Kind.EMBEDDING
    wider = tuple(replace(t, shape=(10**6, *t.shape[1:])) if t is largest else t for t in found.backbone)
    assert 0 <= estimate(replace(found, backbone=wider), needs) - estimate(found, needs) < 10**8
    [layer] = [t for t in found.backbone if t.slot.name.endswith("layer.1.intermediate.dense.weight")]
    wider = tuple(replace(t, shape=(10**6, *t.shape[1:])) if t is layer else t for t in found.backbone)
    assert estimate(replace(found, backbone=wider), needs) - estimate(found, needs) > 5 * 10**8


def test_of_many_filters_that_match_nothing_some_are_told(pair: list[Path]) -> None:
    weights: list[Any] = [[Filtered(filter=f"no{n}", value=0.0) for n in range(500)], 0.0]
    problems = list(parameter_problems(plan(pair), AverageParameters(), weights))
    assert [field for field, _ in problems] == [f"models.0.weight.{n}.filter" for n in range(10)]
    assert "'no9' matches no tensor" in problems[-1][1]
    own: list[Any] = [{"density": [Filtered(filter="no", value=0.5)]}, {"density": [Filtered(filter="*", value=0.5)]}]
    candidates = ["average", {"name": "ties", "density": [{"filter": "no", "value": 0.5}]}]
    auto = AutoParameters.model_validate({"candidates": candidates})
    assert [field for field, _ in parameter_problems(plan(pair), auto)] == ["method.candidates.1.density.0.filter"]
    one = list(parameter_problems(plan(pair), TiesParameters(), [0.0, 0.0], own))
    assert [field for field, _ in one] == ["models.0.parameters.density.0.filter"]
    one = list(parameter_problems(plan(pair), AverageParameters(), [0.0, 0.0]))
    assert [field for field, _ in one] == ["models"]


def test_the_plan_counts_bytes_and_owners(pair: list[Path]) -> None:
    found = plan(pair)
    sizes = [(path / "model.safetensors").stat().st_size for path in pair]
    headers = [int.from_bytes((path / "model.safetensors").read_bytes()[:8], "little") + 8 for path in pair]
    assert found.bytes_to_read == sum(sizes) - sum(headers)
    head_bytes = 4 * (16 + 1) * (2 + 3)
    backbone_bytes = sizes[0] - headers[0] - 4 * (16 + 1) * 2
    assert found.bytes_to_write == backbone_bytes + head_bytes
    assert plan(pair, "bfloat16").bytes_to_write * 2 == found.bytes_to_write
    assert estimate(found, MemoryNeeds(AverageParameters())) > found.bytes_to_read
    # Of a layer: query, key, value with biases and the output's columns; first projection with bias, second's columns.
    assert found.owners() == {"heads": 7 * LAYERS, "neurons": 3 * LAYERS, "rest": 5 + 2 + 6 * LAYERS}


def test_one_checkpoint_alone_is_a_plan(pair: list[Path]) -> None:
    assert len(plan(pair[:1]).heads) == 1


@pytest.mark.parametrize(
    ("dtypes", "asked", "planned"),
    [
        ((torch.float32, torch.float32), "auto", "F32"),
        ((torch.bfloat16, torch.bfloat16), "auto", "BF16"),
        ((torch.float16, torch.bfloat16), "auto", "F32"),
        ((torch.float16, torch.float32), "auto", "F32"),
        ((torch.float64, torch.float16), "auto", "F64"),
        ((torch.float32, torch.float32), "bfloat16", "BF16"),
        ((torch.bfloat16, torch.float64), "float16", "F16"),
        ((torch.float16, torch.float16), "float64", "F64"),
    ],
    ids=str,
)
def test_the_output_has_the_asked_dtype_or_one_that_holds_the_inputs(
    pair: list[Path], dtypes: tuple[torch.dtype, ...], asked: str, planned: str
) -> None:
    for path, dtype in zip(pair, dtypes, strict=True):
        edit_tensors(path, partial(converted, dtype=dtype))
    found = plan(pair, asked)
    assert {tensor.dtype for tensor in found.backbone} == {planned}
    if asked != "auto":
        assert {tensor.dtype for head in found.heads for tensor in head} == {planned}


def test_a_model_that_is_rounded_more_than_the_base_is_doubted_where_differences_from_the_base_count(
    pair: list[Path], tmp_path: Path
) -> None:
    base = inspect_checkpoint(tiny_base(tmp_path / "base"), "base")
    edit_tensors(pair[1], partial(converted, dtype=torch.bfloat16))
    infos = [inspect_checkpoint(path, name) for path, name in zip(pair, ("whole", "rounded"), strict=True)]

    def doubts(method: MethodParameters) -> list[str]:
        notes = plan_job(method, ["whole", "rounded"], infos, OutputSpec(), base).notes
        return [note for note in notes if isinstance(note, Doubt)]

    [doubt] = doubts(TiesParameters())
    assert doubt.startswith("rounded is stored as BF16 and the base as F32, so what rounding changed counts")
    assert doubts(AverageParameters()) == []


def converted(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def config(**changes: Any) -> Callable[[Path], object]:
    return lambda path: edit_json(path / "config.json", **changes)


def tensors(edit: Callable[[Tensors], Tensors | None]) -> Callable[[Path], object]:
    return lambda path: edit_tensors(path, edit)


def added(name: str, tensor: torch.Tensor) -> Callable[[Path], object]:
    return tensors(lambda found: {**found, name: tensor})


def removed(name: str) -> Callable[[Path], object]:
    return tensors(lambda found: {n: t for n, t in found.items() if n != name})


def another_vocabulary(path: Path) -> None:
    file = path / "tokenizer.json"
    file.write_text(file.read_text().replace('"one"', '"uno"'))


Spoiling = Callable[[Path], object]
BAD: dict[str, tuple[Spoiling, list[str]]] = {
    "a decoder": (config(is_decoder=True), ["is_decoder"]),
    "an encoder with a decoder": (config(is_encoder_decoder=True), ["is_encoder_decoder True is not available"]),
    "kind of positions": (config(position_embedding_type="relative_key"), ["position_embedding_type", "'absolute'"]),
    "no layer count": (config(num_hidden_layers=None), ["no usable num_hidden_layers"]),
    "layer count as text": (config(num_hidden_layers="2"), ["num_hidden_layers '2'", "type text", "takes int"]),
    "no heads": (config(num_attention_heads=0), ["no usable num_attention_heads"]),
    "heads as a truth value": (
        config(num_attention_heads=True),
        ["num_attention_heads True", "type bool", "takes int"],
    ),
    "no positions": (config(max_position_embeddings=None), ["no usable max_position_embeddings"]),
    "heads do not divide": (config(num_attention_heads=3), ["hidden size 16", "3 heads"]),
    "layer missing in the weights": (config(num_hidden_layers=3), ["2 layers", "3"]),
    "layer missing in the config": (config(num_hidden_layers=1), ["2 layers", "1"]),
    "neurons contradict": (config(intermediate_size=32), ["intermediate.dense.weight", "[24, 16]", "32 neurons"]),
    "hidden size contradicts": (config(hidden_size=32), ["attention.self.query.weight", "[16, 16]", "32 hidden"]),
    "a matrix that is a vector": (
        added(f"{LAYER}.output.dense.weight", torch.zeros(24)),
        [f"{LAYER}.output.dense.weight", "[24]", "24 neurons"],
    ),
    "a tensor that no rule owns": (
        added("bert.adapter.weight", torch.zeros(2)),
        ["tensor bert.adapter.weight", "guess"],
    ),
    "a name without module": (added("weight", torch.zeros(2)), ["tensor weight is unknown"]),
    "a part that is neither weight nor bias": (
        added(f"{LAYER}.output.dense.scale", torch.zeros(2)),
        [f"{LAYER}.output.dense.scale is unknown"],
    ),
    "names without prefix": (
        tensors(lambda found: {name.removeprefix("bert."): t for name, t in found.items()}),
        ["is unknown in bert"],
    ),
    "integers": (
        added("bert.pooler.dense.bias", torch.zeros(16, dtype=torch.int8)),
        ["bert.pooler.dense.bias", "I8", "not a float"],
    ),
    "a layer without one of its tensors": (
        removed(f"{LAYER}.intermediate.dense.bias"),
        [f"no tensor {LAYER}.intermediate.dense.bias; other layers have it"],
    ),
    "two spellings": (
        added(f"{LAYER}.output.LayerNorm.gamma", torch.ones(16)),
        [f"{LAYER}.output.LayerNorm.weight", "two spellings"],
    ),
    "more labels than the head": (
        config(id2label={str(i): f"l{i}" for i in range(4)}),
        ["4 labels", "classifier.weight"],
    ),
    "rows that the configuration does not say": (
        config(vocab_size=101),
        ["word_embeddings.weight has shape [100, 16]", "vocab_size 101"],
    ),
    "regression of several": (config(problem_type="regression"), ["regression", "outputs"]),
}


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_is_refused_by_its_name_wherever_it_stands(pair: list[Path], case: str, position: int) -> None:
    spoil, words = BAD[case]
    spoil(pair[position])
    assert_refused(pair, InvalidCheckpoint, [f"local:m{position}", *words])


UNLIKE: dict[str, tuple[Spoiling, list[str]]] = {
    "model type": (config(model_type="gpt2"), ["architectures differ: bert, gpt2"]),
    "architecture": (
        config(architectures=["BertForMultipleChoice"]),
        ["architectures differ: BertForSequenceClassification, BertForMultipleChoice"],
    ),
    "head count": (config(num_attention_heads=8), ["num_attention_heads differs: 4, 8"]),
    "activation": (config(hidden_act="relu"), ["hidden_act differs: 'gelu', 'relu'"]),
    "tokenizer": (another_vocabulary, ["tokenizers", "vocabulary"]),
    "a tensor less": (removed("bert.pooler.dense.bias"), ["tensor bert.pooler.dense.bias is missing in the second"]),
    "another shape": (
        added("bert.embeddings.token_type_embeddings.weight", torch.zeros(1, 16)),
        ["bert.embeddings.token_type_embeddings.weight", "[2, 16]", "[1, 16]"],
    ),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_checkpoints_that_do_not_fit_are_refused_by_both_names(pair: list[Path], case: str) -> None:
    spoil, words = UNLIKE[case]
    spoil(pair[1])
    assert_refused(pair, IncompatibleCheckpoints, ["local:m0", "local:m1", *words])


def test_a_tensor_that_only_the_second_has_is_refused_by_name(pair: list[Path]) -> None:
    removed("bert.pooler.dense.bias")(pair[0])
    words = ["local:m0", "local:m1", "bert.pooler.dense.bias is in the second only"]
    assert_refused(pair, IncompatibleCheckpoints, words)


@pytest.mark.parametrize("size", ["num_hidden_layers", "intermediate_size", "max_position_embeddings"])
def test_an_absurd_size_costs_nothing_to_refuse(pair: list[Path], size: str) -> None:
    """A config is a few bytes that anyone can write."""
    config(**{size: 1_000_000})(pair[0])
    tracemalloc.start()
    with pytest.raises(EngineError):
        plan(pair)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 5_000_000


def test_a_layer_number_of_any_length_is_refused_by_name(pair: list[Path]) -> None:
    name = f"bert.encoder.layer.{'1' * 5000}.output.dense.bias"
    added(name, torch.zeros(16))(pair[0])
    with pytest.raises(InvalidCheckpoint, match="local:m0"):
        plan(pair)


def test_position_buffers_of_older_checkpoints_are_passed_over(pair: list[Path]) -> None:
    added("bert.embeddings.position_ids", torch.arange(48)[None])(pair[1])
    assert "bert.embeddings.position_ids" not in {tensor.slot.name for tensor in plan(pair).backbone}


def test_older_spellings_are_planned_under_their_newer_names(pair: list[Path]) -> None:
    expected = {tensor.slot.name for tensor in plan(pair).backbone}
    older = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def rename(name: str) -> str:
        for new, old in older.items():
            name = name.replace(new, old)
        return name

    edit_tensors(pair[0], lambda found: {rename(name): t for name, t in found.items()})
    found = plan(pair)
    assert {tensor.slot.name for tensor in found.backbone} == expected
    sources = {tensor.slot.name: [source.name for source in tensor.sources] for tensor in found.backbone}
    assert sources[f"{LAYER}.output.LayerNorm.weight"] == [
        f"{LAYER}.output.LayerNorm.gamma",
        f"{LAYER}.output.LayerNorm.weight",
    ]


@pytest.mark.parametrize(
    ("name", "slot"),
    [
        (
            f"{LAYER}.attention.self.value.bias",
            Slot(
                f"{LAYER}.attention.self.value.bias",
                Kind.VALUE,
                1,
                True,
                Owner(VALUES, 0),
            ),
        ),
        (f"{LAYER}.output.LayerNorm.gamma", Slot(f"{LAYER}.output.LayerNorm.weight", Kind.FEED_FORWARD_NORM, 1, False)),
        ("bert.embeddings.LayerNorm.beta", Slot("bert.embeddings.LayerNorm.bias", Kind.EMBEDDING, None, True)),
        ("bert.pooler.dense.weight", Slot("bert.pooler.dense.weight", Kind.POOLER, None, False)),
        ("classifier.bias", Slot("classifier.bias", Kind.HEAD, None, True)),
        ("bert.classifier.bias", None),
        ("bert.encoder.layer.x.output.dense.weight", None),
        ("bert.encoder.layer.1.crossattention.self.query.weight", None),
        ("bert.encoder.layer.1xoutput.dense.weight", None),
        ("", None),
        ("cls.predictions.bias", None),
    ],
)
def test_the_table_places_a_tensor_or_does_not_know_it(name: str, slot: Slot | None) -> None:
    assert BERT.slot(name) == slot


def test_every_mask_has_a_site_and_no_site_is_there_twice(pair: list[Path]) -> None:
    sites = list(BERT.sites(inspect_checkpoint(pair[0], "local:m0").config))
    counts = {"heads": HEADS, "neurons": NEURONS}
    assert {score: nodes for site in sites for score, nodes in site.counts.items()} == {
        f"layers.{layer}.{nodes}": count for layer in range(LAYERS) for nodes, count in counts.items()
    }
    assert len({site.module for site in sites}) == len(sites) == 2 * LAYERS


def assert_refused(paths: list[Path], error: type[EngineError], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        plan(paths)
    missing = [word for word in words if word not in caught.value.message]
    assert not missing, caught.value.message
