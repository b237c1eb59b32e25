"""The plan of `passthrough`: which layer of which model becomes which layer of the result."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from worker.engine.catalog import layouts
from worker.engine.catalog.errors import IncompatibleCheckpoints, InvalidCheckpoint, InvalidRequest
from worker.engine.catalog.headers import MAX_TENSORS, CheckpointInfo, TensorInfo
from worker.engine.catalog.layouts import HARMLESS, LAYER_COUNTS
from worker.engine.catalog.methods import BaseParameters, PassthroughParameters
from worker.engine.catalog.methods.passthrough import Slice
from worker.engine.catalog.planning import MergePlan, PlannedTensor, check_vocabulary, output_dtype, plan_merge
from worker.engine.catalog.publishing import with_companions
from worker.engine.catalog.spec import Dtype, Heads, VocabularyPolicy

ONE_VOCABULARY = "method passthrough copies layers and merges no rows, so its models need one vocabulary"
Source = tuple[int, int]
"""A checkpoint, by its position, and the number of one of its layers."""


def plan_job(
    method: BaseParameters,
    names: Sequence[str],
    checkpoints: Sequence[CheckpointInfo],
    dtype: Dtype,
    base: CheckpointInfo | None = None,
    heads: Heads | None = None,
    vocabulary: VocabularyPolicy = "error",
) -> MergePlan:
    """The plan of a merge by any method. See `plan_merge` and `plan_stack`."""
    if isinstance(method, PassthroughParameters):
        if heads == "per_model":
            raise InvalidRequest("method passthrough makes one model with one head", field="output.heads")
        if vocabulary != "error":
            problem = f"{ONE_VOCABULARY}; leave output.vocabulary out"
            raise InvalidRequest(problem, field="output.vocabulary")
        plan = plan_stack(method.slices, names, checkpoints, dtype)
        return with_companions(plan, dtype, last=checkpoints[names.index(method.slices[-1].model)])
    return with_companions(plan_merge(checkpoints, dtype, base, heads, vocabulary), dtype)


def plan_stack(
    slices: Sequence[Slice], names: Sequence[str], checkpoints: Sequence[CheckpointInfo], dtype: Dtype
) -> MergePlan:
    """Lay out the model whose layers are those of the slices.

    Args:
        names: of the checkpoints, as slices name them.

    Raises:
        InvalidRequest: a slice has layers that its model has not.
        InvalidCheckpoint: an architecture whose layers are not one list.
        IncompatibleCheckpoints: names the tensor or setting that differs, with both values.
    """
    order = [names.index(part.model) for part in slices]
    first = checkpoints[order[0]]
    states = []
    for info in checkpoints:
        layouts.check_architectures(first, info)
        layouts.check_checkpoint(info)
        layouts.check_configs(first, info, {*keys_of_layers(first.config), *keys_of_layers(info.config)})
        if first.vocabulary and info.vocabulary:
            check_vocabulary(first, info, ONE_VOCABULARY)
        states.append(layouts.tensors_by_name(info, first))
    copies = layouts.tied_copies(first.config, [states[order[0]], *states])
    tied = tuple(
        (state[copy], state[of]) for state in states for copy, of in copies.items() if {copy, of} <= set(state)
    )
    states = [{name: tensor for name, tensor in state.items() if name not in copies} for state in states]
    stack = _only_stack(first, states[order[0]])
    sources = _sources(slices, order, checkpoints, states, stack)
    layers = [_layers(state) for state in states]
    # Some architectures alternate between layers of different kinds.
    known = {_shapes(layer) for layer in layers[order[0]].values()}
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in states[order[0]].items():
        if layouts.layer_of(name) is None and layouts.is_before_layers(name):
            tensors[name] = tensor
    for number, (model, of) in enumerate(sources):
        layer = layers[model].get(of, {})
        if _shapes(layer) not in known:
            problem = f"layer {of} of the second has other tensors or shapes than any layer of the first"
            raise IncompatibleCheckpoints(first.source, checkpoints[model].source, problem)
        tensors |= {f"{stack}.{number}.{inner}": tensor for inner, tensor in layer.items()}
    for name, tensor in states[order[-1]].items():
        if layouts.layer_of(name) is None and not layouts.is_before_layers(name):
            tensors[name] = tensor
    if len(tensors) > MAX_TENSORS:
        raise InvalidRequest(f"the result would have {len(tensors)} tensors; {MAX_TENSORS} are allowed")
    stacks = {stack: len(sources)}
    backbone = tuple(
        PlannedTensor(
            layouts.slot_of(name),
            layouts.place_of(name, stacks),
            tensor.shape,
            tensor.dtype if layouts.is_buffer(tensor) else output_dtype([tensor], dtype),
            (tensor,),
            is_copied=True,
        )
        for name, tensor in tensors.items()
    )
    config = _stacked_config(first, sources, checkpoints)
    published = replace(first, config=config)
    nothing = tuple(None for _ in checkpoints)
    return MergePlan(None, tuple(checkpoints), None, nothing, backbone, ((),), (published,), tied)


def keys_of_layers(config: Mapping[str, Any]) -> list[str]:
    """Keys of a configuration that follow from the number of layers, or say something of each."""
    return [*LAYER_COUNTS, *_lists_of_layers(config)]


def layers_of_models(plan: MergePlan) -> list[int]:
    """How many layers each model of a stack has, whatever of them the result has."""
    first = plan.checkpoints[0]
    stacks = [layouts.stacks_of(layouts.tensors_by_name(info, first)) for info in plan.checkpoints]
    return [max(counts.values(), default=0) for counts in stacks]


def copied_shares(plan: MergePlan) -> list[float]:
    """The part of the result's bytes that each model gives; models of the same checkpoint have equal parts of its."""
    given: Counter[str] = Counter()
    for tensor in plan.backbone:
        given[tensor.sources[0].source] += tensor.nbytes
    models = Counter(info.source for info in plan.checkpoints)
    return [given[info.source] / given.total() / models[info.source] for info in plan.checkpoints]


def _only_stack(info: CheckpointInfo, state: Mapping[str, TensorInfo]) -> str:
    stacks = layouts.stacks_of(state)
    if len(stacks) != 1:
        found = f"{len(stacks)} lists of layers ({', '.join(sorted(stacks))})" if stacks else "no list of layers"
        raise InvalidCheckpoint(info.source, f"passthrough stacks the layers of one list, and there are {found}")
    if not any(key in info.config for key in LAYER_COUNTS):
        raise InvalidCheckpoint(info.source, f"config.json says the number of layers by none of {LAYER_COUNTS}")
    return next(iter(stacks))


def _sources(
    slices: Sequence[Slice],
    order: Sequence[int],
    checkpoints: Sequence[CheckpointInfo],
    states: Sequence[Mapping[str, TensorInfo]],
    stack: str,
) -> list[Source]:
    found: list[Source] = []
    for index, (part, model) in enumerate(zip(slices, order, strict=True)):
        count = layouts.stacks_of(states[model]).get(stack, 0)
        start, stop = part.layers
        if stop > count:
            problem = f"{checkpoints[model].source} has {count} layers, [{start}, {stop}] are not all there"
            raise InvalidRequest(problem, field=f"method.slices.{index}")
        found += [(model, number) for number in range(start, stop)]
    return found


def _layers(state: Mapping[str, TensorInfo]) -> dict[int, dict[str, TensorInfo]]:
    """Tensors of every layer, by its number and the part of their names within it."""
    found: dict[int, dict[str, TensorInfo]] = {}
    for name, tensor in state.items():
        layer = layouts.layer_of(name)
        if layer is not None:
            found.setdefault(layer.number, {})[layer.inner] = tensor
    return found


def _shapes(layer: Mapping[str, TensorInfo]) -> frozenset[tuple[str, tuple[int, ...]]]:
    return frozenset((inner, tensor.shape) for inner, tensor in layer.items() if not layouts.is_buffer(tensor))


def _lists_of_layers(config: Mapping[str, Any]) -> list[str]:
    """Keys whose values say something of every layer."""
    count = next((config[key] for key in LAYER_COUNTS if key in config), None)
    lists = {key: value for key, value in config.items() if isinstance(value, list) and key not in HARMLESS}
    return [key for key, value in lists.items() if len(value) == count]


def _stacked_config(
    first: CheckpointInfo, sources: Sequence[Source], checkpoints: Sequence[CheckpointInfo]
) -> dict[str, Any]:
    """With the new number of layers, and of lists over layers what the slices' models say of theirs."""
    stacked = dict(first.config)
    for key in LAYER_COUNTS:
        if key in stacked:
            stacked[key] = len(sources)
    for key in _lists_of_layers(first.config):
        stacked[key] = []
        for model, number in sources:
            said = checkpoints[model].config.get(key)
            if not isinstance(said, list) or number >= len(said):
                problem = f"{key} in config.json of the second says nothing of layer {number}"
                raise IncompatibleCheckpoints(first.source, checkpoints[model].source, problem)
            stacked[key].append(said[number])
    return stacked
