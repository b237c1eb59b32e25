"""Language models of two domains, trained from scratch on packaged English text, and their merges."""

import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.tiny import merge_spec, model_spec, silent
from worker.engine.catalog.contracts.spec import EvaluationSpec, ModelSpec
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.jobs.engine import Engine

sys.path.insert(0, str(REPOSITORY / "examples"))

from language_models import DOMAINS, prepare


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts `news` and `tweets` of one ancestor, with rows to measure on and others to judge by."""
    root = tmp_path_factory.mktemp("domains")
    prepare(root)
    return root


def spec_of(root: Path, domain: str, judged: str) -> ModelSpec:
    measured, held_out = root / f"{domain}-measured.jsonl", root / f"{judged}-judged.jsonl"
    evaluation = EvaluationSpec(source=held_out.name, path=held_out, metric="perplexity")
    return model_spec(root / domain, dataset=DatasetSpec(source=measured.name, path=measured), evaluation=evaluation)


@pytest.mark.parametrize("method", [pytest.param("fisher", marks=pytest.mark.long), "aligned_regmean"])
def test_a_measured_merge_beats_the_average_and_the_other_domains_expert(
    root: Path, tmp_path: Path, method: str
) -> None:
    engine = Engine()
    own = [spec_of(root, domain, domain) for domain in DOMAINS]
    merged = engine.merge(merge_spec(tmp_path / "merge", own, {"name": method}, evaluate=True), silent)
    other = {
        domain: engine.merge(
            merge_spec(tmp_path / domain, [spec_of(root, expert, domain)], {"name": "average"}, evaluate=True), silent
        )
        for domain, expert in zip(DOMAINS, reversed(DOMAINS), strict=True)
    }
    assert merged.metrics is not None
    for domain, found in merged.metrics.items():
        assert found.merged < found.average
        [of_other] = (other[domain].metrics or {}).values()
        assert found.merged < of_other.expert
        assert found.expert < found.merged
