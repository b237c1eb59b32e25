"""The commands of the tutorial and of the how-to pages, run as they stand, and the steps of pipelines.

All run in one shell and one folder, in the order of the pages, against the service that the tutorial starts. Its
experts are tiny ones, which are not trained: the README's test trains real ones.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import HANGS_S, REPOSITORY, free_port
from tests.pages import console_commands, matches, printed_by
from tests.tiny import tiny_base, tiny_checkpoint, tiny_texts, write_lines, write_rows
from tests.tiny_adapters import tiny_adapter
from tests.tiny_language_models import tiny_model

DOCS = REPOSITORY / "docs"
EXECUTED = [
    "tutorial", "own-checkpoints", "unlabelled", "lora", "language-models", "mergekit", "uploads", "webhooks",
    "pipelines",
]  # fmt: skip
"""Pages whose commands run here; those of `client` run in test_client_page.py."""
COMMANDS = [(page, command) for page in EXECUTED for command in console_commands(DOCS / f"{page}.md")]
TASKS = {
    "topics": ("business", "entertainment", "politics", "sports", "technology"),
    "sentiment": ("negative", "positive"),
}


def fences(page: str, language: str) -> dict[str, str]:
    """Blocks of a page in a language, by their titles."""
    text = (DOCS / f"{page}.md").read_text()
    return dict(re.findall(rf'```{language} title="([^"]+)"\n(.*?)```', text, re.DOTALL))


PIPELINE = {**fences("pipelines", "yaml"), **fences("pipelines", "python")}


def make_inputs(root: Path) -> None:
    """What `examples/experts.py` makes, and what the pages on adapters and language models name, at tiny size."""
    tiny_base(root / "base")
    for seed, (task, labels) in enumerate(TASKS.items()):
        tiny_checkpoint(root / "experts" / task, names=labels, labels=len(labels), seed=seed)
        tiny_adapter(root / "adapters" / task, root / "base", labels=len(labels), seed=seed)
        rows = root / "tasks" / task
        for part, file in enumerate(("train.jsonl", "validation.jsonl")):
            write_rows(rows / file, labels=len(labels), seed=2 * seed + part)
        write_lines(rows / "texts.jsonl", [json.dumps({"text": text}) for text in tiny_texts(40, seed)])
    for seed, name in enumerate(("base", "code", "law")):
        tiny_model(root / "language" / name, seed=seed)
        write_lines(root / "language" / f"{name}.jsonl", [json.dumps({"text": t}) for t in tiny_texts(40, seed)])


pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def ports() -> dict[str, str]:
    """Ports of this run in place of those of the pages, on which another test may listen."""
    return {"8000": str(free_port()), "8001": str(free_port())}


@pytest.fixture(scope="module")
def environment(ports: dict[str, str]) -> dict[str, str]:
    return {
        "MASKMERGE_URL": f"http://127.0.0.1:{ports['8000']}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'app' / 'public'}",
        "PS1": "",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pages' reader is, with the files that pages show to be saved."""
    folder = tmp_path_factory.mktemp("reader")
    make_inputs(folder / "inputs")
    (folder / "served.py").write_text(fences("tutorial", "python")["served.py"])
    return folder


@pytest.fixture(scope="module")
def printed(folder: Path, environment: dict[str, str], ports: dict[str, str]) -> list[str]:
    """What each of `COMMANDS`, and then each step of a pipeline, printed; the service ends after that."""

    def here(text: str) -> str:
        return re.sub("8000|8001", lambda port: ports[port[0]], text)

    saved = f"cat > recipe.yaml <<'END'\n{PIPELINE['recipe.yaml']}END\n"
    commands = [here(command.line) for _, command in COMMANDS]
    first = next(index for index, (page, _) in enumerate(COMMANDS) if page == "pipelines")
    commands[first] = saved + commands[first]
    return printed_by([*commands, *map(here, pipeline_steps()), "kill %1"], folder, environment, 2 * HANGS_S)


def pipeline_steps() -> list[str]:
    """The commands in the examples for GitHub and Argo, and the function in that for Airflow."""
    workflow = yaml.safe_load(PIPELINE[".github/workflows/merge.yml"])
    runs = [step["run"] for step in workflow["jobs"]["merge"]["steps"] if "run" in step]
    (template,) = yaml.safe_load(PIPELINE["merge.yaml"])["spec"]["templates"]
    (recipe,) = template["inputs"]["artifacts"]
    container = template["container"]
    words = " ".join(f"'{word}'" for word in [*container["command"], *container["args"]])
    argo = f"cat > {recipe['path']} <<'END'\n{recipe['raw']['data']}END\n{words}"
    argo = re.sub(r"\{\{.*?\}\}", "1", argo.replace(f"{Path(recipe['path']).parent}/", "argo-"))
    airflow = f"python - <<'END'\n{airflow_function()}\nprint(merge('recipe.yaml', 'nightly', 'airflow'))\nEND"
    github = [f"GITHUB_RUN_ID=1 GITHUB_RUN_ATTEMPT=1\n{run}" for run in runs]
    place = "mkdir -p pipeline && cp recipe.yaml pipeline && cd pipeline"
    return [f"({place}\n{step}\necho status $?)" for step in (*github, argo, airflow)]


def airflow_function() -> str:
    """The task's function without what makes a task of it: Airflow itself is not installed here."""
    tree = ast.parse(PIPELINE["dags/nightly_merge.py"])
    (function,) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "merge"]
    function.decorator_list = []
    return f"from pathlib import Path\n{ast.unparse(function)}"


@pytest.mark.parametrize("index", range(len(COMMANDS)), ids=[f"{p}-{c.line[:40]}" for p, c in COMMANDS])
def test_each_command_prints_what_its_page_says(printed: list[str], ports: dict[str, str], index: int) -> None:
    _, command = COMMANDS[index]
    assert index < len(printed), f"the shell did not get so far; last it printed {printed[-1]}"
    if command.expected:
        assert matches(command.expected, printed[index]), printed[index]


def test_each_step_of_a_pipeline_succeeds(printed: list[str], folder: Path) -> None:
    steps = printed[len(COMMANDS) : -1]
    assert len(steps) == 4
    assert [step.splitlines()[-1] for step in steps] == ["status 0"] * 4, steps
    for name in ("merged", "argo-merged", "airflow"):
        assert (folder / "pipeline" / name / "manifest.json").exists()


def test_the_workflow_is_one_of_github(tmp_path: Path) -> None:
    file = tmp_path / "merge.yml"
    file.write_text(PIPELINE[".github/workflows/merge.yml"])
    command = ["check-jsonschema", "--builtin-schema", "vendor.github-workflows", str(file)]
    checked = subprocess.run(
        [str(Path(sys.executable).with_name(command[0])), *command[1:]], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout
