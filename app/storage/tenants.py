"""The folders of each tenant."""

from collections.abc import Sequence
from pathlib import Path

from app.contracts.api_keys import DEFAULT_TENANT
from worker.engine.catalog.contracts.statistics import FOLDER

PLACEHOLDER = "{tenant}"
TENANTS = "tenants"
"""Folder within the data folder that has one for each tenant but the default one."""
UPLOADS = "uploads"
"""Folder of uploads, within that of their tenant."""


def roots_of(local_roots: Sequence[Path], tenant: str) -> tuple[Path, ...]:
    """Return the folders that a tenant's `local:` references may name: `{tenant}` in a path is the tenant's name."""
    return tuple(Path(str(root).replace(PLACEHOLDER, tenant)) for root in local_roots)


def statistics_of(data_dir: Path, tenant: str) -> Path:
    """Return the folder of a tenant's statistics."""
    return _own(data_dir, tenant) / FOLDER


def uploads_of(data_dir: Path, tenant: str) -> Path:
    """Return the folder of what a tenant has uploaded."""
    return _own(data_dir, tenant) / UPLOADS


def uploads_of_all(data_dir: Path) -> dict[str, Path]:
    """Return the folders of what tenants have uploaded, by tenant."""
    found = {path.parent.name: path for path in sorted(data_dir.resolve().glob(f"{TENANTS}/*/{UPLOADS}"))}
    return {DEFAULT_TENANT: uploads_of(data_dir, DEFAULT_TENANT), **found}


def _own(data_dir: Path, tenant: str) -> Path:
    own = data_dir.resolve()
    return own if tenant == DEFAULT_TENANT else own / TENANTS / tenant


def statistics_of_others(data_dir: Path, tenant: str) -> tuple[Path, ...]:
    """Return the folders of all other tenants' statistics, in a fixed order."""
    folders = [statistics_of(data_dir, DEFAULT_TENANT), *sorted(data_dir.resolve().glob(f"{TENANTS}/*/{FOLDER}"))]
    own = statistics_of(data_dir, tenant)
    return tuple(folder for folder in folders if folder != own)
