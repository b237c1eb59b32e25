"""The folders of each tenant."""

from collections.abc import Sequence
from pathlib import Path

from app.contracts.api_keys import DEFAULT_TENANT
from worker.engine.catalog.contracts.statistics import FOLDER

PLACEHOLDER = "{tenant}"
TENANTS = "tenants"
"""Folder within the data folder that has one for each tenant but the default one."""


def roots_of(local_roots: Sequence[Path], tenant: str) -> tuple[Path, ...]:
    """Return the folders that a tenant's `local:` references may name: `{tenant}` in a path is the tenant's name."""
    return tuple(Path(str(root).replace(PLACEHOLDER, tenant)) for root in local_roots)


def statistics_of(data_dir: Path, tenant: str) -> Path:
    """Return the folder of a tenant's statistics."""
    own = data_dir.resolve()
    return (own if tenant == DEFAULT_TENANT else own / TENANTS / tenant) / FOLDER


def statistics_of_others(data_dir: Path, tenant: str) -> tuple[Path, ...]:
    """Return the folders of all other tenants' statistics, in a fixed order."""
    folders = [statistics_of(data_dir, DEFAULT_TENANT), *sorted(data_dir.resolve().glob(f"{TENANTS}/*/{FOLDER}"))]
    own = statistics_of(data_dir, tenant)
    return tuple(folder for folder in folders if folder != own)
