"""Redis that others run: servers that Sentinel watches, users with a password file, TLS."""

import asyncio
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trustme
from pydantic import SecretStr
from redis import Redis
from redis.exceptions import AuthenticationError, RedisError, TimeoutError

from app.contracts.jobs import Status
from app.contracts.settings import Settings
from app.embedded_redis import find_server
from app.storage import connection
from app.storage.connection import connect, connect_for_answers, connect_for_rq, connect_for_watching
from app.storage.jobs import JobStore
from app.storage.records import Idempotency, NewJob
from app.storage.redis_address import RedisAddress
from app.storage.scripts import NotReplicated
from tests.conftest import HANGS_S, REPOSITORY, RESULT, Service, free_port, tiny_recipe, wait_until
from worker.__main__ import run
from worker.health import problem

DOCS = (REPOSITORY / "docs" / "scaling.md").read_text()
PASSWORD = "s3cret/word"
SERVERS, SENTINELS = 3, 3
SERVER = """\
port {port}
bind 127.0.0.1
dir {folder}
appendonly yes
appendfsync always
save ""
min-replicas-to-write 1
min-replicas-max-lag 10
masteruser replica
masterauth {password}
user default off
{users}
{follows}
"""
SENTINEL = """\
port {port}
bind 127.0.0.1
dir {folder}
sentinel monitor maskmerge 127.0.0.1 {first} 2
sentinel auth-user maskmerge sentinel
sentinel auth-pass maskmerge {password}
sentinel down-after-milliseconds maskmerge 1000
sentinel failover-timeout maskmerge 5000
user default off
user maskmerge on >{password} allchannels +@all
sentinel sentinel-user maskmerge
sentinel sentinel-pass {password}
"""


class Watched:
    """Servers of Redis, the first of which takes writes at first, and the processes of Sentinel that watch them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ports = [free_port() for _ in range(SERVERS)]
        self.sentinels = [free_port() for _ in range(SENTINELS)]
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self.password_file = root / "password"
        self.password_file.write_text(f"{PASSWORD}\n")
        users = "\n".join(line.replace("PASSWORD", PASSWORD) for line in DOCS.splitlines() if line.startswith("user "))
        assert users.count("user ") == 3
        for port in self.ports:
            follows = "" if port == self.ports[0] else f"replicaof 127.0.0.1 {self.ports[0]}"
            self._write(SERVER.format(port=port, folder=root, password=PASSWORD, users=users, follows=follows), port)
        for port in self.sentinels:
            self._write(SENTINEL.format(port=port, folder=root, first=self.ports[0], password=PASSWORD), port)

    def _write(self, text: str, port: int) -> None:
        folder = self.root / str(port)
        folder.mkdir()
        (folder / "redis.conf").write_text(text.replace(f"dir {self.root}", f"dir {folder}"))

    def start(self, port: int) -> None:
        sentinel = ["--sentinel"] if port in self.sentinels else []
        command = [find_server(), str(self.root / str(port) / "redis.conf"), *sentinel]
        self._processes[port] = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def kill(self, port: int) -> None:
        process = self._processes.pop(port)
        process.kill()
        process.wait()

    def start_all(self) -> None:
        for port in self.ports:
            self.start(port)
        wait_until(lambda: self.replicas(self.ports[0]) == SERVERS - 1, "the replicas to follow")
        for port in self.sentinels:
            self.start(port)
        # They hear of each other, and of the replicas, from the server that they watch.
        wait_until(lambda: all(map(self._knows_all, self.sentinels)), "Sentinel to know all", interval_s=0.2)

    def end(self) -> None:
        for port in [*self._processes]:
            self.kill(port)

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.sentinels)
        files = f"password_file={self.password_file}&sentinel_password_file={self.password_file}"
        return f"redis+sentinel://maskmerge@{hosts}/maskmerge?{files}&sentinel_username=maskmerge"

    def replicas(self, port: int) -> int:
        """How many replicas follow a server closely; -1 where it does not answer."""
        with suppress(RedisError), Redis(port=port, username="maskmerge", password=PASSWORD) as client:
            return int(client.info("replication")["min_slaves_good_slaves"])
        return -1

    def master(self) -> int:
        """The port of the server that takes writes, as Sentinel says."""
        with Redis(port=self.sentinels[0], username="maskmerge", password=PASSWORD, decode_responses=True) as sentinel:
            _, port = sentinel.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "maskmerge")
        return int(port)

    def _knows_all(self, port: int) -> bool:
        with suppress(RedisError), Redis(port=port, username="maskmerge", password=PASSWORD) as sentinel:
            (state,) = sentinel.sentinel_masters().values()
            return (state["num-slaves"], state["num-other-sentinels"]) == (SERVERS - 1, SENTINELS - 1)
        return False


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    watched = Watched(tmp_path_factory.mktemp("sentinel"))
    try:
        watched.start_all()
        yield watched
    finally:
        watched.end()


@pytest.mark.long
def test_accepted_jobs_outlast_the_server_that_takes_writes(
    watched: Watched, tmp_path: Path, tiny_inputs: Path
) -> None:
    """The service has a user that may do no more than the page says."""
    environment = {"MASKMERGE_REDIS_URL": watched.url, "MASKMERGE_LEASE_SECONDS": "120"}
    service = Service(tmp_path / "data", tiny_inputs, free_port(), environment)
    recipe = tiny_recipe("a", "b", name="average")
    service.start()
    try:
        runs, engine = service.submit_held(recipe)
        waits = service.submit(recipe)
        lost = watched.master()
        watched.kill(lost)  # nothing is written after the answer, which is what the job has to rely on
        wait_until(lambda: watched.master() != lost, "another server to take writes", interval_s=0.2)
        later = wait_until(lambda: _submitted(service, recipe), "a job to be accepted", interval_s=0.5)
        engine.resume()
        for job_id in (runs, waits, later):
            job = service.finished(job_id)
            assert (job["status"], job["attempt"]) == ("succeeded", 1), service.log
        watched.start(lost)
        wait_until(lambda: watched.replicas(watched.master()) == SERVERS - 1, "the server to follow", interval_s=0.2)
        assert service.stop() == 0
    finally:
        if service.process is not None and service.process.poll() is None:
            service.stop()
    assert PASSWORD not in service.log
    assert "Traceback" not in service.log, service.log


def _submitted(service: Service, recipe: dict[str, Any]) -> str | None:
    response = service.post("/merge", json=recipe, headers={"Idempotency-Key": "again"})
    return str(response.json()["id"]) if response.status_code == 202 else None


@pytest.mark.long
def test_an_answer_that_comes_late_is_nobody_elses(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "ANSWER_S", 0.3)
    monkeypatch.setattr(connection, "HUNG_S", 0.0)
    with connect_for_answers(watched.url) as redis:
        redis.set("maskmerge:of-a-test", "mine")
        with pytest.raises(TimeoutError):
            redis.blpop("maskmerge:nothing", 1)
        assert redis.get("maskmerge:of-a-test") == "mine"


@pytest.mark.long
def test_watching_and_taking_find_the_server_too(watched: Watched) -> None:
    async def answer() -> object:
        client = connect_for_watching(watched.url, most=2, longest_wait_s=1)
        try:
            return await asyncio.wait_for(client.ping(), HANGS_S)
        finally:
            await client.aclose()

    assert asyncio.run(answer())
    with connect_for_rq(watched.url) as taking:
        assert taking.ping()
        assert taking.info("replication")["role"] == "master"


@pytest.mark.long
def test_the_user_of_the_service_may_not_do_what_it_need_not(watched: Watched) -> None:
    with connect_for_answers(watched.url) as redis:
        for command in (("FLUSHALL",), ("CONFIG", "GET", "*"), ("GET", "others"), ("KEYS", "*")):
            with pytest.raises(RedisError, match="permission"):
                redis.execute_command(*command)


def test_what_no_replica_has_does_not_count(redis: Redis) -> None:
    """This Redis has none, as one whose replicas were lost."""
    alone = JobStore(redis, "alone", lease_seconds=10, max_losses=1)
    careful = JobStore(redis, "alone", lease_seconds=10, max_losses=1, replicas=1)
    once = Idempotency("key", "digest", 60)
    with pytest.raises(NotReplicated, match="0 of at least 1 replicas"):
        careful.records.create(NewJob({}, "name"), once)
    with pytest.raises(NotReplicated):  # asking again finds the job, and hears no more than before
        careful.records.remembered("default", once)
    with pytest.raises(NotReplicated):
        careful.tasks.claim("worker")
    attempt = alone.tasks.claim("worker")
    assert attempt is not None
    assert attempt.number == 1, "the claim that failed has used up no attempt"
    assert alone.tasks.succeed(attempt, RESULT, "artifact")
    record = careful.records.get(attempt.task.job)
    assert record is not None
    assert record.status is Status.SUCCEEDED


def test_replicas_are_asked_for_where_there_is_sentinel() -> None:
    assert Settings(redis_url="redis://localhost").replicas == 0
    assert Settings(redis_url="redis+sentinel://a,b/service").replicas == 1
    assert Settings(redis_url="redis+sentinel://a,b/service", redis_replicas=0).replicas == 0
    assert Settings(redis_url="rediss://managed", redis_replicas=2).replicas == 2


def test_a_url_of_sentinel_has_all_parts() -> None:
    address = RedisAddress.parse(
        "rediss+sentinel://me:a%2Fb@one:1,[::1]:2,three/main/4?ssl_ca_certs=/ca.pem&sentinel_password=c"
    )
    assert address.sentinels == (("one", 1), ("::1", 2), ("three", 26379))
    assert address.service == "main"
    tls = {"ssl": True, "ssl_ca_certs": "/ca.pem"}
    assert address.options == {"username": "me", "password": "a/b", "db": 4, **tls}
    assert address.sentinel_options == {"password": "c", **tls}
    assert "a/b" not in repr(address)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("localhost:6379", "begins with none of redis://"),
        ("http://:hunter2@redis", "begins with none of"),
        ("redis+sentinel://:hunter2@a,b", "write it as redis+sentinel://"),
        ("redis+sentinel://:hunter2@a:b/service", "server 1 of MASKMERGE_REDIS_URL is no HOST:PORT"),
        ("redis+sentinel://a,me:hunter2,b/service", "server 2 of"),
        ("redis://:hunter2/word@redis", "no host and port that can be read"),
        ("redis+sentinel://:[hunter2]@a/service", "no host and port that can be read"),
        ("redis://:hunter2@a/0?replicas=1", "replicas"),
        ("redis://:hunter2@a?password_file=/x", "a password and a file"),
        ("redis+sentinel://:hunter2@a/service?ssl_no=1", "ssl_no"),
        ("redis+sentinel://:hunter2@a/service?sentinel_no=1", "no"),
        ("redis://a?db=x", "db"),
        ("redis://a?sentinel_password=hunter2", "sentinel_password"),
        ("redis+sentinel://:hunter2@a/service?sentinel_socket_timeout=x", "socket_timeout"),
        ("redis+sentinel://a/service?sentinel_socket_timeout=-1", "sentinel_socket_timeout=-1"),
        ("redis+sentinel://:hunter2@a:99999/service", "port 99999; ports are 1 to 65535"),
        ("redis://:hunter2@a:99999", "ports end at 65535"),
        ("redis://:123#hunter2@a:6379/0", "has a #; write it as %23"),
        ("redis://:hunter2@a:0", "port 0"),
        ("rediss://:hunter2@a?ssl_cert_reqs=x", "SSL"),
        ("redis://:hunter2@a/one", "no number of a database"),
        ("redis://:hunter2@a?protocol=9", "protocol"),
        ("redis://:hunter2@a?redis_connect_func=x", "redis_connect_func"),
    ],
)
def test_what_is_no_url_is_refused_without_its_secrets(url: str, says: str) -> None:
    with pytest.raises(ValueError, match="MASKMERGE_REDIS_URL") as refused:
        connect(url, patience=0)
    assert says in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_a_worker_says_what_is_wrong_with_its_url(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = SecretStr("http://:hunter2@redis")
    assert run(Settings(redis_url=url, data_dir=tmp_path)) == 2
    assert "begins with none of" in capsys.readouterr().err


def test_without_sentinel_the_error_names_the_servers_in_short() -> None:
    url = f"redis+sentinel://:hunter2@127.0.0.1:{free_port()}/main"
    says = "no process of Sentinel answers that knows a server of 'main' that takes writes"
    with connect_for_answers(url) as redis, pytest.raises(RedisError, match=f"^{says}$"):
        redis.ping()

    async def answer() -> None:
        client = connect_for_watching(url, most=1, longest_wait_s=1)
        try:
            await client.ping()
        finally:
            await client.aclose()

    with pytest.raises(RedisError, match=f"^{says}$"):
        asyncio.run(answer())
    health = problem(Settings(redis_url=SecretStr(url)))
    assert health == f"Redis does not answer: {says}"
    assert "write it as" in str(problem(Settings(redis_url=SecretStr("redis+sentinel://a"))))


class TlsDoor:
    """Passes TLS connections on to a server that has none of its own, as a managed Redis looks from outside."""

    def __init__(self, certificate: trustme.LeafCert, port: int) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(context)
        self._listens = context.wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True)
        self.port: int = self._listens.getsockname()[1]
        self._to = port
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._listens.accept()
            except ssl.SSLError:  # a client that does not trust the certificate
                continue
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._to))
            for ends in ((near, far), (far, near)):
                threading.Thread(target=partial(self._pass_on, *ends), daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError), source, target:
            while data := source.recv(65536):
                target.sendall(data)

    def close(self) -> None:
        self._listens.close()


def test_a_managed_redis_is_reached_by_tls_with_a_user_and_a_password_that_changes(
    watched: Watched, tmp_path: Path
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    door = TlsDoor(authority.issue_cert("localhost"), watched.master())
    password = tmp_path / "password"
    password.write_text(PASSWORD)
    url = f"rediss://maskmerge@localhost:{door.port}/0?ssl_ca_certs={tmp_path}/ca.pem&password_file={password}"
    try:
        with connect_for_answers(url) as redis:
            assert redis.ping()
            password.write_text("another")
            redis.connection_pool.disconnect()
            with pytest.raises(AuthenticationError):
                redis.ping()
            password.write_text(PASSWORD)
            assert redis.ping()

        async def answer() -> object:
            client = connect_for_watching(url, most=1, longest_wait_s=1)
            try:
                return await client.ping()
            finally:
                await client.aclose()

        assert asyncio.run(answer())
        untrusted = f"{url.partition('?')[0]}?password_file={password}"
        with (
            connect(untrusted, patience=0) as distrusting,
            pytest.raises(RedisError, match="certificate verify failed"),
        ):
            distrusting.ping()
    finally:
        door.close()
