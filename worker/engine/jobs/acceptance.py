"""Judges whether a merge reaches what its request asks for."""

from collections.abc import Collection, Iterator, Mapping

from worker.engine.catalog.contracts.report import MetricResult, mean_and_least
from worker.engine.catalog.contracts.spec import Acceptance


def missed(
    accept: Acceptance, metrics: Mapping[str, MetricResult], minimised: Mapping[str, Collection[str]]
) -> Iterator[str]:
    """Yield what the merge does not reach. What is not known counts as not reached.

    Args:
        metrics: metrics of the published merge, by model.
        minimised: the metrics of which less is better, by model.
    """
    mean, _ = mean_and_least(metrics.values())
    unknown = [name for name, found in metrics.items() if found.retention is None]
    if unknown and (accept.min_mean_retention is not None or accept.min_retention is not None):
        yield f"no retention is known of {', '.join(unknown)}"
    elif accept.min_mean_retention is not None and mean is not None and not mean >= accept.min_mean_retention:
        yield f"the mean retention is {mean:.4f}, and {accept.min_mean_retention:g} is asked for"
    for name, found in metrics.items():
        least = accept.min_retention
        if least is not None and found.retention is not None and not found.retention >= least:
            yield f"the retention of {name} is {found.retention:.4f}, and {least:g} is asked for"
        wanted = accept.metrics.get(name)
        if wanted is None:
            continue
        is_less_better = found.metric in minimised[name]
        if not (found.merged <= wanted if is_less_better else found.merged >= wanted):
            bound = "at most" if is_less_better else "at least"
            yield f"the {found.metric} of {name} is {found.merged:.4g}, and {bound} {wanted:g} is asked for"
