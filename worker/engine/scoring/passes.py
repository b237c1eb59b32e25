"""Passes that measure models, one for each statistic. A pass is `PASS` of the module here with the statistic's name."""

from collections.abc import Mapping
from importlib import import_module

from worker.engine.catalog.methods import STATISTICS, Statistic
from worker.engine.scoring.measurement import StatisticPass


def _pass(statistic: Statistic) -> StatisticPass:
    found: StatisticPass = import_module(f"{__package__}.{statistic}").PASS
    return found


PASSES: Mapping[str, StatisticPass] = {statistic: _pass(statistic) for statistic in STATISTICS}
