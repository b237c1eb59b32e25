"""An addition is its own files and no line elsewhere: they are laid into a copy of the service, which then has it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import dedent

import pytest
from pydantic import SecretStr

from app.contracts.settings import Settings
from app.services.composition import compose
from tests.conftest import REPOSITORY

Run = Callable[[Mapping[str, str], str], None]

METRIC = {
    "worker/engine/catalog/tasks/grading.py": """
        from worker.engine.catalog.tasks.classification import Classification


        class Grading(Classification):
            name = "grading"
            ending = "ForGrading"
            metrics = ("kappa",)
        """,
    "worker/engine/tasks/grading.py": """
        from sklearn.metrics import cohen_kappa_score

        from worker.engine.tasks.classification import ClassificationHead


        class GradingHead(ClassificationHead):
            def metric(self, name):
                return cohen_kappa_score


        KIND = GradingHead
        """,
}
STATISTIC = {
    "worker/engine/catalog/methods/by_length.py": """
        from typing import Literal

        from worker.engine.catalog.methods.entry import MethodEntry
        from worker.engine.catalog.methods.parameters import MeasuringParameters
        from worker.engine.catalog.methods.statistic import Statistic

        ROW_LENGTH = Statistic("row_length", lambda running: 10**7 * running.longest_row)


        class ByLengthParameters(MeasuringParameters):
            name: Literal["by_length"] = "by_length"

            @property
            def statistics(self):
                return frozenset({ROW_LENGTH})


        BY_LENGTH = MethodEntry("by_length", "formula", "source", ("dataset",), ByLengthParameters)
        """,
    "worker/engine/merging/methods/by_length.py": """
        import torch

        from worker.engine.merging.methods.combine import by_slices, model_weights


        def build(parameters, models):
            lengths = torch.stack([model.statistics["row_length"]["mean"] for model in models])

            def prepare(versions):
                weights = model_weights(models, versions.place) * lengths
                return by_slices(versions, (weights / weights.sum())[:, None])

            return prepare
        """,
    "worker/engine/scoring/row_length.py": """
        import torch

        from worker.engine.scoring.measurement import StatisticPass


        def _measure(work, measured):
            return work.find_or_compute(measured, work.facts("row_length", work.rows), _parts(work))


        def _parts(work):
            lengths = [example.length for example in work.examples]
            yield {"mean": torch.tensor(sum(lengths) / len(lengths), dtype=torch.float64)}


        PASS = StatisticPass(_measure, lambda subject, rows: subject.facts("row_length", rows))
        """,
}
STORE = {
    "app/storage/artifacts/shelves.py": """
        from app.storage.artifacts.folder import FolderStore


        def opened(context):
            return FolderStore(context.data_dir / "shelves")
        """,
}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a script on a copy of the service that has these files too."""

    def run(files: Mapping[str, str], script: str) -> None:
        for package in ("app", "worker"):
            shutil.copytree(REPOSITORY / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
        for name, text in files.items():
            path = tmp_path / name
            assert not path.exists()
            path.write_text(dedent(text))
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
        command = [sys.executable, "-c", dedent(script)]
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr

    return run


def test_a_metric_stands_in_the_files_of_its_head_alone(run: Run) -> None:
    run(
        METRIC,
        """
        import numpy as np
        from pydantic import TypeAdapter, ValidationError

        from app.contracts.models import Evaluation
        from worker.engine.catalog.contracts.report import MetricResult
        from worker.engine.catalog.tasks.grading import Grading
        from worker.engine.evaluation.metrics import metric_for

        assert {"f1", "kappa", "pearson"} <= {*MetricResult.model_json_schema()["properties"]["metric"]["enum"]}
        assert Evaluation(source="local:rows.csv", metric="kappa").metric == "kappa"
        try:
            Evaluation(source="local:rows.csv", metric="kapa")
        except ValidationError as refused:
            assert "'kappa'" in str(refused), refused
        else:
            raise AssertionError("a metric that no head has is accepted")
        labels, predicted = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
        by_chance = 2 / 4 * 1 / 4 + 2 / 4 * 3 / 4
        kappa = (3 / 4 - by_chance) / (1 - by_chance)
        assert abs(metric_for("kappa", Grading(2, {}))(labels, predicted) - kappa) < 1e-12
        """,
    )


@pytest.mark.long
def test_a_statistic_stands_in_its_methods_files_and_one_for_its_pass(run: Run) -> None:
    run(
        STATISTIC,
        """
        import json
        from pathlib import Path

        import torch

        from app.contracts.scores import ScoresEntry
        from tests.tiny import merge_spec, model_spec, read_model, silent, tiny_checkpoint, write_rows
        from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
        from worker.engine.catalog.contracts.spec import StoreSpec
        from worker.engine.catalog.methods.by_length import ByLengthParameters
        from worker.engine.catalog.planning.memory import MemoryNeeds, estimate
        from worker.engine.catalog.planning.planner import plan_merge
        from worker.engine.jobs.engine import Engine

        kinds = ScoresEntry.model_json_schema()["properties"]["statistic"]["enum"]
        assert {"gram", "row_length"} <= {*kinds}

        here = Path.cwd()
        checkpoints = [tiny_checkpoint(here / name, seed=seed) for seed, name in enumerate("ab")]
        rows = [write_rows(here / f"{name}.jsonl", longest=longest) for name, longest in (("a", 5), ("b", 40))]
        texts = [[json.loads(line)["text"] for line in file.read_text().splitlines()] for file in rows]
        lengths = [sum(2 + len(text.split()) for text in of_file) / len(of_file) for of_file in texts]

        spec = merge_spec(
            here / "out", list(map(model_spec, checkpoints, rows)), {"name": "by_length"}, align_heads=False
        )
        store = StoreSpec(folder=here / "statistics", max_bytes=10**9)
        (here / "out").mkdir()
        result = Engine(torch.device("cpu")).merge(spec.model_copy(update={"store": store}), silent)
        assert [model.examples for model in result.models] == [40, 40]
        one, other, merged = map(read_model, (*checkpoints, here / "out" / "models" / "a"))
        for name, tensor in merged.items():
            if not name.startswith("classifier"):
                expected = (lengths[0] * one[name].double() + lengths[1] * other[name].double()) / sum(lengths)
                assert torch.allclose(tensor.double(), expected, atol=1e-6), name
        kept = [json.loads(about.read_text())["facts"]["statistic"] for about in here.glob("statistics/*/about.json")]
        assert kept == ["row_length", "row_length"]

        infos = [inspect_checkpoint(path, path.name) for path in checkpoints]
        plan = plan_merge(infos)
        needed = [estimate(plan, MemoryNeeds(ByLengthParameters(), longest_row=tokens)) for tokens in (40, 48)]
        assert needed[1] - needed[0] == 8 * 10**7
        """,
    )


@pytest.mark.long
def test_a_store_of_artifacts_stands_in_its_file_alone(run: Run) -> None:
    run(
        STORE,
        """
        import asyncio
        import json
        from pathlib import Path

        from app.contracts.jobs import Attempt, Outcome, Stage, Status, TaskId
        from app.contracts.requests import MergeRequest
        from app.contracts.settings import Settings
        from app.services.composition import compose
        from tests.tiny import tiny_checkpoint

        settings = Settings(redis_url="redis://127.0.0.1:1", data_dir=Path("data"), artifact_store="shelves")
        services = compose(settings)
        attempt = Attempt(task=TaskId(job="1" * 28, stage=Stage.MERGE), number=1)
        folder = services.artifacts.begin(attempt)
        assert folder.is_relative_to(Path("data/shelves").resolve())
        model = tiny_checkpoint(folder / "models" / "a")
        files = [
            {"name": f"models/a/{path.name}", "bytes": path.stat().st_size, "sha256": "0" * 64}
            for path in model.iterdir()
        ]
        (folder / "manifest.json").write_text(json.dumps({"files": files}))
        artifact = services.artifacts.publish(attempt)
        assert services.artifacts.open(artifact).models == ["a"]

        async def check():
            services.inspectors.start()
            reference = f"job:{attempt.task.job}/a"
            models = [{"name": name, "checkpoint": reference} for name in "ab"]
            request = MergeRequest.model_validate({"method": {"name": "average"}, "models": models, "evaluate": False})
            outcome = Outcome(status=Status.SUCCEEDED, artifact=artifact)
            try:
                return await services.inspectors.check(request, "default", {attempt.task.job: outcome})
            finally:
                services.inspectors.close()

        accepted = asyncio.run(check())
        assert accepted.plan.tensors > 0
        assert accepted.states == {}  # an artifact never changes
        """,
    )


@pytest.mark.long
def test_a_store_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    settings = Settings(redis_url=SecretStr("redis://127.0.0.1:1"), data_dir=tmp_path, artifact_store="shelf")
    with pytest.raises(ValueError, match="MASKMERGE_ARTIFACT_STORE is 'shelf', and the stores are folder, s3"):
        compose(settings)
    environment = {**os.environ, "MASKMERGE_REDIS_URL": "redis://127.0.0.1:1", "MASKMERGE_ARTIFACT_STORE": "store"}
    problem = "MASKMERGE_ARTIFACT_STORE is 'store', and the stores are folder, s3\n"
    for command, code, said in (
        (["worker"], 2, problem),
        (["app.cli", "api"], 2, f"maskmerge: {problem}"),
        (["app.cli", "serve", "--port", "0"], 1, f"maskmerge: {problem}"),
    ):
        ended = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True)
        assert (ended.returncode, ended.stderr) == (code, said)
