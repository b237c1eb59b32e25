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


def expected_entity_f1(task: TokenClassification, labels: Array, probabilities: Array) -> float:
    """Compute F1 from the expected numbers of entities that are found, and that are found rightly.

    Words have their labels independently of each other. Then a word goes on with the entity of the word before it by
    the two words' labels alone, and an entity's probability is a product along its words.

    Args:
        labels: (words, 2), see `entity_f1`.
        probabilities: (words, labels): of each word's label.
    """
    parts = task.parts_of_entities
    own, starts_row = labels[:, 0].astype(int), labels[:, 1].astype(bool)
    wanted = _entities(task, own, starts_row)
    found = right = 0.0
    for number, name in enumerate(sorted({name for _, name in parts.values()}), start=1):
        of = {
            kind: probabilities[:, [k for k, (part, of) in parts.items() if of == name and _kind(part) == kind]].sum(1)
            for kind in ((True, True), (True, False), (False, True), (False, False))
        }
        first, inner = of[True, True] + of[True, False], of[False, True] + of[False, False]
        stays_open = np.append(0.0, (of[True, False] + of[False, False])[:-1])  # after the word before
        is_open = np.where(starts_row, 0.0, stays_open)
        goes_on = np.append(np.where(starts_row, 0.0, inner)[1:], 0.0)  # to the next word
        found += float((first + inner * (1 - is_open)).sum())
        for begin in np.flatnonzero(wanted[:, 0] == number):
            new = 1 - is_open[begin]  # the probability that a label that is no first one begins an entity here
            opened = of[True, False][begin] + of[False, False][begin] * new
            closed = of[True, True][begin] + of[False, True][begin] * new
            for word in range(begin + 1, wanted[begin, 1] + 1):
                opened, closed = opened * of[False, False][word], opened * of[False, True][word]
            right += float(closed + opened * (1 - goes_on[wanted[begin, 1]]))
    entities = found + np.count_nonzero(wanted[:, 0])
    return 2 * right / entities if entities else 0.0


def _kind(part: str) -> tuple[bool, bool]:
    """Return whether a part is of an entity's first word, and of its last."""
    return part in FIRST, part in LAST


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
