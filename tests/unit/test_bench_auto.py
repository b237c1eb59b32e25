"""bench/auto.py: what its targets make of given results."""

from bench.auto import Outcome, rows
from tests.reports import invented_result
from worker.engine.catalog.contracts.report import Difference


def outcome(tasks: str, mean: float, ahead_of_others: float) -> Outcome:
    """The first line is the chosen one; of the others each keeps .5, and lies so far behind, by .01 more or less."""
    result = invented_result(list(tasks))
    assert result.candidates is not None
    behind = Difference(value=ahead_of_others, interval=(ahead_of_others - 0.01, ahead_of_others + 0.01))
    chosen, *others = result.candidates
    lines = [chosen.model_copy(update={"mean_retention": mean})]
    lines += [line.model_copy(update={"mean_retention": 0.5, "behind": behind}) for line in others]
    return Outcome(tuple(tasks), result.model_copy(update={"candidates": lines}), seconds=300.5)


def test_means_are_over_combinations_of_a_size_and_against_the_best_other_candidate() -> None:
    found = rows([outcome("ab", 1.0, 0.1), outcome("ac", 0.97, 0.1), outcome("abcde", 0.97, 0.1)], 5, None)
    assert [(row["ours"], row["reference"], row["met"]) for row in found] == [
        (0.985, 0.5, False),
        (0.97, 0.5, True),
        (0, 3, True),
    ]


def test_a_candidate_that_is_better_beyond_chance_is_counted() -> None:
    worse, equal = outcome("ab", 1.0, -0.011), outcome("ac", 1.0, -0.009)
    assert [o.is_behind for o in (worse, equal)] == [True, False]
    [_, beaten] = rows([worse, equal], 5, None)
    assert (beaten["ours"], beaten["reference"], beaten["met"]) == (1, 2, False)


def test_the_time_of_a_search_is_a_target() -> None:
    [row] = rows([], 5, outcome("abc", 1.0, 0.1))
    assert (row["ours"], row["reference"], row["met"]) == (300.5, 300.0, False)
