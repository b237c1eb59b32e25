"""The search itself: proposing merges, looking at them and giving them up."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from worker.engine.catalog.contracts.report import FailedTrial, Search, Trial
from worker.engine.catalog.contracts.spec import MergeSpec
from worker.engine.catalog.methods import AutoParameters
from worker.engine.catalog.primitives.errors import InvalidDataset, NumericalError
from worker.engine.runtime.libraries import optuna
from worker.engine.search.journal import Journal, RungOutcome, TrialOutcome
from worker.engine.search.space import Proposal, Space
from worker.engine.search.trial_merges import ExpertOutputs, TriedMerge, part

if TYPE_CHECKING:
    from optuna import Study
    from optuna import Trial as Asked

SHARES = (0.25, 0.5, 1.0)
"""Shares of the search rows, one for each look at a trial."""
REDUCTION = 2
"""Number of trials of which one goes on after a look."""
LEAST_ROWS = 32
"""Least number of a model's rows at a look that is not the last; with fewer, chance would decide."""
FLOOR = 1e6
"""Factor by which the distance to a floor counts more than the objective."""

MakeMerge = Callable[[Proposal], TriedMerge]


@dataclass(frozen=True)
class Goal:
    """The objective to maximise, and the floors: the retention that models must keep, for those that name one."""

    objective: Literal["mean_retention", "min_retention"]
    floors: Mapping[str, float]

    def of(self, look: RungOutcome) -> float:
        """Return the mean or least smoothed retention, less the distances of all models below their floors."""
        values = list(look.smoothed.values())
        value = min(values) if self.objective == "min_retention" else sum(values) / len(values)
        return value - self.lack(look.retentions)

    def merit(self, look: RungOutcome) -> float:
        """Return the number that the search maximises; as in `rank`, all that reach the floors are above all others.

        By the objective alone, a trial slightly below a floor may come before one that reaches all floors, which would
        then be given up though it is the one to publish. Estimator and successive halving only see the order, so the
        size of the number does no harm.
        """
        return self.of(look) - FLOOR * self.lack(look.retentions)

    def lack(self, retentions: Mapping[str, float]) -> float:
        return sum(max(0.0, floor - retentions[name]) for name, floor in self.floors.items())

    def rank(self, trial: Trial) -> tuple[int, float, float, int]:
        """Return the rank of a trial that did not fail; the best has the largest.

        A trial that was looked at on all rows comes before one that was given up, and one that is less below the floors
        before one that is more. Among equal ones the first comes first.
        """
        lack = self.lack(trial.retentions)
        return trial.rows, -lack, trial.objective + lack, -trial.number


@dataclass(frozen=True)
class Found:
    """The end of a search."""

    chosen: Proposal
    search: Search
    best: Mapping[int, tuple[int, Proposal]]
    """Number and proposal of each candidate's best trial, by candidate, best first; failed candidates are left out."""


def search(
    spec: MergeSpec,
    auto: AutoParameters,
    space: Space,
    experts: Sequence[ExpertOutputs],
    make: MakeMerge,
    journal: Journal,
    on_trial: Callable[[], None],
) -> Found:
    """Try as many merges as `auto` asks for.

    Candidates come first with their defaults, then with the proposals of Optuna's tree-structured Parzen estimator
    (Bergstra et al. 2011), which depend on the outcomes so far. A trial is looked at on a quarter, a half and all of
    the search rows, and goes on while it is in the better half of the trials that were looked at on as many rows
    (asynchronous successive halving, Li et al. 2020, arXiv 1810.05934). Each candidate's first trial is looked at on
    all rows. The search depends on the seed alone, as long as merges and predictions do.

    Args:
        make: makes a merge as proposed.
        on_trial: called after each trial; may raise to stop.

    Raises:
        InvalidDataset: an expert's metric on its search rows is not positive, so that there is nothing to retain.
        NumericalError: no merge could be made.
    """
    _check_experts(experts)
    goal = Goal(auto.objective, {m.name: m.min_retention for m in spec.models if m.min_retention is not None})
    shares = shares_looked_at(experts)
    study = _study(auto.seed)
    for candidate in range(len(space)):
        study.enqueue_trial(space.first(candidate))
    trials: list[Trial] = []
    failed: list[FailedTrial] = []
    proposals: list[Proposal] = []
    for number in range(auto.trials):
        asked = study.ask()
        proposal = space.propose(asked)

        def is_given_up(step: int, look: RungOutcome, asked: "Asked" = asked) -> bool:
            asked.report(goal.merit(look), step=REDUCTION**step)
            is_behind = asked.should_prune()  # later trials are compared with those that were asked about
            return is_behind and asked.number >= len(space)

        tried = journal.found(number, proposal.parameters)
        if tried is None:
            tried = _try(proposal, shares, make, is_given_up)
            journal.add(number, tried)
        else:
            for step, look in enumerate(tried.looks):
                is_given_up(step, look)
        proposals.append(proposal)
        said = {"number": number, "candidate": space.names[proposal.candidate], "seconds": tried.seconds}
        if tried.error is not None:
            failed.append(FailedTrial(**said, parameters=tried.parameters, error=tried.error))
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
        else:
            share, last = shares[len(tried.looks) - 1], tried.looks[-1]
            trial = Trial(
                **said,
                parameters=tried.parameters,
                rows=max(part(expert.searched, share) for expert in experts),
                retentions=last.retentions,
                smoothed=last.smoothed,
                objective=goal.of(last),
                pruned=share < 1,
            )
            trials.append(trial)
            if trial.pruned:
                study.tell(asked, state=optuna.trial.TrialState.PRUNED)
            else:
                study.tell(asked, goal.merit(last))
        on_trial()
    ranked = sorted(trials, key=goal.rank, reverse=True)
    if not ranked:
        raise NumericalError(f"none of the {len(failed)} merges could be made; the first: {failed[0].error}")
    best: dict[int, tuple[int, Proposal]] = {}
    for trial in ranked:
        proposal = proposals[trial.number]
        best.setdefault(proposal.candidate, (trial.number, proposal))
    chosen = ranked[0]
    return Found(
        chosen=proposals[chosen.number],
        search=Search(
            objective=auto.objective,
            search_rows={expert.name: len(expert.searched) for expert in experts},
            held_out_rows={expert.name: len(expert.held_out) for expert in experts},
            min_retention=dict(goal.floors),
            feasible=goal.lack(chosen.retentions) == 0,
            chosen=chosen.number,
            trials=trials,
            failed=failed,
        ),
        best=best,
    )


def shares_looked_at(experts: Sequence[ExpertOutputs]) -> list[float]:
    """Return the shares of rows at each look; the last is all of them."""
    fewest = min(len(expert.searched) for expert in experts)
    return [share for share in SHARES if share == 1 or fewest * share >= LEAST_ROWS]


def _check_experts(experts: Sequence[ExpertOutputs]) -> None:
    for expert in experts:
        if not expert.metric_alone > 0:
            raise InvalidDataset(
                expert.evaluation.source,
                f"{expert.name} itself has a {expert.evaluation.metric} of {expert.metric_alone:.3g} on the "
                f"{len(expert.searched)} rows that are searched on, so there is nothing to keep of it; name another "
                "metric, or other rows",
            )


def _study(seed: int) -> "Study":
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study: Study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION),
    )
    return study


def _try(
    proposal: Proposal,
    shares: Sequence[float],
    make: MakeMerge,
    is_given_up: Callable[[int, RungOutcome], bool],
) -> TrialOutcome:
    start = time.monotonic()
    looks: list[RungOutcome] = []
    error = None
    try:
        tried_merge = make(proposal)
        for step, share in enumerate(shares):
            looks.append(tried_merge.look(share, proposal.align_ridge))
            if is_given_up(step, looks[-1]):
                break
    except NumericalError as failed:
        error = failed.message
    seconds = round(time.monotonic() - start, 3)
    return TrialOutcome(parameters=dict(proposal.parameters), looks=looks, seconds=seconds, error=error)
