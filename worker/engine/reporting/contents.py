"""Contents of a report beyond the job's result: the data of its pictures, and the construction of the merge.

Large models are shown as means over blocks, and only so many models that a page stays small. The report says what was
left out.
"""

import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from itertools import accumulate, combinations
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BeforeValidator
from torch import Tensor

from worker.engine.catalog.contracts.spec import JobSpec, MergeSpec
from worker.engine.catalog.families import DECODER, NODE_KINDS, NodeKind, ScoreName
from worker.engine.catalog.planning.plan import MergePlan, PlannedTensor
from worker.engine.catalog.planning.tensors import TORCH_NAMES
from worker.engine.catalog.primitives.strict import Strict
from worker.engine.merging.interference import Interference, TaskVectors
from worker.engine.merging.methods import MeasuredModel
from worker.engine.merging.methods.combine import by_layer, model_weights
from worker.engine.merging.methods.mask_fisher import node_weights

PACKAGES = ("maskmerge", "torch", "transformers", "safetensors", "tokenizers", "numpy", "scipy", "scikit-learn")
BLOCKS = 48  # rows and columns of a map, at most
MOST_CELLS = 24_000  # cells of all maps on a page: about 0.6 MB with their tables
MOST_PAIRS = 45  # pairs of models that are listed: those of ten models
DIGITS = 4  # significant digits
DTYPES = {short: long for long, short in TORCH_NAMES.items()}

ScoresByModel = Mapping[str, Mapping[ScoreName, Tensor]]
"""Scores by model and score name, (nodes,)."""
ScoresByLayer = Mapping[tuple[str, int, NodeKind], Tensor]
"""Scores of all nodes of a kind in a layer, (nodes,)."""


def rounded(value: float | None) -> float | None:
    """Round to `DIGITS` significant digits; None for what is no finite number."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")


Rounded = Annotated[float, AfterValidator(lambda value: float(f"{value:.{DIGITS}g}"))]
Known = Annotated[float | None, BeforeValidator(rounded)]
"""A number, or null where there is none."""


class NodeMap(Strict):
    """Scores and merge weights of one kind of mask node, of models of one size."""

    nodes: str
    """Name of the kind of node."""
    stack: str = ""
    """`encoder` or `decoder`, where a model has both."""
    layers: int
    count: int
    """Number of nodes of a layer."""
    scores: dict[str, list[list[Known]]]
    """Scores by model: for each run of layers, from the first on, the means over runs of nodes. All runs are equally
    long, up to rounding."""
    weights: dict[str, list[list[Known]]]
    """Merge weights in the same form; empty where scores decide no weights."""
    lambdas: dict[str, Known]
    """Merge weight that each model has where all scores are equal."""

    @property
    def title(self) -> str:
        """Name of the nodes."""
        of_nodes = NODE_KINDS[self.nodes].title
        return f"{of_nodes} of the {self.stack}" if self.stack else of_nodes


class Maps(Strict):
    models: list[str]
    """Names of the models in the maps, which are the first of the merge."""
    left_out: int
    """Number of other models."""
    maps: list[NodeMap]


class Spread(Strict):
    """Mean, least and largest value over pairs of models."""

    mean: Rounded
    least: Rounded
    most: Rounded


class LayerInterference(Strict):
    layer: int | None
    """Number of the layer; null: everything outside the layers."""
    stack: str = ""
    """`encoder` or `decoder`, where a model has both."""
    cosine: Spread | None
    sign_conflicts: Spread | None

    @property
    def title(self) -> str:
        """Name of the layer."""
        return "outside" if self.layer is None else f"{self.stack} {self.layer}".strip()


class PairInterference(Strict):
    """Interference of two models' task vectors over all layers."""

    models: tuple[str, str]
    cosine: Known
    """Cosine of the task vectors; null where one is 0."""
    sign_conflicts: Known
    """Share of the values that both models changed which they changed in opposite directions; null where there are
    none."""


class InterferenceReport(Strict):
    share_read: Rounded
    """Share of each model's values from which it was computed."""
    layers: list[LayerInterference]
    pairs: list[PairInterference]
    pairs_in_all: int
    """Number of all pairs. Means are over all of them, also where not all are listed."""


class TensorGroup(Strict):
    """Tensors of the merged backbone that were treated alike."""

    kind: str
    owner: str | None
    """Names of the kinds of node that own slices, with commas between; null where none does."""
    outside_layers: bool
    copied: bool
    """Whether they are copied unchanged from one model."""
    tensors: int
    values: int
    dtypes: list[str]


class VocabularyReport(Strict):
    owner: str
    """The checkpoint whose tokenizer the output has."""
    rows: int
    tokens: int
    new: int
    """Number of tokens that come from other models."""
    shared: dict[str, int]
    """Number of the output's tokens that each model has."""


class Construction(Strict):
    """The parts of the merge, and how each was made."""

    groups: list[TensorGroup]
    heads: str
    """Treatment of heads. `merged`: with the backbone; `aligned`: each refitted to the backbone; `kept`: unchanged."""
    dtype: str
    """Data type of most values."""
    vocabulary: VocabularyReport | None
    bytes_read: int
    bytes_written: int


class Contents(Strict):
    """Keys of `report.json` beside those of the job's result."""

    construction: Construction | None
    """Construction of the merge; null for a job of scores."""
    maps: Maps | None
    """Maps of scores and merge weights; null where no mask node was scored."""
    interference: InterferenceReport | None
    """Interference of task vectors; null without a base, if fewer than two models take part, and if the job leaves it
    out."""
    threads: int
    versions: Mapping[str, str]


def of_merge(spec: MergeSpec, plan: MergePlan, scores: ScoresByModel, interference: Interference | None) -> Contents:
    taking_part = [model.name for model in spec.models if model.takes_part]
    return Contents(
        construction=_construction(spec, plan),
        maps=_maps(spec, scores, plan),
        interference=None if interference is None else _interference(interference, taking_part),
        threads=torch.get_num_threads(),
        versions=versions(),
    )


def of_scores(spec: JobSpec, scores: ScoresByModel) -> Contents:
    maps = _maps(spec, scores)
    return Contents(
        construction=None, maps=maps, interference=None, threads=torch.get_num_threads(), versions=versions()
    )


@cache
def versions() -> Mapping[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def _maps(spec: JobSpec, scores: ScoresByModel, plan: MergePlan | None = None) -> Maps | None:
    """Make the maps; if there is the `plan` of a merge, its weights are shown beside the scores."""
    scored = [model for model in spec.models if scores.get(model.name)]
    if not scored:
        return None
    weights: dict[ScoreName, Tensor] = {}
    lambdas: dict[str, float] = {}
    [method] = spec.method.methods
    if plan is not None and method.scoring is not None:
        models = [MeasuredModel(m.weight, scores[m.name], parameters=m.parameters) for m in scored]
        of_place = node_weights(models, method.scoring)
        weights = {
            score: torch.stack([of_place(score, place) for place in places]).mean(0)
            for score, places in plan.owned.items()
        }
        by_place = torch.stack([model_weights(models, place) for places in plan.owned.values() for place in places])
        shares = (by_place / by_place.sum(1, keepdim=True)).mean(0)
        lambdas = {model.name: float(share) for model, share in zip(scored, shares, strict=True)}
    factor = 2 if weights else 1
    cells = accumulate(factor * _cells(by_layer(scores[model.name])) for model in scored)
    shown = max(1, sum(so_far <= MOST_CELLS for so_far in cells))
    shapes: dict[tuple[str, int, NodeKind, int], list[str]] = {}
    for model in scored[:shown]:
        own = by_layer(scores[model.name])
        for (stack, kind), layers in _layers(own).items():
            count = len(own[stack, 0, kind])
            shapes.setdefault((stack, layers, kind, count), []).append(model.name)
    of_layers, weights_of_layers = {name: by_layer(of) for name, of in scores.items()}, by_layer(weights)
    places = {model.name: index for index, model in enumerate(scored)}
    maps = []
    for (stack, layers, kind, count), names in shapes.items():
        sites = [(stack, layer, kind) for layer in range(layers)]
        decided = {
            name: _blocks([weights_of_layers[site][places[name]] for site in sites]) for name in names if weights
        }
        maps.append(
            NodeMap(
                nodes=kind.name,
                stack=stack,
                layers=layers,
                count=count,
                scores={name: _blocks([of_layers[name][site] for site in sites]) for name in names},
                weights=decided,
                lambdas={name: lambdas[name] for name in decided},
            )
        )
    return Maps(models=list(places)[:shown], left_out=len(scored) - shown, maps=maps)


def _layers(scores: ScoresByLayer) -> dict[tuple[str, NodeKind], int]:
    """Return the number of layers by stack and kind of node, an encoder's before a decoder's."""
    counts = Counter((stack, kind) for stack, _, kind in scores)
    return dict(sorted(counts.items(), key=lambda item: (item[0][0] == DECODER, item[0][1].name)))


def _cells(scores: ScoresByLayer) -> int:
    """Count the cells of a model's maps of scores."""
    return sum(
        min(BLOCKS, layers) * min(BLOCKS, len(scores[stack, 0, kind]))
        for (stack, kind), layers in _layers(scores).items()
    )


def _blocks(by_layer: Sequence[Tensor]) -> list[list[Any]]:
    """Compute means over at most `BLOCKS` runs of nodes and of layers; every layer has as many nodes."""
    nodes = torch.stack(list(by_layer))
    columns = torch.stack([part.mean(1) for part in nodes.tensor_split(min(BLOCKS, nodes.shape[1]), 1)], dim=1)
    rows = torch.stack([part.mean(0) for part in columns.tensor_split(min(BLOCKS, len(nodes)))])
    return rows.tolist()


def _interference(found: Interference, names: Sequence[str]) -> InterferenceReport:
    def spread(matrix: Tensor) -> Spread | None:
        known = [value for value in found.of_pairs(matrix) if not math.isnan(value)]
        return Spread(mean=sum(known) / len(known), least=min(known), most=max(known)) if known else None

    def of_layer(stack: str, layer: int | None, vectors: TaskVectors) -> LayerInterference:
        return LayerInterference(
            layer=layer,
            stack=stack,
            cosine=spread(vectors.cosines),
            sign_conflicts=spread(vectors.conflicts),
        )

    in_order = sorted(found.layers, key=lambda at: (at[1] is None, at[0] == DECODER, at[1] or 0))
    whole = found.whole
    pairs = list(
        zip(combinations(names, 2), found.of_pairs(whole.cosines), found.of_pairs(whole.conflicts), strict=True)
    )
    return InterferenceReport(
        share_read=found.values / found.of,
        layers=[of_layer(*at, found.layers[at]) for at in in_order],
        pairs=[
            PairInterference(models=models, cosine=cosine, sign_conflicts=conflicts)
            for models, cosine, conflicts in pairs[:MOST_PAIRS]
        ],
        pairs_in_all=len(pairs),
    )


def _construction(spec: MergeSpec, plan: MergePlan) -> Construction:
    groups: dict[tuple[str, str | None, bool, bool], list[PlannedTensor]] = {}
    follows_nodes = any(method.scoring for method in spec.method.methods)
    for tensor in plan.backbone:
        slot = tensor.slot
        owner = ", ".join(kind.name for kind in slot.owner.kinds) if slot.owner and follows_nodes else None
        key = (str(slot.kind), owner, slot.layer is None, tensor.is_copied)
        groups.setdefault(key, []).append(tensor)
    vocabulary = plan.vocabulary
    return Construction(
        groups=[
            TensorGroup(
                kind=kind.replace("_", " "),
                owner=owner,
                outside_layers=outside,
                copied=copied,
                tensors=len(tensors),
                values=sum(math.prod(tensor.shape) for tensor in tensors),
                dtypes=sorted({dtype_name(tensor.dtype) for tensor in tensors}),
            )
            for (kind, owner, outside, copied), tensors in groups.items()
        ],
        heads="merged" if plan.merges_heads else "aligned" if spec.aligns else "kept",
        dtype=dtype_name(plan.dtype),
        vocabulary=None
        if vocabulary is None
        else VocabularyReport(
            owner=vocabulary.owner.source,
            rows=vocabulary.rows,
            tokens=vocabulary.tokens,
            new=len(vocabulary.new),
            shared=dict(zip([model.name for model in spec.models], vocabulary.shared, strict=True)),
        ),
        bytes_read=plan.bytes_to_read,
        bytes_written=plan.bytes_to_write,
    )


def dtype_name(name: str) -> str:
    """Return a data type's name as PyTorch spells it."""
    return DTYPES.get(name, name.lower())
