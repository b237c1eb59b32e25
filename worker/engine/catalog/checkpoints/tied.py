"""Handles tensors that a model has once and a checkpoint may store under several names."""

from collections.abc import Mapping, Sequence

from worker.engine.catalog.checkpoints import layouts
from worker.engine.catalog.checkpoints.headers import TensorInfo
from worker.engine.catalog.checkpoints.identity import Identity, own_names
from worker.engine.catalog.checkpoints.layouts import OUTPUT_EMBEDDINGS, ends_with
from worker.engine.catalog.checkpoints.library import completed, ties

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
    own = own_names(first.known, [name])[name]
    for copy, original in ties(first.known, completed(base_config)):
        if copy == own and original in by_own:
            return state[by_own[original]]
    return None


def _groups(first: Identity, states: Sequence[State], models: int) -> list[list[str]]:
    """Return groups of names of one tensor; the name that it keeps comes first."""
    config = completed(first.info.config)
    if first.known is None or first.known.converted:
        by_original: dict[str, list[str]] = {}
        for copy, original in layouts.tied_copies(config, states).items():
            by_original.setdefault(original, [original]).append(copy)
        return list(by_original.values())
    named = _by_own(first, states)
    originals = dict(ties(first.known, config))
    unties_output = config.get("tie_word_embeddings") is False or config.get("scale_decoder_outputs") is False
    members: dict[str, list[str]] = {}
    for copy, original in originals.items():
        if unties_output and ends_with(copy, OUTPUT_EMBEDDINGS) and all(named.get(copy) in s for s in states[:models]):
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
    names = dict.fromkeys(name for state in states for name in state)
    return {own: name for name, own in own_names(first.known, names).items()}
