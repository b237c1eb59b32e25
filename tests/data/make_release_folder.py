"""Makes `release_<commit>.tar.xz`: the data folder that a release leaves behind, for those after it to go on with.

It runs with the code of that release, in a checkout of it (`git worktree add`), and that release's `.venv`:

    PYTHONPATH=. python make_release_folder.py release_<commit>.tar.xz

The archive has `data/`, as the stopped service left it: one job that measured and succeeded, one with a name of its
own, one that failed, and one that waits; `inputs/`, which the jobs read; and `key.txt`, an API key of the tenant
`default`.
"""

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import mkdtemp

from tests.conftest import REPOSITORY, Service, free_port, tiny_recipe
from tests.tiny import tiny_checkpoint, write_rows

WHOLE_SECONDS = 1_700_000_000  # the archive keeps no smaller part of a file's time, by which jobs know their inputs
OF_A_RUN = ("lock", "redis.conf", "redis.sock")


def make(target: Path) -> None:
    root = Path(mkdtemp(prefix="release-"))
    inputs, data = root / "inputs", root / "data"
    data.mkdir()
    for seed, (name, labels) in enumerate({"a": 2, "b": 3}.items()):
        tiny_checkpoint(inputs / "checkpoints" / name, labels=labels, seed=seed)
        write_rows(inputs / "rows" / f"{name}.jsonl", count=200, labels=labels, seed=seed)
    for path in inputs.rglob("*"):
        os.utime(path, (WHOLE_SECONDS, WHOLE_SECONDS))
    made = subprocess.run(
        [sys.executable, "-m", "app.cli", "keys", "create", "--scope", "admin", "--data-dir", str(data)],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
        text=True,
    )
    key = made.stdout.strip()
    (root / "key.txt").write_text(key)
    service = Service(data, inputs, free_port(), key=key)
    service.start()
    measured = {**tiny_recipe("a", "b"), "name": "measured", "labels": {"team": "search"}}
    first = service.finished(service.submit(measured))
    assert first["status"] == "succeeded", first
    plain = {**tiny_recipe("a", "b", name="average"), "evaluate": False}
    with service.http as http:
        named = http.put("/merge/nightly", json=plain)
    assert service.finished(named.json()["id"])["status"] == "succeeded"
    late = {**plain, "name": "late", "deadline_seconds": 0.001}
    assert service.finished(service.submit(late))["status"] == "failed"
    waiting = {**tiny_recipe("a", "b"), "name": "waiting"}
    waiting["models"][0]["checkpoint"] = f"job:{first['id']}/a"
    service.submit_held(waiting)
    assert service.stop() == 0
    with tarfile.open(target, "w:xz", preset=9) as archive:
        for name in ("data", "inputs", "key.txt"):
            archive.add(root / name, name, filter=lambda info: None if Path(info.name).name in OF_A_RUN else info)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
