"""Whether the merge that `auto` chose beats the baselines that it must beat, and writes as it must."""

from collections.abc import Collection, Iterator, Mapping, Sequence

from worker.engine.catalog.contracts.report import Candidate, MetricResult
from worker.engine.catalog.methods import AutoParameters
from worker.engine.catalog.methods.auto import Baseline
from worker.engine.catalog.primitives.notes import Doubt

KINDS: Mapping[Baseline, str] = {"base": "base", "best_expert": "expert", "average": "average"}
"""Kinds of the candidates that are a baseline."""


def verdict(
    auto: AutoParameters,
    candidates: Sequence[Candidate],
    metrics: Mapping[str, MetricResult],
    minimised: Mapping[str, Collection[str]],
) -> tuple[bool | None, list[str]]:
    """Return whether the chosen candidate does all that it must for the result to be accepted, and notes to lead it.

    It beats another where its number on the held-out rows is strictly better.

    Args:
        metrics: metrics of the published merge, by model.
        minimised: the metrics of which less is better, by model.

    Returns:
        None and no notes where it must do nothing.
    """
    if not auto.must_beat and auto.must_keep_length is None and auto.must_fit is None:
        return None, []
    [chosen] = [candidate for candidate in candidates if candidate.chosen]
    unbeaten: dict[str, None] = {}
    uncertain: dict[str, None] = {}
    for baseline in auto.must_beat:
        lines = [line for line in candidates if _is(line, baseline)]
        if not lines:
            unbeaten[f"{baseline}, which could not be evaluated"] = None
        for line in lines:
            if auto.must_beat_on == "each":
                unbeaten |= dict.fromkeys(_unbeaten_rows(chosen, line, minimised))
            elif chosen.mean_retention is None or line.mean_retention is None:
                unbeaten[f"{line.name}, since no mean retention is known"] = None
            elif not chosen.mean_retention > line.mean_retention:
                numbers = f"{chosen.mean_retention:.4f}, and {line.mean_retention:.4f}"
                unbeaten[f"{line.name} (mean retention {numbers})"] = None
            elif line.behind is None or not line.behind.interval[0] > 0:
                uncertain[line.name] = None
    failed = [f"it does not beat {'; '.join(unbeaten)}"] if unbeaten else []
    failed += [*_lengths(auto, metrics), *_misfits(auto, metrics)]
    if failed:
        what = f"what auto chose, {chosen.name}, is not accepted: on the held-out rows"
        return False, [Doubt(f"{what} {'; '.join(failed)}")]
    if uncertain:
        what = "on the held-out rows what auto chose is ahead by a difference that may be chance"
        return True, [Doubt(f"{what} of {', '.join(uncertain)}, which it must beat")]
    return True, []


def _lengths(auto: AutoParameters, metrics: Mapping[str, MetricResult]) -> Iterator[str]:
    """Yield what the merge writes beyond the limits of length."""
    if auto.must_keep_length is None:
        return
    least, most = auto.must_keep_length
    written = {name: found.answer_tokens for name, found in metrics.items() if found.answer_tokens is not None}
    if not written:
        yield "no model writes answers whose length could be kept"
    for name, tokens in written.items():
        ours, expert = tokens["merged"], tokens["expert"]
        if not least * expert <= ours <= most * expert:
            said = f"{ours:.1f} tokens, and the expert {expert:.1f}, not {least:g} to {most:g} times as many"
            yield f"it writes {said}, on the rows of {name}"


def _misfits(auto: AutoParameters, metrics: Mapping[str, MetricResult]) -> Iterator[str]:
    """Yield the rows on which too few of the merge's answers fit the stated pattern."""
    if auto.must_fit is None:
        return
    fitting = {name: found.answers_fit for name, found in metrics.items() if found.answers_fit is not None}
    if not fitting:
        yield "no model writes answers that a pattern is stated for"
    for name, share in fitting.items():
        if not share["merged"] >= auto.must_fit:
            yield f"{share['merged']:.3f} of its answers fit the pattern, not {auto.must_fit:g}, on the rows of {name}"


def _is(line: Candidate, baseline: Baseline) -> bool:
    """Return whether a line of the table, other than the chosen one, is a baseline; tuned task arithmetic is too."""
    if line.chosen:
        return False
    if baseline == "task_arithmetic":
        return line.method is not None and line.method["name"] == baseline
    return line.kind == KINDS[baseline]


def _unbeaten_rows(chosen: Candidate, line: Candidate, minimised: Mapping[str, Collection[str]]) -> Iterator[str]:
    """Yield the rows on which the chosen candidate's metric is not better than a line's."""
    for model, metric in chosen.metrics.items():
        ours, theirs = metric.value, line.metrics[model].value
        sign = -1 if metric.metric in minimised[model] else 1
        if not sign * ours > sign * theirs:
            yield f"{line.name} on the rows of {model} ({metric.metric} {ours:.4g}, and {theirs:.4g})"
