"""Settings and the command line."""

import os
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import pytest

from app.cli import main
from app.contracts.settings import MlflowServer, Settings
from app.embedded_redis import EmbeddedRedis, find_server


def test_settings_are_read_from_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKMERGE_LOCAL_ROOTS", "/one:/two")
    monkeypatch.setenv("MASKMERGE_LEASE_SECONDS", "20")
    settings = Settings()
    assert settings.local_roots == (Path("/one"), Path("/two"))
    assert settings.lease_seconds == 20


def test_the_prefix_of_keys_is_the_name_of_the_queue_unless_it_is_set() -> None:
    assert Settings().prefix == Settings().queue == "maskmerge"
    assert Settings(queue="gpu").prefix == "gpu"
    assert Settings(queue="gpu", key_prefix="records").prefix == "records"


@pytest.mark.parametrize("url", ["https://mlflow.services.org", "http://mlflow:5000/base/s"])
def test_addresses_of_mlflow_may_have_any_letter(url: str) -> None:
    assert MlflowServer(url=url).url == url


@pytest.mark.parametrize(
    "url", ["https://a b.org", "https://u@a.org", "https://a.org/?x", "https://a.org/#x", "ftp://a"]
)
def test_addresses_of_mlflow_have_no_blanks_users_or_queries(url: str) -> None:
    with pytest.raises(ValueError, match="url"):
        MlflowServer(url=url)


def test_settings_prints_every_setting_and_masks_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MASKMERGE_REDIS_URL", "redis://:hunter2@localhost")
    assert main(["settings"]) == 0
    printed = capsys.readouterr().out
    assert "hunter2" not in printed
    for name, field in Settings.model_fields.items():
        assert f"MASKMERGE_{name.upper()}=" in printed
        assert field.description, f"{name} has no meaning"
        assert indent(field.description, "    ") in printed


def test_settings_end_quietly_when_their_reader_has_enough() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "app.cli", "settings"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("value", "seconds"), [("90d", 7_776_000), ("12h", 43_200), ("1.5m", 90), ("30s", 30), ("45", 45), ("0.5", 0.5)]
)
def test_a_time_may_have_a_unit_and_outlasts_being_handed_on(
    monkeypatch: pytest.MonkeyPatch, value: str, seconds: float
) -> None:
    monkeypatch.setenv("MASKMERGE_JOB_RETENTION", value)
    assert Settings().job_retention == seconds
    monkeypatch.setenv("MASKMERGE_JOB_RETENTION", str(Settings().job_retention))  # as the supervisor does
    assert Settings().job_retention == seconds


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("JOB_RETENTION", "0"),
        ("JOB_RETENTION", "-1d"),
        ("JOB_RETENTION", "1y"),
        ("JOB_RETENTION", "inf"),
        ("PORT", "no"),
        ("PORT", "70000"),
        ("QUEUE", "with space"),
        ("WORKERS", "0"),
        ("LOG_LEVEL", "LOUD"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, value: str
) -> None:
    monkeypatch.setenv(f"MASKMERGE_{variable}", value)
    assert main(["settings"]) == 2
    assert f"MASKMERGE_{variable}" in capsys.readouterr().err


def test_the_api_without_redis_says_what_to_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["api"]) == 2
    assert "MASKMERGE_REDIS_URL" in capsys.readouterr().err


def test_the_embedded_redis_keeps_its_password_to_itself(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    configuration = tmp_path / "redis" / "redis.conf"
    assert configuration.stat().st_mode & 0o777 == 0o600
    assert configuration.parent.stat().st_mode & 0o777 == 0o700
    password = configuration.read_text().split("requirepass ")[1].split()[0]
    assert len(password) >= 32
    assert password not in " ".join(server.command)
    assert Path(find_server()).is_file()


def test_a_long_data_folder_still_has_a_socket(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / ("long" * 30))
    assert len(str(server.socket)) < 108
    assert server.socket.parent.stat().st_mode & 0o777 == 0o700
    server.clean()
    assert not server.socket.parent.exists()
