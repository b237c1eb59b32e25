"""F1 of entities, which are runs of words, as the CoNLL-2000 and 2003 shared tasks count them (conlleval, seqeval).

An entity is found if its type, its first word and its last word are right. A word begins an entity if its label says
so, or if the word before it is in no entity, in one of another type, or the last of its own.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from worker.engine.catalog.tasks import TokenClassification
from worker.engine.tasks.metrics import Array, ResampledMetric, ratio

FIRST, LAST = "BSU", "ESLU"  # letters of labels of an entity's first word, and of its last


def entity_f1(task: TokenClassification, labels: Array, predictions: Array) -> float:
    """Compute F1 of all entities.

    Args:
        labels: (words, 2): each word's label, and whether the word is its row's first.
        predictions: (words,).
    """
    return float(resampled_entity_f1(task, labels, [predictions])(np.ones((len(labels), 1)))[0, 0])


def is_any_entity(task: TokenClassification, labels: Array) -> bool:
    """Return whether there is an entity among the words; see `entity_f1`."""
    return bool(np.isin(labels[:, 0], list(task.parts_of_entities)).any())


def resampled_entity_f1(task: TokenClassification, labels: Array, predictions: Sequence[Array]) -> ResampledMetric:
    """Return F1 of each prediction, from entities that are counted at their first words, see `entity_f1`."""
    own, starts_row = labels[:, 0].astype(int), labels[:, 1].astype(bool)
    wanted = _entities(task, own, starts_row)
    found = [_entities(task, one.astype(int), starts_row) for one in predictions]
    hits = [(one == wanted).all(1) & (wanted[:, 0] > 0) for one in found]
    wanted_at = (wanted[:, 0] > 0).astype(float)
    found_at = [(one[:, 0] > 0).astype(float) for one in found]

    def values(counts: Array) -> Array:
        of_labels = wanted_at @ counts
        return np.stack(
            [ratio(2 * hit @ counts, at @ counts + of_labels) for hit, at in zip(hits, found_at, strict=True)]
        )

    return values


def _entities(task: TokenClassification, labels: NDArray[np.int_], starts_row: NDArray[np.bool_]) -> NDArray[np.int_]:
    """Return (words, 2): at the first word of an entity its type, from 1, and the place of its last word; else 0."""
    parts = task.parts_of_entities
    types = {name: number for number, name in enumerate(sorted({name for _, name in parts.values()}), start=1)}
    type_of, first, last = (np.zeros(task.outputs, dtype=int) for _ in range(3))
    for label, (part, name) in parts.items():
        type_of[label], first[label], last[label] = types[name], part in FIRST, part in LAST
    of_word = type_of[labels]
    before = np.roll(of_word, 1)
    is_new = starts_row | (before != of_word) | np.roll(last[labels], 1).astype(bool) | first[labels].astype(bool)
    begins = (of_word > 0) & is_new
    # A run ends where the next word is in no entity, or begins one, or a row.
    ends = np.append((is_new | (of_word == 0))[1:], True)
    places = np.where(ends, np.arange(len(labels)), len(labels))
    end = np.minimum.accumulate(places[::-1])[::-1]
    return np.stack([np.where(begins, of_word, 0), np.where(begins, end, 0)], axis=1)
