"""A short run of the chaos that `make chaos` does for hours."""

from pathlib import Path

from tests.faults.chaos import FAULTS, possible, run


def test_whatever_dies_every_job_ends_once_with_the_same_bits(tmp_path: Path) -> None:
    names = possible([name for name in FAULTS if name != "redis is read-only"])
    found = run(tmp_path, names, kills=8, hold_s=5, seed=1)
    assert not found.wrong
    assert found.kills >= 8
    assert found.attempts > found.jobs - 5, "nobody was at work when something died"
    assert max(found.recoveries, default=0) <= 15
