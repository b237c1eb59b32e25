"""Fixtures that many of these tests share."""

import pytest

from worker.engine.jobs.engine import Engine


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine()
