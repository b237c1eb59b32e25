"""Names and manifests of uploads, and the folder in which they are kept."""

import fcntl
import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from app.contracts.uploads import (
    ENDINGS,
    MOST_FILES,
    ManifestError,
    ending,
    manifest,
    name_problem,
    read_manifest,
)
from app.storage.uploads import About, TenantUploads, Upload, UploadBusy, UploadFolders, UploadRefused, remove_unused
from worker.engine.catalog.checkpoints.files import (
    COMPANIONS,
    INDEX,
    SENTENCE_FILES,
    TOKENIZER_FILES,
    WEIGHTS,
)
from worker.engine.catalog.data.rows import FORMATS, PARQUET

DIGEST = "0" * 64
ROWS = b'{"text": "a"}\n'


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def send(uploads: TenantUploads, content: bytes, name: str = "rows.jsonl", others: tuple[Path, ...] = ()) -> Upload:
    about = About(kind="file", name=name, bytes=len(content))
    with uploads.writing(digest(content), about, anew=True) as writer:
        writer.write(content)
        writer.check()
        return writer.publish_file(others)


def test_every_file_of_a_checkpoint_and_every_format_of_rows_is_taken() -> None:
    names = ["config.json", INDEX, WEIGHTS, *TOKENIZER_FILES, *COMPANIONS, *SENTENCE_FILES]
    assert [name for name in names if name_problem(name) is not None] == []
    assert {*FORMATS, PARQUET} <= {*ENDINGS}


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../a.json", "/a.json", "a/b.json", "a\\b.json", ".hidden.json", "a\n.json", "a\0.json",
     "a" * 200 + ".json", "pytorch_model.bin", "model.pt", "model.pth", "a.pkl", "a.py", "a.ckpt", "a", "a.zip",
     "a.safetensors.index", "a.json.gz"],
)  # fmt: skip
def test_hostile_names_and_pickles_are_refused_by_name(name: str) -> None:
    assert name_problem(name) is not None
    with pytest.raises(ManifestError):
        read_manifest(json.dumps({"files": {name: DIGEST}}).encode() if name != "a/b.json" else b"[]")


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"\xff", b"{}", b'{"files": {}}', b'{"files": []}', b'{"files": {"a.json": 1}}', b"[" * 100_000,
     b'{"files": {"a.json": "X"}}', json.dumps({"files": {"a.json": DIGEST}, "more": 1}).encode(),
     json.dumps({"files": {"a.json": "A" * 64}}).encode(),
     json.dumps({"files": {"a/b/c.json": DIGEST}}).encode(), json.dumps({"files": {"../a.json": DIGEST}}).encode(),
     json.dumps({"files": {"//a.json": DIGEST}}).encode(),
     json.dumps({"files": {f"{'a' * 300}/a.json": DIGEST}}).encode(),
     json.dumps({"files": {"..\\x/a.json": DIGEST}}).encode(),
     json.dumps({"files": {"a.json": DIGEST, "a.json/b.json": DIGEST}}).encode(),
     json.dumps({"files": {f"{number}.json": DIGEST for number in range(MOST_FILES + 1)}}).encode(),
     f'{{"files": {{"a.json": "{DIGEST}", "a.json": "{"1" * 64}"}}}}'.encode()],
)  # fmt: skip
def test_a_manifest_that_is_none_is_refused(content: bytes) -> None:
    with pytest.raises(ManifestError):
        read_manifest(content)


def test_the_same_files_have_the_same_manifest() -> None:
    files = {"config.json": DIGEST, "1_Pooling/config.json": "1" * 64}
    assert manifest(files) == manifest(dict(reversed(files.items())))
    assert read_manifest(manifest(files)) == files
    assert ending("A.JSONL") == ".jsonl"


def test_bytes_that_arrived_are_kept_and_nothing_reads_them_before_all_are_there(tmp_path: Path) -> None:
    uploads = TenantUploads(tmp_path)
    about = About(kind="file", name="rows.jsonl", bytes=len(ROWS))
    with uploads.writing(digest(ROWS), about, anew=False) as writer:
        writer.write(ROWS[:5])
    found = uploads.find(digest(ROWS))
    assert found is not None
    assert (found.received, found.complete) == (5, False)
    with uploads.writing(digest(ROWS), about, anew=False) as writer:
        assert writer.received == 5
        writer.write(ROWS[5:])
        writer.check()
        done = writer.publish_file(())
    assert uploads.place(done).path.read_bytes() == ROWS
    assert uploads.place(done).path.name == "rows.jsonl"
    assert uploads.stored_bytes() == 4096


def test_one_request_at_a_time_sends_an_upload(tmp_path: Path) -> None:
    uploads, about = TenantUploads(tmp_path), About(kind="file", name="rows.jsonl", bytes=len(ROWS))
    with uploads.writing(digest(ROWS), about, anew=False) as writer:
        with pytest.raises(UploadBusy), uploads.writing(digest(ROWS), about, anew=True):
            pass
        with pytest.raises(UploadBusy):
            uploads.remove(digest(ROWS))
        found = uploads.use(digest(ROWS))  # of one that is not complete nobody waits for the end
        assert found is not None
        assert not found.complete
        writer.write(ROWS)
    assert uploads.remove(digest(ROWS))
    assert uploads.find(digest(ROWS)) is None
    assert os.listdir(tmp_path) == []


def test_a_folder_is_made_of_the_tenants_own_files_and_outlives_them(tmp_path: Path) -> None:
    uploads, other = TenantUploads(tmp_path / "own"), TenantUploads(tmp_path / "other")
    send(other, b"{}", "config.json")
    files = {"config.json": digest(b"{}"), "1_Pooling/config.json": digest(b"{}")}
    about = About(kind="folder", name=None, bytes=len(manifest(files)))
    with uploads.writing(digest(manifest(files)), about, anew=True) as writer:
        writer.write(manifest(files))
        writer.check()
        with pytest.raises(UploadRefused, match="there is no such upload"):  # the digest alone proves nothing
            writer.publish_folder(files)
        send(uploads, b"{}", "rows.jsonl")
        folder = writer.publish_folder(files)
    assert uploads.stored_bytes() == 4096  # one file, in three places
    assert uploads.remove(digest(b"{}"))
    place = uploads.place(folder)
    assert {path: (place.path / path).read_bytes() for path in files} == dict.fromkeys(files, b"{}")
    assert place.root == place.path


def test_a_file_may_not_take_another_format_in_a_folder(tmp_path: Path) -> None:
    uploads = TenantUploads(tmp_path)
    send(uploads, b"{}", "rows.jsonl")
    files = {"model.safetensors": digest(b"{}")}
    about = About(kind="folder", name=None, bytes=1)
    with (
        uploads.writing(digest(manifest(files)), about, anew=True) as writer,
        pytest.raises(UploadRefused, match="of another format"),
    ):
        writer.publish_folder(files)


def test_a_file_that_another_tenant_has_is_on_the_disk_once(tmp_path: Path) -> None:
    folders = UploadFolders(tmp_path)
    first = send(folders.of("a"), ROWS)
    second = send(folders.of("b"), ROWS, "mine.jsonl", tuple(folders.others("b")))
    places = folders.of("a").place(first).path, folders.of("b").place(second).path
    assert places[0].samefile(places[1])
    assert places[1].name == "mine.jsonl"
    assert [folders.of(tenant).stored_bytes() for tenant in "ab"] == [4096, 4096]
    folders.of("a").remove(digest(ROWS))
    assert places[1].read_bytes() == ROWS


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", b"PK\x03\x04rest"), ("a.jsonl", b"\x80\x04\x95rest"), ("a.parquet", b"PAR rest PAR1"),
     ("a.parquet", b"PAR1 cut")],
)  # fmt: skip
def test_content_that_is_not_what_its_name_says_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(UploadRefused):
        send(TenantUploads(tmp_path), content, name)


def test_an_upload_that_nothing_uses_is_removed_and_one_that_a_job_reads_is_not(tmp_path: Path) -> None:
    folders = UploadFolders(tmp_path)
    contents = {name: name.encode() for name in ("unused", "held", "used")}
    for content in contents.values():
        folder = send(folders.of("t"), content).folder
        os.utime(folder, (1, 1))
    held = {("t", digest(contents["held"])), ("other", digest(contents["unused"]))}
    folders.of("t").use(digest(contents["used"]))
    remove_unused(folders, lambda: held, retention_s=1000)
    left = [name for name, content in contents.items() if folders.of("t").find(digest(content)) is not None]
    assert left == ["held", "used"]
    found = folders.of("t").find(digest(contents["held"]))
    assert found is not None
    assert time.time() - found.used < 1000
    assert sorted(os.listdir(found.folder.parent)) == sorted(digest(contents[name]) for name in left)


def test_what_is_used_at_the_moment_is_not_removed(tmp_path: Path) -> None:
    uploads = TenantUploads(tmp_path)
    folder = send(uploads, ROWS).folder
    os.utime(folder, (1, 1))
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # a door that looks at it
    with pytest.raises(UploadBusy):
        uploads.remove(digest(ROWS), unused_since=2)
    os.utime(folder)
    os.close(descriptor)
    assert not uploads.remove(digest(ROWS), unused_since=2)
    assert uploads.use(digest(ROWS)) is not None
