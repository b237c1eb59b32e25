"""Plans a result that is put together from slices: layers of models become layers of the result."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from worker.engine.catalog.checkpoints.config_differences import check_architectures, check_configs
from worker.engine.catalog.checkpoints.identity import Identity
from worker.engine.catalog.checkpoints.info import CheckpointInfo, TensorInfo
from worker.engine.catalog.checkpoints.layer_settings import keys_of_layers, lists_of_layers, stacked_config
from worker.engine.catalog.checkpoints.limits import MAX_TENSORS
from worker.engine.catalog.checkpoints.settings import check_settings
from worker.engine.catalog.checkpoints.tensor_names import (
    is_before_layers,
    is_buffer,
    layer_of,
    place_of,
    slot_of,
    stacks_of,
    tensors_by_name,
)
from worker.engine.catalog.checkpoints.tied import without_copies
from worker.engine.catalog.checkpoints.token_tensors import check_names_tell_tokens, token_keys
from worker.engine.catalog.checkpoints.vocabulary import Vocabulary
from worker.engine.catalog.checkpoints.weights import LAYER_COUNTS, LAYER_KINDS, check_checkpoint, layer_count
from worker.engine.catalog.planning.comparing import (
    MergeSettings,
    check_vocabulary,
    doubts_of_heads,
    notes_of_settings,
    with_settings_of,
)
from worker.engine.catalog.planning.plan import MergePlan, PlannedTensor
from worker.engine.catalog.planning.tensors import merged_tensor
from worker.engine.catalog.primitives.errors import IncompatibleCheckpoints, InvalidCheckpoint, InvalidRequest
from worker.engine.catalog.primitives.slices import OutputSlice
from worker.engine.catalog.primitives.values import TensorPlace

_Shapes = frozenset[tuple[str, tuple[int, ...]]]
"""Shapes of a layer's tensors, with their names within it."""
SAME_VOCABULARY = (
    "the slices' models need one vocabulary; output.vocabulary 'base' or 'union' merges them token by token"
)


@dataclass(frozen=True)
class _Layer:
    """One layer of the result: its models, and the layer of each of them and of the base."""

    members: tuple[int, ...]
    numbers: tuple[int, ...]
    of_base: int


def plan_slices(
    slices: Sequence[OutputSlice],
    names: Sequence[str],
    identities: Sequence[Identity],
    asked: MergeSettings,
    scale: Callable[[TensorPlace], float] | None = None,
) -> MergePlan:
    """Lay out the model whose layers are those of the slices.

    Tensors before the layers are merged from the first slice's models, and tensors after them from the last slice's.

    Args:
        names: names of the checkpoints in slices.
        identities: the checkpoints with their classes.
        scale: factor of each tensor, if tensors are copied from the one model of each slice; otherwise they are merged.
        asked: settings of the merge. If they name no configuration, that of the first slice's first model is
            published, and models that differ in settings that no shape shows are refused. Settings of layers are each
            layer's own.

    Raises:
        InvalidRequest: a slice names layers that its model does not have.
        InvalidCheckpoint: an architecture's layers are not one list, or a setting cannot be combined.
        IncompatibleCheckpoints: a tensor or setting differs; the message names it and both values.
    """
    base, config_from = asked.base, asked.config_from
    checkpoints = [identity.info for identity in identities]
    first_index = names.index(slices[0].sources[0].model)
    first = checkpoints[first_index]
    everyone = [*checkpoints, *([base] if base else ())]
    states, differing = [], set[str]()
    if base is not None and config_from is base:
        check_settings(base)
    for info in everyone:
        differing |= {*_differences(first, info, asked)}
        states.append(tensors_by_name(info, first))
    aligned = replace(asked, rows_of=base or first).aligned(checkpoints)
    order = [first_index, *(index for index in range(len(states)) if index != first_index)]
    kept, tied = without_copies(identities[first_index], [states[index] for index in order], len(checkpoints))
    states = [kept[order.index(index)] for index in range(len(states))]
    stack = _only_stack(first, states[first_index], merges=scale is None)
    field = "slices" if scale is None else "method.slices"
    layers = _layers(slices, names, checkpoints, base, states, stack, field)
    backbone = _Backbone(identities, states, stack, len(layers), scale, asked, aligned)
    backbone.add_outer(layers[0], before=True)
    # Some architectures alternate between layers of different kinds.
    known = {_shapes(layer) for layer in backbone.inner[first_index].values()}
    for number, layer in enumerate(layers):
        _check_shapes(layer, first, known, backbone)
        backbone.add_layer(number, layer)
    backbone.add_outer(layers[-1], before=False)
    if len(backbone.planned) > MAX_TENSORS:
        raise InvalidRequest(f"the result would have {len(backbone.planned)} tensors; {MAX_TENSORS} are allowed")
    config = stacked_config(first, [(layer.members[0], layer.numbers[0]) for layer in layers], checkpoints)
    for layer in layers:
        _check_kinds(layer, checkpoints)
    of_layers = {*keys_of_layers(first.config), *(keys_of_layers(config_from.config) if config_from else ())}
    published = with_settings_of(replace(first, config=config), config_from, of_layers)
    nothing = tuple(None for _ in checkpoints)
    last = [checkpoints[names.index(source.model)] for source in slices[-1].sources]
    notes = [*doubts_of_heads(last), *notes_of_settings(everyone, differing, config_from)]
    return MergePlan(
        None,
        tuple(checkpoints),
        base,
        nothing,
        tuple(backbone.planned),
        ((),),
        (published,),
        tuple(tied),
        aligned,
        config_from,
        notes=tuple(notes),
    )


class _Backbone:
    """The result's tensors, planned one after another.

    Args:
        states: tensors of every checkpoint by the first one's names; those of the base come last if there is one.
        layers: number of the result's layers, which are a list of the name `stack`.
        aligned: rows of the result's tokens in the models.
    """

    def __init__(
        self,
        identities: Sequence[Identity],
        states: Sequence[Mapping[str, TensorInfo]],
        stack: str,
        layers: int,
        scale: Callable[[TensorPlace], float] | None,
        asked: MergeSettings,
        aligned: Vocabulary | None,
    ) -> None:
        self.planned: list[PlannedTensor] = []
        self.checkpoints = [identity.info for identity in identities]
        self._architecture = identities[0].known  # all are of one
        self.inner = [_by_layer(state) for state in states]
        """Tensors of every checkpoint by layer, see `_by_layer`."""
        self._states, self._stack, self._stacks = states, stack, {stack: layers}
        self._scale, self._asked, self._aligned = scale, asked, aligned

    def add_outer(self, layer: _Layer, *, before: bool) -> None:
        """Add the tensors before or after all layers, of this layer's models."""
        tensors = [self._states[member] for member in layer.members]
        if self._asked.base is not None:
            tensors.append(self._states[-1])
        for name in tensors[0]:
            if layer_of(name) is None and is_before_layers(name, self._architecture) is before:
                self._add(name, layer.members, tensors, name)

    def add_layer(self, number: int, layer: _Layer) -> None:
        """Add the result's layer of this number."""
        tensors = self.tensors_of(layer)
        if self._asked.base is not None:
            tensors.append(self.inner[-1].get(layer.of_base, {}))
        for key in tensors[0]:
            self._add(f"{self._stack}.{number}.{key}", layer.members, tensors, key)

    def tensors_of(self, layer: _Layer) -> list[Mapping[str, TensorInfo]]:
        """Return the tensors of each model's layer."""
        return [self.inner[member].get(of, {}) for member, of in zip(layer.members, layer.numbers, strict=True)]

    def _add(self, name: str, members: Sequence[int], tensors: Sequence[Mapping[str, TensorInfo]], key: str) -> None:
        """Add the tensor `key` of each member and of the base, which comes last in `tensors` if there is one."""
        slot, place = slot_of(name), place_of(name, self._stacks, self._architecture)
        tensor, base = tensors[0][key], self._asked.base
        if is_buffer(tensor, self._architecture):
            copied = PlannedTensor(slot, place, tensor.shape, tensor.dtype, (tensor,), is_copied=True)
            self.planned.append(replace(copied, members=(members[0],)))
            return
        infos = [self.checkpoints[member] for member in members]
        origin = (base, tensors[len(members)].get(key)) if base is not None else None
        dtype = self._asked.dtype
        planned = merged_tensor(slot, place, infos, tensors[: len(members)], key, origin, dtype, self._aligned)
        rows = None if planned.token_rows is None else planned.token_rows.of(members)
        is_copied = self._scale is not None and self._scale(place) == 1 and rows is None
        self.planned.append(replace(planned, token_rows=rows, members=tuple(members), is_copied=is_copied))


def _differences(first: CheckpointInfo, info: CheckpointInfo, asked: MergeSettings) -> list[str]:
    """Return the settings in which a checkpoint differs from the first. Raises where they cannot be combined."""
    check_architectures(first, info)
    check_checkpoint(info)
    besides = {*keys_of_layers(first.config), *keys_of_layers(info.config)}
    if asked.vocabulary != "error":
        check_names_tell_tokens(info)
        besides |= {*token_keys(first.config), *token_keys(info.config)}
    elif first.vocabulary and info.vocabulary:
        check_vocabulary(first, info, SAME_VOCABULARY)
    return check_configs(first, info, besides, settles=asked.config_from is not None)


def _check_shapes(layer: _Layer, first: CheckpointInfo, known: Collection[_Shapes], backbone: _Backbone) -> None:
    """Raise IncompatibleCheckpoints where the models' layers differ, or are like no layer of the first model."""
    tensors, sources = backbone.tensors_of(layer), [backbone.checkpoints[member].source for member in layer.members]
    for source, of, found in zip(sources, layer.numbers, tensors, strict=True):
        if _shapes(found) not in known:
            problem = f"layer {of} of the second has other tensors or shapes than any layer of the first"
            raise IncompatibleCheckpoints(first.source, source, problem)
        if _shapes(found) != _shapes(tensors[0]):
            problem = f"layer {layer.numbers[0]} of the first has other tensors or shapes than layer {of} of the second"
            raise IncompatibleCheckpoints(sources[0], source, problem)


def layers_of_models(plan: MergePlan) -> list[int]:
    """Return the number of layers of each model of a stack, whichever of them the result has."""
    first = plan.checkpoints[0]
    stacks = [stacks_of(tensors_by_name(info, first)) for info in plan.checkpoints]
    return [max(counts.values(), default=0) for counts in stacks]


def copied_shares(plan: MergePlan) -> list[float]:
    """Return each model's share of the result's bytes; models with the same checkpoint share equally."""
    given: Counter[str] = Counter()
    for tensor in plan.backbone:
        given[tensor.sources[0].source] += tensor.nbytes
    models = Counter(info.source for info in plan.checkpoints)
    return [given[info.source] / given.total() / models[info.source] for info in plan.checkpoints]


def _only_stack(info: CheckpointInfo, state: Mapping[str, TensorInfo], *, merges: bool) -> str:
    stacks = stacks_of(state)
    if len(stacks) != 1:
        found = f"{len(stacks)} lists of layers ({', '.join(sorted(stacks))})" if stacks else "no list of layers"
        advice = "; leave slices out to merge it whole" if merges else ""
        raise InvalidCheckpoint(info.source, f"slices are of one list of layers, and it has {found}{advice}")
    if layer_count(info.config) is None:
        keys = (*LAYER_COUNTS, *LAYER_KINDS)
        raise InvalidCheckpoint(info.source, f"config.json says the number of layers by none of {keys}")
    return next(iter(stacks))


def _layers(
    slices: Sequence[OutputSlice],
    names: Sequence[str],
    checkpoints: Sequence[CheckpointInfo],
    base: CheckpointInfo | None,
    states: Sequence[Mapping[str, TensorInfo]],
    stack: str,
    field: str,
) -> list[_Layer]:
    """Return the layers of the result."""
    counts = [stacks_of(state).get(stack, 0) for state in states]
    found: list[_Layer] = []
    for index, part in enumerate(slices):
        members = tuple(names.index(source.model) for source in part.sources)
        layers = [s.layers or (0, counts[m]) for m, s in zip(members, part.sources, strict=True)]
        of_base = part.base_layers or layers[0]
        runs = [(checkpoints[m].source, counts[m], run) for m, run in zip(members, layers, strict=True)]
        if base is not None:
            runs.append((base.source, counts[-1], of_base))
        for source, count, (start, stop) in runs:
            if stop > count:
                problem = f"{source} has {count} layers, [{start}, {stop}] are not all there"
                raise InvalidRequest(problem, field=f"{field}.{index}")
            if stop - start != layers[0][1] - layers[0][0]:
                problem = (
                    f"the slice has {stop - start} layers of {source}, and {layers[0][1] - layers[0][0]} of the first"
                )
                raise InvalidRequest(problem, field=f"{field}.{index}")
        found += [
            _Layer(members, tuple(start + offset for start, _ in layers), of_base[0] + offset)
            for offset in range(layers[0][1] - layers[0][0])
        ]
    return found


def _check_kinds(layer: _Layer, checkpoints: Sequence[CheckpointInfo]) -> None:
    """Check that configurations say the same about all layers that are merged to one."""
    first = checkpoints[layer.members[0]]
    for member, number in zip(layer.members[1:], layer.numbers[1:], strict=True):
        other = checkpoints[member]
        for key in lists_of_layers(first.config):
            ours, theirs = first.config[key], other.config.get(key)
            if theirs is None or number >= len(theirs) or ours[layer.numbers[0]] != theirs[number]:
                problem = f"{key} in config.json differs between layer {layer.numbers[0]} and layer {number}"
                raise IncompatibleCheckpoints(first.source, other.source, problem)


def _by_layer(state: Mapping[str, TensorInfo]) -> dict[int, dict[str, TensorInfo]]:
    """Return the tensors of every layer, by its number and the part of their names within it."""
    found: dict[int, dict[str, TensorInfo]] = {}
    for name, tensor in state.items():
        layer = layer_of(name)
        if layer is not None:
            found.setdefault(layer.number, {})[layer.inner] = tensor
    return found


def _shapes(layer: Mapping[str, TensorInfo]) -> _Shapes:
    return frozenset((inner, tensor.shape) for inner, tensor in layer.items() if not is_buffer(tensor))
