"""How fast a merge is whose inputs are in object storage on loopback, against the same inputs on the disk.

    python bench/object_storage.py [--shape NAME] [--rounds N] [--endpoint URL] [--json FILE]

It starts a service of its own. The server at the endpoint, to which AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are the
keys, must send ranges without reading whole objects, which s3rver and MinIO do and moto does not. Times are those of
the job from its start to its end, the best of the rounds, in which the three kinds take turns. The copies of inputs are
removed before each round, so the first merge of objects reads all of them over the network.
"""

import argparse
import shutil
import sys
import time
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import boto3
import httpx

from app.storage.objects.cache import FOLDER
from bench.merging import SHAPES, Row, write_checkpoint
from bench.servers import started
from bench.table import shown

BUCKET = "maskmerge-bench"
TARGET = 0.8


def upload(endpoint: str, folder: Path) -> None:
    """Upload every checkpoint in a folder."""
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    client.create_bucket(Bucket=BUCKET)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client.upload_file(str(path), BUCKET, str(path.relative_to(folder)))


def seconds(client: httpx.Client, prefix: str) -> float:
    """The time of a merge of the two checkpoints below a prefix of references."""
    models = [{"name": name, "checkpoint": f"{prefix}/{name}"} for name in "ab"]
    body = {"method": {"name": "average"}, "models": models, "evaluate": False}
    job = client.post("/merge", json=body).raise_for_status().json()
    while not job["finished_at"]:
        time.sleep(0.1)
        job = client.get(f"/jobs/{job['id']}").raise_for_status().json()
    if job["status"] != "succeeded":
        raise RuntimeError(job["error"]["message"])
    client.delete(f"/jobs/{job['id']}").raise_for_status()
    began, ended = (datetime.fromisoformat(job[name]) for name in ("started_at", "finished_at"))
    return (ended - began).total_seconds()


def measured(endpoint: str, shape: str, rounds: int, folder: Path) -> list[Row]:
    inputs, data = folder / "inputs", folder / "data"
    for seed, name in enumerate("ab", start=1):
        write_checkpoint(SHAPES[shape], inputs / name, seed)
    upload(endpoint, inputs)
    settings = {
        "data_dir": str(data),
        "local_roots": str(folder),
        "s3_buckets": BUCKET,
        "s3_endpoint": endpoint,
        "min_free_bytes": "0",
    }
    times: dict[str, list[float]] = {"disk": [], "first": [], "again": []}
    with started("serve", "", "/readyz", **settings) as api, api.client() as client:
        client.headers.pop("Authorization")
        for _ in range(rounds + 1):
            times["disk"].append(seconds(client, "local:inputs"))
            shutil.rmtree(data / FOLDER, ignore_errors=True)
            times["first"].append(seconds(client, f"s3:{BUCKET}"))
            times["again"].append(seconds(client, f"s3:{BUCKET}"))
    # The first round loads libraries.
    best = {kind: min(found[1:]) for kind, found in times.items()}
    names = {"first": "read over the network", "again": "copied by an earlier job"}
    return [
        {
            "what": f"{shape}: merge of objects {name}, s against the disk",
            "ours": best[kind],
            "reference": best["disk"],
            "ratio": best["disk"] / best[kind],
            "target": f"ratio >= {TARGET}",
            "met": best["disk"] / best[kind] >= TARGET,
        }
        for kind, name in names.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="bert-base")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--endpoint", default="http://127.0.0.1:4568")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with TemporaryDirectory(prefix="maskmerge-bench-") as name:
        rows = measured(options.endpoint, options.shape, options.rounds, Path(name))
    shown(options.json, rows)


if __name__ == "__main__":
    main()
