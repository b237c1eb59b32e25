"""What every family of architectures must do, by the same tests for each: the table is right or one of them fails."""

import io
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceTrainer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from tests.score_names import assert_same_in_norm, by_name
from tests.tiny import (
    HEADS,
    LAYERS,
    NEURONS,
    POSITIONS,
    Tensors,
    dataset_spec,
    edit_json,
    edit_tensors,
    float64_model,
    insert_masks,
    merge_spec,
    model_spec,
    read_model,
    read_rows,
    silent,
    tiny_base,
    tiny_checkpoint,
    write_rows,
)
from tests.tiny_families import (
    ENCODER_DECODERS,
    TINY_FAMILIES,
    TINY_MIXTURES,
    TINY_T5,
    TINY_VISION,
    Slices,
    TinyFamily,
)
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.checkpoints.library import model_type_of
from worker.engine.catalog.data.rows import RowFile, sample
from worker.engine.catalog.families import FAMILIES, Family, Kind, ScoreName
from worker.engine.catalog.planning.plan import MergePlan, required_family
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.catalog.primitives.errors import (
    EngineError,
    IncompatibleCheckpoints,
    InvalidCheckpoint,
    InvalidDataset,
)
from worker.engine.evaluation.evaluate import predict
from worker.engine.inputs.examples import Example, collate, tokenize
from worker.engine.jobs.engine import Engine
from worker.engine.models.loading import LoadedModel, load
from worker.engine.scoring.estimators import estimator_for
from worker.engine.scoring.scorer import score

ALL = {**TINY_FAMILIES, **TINY_VISION, **ENCODER_DECODERS}
ROWS = 12
LABELS = {"two": 2, "three": 3, "grade": 1}
OF_ANY = {kind for family in TINY_FAMILIES.values() for kind in family.counts(HEADS, NEURONS)}
WITHIN = {"heads": 2, "neurons": 7, "kv_heads": 1, "cross_heads": 3}
INDICES = {kind: WITHIN[kind.rpartition(".")[2]] for kind in sorted(OF_ANY)}
HEADS_OF_NO_WIDTH = {"llama": 32, "falcon": 71, "gpt_neox": 64}
"""Numbers of heads that are a class's own where the configuration says none, and that its checks come to first."""
AGAINST_SHAPES = {
    *(("falcon", key) for key in ("new_decoder_architecture", "multi_query")),
    ("falcon-new", "new_decoder_architecture"),
    ("falcon-sequential", "multi_query"),
}
"""Settings of which another value has another shape."""
FORMS = ["bert", "albert", "gpt2", "llama", "t5-gated"]
"""A family of each form: what does not depend on a table's names is shown on these."""
CPU = torch.device("cpu")
ENGINE_TOLERANCE = 1e-4  # of a score in norm, float32 against float64
INVARIANCE = 1e-5  # relative in norm per layer and kind, in float32
OF_NORMS_ON_BOTH_SIDES = 3e-5  # the same where each part is normalised before and after, by which rounding errors grow


@dataclass(frozen=True)
class Case:
    """Three experts of one ancestor, `two`, `three` and `grade`, with rows beside them."""

    name: str
    tiny: TinyFamily
    root: Path

    @property
    def table(self) -> Family:
        return FAMILIES[self.tiny.model_type]

    @property
    def experts(self) -> dict[str, Path]:
        return {name: self.root / name for name in LABELS}

    @property
    def counts(self) -> dict[str, int]:
        return self.tiny.counts(HEADS, NEURONS)

    @property
    def layers(self) -> int:
        """The number of layers with weights of their own."""
        return self.tiny.stored(LAYERS)

    @property
    def nodes(self) -> list[tuple[str, int, int]]:
        """A node of each kind in each layer."""
        return [
            (kind, layer, index)
            for kind, index in INDICES.items()
            if kind in self.counts
            for layer in range(self.layers)
        ]

    def slices_of(self, name: str) -> Slices | None:
        return self.tiny.slices_of(name, HEADS, NEURONS)

    def owned(self, node: tuple[str, int, int], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
        """The slices that belong to a node, each with its tensor's name and its letter; views."""
        nodes, layer, index = node
        for name, tensor in tensors.items():
            slices = self.slices_of(name)
            if slices is not None:
                parts = tensor.chunk(len(slices.owners), slices.axis)
                for part, owner, letter in zip(parts, slices.owners, slices.letters, strict=True):
                    if owner == (self.tiny.score(nodes, layer), index % self.counts[nodes]):
                        yield name, letter, part


@pytest.fixture(scope="module", params=TINY_FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(request.param, tmp_path_factory.mktemp(request.param))


def make_case(name: str, root: Path) -> Case:
    for seed, (expert, labels) in enumerate(LABELS.items()):
        tiny_checkpoint(root / expert, family=TINY_FAMILIES[name], labels=labels, seed=seed)
        write_rows(root / f"{expert}.jsonl", count=ROWS, labels=labels, seed=seed)
    return Case(name, TINY_FAMILIES[name], root)


@pytest.fixture(scope="module")
def merged(case: Case, engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three experts merged by the default method, for the tests that look at the result."""
    folder = tmp_path_factory.mktemp(f"{case.name}-merged")
    merge(engine, folder, list(case.experts.values()))
    return folder


def merge(engine: Engine, folder: Path, checkpoints: list[Path], **options: Any) -> dict[str, Path]:
    """The merged models' folders."""
    weights = options.pop("weights", [1.0] * len(checkpoints))
    rows = [path.with_suffix(".jsonl") for path in checkpoints]
    models = [model_spec(path, at, weight=weight) for path, at, weight in zip(checkpoints, rows, weights, strict=True)]
    engine.merge(merge_spec(folder, models, options), silent)
    return {path.name: folder / "models" / path.name for path in checkpoints}


def plan(paths: list[Path]) -> MergePlan:
    return plan_merge([inspect_checkpoint(path, f"local:{path.name}") for path in paths])


def copied(case: Case, folder: Path) -> list[Path]:
    """Two experts that fit, to be spoilt."""
    return [Path(shutil.copytree(case.experts[name], folder / name)) for name in ("two", "three")]


def assert_refused(paths: list[Path], error: type[EngineError], *words: str) -> None:
    with pytest.raises(error) as caught:
        plan(paths)
    missing = [word for word in words if word not in caught.value.message]
    assert not missing, caught.value.message


def probe(case: Case) -> Tensors:
    """Rows without padding, past the special tokens' ids."""
    config = AutoConfig.from_pretrained(case.experts["two"])
    ids = torch.randint(8, config.vocab_size, (3, 12), generator=torch.Generator().manual_seed(0))
    if config.is_encoder_decoder:
        ids[:, -1] = config.eos_token_id
    return {"input_ids": ids}


def logits(checkpoint: Path, inputs: Tensors) -> Tensor:
    with torch.no_grad():
        found: Tensor = float64_model(checkpoint)(**inputs).logits
    return found


# Scores


def examples_of(loaded: LoadedModel, rows: Path) -> list[Example]:
    return tokenize(read_rows(rows), dataset_spec(rows), loaded.tokenizer, loaded.max_length, None).examples


def one_by_one(checkpoint: Path, tiny: TinyFamily) -> dict[ScoreName, Tensor]:
    """Scores by masks that are there: a row at a time, no padding, float64, a backward pass for every label."""
    model, tokenizer = float64_model(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    masks = insert_masks(model, tiny)
    total = [torch.zeros_like(mask) for mask in masks]
    lines = checkpoint.with_suffix(".jsonl").read_text().splitlines()
    for line in lines:
        encoded = tokenizer(json.loads(line)["text"], return_tensors="pt", truncation=True, max_length=POSITIONS)
        (row,) = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits
        likelihoods = row.log_softmax(-1) if len(row) > 1 else row
        weights = likelihoods.detach().exp() if len(row) > 1 else torch.ones(1)
        for weight, output in zip(weights, likelihoods, strict=True):
            for sum_, gradient in zip(total, torch.autograd.grad(output, masks, retain_graph=True), strict=True):
                sum_ += weight * gradient**2 / len(lines)
    return by_name(tiny, total)


def test_scores_are_those_of_masks_that_are_there(case: Case) -> None:
    assert_scores_of_masks(case, "three")


@pytest.mark.parametrize("name", FORMS)
def test_scores_of_a_number_are_those_of_masks_that_are_there(tmp_path: Path, name: str) -> None:
    assert_scores_of_masks(make_case(name, tmp_path), "grade")


def assert_scores_of_masks(case: Case, expert: str) -> None:
    checkpoint = case.experts[expert]
    loaded = load(inspect_checkpoint(checkpoint, expert), CPU)
    examples = examples_of(loaded, checkpoint.with_suffix(".jsonl"))
    estimator = estimator_for("expected", loaded.task, seed=0)
    found = score(loaded, examples, estimator, "float32", "rows", silent).scores()
    assert_same_in_norm(found, one_by_one(checkpoint, case.tiny), ENGINE_TOLERANCE)


def test_scores_do_not_depend_on_batches_or_padding(case: Case) -> None:
    checkpoint = case.experts["three"]
    loaded = load(inspect_checkpoint(checkpoint, "three"), CPU)
    examples = examples_of(loaded, checkpoint.with_suffix(".jsonl"))
    assert len({example.length for example in examples}) > 3
    estimator = estimator_for("expected", loaded.task, seed=0)

    def scores(batches: list[list[Example]]) -> dict[ScoreName, Tensor]:
        return score(loaded, examples, estimator, "float32", "rows", silent, batches).scores()

    within = OF_NORMS_ON_BOTH_SIDES if case.tiny.model_type.startswith("gemma") else INVARIANCE
    alone = scores([[example] for example in examples])
    assert_same_in_norm(scores([examples]), alone, within)
    assert_same_in_norm(scores([examples[::-1][i : i + 5] for i in range(0, ROWS, 5)]), alone, within)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_that_are_padded_on_either_side_give_what_they_give_alone(case: Case, side: str) -> None:
    """By the attention that the engine runs; positions are those of the row, as its mask says."""
    if not case.table.is_causal:
        pytest.skip("encoders are padded on the right alone")
    checkpoint = case.experts["three"]
    loaded, exact = load(inspect_checkpoint(checkpoint, "three"), CPU), float64_model(checkpoint)
    rows = [example.encoding["input_ids"] for example in examples_of(loaded, checkpoint.with_suffix(".jsonl"))]
    longest, pad = max(map(len, rows)), loaded.padding["input_ids"]
    assert pad == exact.config.pad_token_id
    filled = [([pad] * (longest - len(row)), [0] * (longest - len(row)), row, [1] * len(row)) for row in rows]
    ids = torch.tensor([(p + row if side == "left" else row + p) for p, _, row, _ in filled])
    mask = torch.tensor([(p + row if side == "left" else row + p) for _, p, _, row in filled])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        found = loaded.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        alone = torch.cat([exact(input_ids=torch.tensor([row])).logits for row in rows])
    torch.testing.assert_close(found.double(), alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pad_token", [None, -1])
def test_a_decoder_without_padding_reads_the_last_token_of_each_row(
    case: Case, tmp_path: Path, pad_token: int | None
) -> None:
    """transformers itself refuses batches then; a row alone is read to its end."""
    if not case.table.is_causal:
        pytest.skip("encoders read their first token, or all of them")
    (checkpoint, _) = copied(case, tmp_path)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "pad_token_id": pad_token}))
    loaded, exact = load(inspect_checkpoint(checkpoint, "two"), CPU), float64_model(checkpoint)
    examples = examples_of(loaded, case.root / "two.jsonl")
    (batch,) = collate([examples], loaded.padding, CPU)
    with torch.no_grad():
        found = loaded.kind.run(batch.inputs)
        alone = torch.cat([exact(torch.tensor([one.encoding["input_ids"]])).logits for one in examples])
    torch.testing.assert_close(found.double(), alone, rtol=1e-3, atol=1e-3)
    assert predict(loaded, examples, "float32", silent).tolist() == alone.argmax(-1).tolist()


def test_the_last_layer_is_computed_of_the_token_that_the_head_reads(case: Case) -> None:
    loaded = load(inspect_checkpoint(case.experts["three"], "three"), CPU)
    examples = examples_of(loaded, case.root / "three.jsonl")
    seen: dict[ScoreName, list[int]] = {}
    for site in case.table.sites(loaded.info.config):
        score_name = next(iter(site.counts))

        def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: ScoreName = score_name) -> None:
            flat = inputs[0].dim() == 2  # of all rows, in OPT
            seen.setdefault(name, []).append(len(inputs[0]) // len(examples) if flat else inputs[0].shape[1])

        loaded.model.get_submodule(site.module).register_forward_hook(note)

    score(loaded, examples, estimator_for("expected", loaded.task, seed=0), "float32", "rows", silent, [examples])

    longest = max(example.length for example in examples)
    uses = 1 + LAYERS - case.layers
    last = [f"layers.{case.layers - 1}.{nodes}" for nodes in ("heads", "neurons") if case.table.head.reads_first_token]
    assert longest > 1
    assert seen == {name: [*[longest] * (uses - 1), 1 if name in last else longest] for name in seen}
    assert {*last} <= {*seen}
    assert len(seen) == sum(not kind.endswith("kv_heads") for kind in case.counts) * case.layers


def test_bfloat16_gives_scores_of_the_same_order(case: Case) -> None:
    checkpoint = case.experts["two"]
    loaded = load(inspect_checkpoint(checkpoint, "two"), CPU)
    examples = examples_of(loaded, checkpoint.with_suffix(".jsonl"))
    estimator = estimator_for("expected", loaded.task, seed=0)
    exact = score(loaded, examples, estimator, "float32", "rows", silent).scores()
    narrow = score(loaded, examples, estimator, "bfloat16", "rows", silent).scores()
    assert_same_in_norm(narrow, exact, case.tiny.rounding)


@pytest.mark.parametrize("family", ["xlm-roberta", "camembert"])
def test_what_is_found_of_roberta_holds_of_those_that_share_its_code(family: str, tmp_path: Path) -> None:
    """Scores to the bit, so that studies of RoBERTa's rounding need no repetition."""
    roberta = make_case("roberta", tmp_path).experts["two"]
    other = Path(shutil.copytree(roberta, tmp_path / "other"))
    edit_json(other / "config.json", model_type=family, architectures=[FAMILIES[family].head.architecture])
    found = []
    for checkpoint in (roberta, other):
        loaded = load(inspect_checkpoint(checkpoint, checkpoint.name), CPU)
        examples = examples_of(loaded, roberta.with_suffix(".jsonl"))
        estimator = estimator_for("expected", loaded.task, seed=0)
        found.append([score(loaded, examples, estimator, p, "rows", silent).scores() for p in ("float32", "bfloat16")])
    for of_roberta, of_other in zip(*found, strict=True):
        assert of_roberta.keys() == of_other.keys()
        assert all(torch.equal(of_roberta[site], of_other[site]) for site in of_roberta)


# Ownership


def test_scaling_what_a_node_owns_after_its_activation_is_scaling_its_mask(case: Case, tmp_path: Path) -> None:
    for nodes, layer, index in case.nodes:
        assert_scaled_as_its_mask(case, tmp_path / f"{nodes}.{layer}", nodes, layer, index)


def assert_scaled_as_its_mask(case: Case, folder: Path, nodes: str, layer: int, index: int) -> None:
    multiplier, inputs, expert = -1.7, probe(case), case.experts["three"]
    masked = float64_model(expert)
    with torch.no_grad():
        insert_masks(masked, case.tiny)[list(case.counts).index(nodes)][layer, index % case.counts[nodes]] = multiplier
        expected = masked(**inputs).logits
    assert not torch.allclose(expected, logits(expert, inputs))
    # A head's mask can be seen on either side of its context if the value is its own, a neuron's only behind the
    # non-linearity.
    node = nodes, layer, index
    behind = {letter for _, letter, _ in case.owned(node, read_model(expert))} & {"v", "o", "d"}
    assert behind
    for letter in behind:
        scaled = Path(shutil.copytree(expert, folder / letter))

        def scale(tensors: Tensors, letter: str = letter) -> Tensors:
            wide = {name: tensor.double() for name, tensor in tensors.items()}
            for _, found, part in case.owned(node, wide):
                if found == letter:
                    part.mul_(multiplier)
            return wide

        edit_tensors(scaled, scale)
        torch.testing.assert_close(logits(scaled, inputs), expected, rtol=1e-12, atol=1e-12)


def test_what_a_node_owns_is_exactly_what_matters_no_more_when_it_is_masked(case: Case) -> None:
    for nodes, layer, index in case.nodes:
        assert_matters_no_more(case, nodes, layer, index)


def assert_matters_no_more(case: Case, nodes: str, layer: int, index: int) -> None:
    model = float64_model(case.experts["three"])
    mask = insert_masks(model, case.tiny)[list(case.counts).index(nodes)]
    with torch.no_grad():
        mask[layer, index % case.counts[nodes]] = 0
    model(**probe(case)).logits.pow(2).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    visible = {}
    for name, gradient in gradients.items():
        slot = case.table.slot(name)
        assert slot is not None, name
        # A bias that is the same for every key, or place of one, is invisible to softmax: its gradient is rounding.
        is_invisible = slot.is_bias and (slot.kind in (Kind.KEY, Kind.CROSS_KEY) or "pos_key_proj" in name)
        visible[name] = gradient.abs() > 1e-12 if is_invisible or case.tiny.fused else gradient != 0
    masked = {(nodes, layer, index % case.counts[nodes])}
    if nodes == "kv_heads":  # with what heads share, these heads are masked too
        sharing = HEADS // case.counts[nodes]
        first = index % case.counts[nodes] * sharing
        masked |= {("heads", layer, head) for head in range(first, first + sharing)}
    if nodes == "heads" and case.tiny.kv_heads == HEADS:  # each has its own
        masked.add(("kv_heads", layer, index))
    for node in masked:
        for name, letter, part in case.owned(node, visible):
            slot = case.table.slot(name)
            if not (case.tiny.normed_together and slot is not None and slot.kind in (Kind.QUERY, Kind.KEY)):
                assert not part.any(), (name, letter)
            part.fill_(True)
    for name, found in visible.items():
        slices = case.slices_of(name)
        axis, letters = (0, ("",)) if slices is None else (slices.axis, slices.letters)
        slot = case.table.slot(name)
        if slot is None or slot.layer is None:
            continue
        of_keys = slot.kind in (Kind.KEY, Kind.CROSS_KEY)
        for part, letter in zip(found.chunk(len(letters), axis), letters, strict=True):
            if not (name.endswith(".bias") and (letter == "k" or of_keys or "pos_key_proj" in name)):
                assert slices_without_effect(part, axis) == 0, name


def slices_without_effect(visible: Tensor, axis: int) -> int:
    return int((~visible.movedim(axis, 0).reshape(visible.shape[axis], -1).any(1)).sum())


def test_the_table_gives_every_tensor_the_owner_that_is_written_down_twice(case: Case) -> None:
    backbone = plan(list(case.experts.values())).backbone
    for tensor in backbone:
        owner, expected = tensor.slot.owner, case.slices_of(tensor.slot.name)
        assert (owner is None) == (expected is None), tensor.slot.name
        if owner is not None and expected is not None:
            kinds = [f"{score.stack}.{score.kind}" if score.stack else score.kind.name for score in owner.scores]
            scores = zip(owner.scores, kinds, strict=True)
            parts = [[(str(score), index) for index in range(case.counts[kind])] for score, kind in scores]
            groups = min(map(len, parts)) if owner.by_head else 1
            runs = [part[group * len(part) // groups : (group + 1) * len(part) // groups]
                    for group in range(groups) for part in parts]  # fmt: skip
            assert (owner.axis, [one for run in runs for one in run]) == (expected.axis, [*expected.owners])
    heads = {name for name in read_model(case.experts["two"]) if name.startswith(case.tiny.head)}
    assert {tensor.slot.name for tensor in backbone} == read_model(case.experts["two"]).keys() - heads


# Merging


def dense_merge(case: Case, versions: list[Tensors], scores: list[Tensors]) -> Tensors:
    """`mask_fisher` as METHOD has it, with one weight per element, in float64."""
    shares = {}
    for name in scores[0]:
        by_model = np.stack([of_model[name].numpy() / of_model[name].numpy().mean() for of_model in scores])
        by_model = np.maximum(by_model, 1e-3)
        shares[name] = by_model / by_model.sum(0)
    merged = {}
    for name, first in versions[0].items():
        share = np.full((len(versions), 1), 1 / len(versions))
        slices = case.slices_of(name)
        axis = 0
        if slices is not None:
            axis = slices.axis
            share = np.stack([shares[score][:, index] for score, index in slices.owners], axis=1)
            share = share.repeat(first.shape[axis] // share.shape[1], axis=1)
        share = share.reshape(len(versions), *[-1 if d == axis else 1 for d in range(first.dim())])
        stacked = np.stack([version[name].double().numpy() for version in versions])
        merged[name] = torch.from_numpy((share * stacked).sum(0))
    return merged


def test_the_merge_computes_what_a_model_assembled_by_hand_computes(case: Case, merged: Path) -> None:
    versions = [read_model(path) for path in case.experts.values()]
    scores = [load_file(merged / "scores" / f"{name}.safetensors") for name in case.experts]
    scores = [{n: s for n, s in of_model.items() if not n.endswith("stderr")} for of_model in scores]
    assert scores[0].keys() == {case.tiny.score(kind, layer) for layer in range(case.layers) for kind in case.counts}
    backbones = [{n: t for n, t in v.items() if not n.startswith(case.tiny.head)} for v in versions]
    by_hand = dense_merge(case, backbones, scores)
    inputs = probe(case)
    for name, version in zip(case.experts, versions, strict=True):
        model = AutoModelForSequenceClassification.from_pretrained(case.experts[name], dtype=torch.float64).eval()
        state = {n: by_hand.get(n, tensor) for n, tensor in version.items()}
        missing = model.load_state_dict(state, strict=False).missing_keys
        assert {*missing} == tied_copies(model, state)
        with torch.no_grad():
            expected = model(**inputs).logits
        assert float((expected - logits(case.experts[name], inputs)).abs().max()) > 1e-3
        torch.testing.assert_close(logits(merged / "models" / name, inputs), expected, rtol=0, atol=1e-4)


def test_the_ancestor_without_a_head_is_the_base(case: Case, engine: Engine, merged: Path, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", family=case.tiny)
    ancestor = read_model(base)
    models = [model_spec(path, path.with_suffix(".jsonl")) for path in case.experts.values()]
    of_base = {"source": "local:base", "path": base}
    spec = merge_spec(tmp_path / "out", models, {"name": "mask_fisher", "scale": 0.5})
    engine.merge(type(spec).model_validate({**spec.model_dump(), "base": of_base}), silent)
    found, whole = read_model(tmp_path / "out" / "models" / "two"), read_model(merged / "models" / "two")
    assert ancestor
    for name, tensor in ancestor.items():
        own = name if name in whole else f"{case.table.prefix}{name}"
        if case.table.slot(own).kind is not Kind.POOLER:  # type: ignore[union-attr]
            torch.testing.assert_close(found[own], tensor + 0.5 * (whole[own] - tensor), rtol=0, atol=1e-5, msg=own)


def test_a_model_merged_with_itself_is_itself_to_the_bit(case: Case, engine: Engine, tmp_path: Path) -> None:
    assert_itself_to_the_bit(case, engine, tmp_path)


@pytest.mark.parametrize("method", [{"preset": "paper"}, {"rest": "model"}], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_other_ways_to_weigh_do_so_too(engine: Engine, tmp_path: Path, name: str, method: dict[str, Any]) -> None:
    case = make_case(name, tmp_path)
    assert_itself_to_the_bit(case, engine, tmp_path, **method)
    folder = tmp_path / "merged"
    merge(engine, folder, list(case.experts.values()), **method)
    assert_moved(case, folder)


def assert_itself_to_the_bit(case: Case, engine: Engine, folder: Path, **method: Any) -> None:
    copies = [Path(shutil.copytree(case.experts["three"], folder / name)) for name in ("a", "b")]
    for seed, path in enumerate(copies):
        write_rows(path.with_suffix(".jsonl"), count=ROWS, labels=3, seed=seed)
    original = read_model(case.experts["three"])
    for path in merge(engine, folder / "out", copies, weights=[1.0, 0.7], **method).values():
        merged = read_model(path)
        assert merged.keys() == original.keys()
        assert [name for name, tensor in original.items() if not torch.equal(merged[name], tensor)] == []


def test_the_merge_moves_the_backbone_and_keeps_the_heads(case: Case, merged: Path) -> None:
    assert_moved(case, merged)


def assert_moved(case: Case, folder: Path) -> None:
    for name, path in case.experts.items():
        expert, found = read_model(path), read_model(folder / "models" / name)
        assert found.keys() == expert.keys()
        for tensor in expert:
            assert bool(found[tensor].isfinite().all()), tensor
            assert torch.equal(found[tensor], expert[tensor]) == tensor.startswith(case.tiny.head), tensor


@pytest.mark.parametrize("name", FORMS)
def test_with_all_the_weight_on_one_expert_its_logits_come_back_exactly(
    engine: Engine, tmp_path: Path, name: str
) -> None:
    case = make_case(name, tmp_path)
    experts = [case.experts["three"], case.experts["two"]]
    merged = merge(engine, tmp_path / "out", experts, weights=[1.0, 0.0])
    assert torch.equal(logits(merged["three"], probe(case)), logits(experts[0], probe(case)))


def test_transformers_loads_the_merge_and_its_tokenizer_whole(case: Case, merged: Path) -> None:
    text = "one w7 three w84"
    for name in case.experts:
        folder = merged / "models" / name
        model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert {kind: list(found) for kind, found in report.items() if found} == {}
        on_disk = read_model(folder)
        state = model.state_dict()
        assert state.keys() - on_disk.keys() == tied_copies(model, on_disk)
        assert [n for n, tensor in on_disk.items() if not torch.equal(tensor, state[n])] == []
        expert = AutoModelForSequenceClassification.from_pretrained(case.experts[name])
        assert shared_storage(model) == shared_storage(expert)
        tokenizer, own = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(case.experts[name])
        assert type(tokenizer) is type(own)
        assert dict(tokenizer(text)) == dict(own(text))
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


def test_no_classifier_of_these_families_ties_weights_and_a_tie_would_be_seen(case: Case) -> None:
    """Input embeddings are tied to the output of language models alone; the same check finds that tie there."""
    expert = AutoModelForSequenceClassification.from_pretrained(case.experts["two"])
    if case.tiny.decoder is not None:
        names = [case.table.prefix + name for name in ("decoder.embed_tokens", "encoder.embed_tokens", "shared")]
        assert shared_storage(expert) == [[f"{name}.weight" for name in names]]
        return
    assert shared_storage(expert) == []
    config = AutoConfig.from_pretrained(case.experts["two"], tie_word_embeddings=True)
    masked = type(config) in AutoModelForMaskedLM._model_mapping
    language_model = (AutoModelForMaskedLM if masked else AutoModelForCausalLM).from_config(config)
    assert any("embed" in name or "wte" in name for group in shared_storage(language_model) for name in group)


def tied_copies(model: Any, stored: Mapping[str, Tensor]) -> set[str]:
    """Names of parameters that are others, which alone are stored."""
    return {name for names in shared_storage(model) for name in names if name not in stored and {*names} & {*stored}}


def shared_storage(model: Any) -> list[list[str]]:
    """Names of parameters that are one and the same memory."""
    by_address: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_address.setdefault(parameter.data_ptr(), []).append(name)
    return sorted(sorted(names) for names in by_address.values() if len(names) > 1)


# Rows


def test_rows_are_cut_at_exactly_the_models_last_position(case: Case, tmp_path: Path) -> None:
    checkpoint = case.experts["two"]
    loaded = load(inspect_checkpoint(checkpoint, "two"), CPU)
    assert loaded.max_length == POSITIONS
    rows = write_rows(tmp_path / "long.jsonl", count=3, longest=400, seed=5)
    rows.write_text(rows.read_text() + json.dumps({"text": "one " * 500, "label": 0}) + "\n")
    longest = max(examples_of(loaded, rows), key=lambda example: example.length)
    assert longest.length == POSITIONS
    if not case.table.is_causal:  # decoders' rows have no mark at their end
        tokenizer = loaded.tokenizer
        assert longest.encoding["input_ids"][-1] in (tokenizer.sep_token_id, tokenizer.eos_token_id)
    inputs = {name: torch.tensor([values]) for name, values in longest.encoding.items()}
    assert bool(loaded.model(**inputs).logits.isfinite().all())
    one_more = {name: torch.cat([values[:, :1], values], dim=1) for name, values in inputs.items()}
    learned = ("position_embeddings", "embed_positions", "wpe")
    if not any(part in name for name in read_model(checkpoint) for part in learned):
        # Relative positions alone: it runs, at a distance that it was never trained on.
        assert bool(loaded.model(**one_more).logits.isfinite().all())
    else:
        with pytest.raises((IndexError, RuntimeError)):
            loaded.model(**one_more)


def test_only_what_the_model_takes_is_given_to_it(case: Case, tmp_path: Path) -> None:
    """Even of a tokenizer that tells segments apart where the model cannot."""
    (checkpoint, _) = copied(case, tmp_path)
    edit_json(checkpoint / "tokenizer_config.json", model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    loaded = load(inspect_checkpoint(checkpoint, "two"), CPU)
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"text": "one two", "text_pair": "three", "label": 0}) + "\n")
    spec = dataset_spec(file, text_pair="text_pair")
    (example,) = tokenize(sample(RowFile(spec), spec, None), spec, loaded.tokenizer, loaded.max_length, None).examples
    segments = case.name in ("albert", "bert", "electra", "deberta-v2")
    assert set(example.encoding) == {"input_ids", "attention_mask"} | ({"token_type_ids"} if segments else set())
    inputs = {name: torch.tensor([values]) for name, values in example.encoding.items()}
    assert bool(loaded.model(**inputs).logits.isfinite().all())


@pytest.mark.parametrize("name", [name for name, tiny in TINY_FAMILIES.items() if tiny.decoder])
def test_a_row_whose_text_spells_the_end_token_is_refused(tmp_path: Path, name: str) -> None:
    """A classifier reads at the last end token of a row, and transformers refuses batches of different numbers."""
    case = make_case(name, tmp_path)
    loaded = load(inspect_checkpoint(case.experts["two"], "two"), CPU)
    file = tmp_path / "ends.jsonl"
    file.write_text(json.dumps({"text": f"one {loaded.tokenizer.eos_token} two", "label": 0}) + "\n")
    with pytest.raises(InvalidDataset, match=r"line 1: its text spells the end token"):
        loaded.kind.tokenized(read_rows(file), dataset_spec(file), loaded.tokenizer, loaded.max_length, None)


# Refusals


def test_a_tensor_that_no_rule_owns_is_refused_by_name(case: Case, tmp_path: Path) -> None:
    prefix = f"{case.tiny.layers}.1.{case.tiny.heads_out}"
    for name in (f"{prefix}.scale", f"{prefix}.lora_A.weight", f"{case.table.prefix}adapter.weight"):
        pair = copied(case, tmp_path / name)
        edit_tensors(pair[1], lambda tensors, name=name: {**tensors, name: torch.zeros(2)})  # type: ignore[misc]
        assert_refused(pair, InvalidCheckpoint, "local:three", f"tensor {name} is unknown")


def test_a_missing_tensor_is_refused_by_name_whoever_lacks_it(case: Case, tmp_path: Path) -> None:
    of_a_layer = f"{case.tiny.layers}.{case.layers - 1}.{case.tiny.values}.weight"
    outer = next(name for name in read_model(case.experts["two"]) if name.startswith(case.table.embeddings))

    def without(folder: str, lacking: list[int], name: str) -> list[Path]:
        pair = copied(case, tmp_path / folder)
        for index in lacking:
            edit_tensors(pair[index], lambda tensors: {n: t for n, t in tensors.items() if n != name})
        return pair

    if case.layers > 1:  # other layers have it
        assert_refused(without("first", [0], of_a_layer), InvalidCheckpoint, "local:two", f"no tensor {of_a_layer}")
        assert_refused(without("second", [1], of_a_layer), InvalidCheckpoint, "local:three", f"no tensor {of_a_layer}")
        assert_refused(without("both", [0, 1], of_a_layer), InvalidCheckpoint, f"no tensor {of_a_layer}")
    else:
        outer = of_a_layer
    assert_refused(without("outer", [1], outer), IncompatibleCheckpoints, f"tensor {outer} is missing in the second")
    assert_refused(without("other", [0], outer), IncompatibleCheckpoints, f"tensor {outer} is in the second only")
    pair = without("neither", [0, 1], outer)

    def planned_and_loaded() -> None:  # headers tell it where the class's tensors are known
        plan(pair)
        load(inspect_checkpoint(pair[0], "two"), CPU)

    with pytest.raises(InvalidCheckpoint, match=f"no tensor {outer}"):
        planned_and_loaded()


def test_every_module_of_the_head_is_needed_and_its_last_counts_the_labels(case: Case, tmp_path: Path) -> None:
    for module in case.table.head.modules:
        pair = copied(case, tmp_path / module)
        edit_tensors(pair[0], lambda found, m=module: {n: t for n, t in found.items() if n != f"{m}.weight"})  # type: ignore[misc]
        assert_refused(pair, InvalidCheckpoint, f"no tensor {module}.weight")
    pair = copied(case, tmp_path / "labels")
    edit_json(pair[1] / "config.json", id2label={str(i): f"l{i}" for i in range(5)})
    assert_refused(pair, InvalidCheckpoint, "5 labels", f"{case.table.head.logits}.weight", "[3, ")


def test_another_family_is_refused_by_both_names(case: Case, tmp_path: Path) -> None:
    others = {"xlm-roberta": "roberta"}
    other = others.get(case.tiny.model_type, "xlm-roberta")
    stranger = tiny_checkpoint(tmp_path / "stranger", family=TINY_FAMILIES[other])
    found = f"architectures differ: {case.tiny.model_type}, {other}"
    assert_refused([case.experts["two"], stranger], IncompatibleCheckpoints, "local:two", "local:stranger", found)


def test_another_architecture_of_the_family_is_refused(case: Case, tmp_path: Path) -> None:
    pair = copied(case, tmp_path)
    own = case.table.head.architecture
    known = model_type_of(case.tiny.model_type)
    assert known is not None
    other = next(name for name in sorted(known.architectures) if name != own and not name.endswith("Model"))
    edit_json(pair[0] / "config.json", architectures=[other])
    if case.tiny.model_type == "gpt_neox":
        assert_refused(
            pair, IncompatibleCheckpoints, f"local:two and local:three: architectures differ: {other}, {own}"
        )
        return
    lacking = min(name for name in read_model(pair[0]) if name.startswith(case.tiny.head))
    with pytest.raises(InvalidCheckpoint) as caught:
        plan(pair)
    said = f"checkpoint local:two: architectures in config.json says {other}, which has no tensor {lacking}; "
    advice = " has. Name the class that the checkpoint is, or remove the tensor"
    message = caught.value.message
    assert message.startswith(said)
    assert message.endswith(advice)
    assert lacking in known.architectures[message.removeprefix(said).removesuffix(advice)].all_names


def test_every_setting_and_size_must_be_shared(case: Case, tmp_path: Path) -> None:
    for key in case.table.settings:
        pair = copied(case, tmp_path / key)
        config = json.loads((pair[0] / "config.json").read_text())
        other: Any = 7 if config.get(key) != 7 else 8
        if key == "pos_att_type":
            other = ["p2c"]
        elif key == "feed_forward_proj":
            other = config[key].replace("gelu", "relu")
        elif key in ("layer_types", "no_rope_layers"):
            other = config[key][::-1]
        elif key.startswith("relative_attention_"):
            other = 2 * config[key]
        elif isinstance(config.get(key), float) or (config.get(key) is None and key.endswith("softcapping")):
            other = 7.0
        elif key.endswith(("act", "activation", "activation_function")):
            other = "relu"
        elif key.endswith("eps"):
            other = 7.0
        elif isinstance(config.get(key), bool):
            other = not config[key]
        elif isinstance(config.get(key), dict):
            theta = {"rope_theta": 7.0}
            inner = {of: {**rotary, **theta} for of, rotary in config[key].items() if isinstance(rotary, dict)}
            other = {**config[key], **(inner or theta)}
        edit_json(pair[1] / "config.json", **{key: other})
        if key == case.table.padding_position:  # another limit, and another meaning of every position
            assert required_family(plan([pair[1]])).max_tokens({**config, key: other}) == POSITIONS + 2 - 8
        if (case.name, key) in AGAINST_SHAPES:
            assert_refused(
                pair, InvalidCheckpoint, "local:three", "query_key_value.weight has shape", "config.json says"
            )
        else:
            assert_refused(pair, IncompatibleCheckpoints, f"{key} differs")
    for what, key in case.table.config_names.items():
        follows = ("kv_heads", "head_size", "decoder_layers", "decoder_heads", "decoder_neurons")
        if what in (*follows, *case.table.absent_sizes) or (what == "neurons" and case.table.widening):
            continue
        pair = copied(case, tmp_path / key)
        edit_json(pair[0] / "config.json", **{key: None, "layer_types": None, "no_rope_layers": None})
        heads = HEADS_OF_NO_WIDTH.get(case.tiny.model_type) if what == "heads" else None
        problem = f"no usable {key}" if heads is None else f"{key} {heads}, which does not divide hidden_size 16"
        assert_refused(pair, InvalidCheckpoint, f"checkpoint local:two: config.json has {problem}")


def test_what_a_missing_setting_means_is_what_transformers_takes_it_for(case: Case) -> None:
    defaults = vars(AutoConfig.for_model(case.tiny.model_type))
    known = model_type_of(case.tiny.model_type)
    assert known is not None
    for key, absent in {**case.table.settings, **case.table.supported}.items():
        if key not in known.derived:
            assert case.table.setting({key: defaults.get(key, absent)}, key) == case.table.setting({}, key), key
    of_older_versions = {"sliding_window_pattern", "global_attn_every_n_layers"}
    assert all(
        case.table.settings[key] is None
        for key in known.derived.keys() & case.table.settings.keys() - {"rope_parameters", "sliding_window"}
    )
    follow = ("head_size", *case.table.absent_sizes)
    assert {key for what, key in case.table.config_names.items() if what not in follow} <= defaults.keys()
    for what, key in case.table.config_names.items():
        if what in ("kv_heads", "head_size") and key in defaults and case.table.model_type != "falcon":
            sizes = {
                name: defaults[name] for name in case.table.config_names.values() if name != key and name in defaults
            }
            assert case.table.size(sizes, what) == defaults[key]
    read_with_a_default_of_its_own = {
        "decoder_start_token_id",
        "position_buckets",
        "norm_rel_ebd",
        "share_att_key",
        "position_embedding_type",
    }
    read_with_a_default_of_its_own |= of_older_versions
    unknown = {key for key in case.table.settings if key not in defaults and not key.startswith("conv_")}
    assert unknown <= read_with_a_default_of_its_own


def test_what_is_not_available_is_refused_by_its_key(case: Case, tmp_path: Path) -> None:
    of_encoders = {} if case.table.is_causal else {"is_decoder": False}
    for key, only in {**of_encoders, **case.table.supported}.items():
        pair = copied(case, tmp_path / key)
        other: Any = "relative_key" if isinstance(only, str) else only + 1 if type(only) is int else not only
        for path in pair:
            edit_json(path / "config.json", **{key: other})
        assert_refused(pair, InvalidCheckpoint, key, "not available")


@pytest.mark.parametrize("padding", ["1", True, POSITIONS + 1])
def test_a_padding_position_that_leaves_no_row_is_refused_by_its_key(case: Case, tmp_path: Path, padding: Any) -> None:
    key = case.table.padding_position
    pair = copied(case, tmp_path)
    if key is None or key in case.table.supported:
        positions = case.table.config_names["positions"]
        edit_json(pair[0] / "config.json", **{positions: padding if padding == "1" else 0})
        is_known = positions in vars(AutoConfig.for_model(case.tiny.model_type))
        problem = f"{positions} '1'" if padding == "1" and is_known else f"no usable {positions}"
        assert_refused(pair, InvalidCheckpoint, problem)
    else:
        edit_json(pair[0] / "config.json", pad_token_id=padding)
        assert_refused(pair, InvalidCheckpoint, "local:two", "pad_token_id")


# What devices take


def test_a_gpu_gets_fused_attention_where_the_family_has_it(case: Case) -> None:
    """`load` asks for no attention by name there; what it gets computes the same."""
    asked = {"attn_implementation": None, "dtype": torch.float64}
    fused = AutoModelForSequenceClassification.from_pretrained(case.experts["three"], **asked).eval()
    has_none = case.tiny.model_type in ("deberta-v2", "mpnet", "gemma2")
    assert fused.config._attn_implementation == ("eager" if has_none else "sdpa")
    with torch.no_grad():
        found = fused(**probe(case)).logits
    torch.testing.assert_close(found, logits(case.experts["three"], probe(case)), rtol=1e-9, atol=1e-9)


# What older versions wrote


@pytest.mark.parametrize("name", [name for name, tiny in TINY_FAMILIES.items() if FAMILIES[tiny.model_type].unread])
def test_what_older_versions_saved_besides_is_left_out(tmp_path: Path, name: str) -> None:
    case = make_case(name, tmp_path / "made")
    pair = copied(case, tmp_path)
    unread = {f"{case.table.prefix}{name.format(layer=1)}": torch.zeros(16, 16) for name in case.table.unread}
    unread[f"{case.table.prefix}{case.table.unread[0].format(layer=1)}"] = torch.arange(POSITIONS)[None]
    expected = {tensor.slot.name for tensor in plan(pair).backbone}
    edit_tensors(pair[0], lambda tensors: {**tensors, **unread})
    assert {tensor.slot.name for tensor in plan(pair).backbone} == expected
    assert not unread.keys() & expected


@pytest.mark.parametrize("name", ["bert", "albert", "deberta-v2"])
def test_older_spellings_merge_as_the_newer_ones_do(engine: Engine, tmp_path: Path, name: str) -> None:
    pair = copied(make_case(name, tmp_path / "made"), tmp_path)
    for path in pair:
        write_rows(path.with_suffix(".jsonl"), count=ROWS, labels=LABELS[path.name])
    expected = merge(engine, tmp_path / "new", pair)

    def older(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    assert any(older(name) != name for name in read_model(pair[0]))
    edit_tensors(pair[0], lambda tensors: {older(name): tensor for name, tensor in tensors.items()})
    found = merge(engine, tmp_path / "old", pair)
    for name, folder in found.items():
        old, new = read_model(folder), read_model(expected[name])
        assert old.keys() == new.keys()
        for tensor in new:
            torch.testing.assert_close(old[tensor], new[tensor], rtol=0, atol=1e-6)


SENTENCEPIECE = {
    "xlm-roberta": "sentencepiece.bpe.model",
    "camembert": "sentencepiece.bpe.model",
    "deberta-v3": "spm.model",
}


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_a_tokenizer_that_is_a_sentencepiece_model_alone_is_read_compared_and_kept(
    engine: Engine, tmp_path: Path, name: str
) -> None:
    case = make_case(name, tmp_path)
    pieces = sentencepiece_model(case)
    for path in case.experts.values():
        (path / "tokenizer.json").unlink()
        (path / SENTENCEPIECE[name]).write_bytes(pieces)
    pair = [case.experts["two"], case.experts["three"]]
    for name_, folder in merge(engine, tmp_path / "out", pair).items():
        tokenizer, own = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(case.experts[name_])
        ids = tokenizer("one w7 three")["input_ids"]
        assert ids == own("one w7 three")["input_ids"]
        assert len(ids) > 5
        assert tokenizer.unk_token_id not in ids
    (pair[1] / SENTENCEPIECE[name]).write_bytes(sentencepiece_model(case, size=40))
    assert_refused(pair, IncompatibleCheckpoints, "different vocabularies")
    (pair[1] / SENTENCEPIECE[name]).unlink()
    case.tiny.tokenizer().save_pretrained(pair[1])
    assert_refused(pair, IncompatibleCheckpoints, "different forms", "tokenizer.json")


def test_bertweets_tokenizer_of_words_and_codes_is_kept(engine: Engine, tmp_path: Path) -> None:
    """A RoBERTa whose tokenizer has no other form than its own."""
    case = make_case("roberta", tmp_path)
    for path in case.experts.values():
        (path / "tokenizer.json").unlink()
        edit_json(path / "tokenizer_config.json", tokenizer_class="BertweetTokenizer", backend=None)
        (path / "vocab.txt").write_text("".join(f"{piece} 9\n" for piece in ("one", "on@@", "t@@", "w@@", "o")))
        (path / "bpe.codes").write_text("o n 10\non e</w> 9\n")
    for name, folder in merge(engine, tmp_path / "out", list(case.experts.values())).items():
        tokenizer, own = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(case.experts[name])
        assert tokenizer.tokenize("one two") == own.tokenize("one two") == ["one", "t@@", "w@@", "o"]


def sentencepiece_model(case: Case, size: int = 60) -> bytes:
    """Trained on the rows, with the special pieces where the published models have them."""
    options: dict[str, Any] = {}
    if case.name == "deberta-v3":
        options = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
        options |= {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
    texts = [json.loads(line)["text"] for line in case.experts["two"].with_suffix(".jsonl").read_text().splitlines()]
    stream = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=stream,
        vocab_size=size,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return stream.getvalue()


def test_each_modernbert_keeps_its_own_pooling(engine: Engine, tmp_path: Path) -> None:
    """Whosever settings count: its head was trained on it."""
    case = make_case("modernbert", tmp_path)
    first, second = (case.experts[name] for name in ("two", "three"))
    edit_json(first / "config.json", classifier_pooling="cls")
    models = [model_spec(path, path.with_suffix(".jsonl")) for path in (first, second)]
    engine.merge(merge_spec(tmp_path / "out", models, config_from="three"), silent)
    for path, pooling in ((first, "cls"), (second, "mean")):
        folder = tmp_path / "out" / "models" / path.name
        assert json.loads((folder / "config.json").read_text())["classifier_pooling"] == pooling
        assert AutoModelForSequenceClassification.from_pretrained(folder).config.classifier_pooling == pooling


def test_a_norm_that_modernberts_first_layer_does_not_have_is_refused(tmp_path: Path) -> None:
    pair = copied(make_case("modernbert", tmp_path / "made"), tmp_path)
    name = "model.layers.0.attn_norm.weight"
    edit_tensors(pair[1], lambda tensors: {**tensors, name: torch.ones(16)})
    assert_refused(pair, InvalidCheckpoint, f"tensor {name} is unknown")
    edit_tensors(pair[1], lambda tensors: {n: t for n, t in tensors.items() if "1.attn_norm" not in n and n != name})
    assert_refused(pair, IncompatibleCheckpoints, "tensor model.layers.1.attn_norm.weight is missing in the second")


def test_every_module_that_a_table_names_is_in_a_model() -> None:
    for table in (one for one in FAMILIES.values() if not one.stacked):
        found: set[str] = set()
        for name, tiny in {**ALL, "mt5-plain": replace(TINY_T5, model_type="mt5")}.items():
            if tiny.model_type == table.model_type:
                of_texts = {} if name in TINY_VISION else {"vocab_size": 20}
                config = AutoConfig.for_model(tiny.model_type, **of_texts, **tiny.configured(16, HEADS, 1, NEURONS))
                auto_class = (
                    AutoModelForImageClassification if name in TINY_VISION else AutoModelForSequenceClassification
                )
                model = auto_class.from_config(config)
                found |= dict(model.named_modules()).keys() | dict(model.named_parameters()).keys()
        inner = [table.layer_path(0, stack.name) + module for stack in table.stacks for module in stack.modules]
        outer = [table.prefix + name for name in (*table.outer_modules, *table.outer_parameters)]
        assert {*inner, *outer, *table.head.modules, table.embeddings} <= found


def test_every_table_is_tested() -> None:
    assert {tiny.model_type for tiny in (*ALL.values(), *TINY_MIXTURES.values())} == FAMILIES.keys()
