"""Every setting of the service, read from `MASKMERGE_*` variables."""

import json
import re
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.contracts.addresses import as_address
from app.contracts.api_keys import Tenant
from app.contracts.limits import HIGHEST_PRIORITY, LOWEST_PRIORITY, MAX_BODY_BYTES, Limits, TenantLimits
from app.contracts.object_storage import Location, ObjectStorage
from app.contracts.patterns import check_together, checked_target, overlaps

SEPARATORS = {
    "local_roots": ":",
    "s3_buckets": ",",
    "allowed_hosts": ",",
    "cors_origins": ",",
    "trusted_proxies": ",",
    "publish_targets": ",",
}
"""Between the parts of a variable's value."""
NO_FOLDERS = ("s3", "hf", "http", "https", "local", "job", "upload", "mlflow")
"""Schemes of references and addresses, with which the text before a colon is no folder."""
DEFAULT_PORTS = {"http": 80, "https": 443}
OBJECTS = {
    "tenant_limits": '{"search": {"active_jobs": 4}}',
    "mlflow_servers": '{"prod": {"url": "https://mlflow.example.org"}}',
}
"""Examples of settings in JSON."""
LogFormat = Literal["text", "json"]
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def _seconds(value: object) -> object:
    """Return the seconds of a duration such as `90d`, and any other value unchanged."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)([smhd])", value.strip()) if isinstance(value, str) else None
    return float(found[1]) * UNITS[found[2]] if found else value


def _network(value: object) -> object:
    """Return the network that a text names, and any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return ip_network(value.strip())
    except ValueError as error:
        raise ValueError(f"{error}; write an address or a network, as 10.0.0.7 or 10.0.0.0/24") from error


Network = Annotated[IPv4Network | IPv6Network, BeforeValidator(_network)]


class MlflowServer(BaseModel):
    """A server of MLflow, to whose address no request can add anything."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: Annotated[str, Field(pattern=r"^https?://[^/?#@\s]+(/[^?#\s]*)?$")]
    token_file: Path | None = None
    """File of the bearer token."""
    experiment: Annotated[str, Field(min_length=1, max_length=250)] = "maskmerge"


ServerName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="MASKMERGE_", use_attribute_docstrings=True, frozen=True)

    redis_url: SecretStr | None = None
    """Redis to use, as redis://, rediss:// or unix:// URL, or redis+sentinel://HOST:PORT,HOST:PORT/SERVICE;
    `maskmerge serve` starts its own when this is not set."""
    redis_replicas: Annotated[int, Field(ge=0, le=10)] | None = None
    """Number of replicas of Redis that must have a change of a job before it counts, so that it outlasts the loss of
    the server that takes writes. When not set, 1 with Sentinel and 0 without."""
    data_dir: Path = Path("maskmerge-data")
    """Folder of artifacts and of work in progress (and of the embedded Redis). API and workers share it, unless
    artifacts are in object storage and nothing is uploaded."""
    artifact_store: str = "folder"
    """Place of artifacts and statistics: `folder` keeps them in the data folder, `s3:BUCKET/PREFIX` in object
    storage."""
    s3_buckets: Annotated[tuple[str, ...], NoDecode] = ()
    """Buckets that `s3:` references may name, separated by commas, each with a prefix or without, such as
    `models,data/shared`. `{tenant}` stands for the name of the tenant, as in `local_roots`."""
    s3_endpoint: str | None = None
    """URL of the object storage, such as http://minio:9000; AWS when not set."""
    s3_region: str | None = None
    """Region of the buckets; that of AWS_REGION when not set, or us-east-1."""
    s3_credentials_file: Path | None = None
    """File with the keys to object storage, in the form of ~/.aws/credentials; it is read again every few minutes. When
    not set, the keys are in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or those of the machine's or pod's role."""
    s3_signed_seconds: Annotated[float, BeforeValidator(_seconds), Field(ge=0, le=604_800)] = 900
    """Time for which a signed URL can be used, to which the download of a large file of an artifact in object storage
    is sent: in seconds, or as 15m. With 0, the API sends all files itself."""
    s3_public_endpoint: str | None = None
    """URL of the object storage in signed URLs, where clients reach it by another than `s3_endpoint`."""
    max_cache_bytes: Annotated[int, Field(ge=0)] = 50_000_000_000
    """Room in the data folder for copies of inputs from object storage. Beyond it, copies that no job reads are
    removed, those that were not used for longest first."""
    local_roots: Annotated[tuple[Path, ...], NoDecode] = ()
    """Folders that `local:` references may name, separated by colons; searched in order. `{tenant}` in a path stands
    for the name of the tenant whose key a request has, so that each tenant has a folder of its own."""
    host: str = "127.0.0.1"
    """Address that the API listens on."""
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    """Names and addresses by which clients reach the API, separated by commas, without ports. Loopback names and `host`
    are always allowed; requests for other names are refused."""
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Origins whose pages may call the API from a browser, separated by commas, each exactly as
    https://app.example.org. Without any, pages of other sites can neither change nor read anything."""
    trusted_proxies: Annotated[tuple[Network, ...], NoDecode] = ()
    """Addresses and networks of proxies, separated by commas. `Forwarded` and `X-Forwarded-*` say the client's address,
    the scheme and the host of a request that comes from one of them; from anybody else they are ignored."""
    tls_certificate: Path | None = None
    """File of the certificate with which the API speaks TLS, in PEM, followed by those that signed it. Without it, the
    API speaks plain HTTP."""
    tls_key: Path | None = None
    """File of the certificate's private key, in PEM and without a passphrase. Both files are read again within a minute
    of a change."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port that the API listens on."""
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    """Workers that `maskmerge serve` starts."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """Threads of a worker's arithmetic; the cores divided by the workers when not set."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device on which a worker computes; `auto`: the first CUDA GPU that it sees, else the CPU. A job that asks for a
    `device` is done by workers with that one."""
    queue: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = "maskmerge"
    """Name of the RQ queue that hands jobs to workers."""
    key_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    """Text with which the names of all keys in Redis begin, except those of RQ; the queue's name when not set."""
    lease_seconds: Annotated[float, Field(ge=2, le=3600)] = 10
    """A running attempt that has not renewed its lease for this time counts as lost."""
    max_losses: Annotated[int, Field(ge=1)] = 5
    """Number of times that a job may lose its worker; at the last of them it fails with worker_lost."""
    shard_seconds: Annotated[float, Field(gt=0, le=86_400)] = 20
    """Time that a shard of a job's scoring takes, about. Scoring that would take two of them or more is cut, and all
    workers take shards; a worker that dies loses one."""
    heartbeat_seconds: Annotated[float, Field(ge=2, le=3600)] = 30
    """An engine process sends a heartbeat every second. If it sends nothing and uses no processor time for this long,
    it counts as hung, with a job or without. It is killed and replaced, and its job is tried again."""
    stall_seconds: Annotated[float, Field(ge=2, le=604_800)] = 600
    """If a job makes no progress for this long while its engine uses no processor time or sends no heartbeat, it counts
    as hung too. Other work may take any time; `deadline_seconds` of the request limits it."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = MAX_BODY_BYTES
    """Largest request body, except those of uploads."""
    max_active_jobs: Annotated[int, Field(ge=1)] | None = None
    """Number of jobs of a tenant that run at once; others of the tenant wait. No limit when not set."""
    max_queued_jobs: Annotated[int, Field(ge=1)] | None = None
    """Number of jobs of a tenant that wait; further ones are refused. No limit when not set."""
    max_stored_bytes: Annotated[int, Field(ge=0)] | None = None
    """Bytes of a tenant's artifacts and uploads, with those that its waiting and running jobs are going to write. No
    limit when not set."""
    max_requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Number of a tenant's requests in a minute. No limit when not set."""
    max_priority: Annotated[int, Field(ge=LOWEST_PRIORITY, le=HIGHEST_PRIORITY)] = HIGHEST_PRIORITY
    """Highest `priority` that requests may ask for."""
    tenant_limits: Annotated[dict[Tenant, Limits], NoDecode] = {}
    """Limits of single tenants in place of those above, as JSON, such as `{"search": {"active_jobs": 4}}`. Their names
    are `active_jobs`, `queued_jobs`, `stored_bytes`, `requests_per_minute`, `body_bytes` and `priority`; null is no
    limit."""
    max_failed_keys_per_minute: Annotated[int, Field(ge=1)] = 60
    """Number of requests without a valid key in a minute, from one address. Requests with one are answered all the
    same."""
    min_free_bytes: Annotated[int, Field(ge=0)] = 1_000_000_000
    """Room that is kept free in the data folder. A new job is refused if what it and all waiting and running jobs are
    going to write would leave less."""
    request_seconds: Annotated[float, Field(gt=0, le=3600)] = 30
    """A client must send a whole request within this time, or it is cut off; of an upload, each megabyte."""
    max_worker_bytes: Annotated[int, Field(ge=1)] = 8_000_000_000
    """An engine process that holds more than this after a job is replaced by a fresh one."""
    max_statistics_bytes: Annotated[int, Field(ge=0)] = 20_000_000_000
    """Room for statistics that are kept for later merges, in the data folder and in object storage each. Beyond it,
    those that were not used for longest are removed."""
    job_retention: Annotated[float, BeforeValidator(_seconds), Field(gt=0, le=1e10)] = 90 * 86_400
    """Time for which a job and its artifact are kept after the job's end: in seconds, or as 90d, 12h or 30m. If a
    waiting or running job reads its models, it is kept until that job ends."""
    max_upload_bytes: Annotated[int, Field(ge=1024)] = 100_000_000_000
    """Size of the largest file that can be uploaded."""
    upload_retention: Annotated[float, BeforeValidator(_seconds), Field(gt=0, le=1e10)] = 7 * 86_400
    """Time for which an upload is kept that nothing uses: in seconds, or as 90d, 12h or 30m. A job that names it renews
    that time, and while such a job waits or runs, the upload stays."""
    webhook_allow_private: bool = False
    """Whether webhooks may be sent to private, loopback and other addresses that are not public."""
    webhook_seconds: Annotated[float, Field(ge=0.1, le=300)] = 15
    """A receiver of webhooks must answer within this time, or the attempt has failed."""
    webhook_progress_seconds: Annotated[float, Field(ge=1, le=86_400)] = 10
    """Least time between two `job.progress` of a job."""
    publish_targets: Annotated[tuple[str, ...], NoDecode] = ()
    """Places that requests may publish merges at, separated by commas, where `*` stands for any text, as `hf:acme/*` or
    `mlflow:prod/*`. `{tenant}` stands for the name of the request's tenant; it ends the pattern or is followed by `/`,
    `.` or `_`, and no `*` comes before it. None when not set."""
    hub_token_file: Path | None = None
    """File of the token with which merges are published on the hub, which needs the right to write. HF_TOKEN is for
    reading inputs, and never publishes."""
    mlflow_servers: Annotated[dict[ServerName, MlflowServer], NoDecode] = {}
    """MLflow servers that merges are published at, as JSON by the names that requests have for them, such as
    `{"prod": {"url": "https://mlflow.example.org", "token_file": "/run/secrets/mlflow"}}`; `experiment` is the one of
    the runs, `maskmerge` when not set."""
    predict_seconds: Annotated[float, Field(ge=0.1, le=600)] = 30
    """Seconds within which a worker must answer rows on which a merge is tried. An engine process that is still at
    them then is replaced."""
    publish_seconds: Annotated[float, Field(gt=0, le=86_400)] = 3600
    """Publishing a merge at all its further places must be done within this time, or has failed at what is left."""
    signing_key: Path | None = None
    """File of the private key, in PEM and without a passphrase, that signs the provenance of merges. Without it, they
    are not signed."""
    idempotency_seconds: Annotated[int, Field(ge=60)] = 86_400
    """Seconds for which an Idempotency-Key is remembered."""
    log_format: LogFormat = "text"
    """Format of the log: `text`, or `json` for an object a line."""
    log_level: Annotated[str, Field(pattern=r"^(DEBUG|INFO|WARNING|ERROR)$")] = "INFO"
    """Lowest level of the messages that are logged."""

    @field_validator(*SEPARATORS, mode="before")
    @classmethod
    def _split(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, str):
            return [part for part in value.split(SEPARATORS[str(info.field_name)]) if part]
        return value

    @field_validator("tenant_limits", "mlflow_servers", mode="before")
    @classmethod
    def _parse(cls, value: object, info: ValidationInfo) -> object:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"is no JSON ({error}); write it as {OBJECTS[str(info.field_name)]}") from error

    @field_validator("allowed_hosts")
    @classmethod
    def _are_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in (stripped := tuple(host.strip() for host in hosts)):
            if not re.fullmatch(r"[A-Za-z0-9._-]+", host) and as_address(host) is None:
                raise ValueError(
                    f"'{host}' is no name or address; write it as api.example.org, without scheme and port"
                )
        return stripped

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_origin(origin.strip()) for origin in origins)

    @field_validator("s3_buckets")
    @classmethod
    def _are_places(cls, places: tuple[str, ...]) -> tuple[str, ...]:
        for place in (stripped := tuple(place.strip() for place in places)):
            Location.parse(place.replace("{tenant}", "tenant"))
        return stripped

    @field_validator("local_roots")
    @classmethod
    def _are_folders(cls, roots: tuple[Path, ...]) -> tuple[Path, ...]:
        for root in roots:
            if str(root) in NO_FOLDERS:
                raise ValueError(
                    f"'{root}:' is no folder, and colons separate them; buckets are named in MASKMERGE_S3_BUCKETS. "
                    f"Write the absolute path of a folder that is named {root}"
                )
        return roots

    @field_validator("publish_targets")
    @classmethod
    def _are_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        checked = tuple(checked_target(pattern.strip()) for pattern in patterns)
        check_together(checked)
        return checked

    @model_validator(mode="after")
    def _artifacts_are_apart(self) -> "Settings":
        if self.kept_in is None:
            return self
        place = f"{self.kept_in}".removeprefix("s3:")
        artifacts = place.removesuffix("/")
        for bucket in self.s3_buckets:
            if overlaps(bucket, artifacts):
                raise ValueError(f"artifacts in s3:{place} could be read as inputs by MASKMERGE_S3_BUCKETS={bucket}")
        for pattern in self.publish_targets:
            if pattern.startswith("s3:") and overlaps(pattern.removeprefix("s3:"), artifacts):
                raise ValueError(
                    f"artifacts in s3:{place} could be written to by MASKMERGE_PUBLISH_TARGETS={pattern}; name another "
                    "bucket or prefix in one of them"
                )
        return self

    @field_validator("s3_endpoint", "s3_public_endpoint")
    @classmethod
    def _is_endpoint(cls, endpoint: str | None) -> str | None:
        if endpoint is not None and not re.fullmatch(r"https?://[A-Za-z0-9._:\[\]-]+/?", endpoint):
            raise ValueError("is no URL; write it as https://s3.example.org or http://minio:9000, without keys in it")
        return endpoint and endpoint.removesuffix("/")

    @property
    def kept_in(self) -> Location | None:
        """Place in object storage of artifacts and statistics; None where the data folder keeps them."""
        store, _, place = self.artifact_store.partition(":")
        return Location.parse(place) if store == "s3" else None

    @property
    def object_storage(self) -> ObjectStorage:
        return ObjectStorage(
            buckets=self.s3_buckets,
            endpoint=self.s3_endpoint,
            public_endpoint=self.s3_public_endpoint,
            signed_seconds=self.s3_signed_seconds,
            region=self.s3_region,
            credentials_file=self.s3_credentials_file,
            max_cache_bytes=self.max_cache_bytes,
        )

    @property
    def url(self) -> str:
        """URL by which this machine reaches the API."""
        anywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - listened on, but no place to connect to
        host = anywhere.get(self.host, self.host)
        scheme = "http" if self.tls_certificate is None else "https"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def replicas(self) -> int:
        """Number of Redis' replicas that must have a change of a job before it counts."""
        if self.redis_replicas is not None:
            return self.redis_replicas
        has_sentinel = self.redis_url is not None and "+sentinel://" in self.redis_url.get_secret_value()
        return 1 if has_sentinel else 0

    @property
    def hidden_folders(self) -> tuple[Path, ...]:
        """Folders that no message may name: the data folder, and what all tenants' local roots have in common."""
        return (*(Path(str(root).partition("{tenant}")[0]) for root in self.local_roots), self.data_dir)

    @property
    def prefix(self) -> str:
        """Text with which the names of all keys in Redis begin, except those of RQ."""
        return self.queue if self.key_prefix is None else self.key_prefix

    @property
    def limits(self) -> TenantLimits:
        """Limits of each tenant: its own, and what it has none of by the settings for all."""
        default = Limits(
            active_jobs=self.max_active_jobs,
            queued_jobs=self.max_queued_jobs,
            stored_bytes=self.max_stored_bytes,
            requests_per_minute=self.max_requests_per_minute,
            body_bytes=self.max_body_bytes,
            priority=self.max_priority,
        )
        own = {tenant: of.model_dump(exclude_unset=True) for tenant, of in self.tenant_limits.items()}
        return TenantLimits(default, {tenant: default.model_copy(update=of) for tenant, of in own.items()})

    def text(self, name: str) -> str:
        """Return the value of a setting as its environment variable would have it; empty when there is none."""
        value = getattr(self, name)
        if isinstance(value, tuple):
            return SEPARATORS[name].join(str(part) for part in value)
        if isinstance(value, Mapping):
            return json.dumps({key: of.model_dump(mode="json", exclude_unset=True) for key, of in value.items()})
        return "" if value is None else str(value)

    def describe(self) -> list[tuple[str, str, str]]:
        """Return (variable, current value, meaning) of every setting; secrets are masked."""
        return [
            (f"MASKMERGE_{name.upper()}", self.text(name), field.description or "")
            for name, field in type(self).model_fields.items()
        ]


def _origin(text: str) -> str:
    """Return an origin as browsers write it. Raises ValueError where it is none."""
    found = re.fullmatch(r"(https?)://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?", text.lower())
    if found is None:
        raise ValueError(f"'{text}' is no origin; write it as https://app.example.org or http://localhost:3000")
    scheme, host, port = found.groups()
    is_default = port is None or int(port) == DEFAULT_PORTS[scheme]
    return f"{scheme}://{host}" if is_default else f"{scheme}://{host}:{int(port)}"
