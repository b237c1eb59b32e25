"""Statistics are kept, found, listed and removed alike in a folder that machines share and in object storage."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from app.contracts.object_storage import Location, ObjectStorage
from app.storage.objects.bucket import Patience
from app.storage.objects.errors import StorageAway
from app.storage.statistics import KeptStatistics, common_statistics, sweep_statistics
from app.storage.tenants import statistics_of, statistics_of_others
from tests.object_storage.server import PROGRAMS, ObjectServer, set_keys
from worker.engine.catalog.contracts.statistics import NODE_SUMS, Facts, Origin, Tokens
from worker.engine.catalog.methods import GRAM
from worker.engine.catalog.primitives.errors import StorageError
from worker.engine.scoring.store import StatisticsStore

TOKENS = Tokens(tokenizer="3", inputs=["input_ids"], max_length=128, versions={"tokenizers": "1"})
FACTS = Facts(statistic=GRAM, checkpoint=f"sha256:{'1' * 64}", rows="2" * 64, tokens=TOKENS, precision="float32")
ORIGIN = Origin(checkpoint="local:expert", dataset="local:rows.jsonl", examples=7)
PARTS = [{"layers.0.heads": torch.rand(1 << 10, generator=torch.manual_seed(3))}, {"pooler": torch.ones(2)}]
KEPT_IN = Location("statistics", "own")


@pytest.fixture(scope="module", params=PROGRAMS)
def server(request: pytest.FixtureRequest) -> Iterator[ObjectServer]:
    with PROGRAMS[request.param]() as server:
        server.make("statistics")
        yield server


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    set_keys(monkeypatch)


@dataclass
class Machine:
    """A machine with a data folder; several have a bucket in common, or else the folder."""

    data_dir: Path
    settings: ObjectStorage
    kept_in: Location | None

    def store(self, tenant: str = "default", max_bytes: int = 10**9) -> StatisticsStore:
        common = common_statistics(self.kept_in, self.settings)
        others = statistics_of_others(self.data_dir, tenant)
        folder = statistics_of(self.data_dir, tenant)
        return StatisticsStore(folder, max_bytes, others, None if common is None else common(tenant))

    def keep(self, facts: Facts, tenant: str = "default") -> None:
        with self.store(tenant) as store:
            store.put(facts, ORIGIN, PARTS)

    def has(self, facts: Facts, tenant: str = "default") -> bool:
        """Whether it finds the bits that were kept."""
        with self.store(tenant) as store:
            found = store.get(facts)
            return found is not None and all(
                torch.equal(found[name], tensor) for part in PARTS for name, tensor in part.items()
            )

    @property
    def kept(self) -> KeptStatistics:
        return KeptStatistics(self.data_dir, self.kept_in, self.settings)

    def listed(self, tenant: str = "default") -> list[str]:
        return [one.address for one in self.kept.of(tenant).newest()]


@pytest.fixture
def objects(tmp_path: Path, server: ObjectServer) -> Iterator[Machine]:
    yield Machine(tmp_path / "first", ObjectStorage(endpoint=server.proxy.url), KEPT_IN)
    server.proxy.heal()
    for key in server.keys("statistics"):
        server.client.delete_object(Bucket="statistics", Key=key)


@pytest.fixture(params=["folder", "objects"])
def machines(request: pytest.FixtureRequest, objects: Machine) -> tuple[Machine, Machine]:
    """Two machines, with folders of their own where a bucket is in common."""
    if request.param == "folder":
        return replace(objects, kept_in=None), replace(objects, kept_in=None)
    return objects, another(objects)


def another(machine: Machine) -> Machine:
    return replace(machine, data_dir=machine.data_dir.with_name("second"))


def numbered(number: int) -> Facts:
    return FACTS.model_copy(update={"seed": number})


def test_what_one_machine_keeps_another_finds_lists_and_removes(machines: tuple[Machine, Machine]) -> None:
    first, second = machines
    assert (first.has(FACTS), second.listed()) == (False, [])
    first.keep(FACTS)
    sums = FACTS.model_copy(update={"statistic": NODE_SUMS, "piece": "0-256 of 1 tokens"})
    first.keep(sums)
    assert second.listed() == [FACTS.address]  # sums of shards are for the job alone
    with pytest.raises(FileNotFoundError):
        second.kept.of("default").get(sums.address)
    kept = second.kept.of("default").get(FACTS.address)
    assert (kept.about.origin, kept.used_at() is not None) == (ORIGIN, True)
    files, held = kept.open()
    with held:
        names = [f"gram-{FACTS.address[:12]}.{number:05d}.safetensors" for number in range(2)]
        assert [file.name for file in files] == names
        for file, part in zip(files, PARTS, strict=True):
            with file.open() as stream:
                content = load(stream.read())
            assert content.keys() == part.keys()
            assert all(torch.equal(content[name], part[name]) for name in part)
    with second.store() as store:
        assert store.holds(FACTS)
        about = store.about(FACTS)
        assert about is not None
        assert about.origin == ORIGIN
        assert store.read(sums) is not None
    assert second.has(FACTS)
    with second.store() as store:
        store.remove([FACTS, sums, numbered(1)])
    assert (second.has(FACTS), second.listed(), first.listed()) == (False, [], [])
    with pytest.raises(FileNotFoundError):
        second.kept.of("default").get(FACTS.address)


def test_another_tenant_finds_by_facts_alone_and_hears_no_name(machines: tuple[Machine, Machine]) -> None:
    first, second = machines
    first.keep(FACTS)
    assert second.listed("other") == []
    with pytest.raises(FileNotFoundError):
        second.kept.of("other").get(FACTS.address)
    assert second.has(FACTS, "other")
    assert first.listed("other") == [FACTS.address]
    origin = first.kept.of("other").get(FACTS.address).about.origin
    assert (origin.checkpoint, origin.dataset) == (FACTS.checkpoint, f"sha256:{FACTS.rows}")
    assert first.kept.of("default").get(FACTS.address).about.origin == ORIGIN


def test_writers_of_one_statistic_disturb_nobody_whatever_bits_they_measured(objects: Machine) -> None:
    second, third = another(objects), replace(objects, data_dir=objects.data_dir.with_name("third"))
    barrier = threading.Barrier(2)

    def parts(scale: float) -> Iterator[dict[str, torch.Tensor]]:
        yield {"x": torch.full((1 << 10,), scale)}
        barrier.wait(60)

    def keep(machine: Machine, scale: float) -> None:
        with machine.store() as store:
            assert store.get(FACTS) is None
            store.put(FACTS, ORIGIN, parts(scale))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(keep, (objects, second), (1.0, 2.0)))
    with third.store() as store:
        found = store.get(FACTS)
        assert found is not None
        assert set(found["x"].tolist()) in ({1.0}, {2.0})
    for machine, scale in ((objects, 1.0), (second, 2.0)):
        with machine.store() as store:
            own = store.get(FACTS)
            assert own is not None
            assert set(own["x"].tolist()) == {scale}


@pytest.mark.parametrize("damage", ["a file is gone", "a file is shorter", "other bytes", "no about.json"])
def test_what_is_not_whole_is_measured_again_and_kept_whole(
    objects: Machine, server: ObjectServer, damage: str
) -> None:
    objects.keep(FACTS)
    file = next(key for key in server.keys("statistics") if key.endswith(".safetensors"))
    content = server.client.get_object(Bucket="statistics", Key=file)["Body"].read()
    if damage == "a file is gone":
        server.client.delete_object(Bucket="statistics", Key=file)
    elif damage == "no about.json":
        about = next(key for key in server.keys("statistics") if key.endswith("default.json"))
        server.client.put_object(Bucket="statistics", Key=about, Body=b'{"facts": ')
    else:
        body = content[:-1] + (b"" if damage == "a file is shorter" else b"\x55")
        server.client.put_object(Bucket="statistics", Key=file, Body=body)
    second = another(objects)
    with second.store() as store:
        assert store.get(FACTS) is None
        store.put(FACTS, ORIGIN, PARTS)
    third = replace(objects, data_dir=objects.data_dir.with_name("third"))
    assert third.has(FACTS)
    assert [one.address for one in third.kept.of("default").newest()] == [FACTS.address]


def test_what_a_sweep_removes_after_a_job_has_listed_it_is_measured_again_and_uploaded_whole(
    objects: Machine, server: ObjectServer
) -> None:
    objects.keep(FACTS)
    second = another(objects)
    with second.store() as store:
        assert store.holds(FACTS)
        sweep_statistics(KEPT_IN, objects.settings, 0)
        assert server.keys("statistics") == []
        assert store.get(FACTS) is None
        store.put(FACTS, ORIGIN, PARTS)
    assert replace(objects, data_dir=objects.data_dir.with_name("third")).has(FACTS)


def test_storage_that_fails_is_asked_again_and_one_that_stalls_fails_the_job_and_keeps_no_half(
    objects: Machine, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = another(objects)
    server.proxy.failures = 2
    objects.keep(FACTS)
    server.proxy.cuts = 1
    assert second.has(FACTS)
    assert (server.proxy.failures, server.proxy.cuts) == (0, 0)
    impatient = Patience(request_s=0.5, retries=1, total_s=1)
    for module in ("common.AT_WORK", "common.IN_PASSING", "bucket.AT_THE_DOOR", "objects.AT_WORK"):
        monkeypatch.setattr(f"app.storage.statistics.{module}", impatient)

    def parts() -> Iterator[dict[str, torch.Tensor]]:
        yield PARTS[0]
        server.proxy.is_stalled = True
        yield PARTS[1]

    with objects.store() as store:
        assert store.get(numbered(1)) is None
        with pytest.raises(StorageError, match="statistics cannot be kept or found: bucket") as caught:
            store.put(numbered(1), ORIGIN, parts())
    assert caught.value.retryable
    third = replace(objects, data_dir=objects.data_dir.with_name("third"))
    with pytest.raises(StorageError):
        third.has(FACTS)
    with pytest.raises(StorageAway):
        third.listed()
    sweep_statistics(objects.kept_in, objects.settings, 0)  # it is left to the next
    server.proxy.heal()
    assert third.has(FACTS)
    assert not third.has(numbered(1))
    assert objects.has(numbered(1))  # what it measured is in its folder, and is uploaded now
    assert third.has(numbered(1))


def test_two_sweeps_remove_what_was_used_longest_ago_and_what_was_left(
    objects: Machine, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects.keep(numbered(0))
    objects.keep(numbered(1))
    time.sleep(1.1)  # times in buckets are whole seconds
    objects.keep(numbered(2))
    monkeypatch.setattr("app.storage.statistics.common.RENEWED_S", 0.0)
    assert objects.has(numbered(0))  # used now
    size = sum(one["Size"] for one in server.client.list_objects_v2(Bucket="statistics")["Contents"])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: sweep_statistics(KEPT_IN, objects.settings, size - 1), range(2)))
    assert set(objects.listed()) == {numbered(0).address, numbered(2).address}
    left = "own/statistics/" + "4" * 64 + "/" + "5" * 64 + "/" + "6" * 64 + ".safetensors"
    server.client.put_object(Bucket="statistics", Key=left, Body=b"half")
    sweep_statistics(KEPT_IN, objects.settings, size)
    assert left in server.keys("statistics")
    monkeypatch.setattr("app.storage.statistics.objects.ABANDONED_S", -10.0)
    sweep_statistics(KEPT_IN, objects.settings, size)
    assert left not in server.keys("statistics")
    assert len(objects.listed()) == 2


def test_a_folder_with_too_little_room_is_filled_from_the_bucket_again(objects: Machine) -> None:
    for number in range(3):
        objects.keep(numbered(number))
    second = another(objects)
    with second.store(max_bytes=5_000) as store:
        for number in (0, 1, 2, 0):
            found = store.get(numbered(number))
            assert found is not None
            assert torch.equal(found["layers.0.heads"], PARTS[0]["layers.0.heads"])
        assert len(list(store.folder.iterdir())) <= 2
    assert len(second.listed()) == 3
