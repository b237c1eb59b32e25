"""The parts of a search: halves of rows, what is tried, and the journal of what was."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import optuna
import pytest
from pydantic import ValidationError

from tests.reports import invented_result
from tests.tiny import merge_spec, model_spec
from worker.engine.catalog.contracts.report import Candidate, CandidateMetric, Difference, mean_and_least
from worker.engine.catalog.contracts.spec import CheckpointSpec, MergeSpec, models_beside
from worker.engine.catalog.data.rows import Row
from worker.engine.catalog.methods import METHODS, AutoParameters, Choice, MethodParameters, default_candidates
from worker.engine.catalog.methods.auto import space_of, with_values
from worker.engine.catalog.primitives.errors import InvalidDataset, Place
from worker.engine.search.gate import verdict
from worker.engine.search.job import judged_notes
from worker.engine.search.journal import Journal, RungOutcome, TrialOutcome
from worker.engine.search.search import search
from worker.engine.search.space import Proposal, Space, unique
from worker.engine.search.splitting import halves

SEARCHED = [name for name in METHODS if name != "passthrough"]


def row(place: int, text: str, pair: str | None = None) -> Row:
    return Row(Place("line", place), text, pair, 0)


def auto(**given: Any) -> AutoParameters:
    return AutoParameters.model_validate({"candidates": ["average"], **given})


def job(method: AutoParameters, *, base: bool = False, weights: tuple[Any, ...] = (1.0, 2.0, 0.5)) -> MergeSpec:
    models = [model_spec(Path(f"/{name}"), weight=weight) for name, weight in zip("abc", weights, strict=True)]
    spec = merge_spec(Path("/out"), models, method.model_dump())
    return spec.model_copy(update={"base": CheckpointSpec(source="base") if base else None})


def proposals(space: Space, first: int | None = None, count: int = 1) -> list[Proposal]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    if first is not None:
        study.enqueue_trial(space.first(first))
    return [space.propose(study.ask()) for _ in range(count)]


# --- halves


def test_halves_have_every_row_once_and_are_as_large() -> None:
    rows = [row(place, f"text {place}") for place in range(101)]
    searched, held_out = halves(rows, 0, "rows")
    assert sorted(searched + held_out) == list(range(101))
    assert abs(len(searched) - len(held_out)) == 1
    assert searched == sorted(searched)
    assert halves(rows, 0, "rows") == (searched, held_out)
    assert halves(rows, 1, "rows") != (searched, held_out)


def test_rows_of_one_text_are_in_one_half() -> None:
    rows = [row(place, f"text {place % 7}", None if place % 2 else f"pair {place % 3}") for place in range(200)]
    halved = halves(rows, 0, "rows")
    texts = [{(rows[place].text, rows[place].text_pair) for place in half} for half in halved]
    assert not texts[0] & texts[1]
    assert all(texts)


def test_what_is_held_out_for_one_model_is_not_searched_on_for_another() -> None:
    """Two evaluations of the same texts in different orders, as those of other seeds."""
    texts = [f"text {place}" for place in range(100)]
    held_out = []
    for order in (texts, texts[::-1], sorted(texts)):
        _, held = halves([row(place, text) for place, text in enumerate(order)], 0, "rows")
        held_out.append({order[place] for place in held})
    assert held_out[0] == held_out[1] == held_out[2]


@pytest.mark.parametrize("counts", [[1, 1], [9, 1], [1, 9], [5, 1, 1, 1], [3, 3, 3], [1, 50, 1, 1, 7]])
def test_halves_differ_by_the_rows_of_one_text_at_most(counts: list[int]) -> None:
    rows = [row(0, f"text {number}") for number, count in enumerate(counts) for _ in range(count)]
    for seed in range(20):
        searched, held_out = halves(rows, seed, "rows")
        assert searched
        assert held_out
        assert abs(len(searched) - len(held_out)) <= max(counts)


def test_one_text_cannot_be_halved() -> None:
    with pytest.raises(InvalidDataset, match=r"rows: .*two different rows"):
        halves([row(0, "same"), row(1, "same")], 0, "rows")


# --- what is tried


@pytest.mark.parametrize("name", SEARCHED)
def test_a_candidates_first_trial_is_its_defaults(name: str) -> None:
    """Optuna takes a value out of its range without a word, but learns from none."""
    method = auto(candidates=[name])
    spec = job(method, base=True)
    [first] = proposals(Space(spec, method, aligns=True), first=0)
    defaults = METHODS[name].parameters.model_validate({"name": name})
    searched = space_of(defaults, has_base=True)
    for parameter, space in searched.items():
        value = getattr(defaults, parameter)
        assert value in space.values if isinstance(space, Choice) else space.low <= value <= space.high
        assert getattr(first.method, parameter) == value
    assert first.weights == (1.0, 2.0, 0.5)
    assert first.align_ridge == 0.1


@pytest.mark.parametrize("name", SEARCHED)
def test_whatever_is_proposed_of_a_method_suits_it(name: str) -> None:
    method = auto(candidates=[name])
    made = proposals(Space(job(method, base=True), method, aligns=True), count=50)
    assert all(proposal.method.name == name for proposal in made)
    for parameter, space in METHODS[name].search.items():
        values = {getattr(proposal.method, parameter) for proposal in made}
        assert len(values) == (len(space.values) if isinstance(space, Choice) else 50)


def test_what_a_candidate_gives_is_kept_and_what_the_job_gives_counts_for_all() -> None:
    method = auto(candidates=[{"name": "mask_fisher", "normalize": "model", "examples": 7}, "regmean"], examples=99)
    space = Space(job(method), method, aligns=False)
    for proposal in proposals(space, count=40):
        if proposal.candidate == 0:
            assert (proposal.method.model_dump()["normalize"], proposal.method.most_examples) == ("model", 7)
            assert "normalize" not in proposal.parameters
        else:
            assert proposal.method.most_examples == 99
        assert "align_ridge" not in proposal.parameters
        assert "scale" not in proposal.parameters
    [refitted, estimated] = auto(
        candidates=[{"name": "aligned_regmean", "start": "tsv_m"}, {"name": "regmean", "gram": "deltas"}], examples=99
    ).methods
    assert (refitted.most_examples, estimated.most_examples) == (99, 0)


def test_weights_are_around_the_recipes_and_the_first_is_as_it_is() -> None:
    method = auto()
    for _, two, half in (p.weights for p in proposals(Space(job(method), method, aligns=False), count=50)):
        assert isinstance(two, float)
        assert isinstance(half, float)
        assert 2 / 3 <= two <= 6
        assert 1 / 6 <= half <= 1.5
    [first] = proposals(Space(job(method), method, aligns=False))
    assert first.weights[0] == 1.0
    assert first.parameters == {"weight b": first.weights[1], "weight c": first.weights[2]}


@pytest.mark.parametrize("weights", [(0.0, 1.0, 2.0), (1.0, 0.0, 2.0)])
def test_a_model_that_takes_no_part_gets_no_weight(weights: tuple[float, ...]) -> None:
    method = auto()
    for proposal in proposals(Space(job(method, weights=weights), method, aligns=False), count=10):
        assert [weight == 0 for weight in proposal.weights] == [weight == 0 for weight in weights]
        assert "weight c" in proposal.parameters


def test_weights_by_tensor_are_kept() -> None:
    method = auto()
    given = (1.0, [1.0, 2.0], 1.0)
    for proposal in proposals(Space(job(method, weights=given), method, aligns=False), count=10):
        assert proposal.weights == given


def test_methods_that_do_not_weigh_get_no_weights() -> None:
    method = auto(candidates=["model_stock"])
    for proposal in proposals(Space(job(method, base=True, weights=(1.0, 1.0, 1.0)), method, aligns=False), count=5):
        assert proposal.weights == (1.0, 1.0, 1.0)


def test_candidates_of_the_same_method_have_names_of_their_own() -> None:
    assert unique(["regmean", "ties", "regmean", "regmean"]) == ["regmean", "ties", "regmean 2", "regmean 3"]


@pytest.mark.parametrize(
    ("candidates", "problem"),
    [
        (["passthrough"], "stacks layers"),
        ([{"name": "mask_fisher", "preset": "paper"}], "a preset"),
        ([{"name": "regmean", "precision": "float32"}], "precision is of the whole search"),
        ([], "at least 1 item"),
        (["average"] * 5, "5 candidates need as many trials"),
    ],
)
def test_candidates_that_cannot_be_searched_are_refused(candidates: list[Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        auto(candidates=candidates, trials=4)


def test_candidates_come_back_as_they_were_given() -> None:
    given = [{"name": "average"}, {"name": "ties", "density": 0.3}]
    method = auto(candidates=["average", {"name": "ties", "density": 0.3}])
    assert method.model_dump(mode="json")["candidates"] == given
    assert AutoParameters.model_validate(method.model_dump(mode="json")) == method
    assert isinstance(with_values(method.methods[1], {"scale": 0.5}), MethodParameters)


def test_default_candidates_can_be_run_with_what_is_named() -> None:
    everything = default_candidates(has_base=True, has_datasets=True, models=3)
    assert {"average", "mask_fisher", "ties", "regmean", "aligned_regmean"} <= set(everything)
    assert default_candidates(has_base=False, has_datasets=False, models=2) == ["average"]
    without_rows = default_candidates(has_base=True, has_datasets=False, models=2)
    assert without_rows == ["average", "task_arithmetic", "ties", "tsv_m"]
    assert not {"ties", "task_arithmetic"} & set(default_candidates(has_base=False, has_datasets=True, models=2))


# --- what is given up, and what is chosen


class Rows:
    """Stands for an expert with so many search rows."""

    name, held_out, metric_alone = "a", (), 1.0
    searched = range(128)


def test_a_merge_that_keeps_the_floor_is_not_given_up_for_a_better_one_that_does_not() -> None:
    """As the numbers come in: the second is better by the objective, and lacks what the first does not."""
    kept = [{"a": 0.95, "b": 0.93}, {"a": 0.945, "b": 0.99}, {"a": 0.96, "b": 0.92}, {"a": 0.949, "b": 1.0}]
    outcomes = [RungOutcome(retentions=one, smoothed={"a": one["a"] - 0.1, "b": one["b"]}) for one in kept]

    class Outcome:
        def __init__(self, number: int) -> None:
            self.number = number

        def look(self, share: float, ridge: float) -> RungOutcome:
            return outcomes[self.number]

    method = auto(trials=4)
    spec = job(method)
    floored = [spec.models[0].model_copy(update={"name": "a", "min_retention": 0.95}), *spec.models[1:]]
    spec = spec.model_copy(update={"models": floored})
    numbers = iter(range(4))
    found = search(
        spec,
        method,
        Space(spec, method, aligns=False),
        cast("Any", [Rows()]),
        lambda _: cast("Any", Outcome(next(numbers))),
        Journal(None, "one"),
        lambda: None,
    )
    assert [trial.pruned for trial in found.search.trials] == [False, True, False, True]
    assert [trial.objective for trial in found.search.trials] == pytest.approx([0.89, 0.9125, 0.89, 0.9235])
    assert found.search.feasible
    assert found.search.chosen == 0


def test_memory_is_counted_for_each_merge_that_is_kept() -> None:
    refits = [{"name": "aligned_regmean", "hold": hold} for hold in (0.1, 0.3)]
    assert [models_beside(True, True, auto(candidates=["average", *refits[:count]])) for count in (0, 1, 2)] == [
        3,
        4,
        5,
    ]


# --- the journal


def look(kept: float) -> RungOutcome:
    return RungOutcome(retentions={"a": kept}, smoothed={"a": kept / 2})


def tried(number: int, **parameters: Any) -> TrialOutcome:
    return TrialOutcome(parameters=parameters or {"number": number}, looks=[look(0.5), look(0.25)], seconds=1.5)


def journal(path: Path, identity: str = "one", count: int = 3) -> Journal:
    made = Journal(path, identity)
    for number in range(count):
        made.add(number, tried(number))
    return made


def known(found: Journal, count: int = 5) -> list[int]:
    return [number for number in range(count) if found.found(number, {"number": number}) is not None]


def test_a_journal_has_what_was_tried(tmp_path: Path) -> None:
    path = tmp_path / "searches" / "job.jsonl"
    journal(path)
    again = Journal(path, "one")
    assert known(again) == [0, 1, 2]
    assert again.found(1, {"number": 1}) == tried(1)
    assert again.found(1, {"number": 2}) is None


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_what_a_crash_left_of_a_line_is_forgotten(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "job.jsonl"
    journal(path)
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(path, "one")
    assert known(again) == ([0, 1, 2] if cut == 1 else [0, 1])
    again.add(len(known(again)), tried(7))
    assert Journal(path, "one").found(len(known(again)), {"number": 7}) is not None


@pytest.mark.parametrize("error", ["no tensor w\u2028, as it is", "tensor \u00e9"])
def test_lines_end_where_the_journal_ends_them_and_a_letter_may_be_cut(tmp_path: Path, error: str) -> None:
    path = tmp_path / "job.jsonl"
    made = journal(path, count=2)
    failed = TrialOutcome(parameters={"number": 2}, looks=[], seconds=0.5, error=error)
    made.add(2, failed)
    made.add(3, tried(3))
    assert Journal(path, "one").found(2, {"number": 2}) == failed
    assert known(Journal(path, "one")) == [0, 1, 2, 3]
    whole = path.read_bytes()
    letter = next(place for place, byte in enumerate(whole) if byte > 127)
    path.write_bytes(whole[: letter + 1])
    assert known(Journal(path, "one")) == [0, 1]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]\n", b'{"identity": "another"}\n{}\n'])
def test_what_is_no_journal_of_this_search_is_forgotten(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "job.jsonl"
    path.write_bytes(content)
    assert known(Journal(path, "one")) == []
    journal(path, "another")
    assert known(Journal(path, "one")) == []


def test_another_outcome_forgets_what_followed(tmp_path: Path) -> None:
    path = tmp_path / "job.jsonl"
    made = journal(path)
    made.add(1, tried(1, other=True))
    for one in (made, Journal(path, "one")):
        assert known(one) == [0]
        assert one.found(1, {"other": True}) is not None


def test_without_a_file_nothing_is_kept(tmp_path: Path) -> None:
    made = Journal(None, "one")
    made.add(0, tried(0))
    assert known(made) == [0]
    assert not list(tmp_path.iterdir())


# --- what of the table is worth a note


def notes(
    kept: Mapping[str, float | None], behind: Mapping[str, float], held_out: int = 250, chosen_method: str | None = None
) -> list[str]:
    """Of invented candidates, the first chosen, with these retentions; the others behind it by that and .01."""
    result = invented_result(list(kept))
    assert result.search is not None
    assert result.candidates is not None
    chosen, *others = result.candidates
    metrics = {name: m.model_copy(update={"retention": kept[name]}) for name, m in chosen.metrics.items()}
    method = chosen.method if chosen_method is None else {"name": chosen_method}
    lines = [chosen.model_copy(update={"metrics": metrics, "method": method})]
    for line in others:
        value = behind.get(line.name, 0.02)
        difference = Difference(value=value, interval=(value - 0.01, value + 0.01))
        lines.append(line.model_copy(update={"behind": difference}))
    search = result.search.model_copy(update={"held_out_rows": dict.fromkeys(kept, held_out)})
    return judged_notes(search, lines)


def test_a_floor_that_is_missed_on_held_out_rows_is_noted() -> None:
    assert notes({"a": 0.9, "b": 0.1}, {}) == []
    [note] = notes({"a": 0.8499, "b": 0.1}, {})
    assert "keeps 0.850 of a, not 0.85 that min_retention asks for" in note


def test_a_floor_that_cannot_be_judged_is_noted() -> None:
    """The expert has no positive metric on the held-out rows, so that there is no retention."""
    [note] = notes({"a": None, "b": 0.1}, {})
    assert note.startswith("on the held-out rows the metric of a itself is not positive")


def test_a_line_that_is_better_than_the_chosen_one_beyond_chance_is_noted() -> None:
    [note] = notes({"a": 0.9, "b": 0.9}, {"expert a": -0.02, "ties": -0.005})
    assert note == "on the held-out rows expert a kept more than what was chosen, beyond chance"


@pytest.mark.parametrize(("gained", "judged"), [(0.005, "nothing beyond chance"), (-0.05, "worse")])
def test_what_is_not_ahead_of_the_plain_average_is_noted(gained: float, judged: str) -> None:
    first = notes({"a": 0.9, "b": 0.9}, {"average": gained})[0]
    assert first.startswith(f"on the held-out rows the search gained {gained:+.4f} of mean retention")
    assert first.endswith(f"over the plain average, which is {judged}")


def test_what_is_not_ahead_of_the_cheapest_candidate_is_noted() -> None:
    """Of methods that need neither rows nor base nor whole matrices; `ties` needs a base, and `regmean` much more."""
    dearer = dict.fromkeys(("ties", "regmean"), 0.0)
    assert notes({"a": 0.9, "b": 0.9}, dearer) == []
    cheap = dict.fromkeys(("linear", "slerp", "karcher"), 0.005)
    [note] = notes({"a": 0.9, "b": 0.9}, cheap)
    assert note.startswith("on the held-out rows the search gained +0.0050 of mean retention")
    assert note.endswith(", the cheapest of its candidates, which is nothing beyond chance")
    [note] = notes({"a": 0.9, "b": 0.9}, cheap, chosen_method="linear")
    assert "is the cheapest of its candidates: those that need more did not gain" in note


def test_few_held_out_rows_are_noted() -> None:
    [note] = notes({"a": 0.9, "b": 0.9}, {}, held_out=31)
    assert "a on 31, b on 31" in note


# --- what the chosen one must beat


def judged(
    kept: Mapping[str, tuple[str, float, float]], must_beat: list[str], on: str
) -> tuple[bool | None, list[str]]:
    """The verdict over lines of (kind, metric of a, metric of b), the first chosen; retentions are of experts at 1."""

    def metric(name: Any, value: float) -> CandidateMetric:
        retention = 1 / value if name == "perplexity" else value
        return CandidateMetric(metric=name, value=value, interval=(value, value), retention=retention)

    first = next(iter(kept.values()))
    lines: list[Candidate] = []
    for name, (kind, a, b) in kept.items():
        metrics = {"a": metric("accuracy", a), "b": metric("perplexity", b)}
        mean, least = mean_and_least(metrics.values())
        behind = (first[1] + 1 / first[2] - a - 1 / b) / 2
        lines.append(
            Candidate(
                name=name,
                kind=cast("Any", kind),
                method={"name": "ties"} if kind == "method" else None,
                weights={},
                align_ridge=None,
                trial=None,
                metrics=metrics,
                mean_retention=mean,
                min_retention=least,
                behind=Difference(value=behind, interval=(behind - 0.02, behind + 0.02)),
                chosen=not lines,
            )
        )
    return verdict(auto(must_beat=must_beat, must_beat_on=on), lines, {}, {"a": (), "b": ("perplexity",)})


LINES = {
    "ties": ("method", 0.8, 1.25),
    "expert a": ("expert", 1.0, 2.0),
    "expert b": ("expert", 0.5, 1.0),
    "base": ("base", 0.4, 1.2),
}
"""Mean retentions are 0.8, 0.75, 0.75 and 0.62; each expert is best on its own rows, and the base is better on b."""


@pytest.mark.parametrize(
    ("must_beat", "on", "unbeaten"),
    [
        (["base", "best_expert"], "mean", []),
        (["base"], "each", ["base on the rows of b (perplexity 1.25, and 1.2)"]),
        (
            ["best_expert"],
            "each",
            [
                "expert a on the rows of a (accuracy 0.8, and 1)",
                "expert b on the rows of b (perplexity 1.25, and 1)",
            ],
        ),
        (["average"], "mean", ["average, which could not be evaluated"]),
    ],
)
def test_what_is_not_better_than_a_baseline_does_not_beat_it(
    must_beat: list[str], on: str, unbeaten: list[str]
) -> None:
    accepted, notes = judged(LINES, must_beat, on)
    assert accepted == (not unbeaten)
    said = "what auto chose, ties, is not accepted: on the held-out rows it does not beat "
    assert notes == ([said + "; ".join(unbeaten)] if unbeaten else [])


def test_of_equal_ones_none_is_beaten_and_what_may_be_chance_is_said() -> None:
    assert judged({"ties": ("method", 0.8, 1.0), "base": ("base", 0.8, 1.0)}, ["base"], "mean")[0] is False
    assert judged({"ties": ("method", 0.8, 1.0), "base": ("base", 0.7, 1.0)}, ["base"], "mean") == (True, [])
    accepted, [note] = judged({"ties": ("method", 0.8, 1.0), "base": ("base", 0.79, 1.0)}, ["base"], "mean")
    assert accepted
    assert "by a difference that may be chance of base, which it must beat" in note
    assert judged(LINES, [], "mean") == (None, [])


@pytest.mark.parametrize(
    ("must", "tokens", "fit", "said"),
    [
        ({"must_keep_length": [0.5, 2]}, 15.0, None, None),
        ({"must_keep_length": [0.5, 2]}, 5.0, None, None),
        ({"must_keep_length": [0.5, 2]}, 20.1, None, "it writes 20.1 tokens, and the expert 10.0, not 0.5 to 2 times"),
        ({"must_keep_length": [0.5, 2]}, 4.9, None, "on the rows of a"),
        ({"must_keep_length": [0.5, 2]}, None, None, "no model writes answers whose length could be kept"),
        ({"must_fit": 0.9}, 15.0, 0.9, None),
        ({"must_fit": 0.9}, 15.0, 0.89, "0.890 of its answers fit the pattern, not 0.9, on the rows of a"),
        ({"must_fit": 0.9}, 15.0, None, "no model writes answers that a pattern is stated for"),
    ],
)
def test_what_is_written_must_be_as_long_and_fit(
    must: dict[str, Any], tokens: float | None, fit: float | None, said: str | None
) -> None:
    result = invented_result(["a", "b"])
    assert result.metrics is not None
    assert result.candidates is not None
    written = {
        "answer_tokens": None if tokens is None else {"expert": 10.0, "merged": tokens},
        "answers_fit": None if fit is None else {"expert": 0.5, "merged": fit},
    }
    metrics = {**result.metrics, "a": result.metrics["a"].model_copy(update=written)}
    accepted, found = verdict(auto(**must), result.candidates, metrics, {"a": (), "b": ()})
    assert accepted == (said is None)
    assert len(found) == (said is not None)
    assert said is None or said in found[0]
