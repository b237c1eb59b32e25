"""Places outside of the service that merges are published at. A place is the module that is named after its scheme."""

from fnmatch import fnmatchcase
from importlib import import_module

from app.contracts.patterns import PLACEHOLDER
from app.contracts.settings import Settings
from app.contracts.targets import Target, compared
from app.storage.targets.target import Receipt, WholeArtifact

MODULES = {"hf": "hub", "mlflow": "mlflow", "s3": "s3"}


def publish(target: Target, artifact: WholeArtifact, settings: Settings) -> Receipt:
    """Publish a complete artifact. Done again after any interruption, it leaves one version of the same files.

    Raises:
        NotPublished: the place does not have it.
    """
    module = import_module(f"{__name__}.{MODULES[target.scheme]}")
    receipt: Receipt = module.publish(target, artifact, settings)
    return receipt


def refusal(target: Target, tenant: str, settings: Settings) -> str | None:
    """Say why a tenant may not publish there; None if it may."""
    patterns = (compared(pattern.replace(PLACEHOLDER, tenant)) for pattern in settings.publish_targets)
    if not any(fnmatchcase(target.place, pattern) for pattern in patterns):
        asked = f"{target.scheme}:{target.name}"
        return f"{asked} is not among the places that this service publishes at (MASKMERGE_PUBLISH_TARGETS)"
    if target.scheme == "hf" and settings.hub_token_file is None:
        return "this service has no token to publish on the hub with (MASKMERGE_HUB_TOKEN_FILE)"
    server = target.name.partition("/")[0]
    if target.scheme == "mlflow" and server not in settings.mlflow_servers:
        return f"this service knows no MLflow server '{server}' (MASKMERGE_MLFLOW_SERVERS)"
    return None
