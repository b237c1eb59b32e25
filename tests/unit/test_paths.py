"""What messages tell of paths of this machine: their last parts."""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors
import tokenizers

from app.contracts.jobs import ErrorCode, JobError
from tests.conftest import RESULT
from worker.engine.catalog.contracts.report import MergeResult
from worker.engine.catalog.primitives import paths
from worker.engine.catalog.primitives.errors import InvalidCheckpoint
from worker.engine.catalog.primitives.paths import hide, in_one_line, without_paths

HOME = str(Path.home())


@pytest.fixture(autouse=True)
def nothing_registered() -> Iterator[None]:
    before = set(paths._hidden)
    yield
    paths._hidden.clear()
    paths._hidden.update(before)
    paths._patterns.cache_clear()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[Errno 2] No such file: '/usr/share/a/config.json'", "[Errno 2] No such file: 'config.json'"),
        ("[Errno 18] cross-device: '/usr/a b/c d.json' -> '/var/e'", "[Errno 18] cross-device: 'c d.json' -> 'e'"),
        ('File "/usr/lib/python3/x y/z.py", line 3', 'File "z.py", line 3'),
        ("cannot open /usr/lib/a/model.safetensors, it is short", "cannot open model.safetensors, it is short"),
        ("PosixPath('/var/lib/a')", "PosixPath('a')"),
        ("OSError(b'/var/lib/a')", "OSError(b'a')"),
        ("file:///var/lib/a.json is odd", "a.json is odd"),
        ("in (/usr/lib/a/) and [/usr/lib/b]", "in (a) and [b]"),
        ("//usr//lib//a", "a"),
        ("/usr/lib/a", "a"),
        (f"error:{tempfile.gettempdir()}/xyz/config.json", "error:config.json"),
        (f"{sys.prefix}/lib/python3/site-packages/transformers/x.py", "x.py"),
        (f"{HOME}/.cache/huggingface/hub/models--a--b/snapshots/c/config.json", "config.json"),
    ],
)  # fmt: skip
def test_of_an_absolute_path_the_last_part_is_left(text: str, expected: str) -> None:
    assert without_paths(text) == expected
    assert without_paths(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "checkpoint local:experts/sst2: config.json is missing",
        "'local:/usr/lib/a' must be a relative path without '..'",
        "https://example.org/usr/lib/a and http://127.0.0.1:8000/usr/lib/a",
        "hf:org/name@main",
        "see GET /jobs/0123/artifacts and/or /methods",
        "tensor encoder/layer/0 has 3/4 of its rows; 1/2",
        "no paths at all",
        "models/a/model.safetensors has 7 bytes",
        "a / b, //, /",
    ],
)
def test_what_is_no_path_of_this_machine_stays(text: str) -> None:
    assert without_paths(text) == text


def test_registered_folders_are_hidden_also_with_spaces_and_through_links(tmp_path: Path) -> None:
    real = tmp_path / "my models"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    hide(tmp_path / "link")
    for folder in (real, tmp_path / "link"):
        assert without_paths(f"error:{folder}/a/config.json: broken") == "error:config.json: broken"
        assert str(tmp_path) not in without_paths(f"root {folder} is gone")


def test_long_texts_take_no_time() -> None:
    begin = time.monotonic()
    for text in ("/" * 200_000, "/usr/" * 50_000, "'/usr/a" * 20_000, "/usr/" + "a" * 200_000, '"/' * 100_000):
        without_paths(text)
    assert time.monotonic() - begin < 5


def raised_by_safetensors(folder: Path) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it is
        safetensors.safe_open(folder / "model.safetensors", framework="pt")
    return caught.value


def raised_by_tokenizers(folder: Path) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return caught.value


def raised_by_the_system(folder: Path) -> BaseException:
    with pytest.raises(OSError, match="No such file") as caught:
        os.rename(folder / "a", folder / "b")
    return caught.value


def raised_by_transformers(folder: Path) -> BaseException:
    import transformers

    (folder / "config.json").write_text("{")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        transformers.AutoConfig.from_pretrained(folder)
    return caught.value


def raised_by_datasets(folder: Path) -> BaseException:
    import datasets

    with pytest.raises(Exception) as caught:  # noqa: PT011
        datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), cache_dir=str(folder / "cache"))
    return caught.value


@pytest.mark.parametrize(
    "raised",
    [raised_by_safetensors, raised_by_tokenizers, raised_by_the_system, raised_by_transformers, raised_by_datasets],
)
def test_what_libraries_and_the_system_say_of_a_missing_or_broken_file_names_no_folder(
    raised: object, tmp_path: Path
) -> None:
    assert callable(raised)
    error = raised(tmp_path)
    assert str(tmp_path) not in in_one_line(error)
    assert str(tmp_path) not in InvalidCheckpoint("local:a", str(error), cause=str(error)).message


def test_errors_and_notes_of_a_job_hold_no_path_whoever_made_them(tmp_path: Path) -> None:
    text = f"cannot read {tmp_path}/a.json"
    error = JobError(code=ErrorCode.INTERNAL, message=text, detail={"file": f"{tmp_path}/a.json", "all": [text]})
    assert (error.message, error.detail) == ("cannot read a.json", {"file": "a.json", "all": ["cannot read a.json"]})
    refused = InvalidCheckpoint("local:a", text, file=f"{tmp_path}/a.json")
    assert (refused.message, refused.detail["file"]) == ("checkpoint local:a: cannot read a.json", "a.json")
    assert MergeResult.model_validate({**RESULT.model_dump(), "notes": [text]}).notes == ["cannot read a.json"]
