"""Passes that measure models, one for each statistic."""

from collections.abc import Mapping

from worker.engine.catalog.methods import Statistic
from worker.engine.scoring import fisher, grams, mask_fisher
from worker.engine.scoring.work import Pass

PASSES: Mapping[Statistic, Pass] = {one.statistic: one for one in (mask_fisher.PASS, grams.PASS, fisher.PASS)}

if PASSES.keys() != set(Statistic):
    raise ImportError(f"catalog and passes disagree on the statistics: {PASSES.keys() ^ set(Statistic)}")
