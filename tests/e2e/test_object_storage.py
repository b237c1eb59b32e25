"""A service whose inputs and artifacts are in object storage, from a request to the removal of what it made."""

import hashlib
from pathlib import Path

from app.client import Client
from tests.conftest import make_service, tiny_recipe
from tests.object_storage.server import KEYS, moto


def test_a_merge_of_objects_is_published_downloaded_chained_and_removed(tmp_path: Path, tiny_inputs: Path) -> None:
    with moto() as server:
        server.make("models", "results")
        for name in "ab":
            server.put(f"models/experts/{name}", tiny_inputs / "checkpoints" / name)
            server.put(f"models/rows/{name}.jsonl", tiny_inputs / "rows" / f"{name}.jsonl")
        environment = {
            **KEYS,
            "MASKMERGE_S3_BUCKETS": "models",
            "MASKMERGE_S3_ENDPOINT": server.url,
            "MASKMERGE_ARTIFACT_STORE": "s3:results/maskmerge",
        }
        service = make_service(tmp_path, tiny_inputs, **environment)
        service.start()
        try:
            recipe = tiny_recipe("a", "b", examples=32)
            for name, model in zip("ab", recipe["models"], strict=True):
                model["checkpoint"] = f"s3:models/experts/{name}"
                model["dataset"]["source"] = f"s3:models/rows/{name}.jsonl"
            job = service.finished(service.submit(recipe))
            assert job["status"] == "succeeded", job["error"]
            prefix = f"maskmerge/artifacts/{job['id']}/1"
            assert f"{prefix}/manifest.json" in server.keys("results")
            assert not any((service.data_dir / "work").iterdir())
            with Client(service.url) as client:
                client.download(job["id"], tmp_path / "result")
            listing = service.get(f"/jobs/{job['id']}/artifacts").json()["files"]
            assert len(listing) > 10
            for file in listing:
                content = (tmp_path / "result" / file["name"]).read_bytes()
                assert hashlib.sha256(content).hexdigest() == file["sha256"], file["name"]
            archive = service.get(f"/jobs/{job['id']}/archive")
            assert len(archive.content) == int(archive.headers["content-length"])
            chained = {
                "method": {"name": "average"},
                "models": [{"name": name, "checkpoint": f"job:{job['id']}/{name}"} for name in "ab"],
                "evaluate": False,
            }
            second = service.finished(service.submit(chained))
            assert second["status"] == "succeeded", second["error"]
            secret = KEYS["AWS_SECRET_ACCESS_KEY"]
            assert secret not in service.log
            for process in service.processes().values():
                assert not any(secret in word for word in process.cmdline())
            with service.http as http:
                assert http.delete(f"/jobs/{job['id']}").status_code == 204
                assert http.delete(f"/jobs/{second['id']}").status_code == 204
            assert not any(key.startswith("maskmerge/artifacts/") for key in server.keys("results"))
        finally:
            assert service.stop() == 0
    assert not any((tmp_path / "data" / "work").iterdir())
