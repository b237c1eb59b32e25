"""The engine's process opens no file by a protocol that it does not need. Each test has a process of its own."""

import subprocess
import sys

FORBIDDEN = """
import fsspec
from worker.engine.runtime.protocols import ALLOWED, forbid_others
forbid_others()
import datasets
for url in ("http://127.0.0.1/x", "ftp://127.0.0.1/x", "s3://a/b", "memory://a", "zip://x::https://127.0.0.1/x.zip"):
    try:
        fsspec.core.url_to_fs(url)
    except ValueError as error:
        assert "Protocol not known" in str(error), error
    else:
        raise AssertionError(url)
assert [type(fsspec.filesystem(name)).__name__ for name in ("hf", "file")] == ["HfFileSystem", "LocalFileSystem"]
"""
UNPREPARED = """
from pathlib import Path
from worker.engine.catalog.contracts.spec import ScoreSpec
from worker.engine.inputs.hub import fetch
spec = ScoreSpec(name="", models=[], method={"name": "average"}, recipe={}, folder=Path("x"))
try:
    fetch(spec, lambda *_: None)
except RuntimeError as error:
    assert "any address" in str(error), error
else:
    raise AssertionError("what the hub names would be opened wherever it is")
"""


def test_no_library_opens_a_file_by_another_protocol() -> None:
    subprocess.run([sys.executable, "-c", FORBIDDEN], check=True)


def test_nothing_is_fetched_from_the_hub_without_this_rule() -> None:
    subprocess.run([sys.executable, "-c", UNPREPARED], check=True)
