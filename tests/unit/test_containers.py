"""What the Dockerfiles and the compose file name exists, is allowed, and agrees with the rest of the project."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from app.contracts.settings import Settings
from app.embedded_redis import CONFIGURATION
from app.supervisor import STOP_S
from tests.conftest import REPOSITORY
from tests.containers import COMPOSE, DOCKERFILES, Dockerfile, NotSet, compose, is_ignored, published_variables
from worker.engine_process import START_TIMEOUT_S

API = Dockerfile.read(REPOSITORY / "docker" / "api.Dockerfile")
WORKER = Dockerfile.read(REPOSITORY / "docker" / "worker.Dockerfile")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PASSWORD = {"MASKMERGE_REDIS_PASSWORD": "secret"}
SERVICES = compose(PASSWORD)["services"]
BIN = Path(sys.executable).parent
SETTINGS = {f"MASKMERGE_{name.upper()}" for name in Settings.model_fields}

either_image = pytest.mark.parametrize("image", [API, WORKER], ids=["api", "worker"])


def check_schema(path: Path) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def hadolint(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(BIN / "hadolint"), "-"], input=text, capture_output=True, text=True, check=False)


def test_the_compose_file_follows_the_published_schema(tmp_path: Path) -> None:
    result = check_schema(COMPOSE)
    assert result.returncode == 0, result.stdout
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(COMPOSE.read_text().replace("stop_grace_period:", "stop_grace:"))
    assert "stop_grace" in check_schema(broken).stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_linter_finds_nothing_in_a_dockerfile_and_something_in_a_bad_one(path: Path) -> None:
    text = path.read_text()
    result = hadolint(text)
    assert result.returncode == 0, result.stdout
    assert "DL3006" in hadolint(text.replace("python:3.12-slim-bookworm", "python")).stdout


def test_without_a_password_compose_says_what_to_set() -> None:
    for variables in ({}, {"MASKMERGE_REDIS_PASSWORD": ""}):
        with pytest.raises(NotSet, match=r"MASKMERGE_REDIS_PASSWORD set it in \.env"):
            compose(variables)


def test_the_password_is_in_environments_alone() -> None:
    for service in SERVICES.values():
        for key, value in service.items():
            assert ("secret" in json.dumps(value)) == (key == "environment"), key


def test_no_secret_file_gets_into_a_build() -> None:
    assert is_ignored(".env")
    assert is_ignored("inputs/experts/model.safetensors")
    assert is_ignored("app/__pycache__/cli.pyc")
    assert ".env" in (REPOSITORY / ".gitignore").read_text()


def test_every_maskmerge_variable_of_a_container_is_a_setting() -> None:
    given = {name for image in (API, WORKER) for name in image.environment}
    given |= {name for service in SERVICES.values() for name in service["environment"]}
    assert {name for name in given if name.startswith("MASKMERGE_")} <= SETTINGS


def test_every_variable_that_compose_reads_is_in_the_deployment_guide() -> None:
    page = (REPOSITORY / "docs" / "deployment.md").read_text()
    assert set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE)) == published_variables() | set(
        yaml.safe_load(COMPOSE.read_text())["volumes"]
    )


@either_image
def test_every_copied_path_exists_and_reaches_the_build(image: Dockerfile) -> None:
    sources = [source for stage in (0, 1, 2) for source in image.copied(stage)]
    assert set(image.copied(1)) == {"app", "worker", "pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]}
    for source in sources:
        path = REPOSITORY / source
        assert path.exists(), source
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file() and p.suffix != ".pyc"]
        assert [file for file in files if is_ignored(str(file.relative_to(REPOSITORY)))] == []


@either_image
def test_a_change_of_code_reinstalls_no_dependency(image: Dockerfile) -> None:
    stage_of_dependencies = {i.stage for i in image.all("RUN") if "pip install -c constraints.txt" in i.text}
    assert stage_of_dependencies == {0}
    assert set(image.copied(0)) == {"pyproject.toml", "constraints.txt"}


def test_torch_has_a_layer_that_only_the_constraints_touch() -> None:
    keywords = [i for i in WORKER.instructions if i.stage == 0]
    torch = next(n for n, i in enumerate(keywords) if i.keyword == "RUN" and i.words[-1] == "torch")
    assert [i.words[:-1] for i in keywords[:torch] if i.keyword == "COPY"] == [["constraints.txt"]]
    assert "whl/cpu" in next(i.text for i in keywords[:torch] if i.keyword == "ARG")


@pytest.mark.parametrize(
    ("image", "extras"), [(API, []), (WORKER, ["worker"])], ids=["api", "worker"]
)  # the extras that each image takes
def test_the_images_install_what_the_project_declares(image: Dockerfile, extras: list[str], tmp_path: Path) -> None:
    """The command of the Dockerfile itself writes the requirements."""
    for source in image.copied(0):
        shutil.copy(REPOSITORY / source, tmp_path)
    (command,) = [i.text for i in image.all("RUN") if "> requirements.txt" in i.text]
    subprocess.run(["sh", "-c", command.replace("python", sys.executable, 1)], cwd=tmp_path, check=True)
    declared = [*PROJECT["dependencies"], *(r for extra in extras for r in PROJECT["optional-dependencies"][extra])]
    assert (tmp_path / "requirements.txt").read_text().splitlines() == declared


def closure(requirements: list[str]) -> set[str]:
    """Names of everything that installing these brings."""
    found: set[tuple[str, str]] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, parent_extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": parent_extra}):
            continue
        for extra in ("", *requirement.extras):
            if (requirement.name.lower(), extra) not in found:
                found.add((requirement.name.lower(), extra))
                needs = metadata.distribution(requirement.name).requires or []
                waiting += [(Requirement(text), extra) for text in needs]
    return {name for name, _ in found}


def test_nothing_that_the_api_image_installs_brings_torch() -> None:
    heavy = {"torch", "transformers", "numpy", "scipy"}
    assert closure(PROJECT["dependencies"]).isdisjoint(heavy)
    assert heavy <= closure(PROJECT["optional-dependencies"]["worker"])


@either_image
def test_images_have_a_pinned_base_that_the_project_supports(image: Dockerfile) -> None:
    bases = {i.words[0] for i in image.all("FROM")}
    (base,) = bases
    version = re.fullmatch(r"python:(3\.\d+)-slim-\w+", base)
    assert version
    assert version[1] in SpecifierSet(PROJECT["requires-python"])


def test_every_service_is_confined() -> None:
    for name, service in SERVICES.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["init"] is True, name
        assert "container_name" not in service, name  # `--scale` needs names of Docker's own
    assert SERVICES["redis"]["user"] == "redis"
    assert [image.one("USER") for image in (API, WORKER)] == ["10001:10001"] * 2


def test_redis_is_reached_from_the_inner_network_alone() -> None:
    assert SERVICES["redis"]["networks"] == ["backend"]
    assert compose(PASSWORD)["networks"]["backend"]["internal"] is True
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["api"]
    assert SERVICES["api"]["ports"] == ["127.0.0.1:8000:8000"]


def test_folders_that_an_image_writes_to_are_volumes_owned_by_its_user() -> None:
    for name, image in (("api", API), ("worker", WORKER), ("worker-cuda", WORKER)):
        volumes = dict(v.split(":") for v in SERVICES[name]["volumes"] if isinstance(v, str))
        made = next(i for i in image.last_stage if "install -d -o 10001 -g 10001" in i.text)
        assert made.text.endswith(" ".join(["10001", *volumes.values()])), name
        assert volumes["data"] == image.environment["MASKMERGE_DATA_DIR"]
        assert volumes.get("hub") == image.environment.get("HF_HOME")
        (inputs,) = [v for v in SERVICES[name]["volumes"] if isinstance(v, dict)]
        assert inputs["target"] == image.environment["MASKMERGE_LOCAL_ROOTS"]
        assert inputs["read_only"] is True


def test_docker_waits_longer_than_the_parts_take() -> None:
    for service in SERVICES.values():
        assert int(service["stop_grace_period"].removesuffix("s")) > STOP_S
    assert int(SERVICES["worker"]["healthcheck"]["start_period"].removesuffix("s")) >= START_TIMEOUT_S


def test_api_and_workers_wait_for_redis() -> None:
    for name in ("api", "worker", "worker-cuda"):
        assert SERVICES[name]["depends_on"] == {"redis": {"condition": "service_healthy"}}


def test_the_cuda_worker_is_the_worker_with_another_torch_and_a_device() -> None:
    cuda, cpu = SERVICES["worker-cuda"], SERVICES["worker"]
    assert {key for key in cuda if cuda.get(key) != cpu.get(key)} == {"profiles", "build", "deploy"}
    assert set(cuda["build"]["args"]) == {i.words[0].split("=")[0] for i in WORKER.all("ARG")}
    (device,) = cuda["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert "profiles" not in cpu


def test_both_ways_to_run_redis_keep_data_alike() -> None:
    settings = ("appendonly", "appendfsync", "save", "maxmemory-policy")
    inner = [line for line in CONFIGURATION.splitlines() if line.startswith(settings)]
    assert len(inner) == len(settings)
    assert set(inner) <= set(SERVICES["redis"]["command"][-1].splitlines())


def test_the_guides_name_services_profiles_and_paths_of_the_compose_file() -> None:
    pages = [(REPOSITORY / page).read_text() for page in ("README.md", "docs/deployment.md")]
    blocks = "".join("".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)) for page in pages)
    assert blocks.count("docker compose") >= 4
    assert set(re.findall(r"--scale ([\w-]+)=", blocks)) == {"worker"}
    assert set(re.findall(r"--profile (\w+)", blocks)) == {"cuda"}
    volumes = set(compose(PASSWORD)["volumes"])
    assert set(re.findall(r"-v maskmerge_(\w+):", blocks)) == {"redis", "data"} < volumes
    assert set(re.findall(r"(MASKMERGE_\w+)=", blocks)) <= published_variables()
    for service, command in re.findall(r"docker compose run --rm (\w+) (.*?)(?:  #|$)", blocks, re.MULTILINE):
        assert service in SERVICES
        assert command.startswith("maskmerge keys create"), command
    assert set(re.findall(r"docker compose (?:--profile \w+ )?(\w+)", blocks)) <= {
        "build",
        "run",
        "up",
        "down",
        "stop",
        "start",
        "logs",
    }
