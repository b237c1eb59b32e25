"""Handles tensors that a model has once and a checkpoint may store under several names."""

from collections.abc import Mapping, Sequence
from typing import Any

from worker.engine.catalog.checkpoints.identity import Identity
from worker.engine.catalog.checkpoints.info import TensorInfo
from worker.engine.catalog.checkpoints.library import completed, ties
from worker.engine.catalog.checkpoints.tensor_names import (
    EMBEDDINGS,
    OUTPUT_EMBEDDINGS,
    SHARED_EMBEDDINGS,
    ends_with,
    layer_of,
    own_name,
)
from worker.engine.catalog.checkpoints.weights import ties_embeddings

TIED_BIASES = {"cls.predictions.decoder.bias": "cls.predictions.bias", "lm_head.decoder.bias": "lm_head.bias"}
State = Mapping[str, TensorInfo]
Pair = tuple[TensorInfo, TensorInfo]


def without_copies(
    first: Identity, states: Sequence[State], models: int
) -> tuple[list[dict[str, TensorInfo]], list[Pair]]:
    """Leave out stored copies of tied tensors, so that each tensor has one name in every checkpoint.

    Args:
        first: the identity whose class and configuration say which tensors are tied.
        states: the tensors of every checkpoint, by the names of the first.
        models: number of checkpoints that are merged; the base follows them.

    Returns:
        The tensors of each checkpoint, and pairs: each copy that is left out with its original, which must equal it.
    """
    groups = _groups(first, states, models)
    found, pairs = [], []
    for state in states:
        own = dict(state)
        for kept, *copies in groups:
            for name in copies:
                copy = own.pop(name, None)
                if copy is None:
                    continue
                if kept in own:
                    pairs.append((copy, own[kept]))
                else:
                    own[kept] = copy
        found.append(own)
    return found, pairs


def tied_in_base(first: Identity, name: str, base_config: Mapping[str, object], state: State) -> TensorInfo | None:
    """Return the tensor that a base ties `name` to, if the models have it separately."""
    if first.known is None:
        return None
    by_own = _by_own(first, [state])
    own = own_name(first.known, name)
    for copy, original in ties(first.known, completed(base_config)):
        if copy == own and original in by_own:
            return state[by_own[original]]
    return None


def _groups(first: Identity, states: Sequence[State], models: int) -> list[list[str]]:
    """Return groups of names of one tensor; the name that it keeps comes first."""
    config = completed(first.info.config)
    if first.known is None:
        by_original: dict[str, list[str]] = {}
        for copy, original in _copies_by_name(config, states).items():
            by_original.setdefault(original, [original]).append(copy)
        return list(by_original.values())
    named = _by_own(first, states)
    originals = dict(ties(first.known, config))
    unties_output = config.get("tie_word_embeddings") is False or config.get("scale_decoder_outputs") is False
    members: dict[str, list[str]] = {}
    for copy, original in originals.items():
        if unties_output and copy == first.known.output and all(named.get(copy) in s for s in states[:models]):
            continue  # T5 1.1's class says that both are one, but its checkpoints have two
        while original in originals:
            original = originals[original]
        members.setdefault(original, [original]).append(copy)
    groups = []
    for group in members.values():
        there = [named[own] for own in group if own in named]
        if len(there) > 1:
            groups.append(sorted(there, key=lambda name: name not in states[0]))
    return groups


def _by_own(first: Identity, states: Sequence[State]) -> dict[str, str]:
    """Return the name of each tensor in the states, by the name that the class gives it."""
    if first.known is None:
        return {name: name for state in states for name in state}
    names = dict.fromkeys(name for state in states for name in state if layer_of(name) is None)
    return {own_name(first.known, name): name for name in names}


def _copies_by_name(config: Mapping[str, Any], states: Sequence[Mapping[str, TensorInfo]]) -> dict[str, str]:
    """Return the names of tensors that are second copies, each with its original, by the names of an unknown class.

    `tie_word_embeddings` decides, whether a checkpoint stores the copy or not. If a configuration lacks that key, they
    are tied if not all of `states` store the copy.

    Args:
        states: the tensors of every checkpoint, by the names of the first.
    """
    embeddings = _Embeddings(states)
    tied = ties_embeddings(config)
    copies = {}
    for name in dict.fromkeys(name for state in states for name in state):
        if tied if tied is not None else not all(name in state for state in states):
            original = _original(name, states[0], embeddings)
        elif ends_with(name, SHARED_EMBEDDINGS):
            original = embeddings.like(name, EMBEDDINGS[:1])
        else:
            original = None
        if original is not None:
            copies[name] = original
    return copies


def _original(name: str, first: Mapping[str, TensorInfo], embeddings: "_Embeddings") -> str | None:
    if ends_with(name, SHARED_EMBEDDINGS):
        return embeddings.like(name, EMBEDDINGS[:1])
    if ends_with(name, OUTPUT_EMBEDDINGS):
        return embeddings.like(name, EMBEDDINGS)
    for copy, original in TIED_BIASES.items():
        if ends_with(name, (copy,)) and name.removesuffix(copy) + original in first:
            return name.removesuffix(copy) + original
    return None


class _Embeddings:
    """Embedding matrices of the first of `states`, found by their shapes: a header may name any number of them."""

    def __init__(self, states: Sequence[Mapping[str, TensorInfo]]) -> None:
        self._states = states
        self._outer: list[str] | None = None
        self._by_shapes: dict[tuple[str, tuple[int, ...]], dict[tuple[tuple[int, ...], ...], str]] = {}

    def like(self, name: str, endings: Sequence[str]) -> str | None:
        """Return the first matrix that has the shape of `name` wherever `name` is stored; None where there is none."""
        storing = tuple(index for index, state in enumerate(self._states) if name in state)
        shapes = tuple(self._states[index][name].shape for index in storing)
        found = (self._named(ending, storing).get(shapes) for ending in endings)
        return next((other for other in found if other not in (None, name)), None)

    def _named(self, ending: str, storing: tuple[int, ...]) -> dict[tuple[tuple[int, ...], ...], str]:
        """Return the tensors whose names end so, by their shapes in the states at `storing`."""
        if (ending, storing) not in self._by_shapes:
            first = self._states[0]
            if self._outer is None:
                self._outer = [name for name in first if ends_with(name, EMBEDDINGS) and layer_of(name) is None]
            by_shapes: dict[tuple[tuple[int, ...], ...], str] = {}
            for name in self._outer:
                if ends_with(name, (ending,)):
                    shapes = tuple(self._states[index].get(name, first[name]).shape for index in storing)
                    by_shapes.setdefault(shapes, name)
            self._by_shapes[ending, storing] = by_shapes
        return self._by_shapes[ending, storing]
