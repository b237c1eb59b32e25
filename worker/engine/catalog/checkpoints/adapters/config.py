"""Reads `adapter_config.json`, and refuses what it says of adapters that are no plain LoRA."""

from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, StrictBool, ValidationError

from worker.engine.catalog.checkpoints.adapters.peft import HARMLESS, MERGE_IT, PLAIN_STARTS
from worker.engine.catalog.checkpoints.adapters.targets import TargetConfig
from worker.engine.catalog.checkpoints.files import ADAPTER_CONFIG
from worker.engine.catalog.checkpoints.json_files import read_json
from worker.engine.catalog.checkpoints.limits import MAX_CONFIG_BYTES
from worker.engine.catalog.primitives.errors import InvalidCheckpoint
from worker.engine.catalog.primitives.words import message_of

Rank = Annotated[int, Field(ge=1, le=1_000_000)]


class AdapterConfig(TargetConfig):
    """The keys of `adapter_config.json` that change what the adapter computes; other keys are in `model_extra`."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    peft_type: str
    base_model_name_or_path: str | None = None
    r: Rank
    lora_alpha: float
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: StrictBool | None = False
    init_lora_weights: bool | str | None = True


def read_config(path: Path, source: str) -> AdapterConfig:
    """Read the configuration. Raises InvalidCheckpoint where it says more than a plain LoRA adapter does."""
    content = read_json(path / ADAPTER_CONFIG, source, MAX_CONFIG_BYTES)
    kind = content.get("peft_type")
    if kind != "LORA":
        raise InvalidCheckpoint(source, f"{ADAPTER_CONFIG} has peft_type {str(kind)[:40]}; only LORA is available")
    try:
        config = AdapterConfig.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:100] for part in first["loc"])
        raise InvalidCheckpoint(source, f"{ADAPTER_CONFIG}: {where}: {message_of(first)}") from error
    for key, value in (config.model_extra or {}).items():
        if value and key not in HARMLESS:
            raise InvalidCheckpoint(source, f"{ADAPTER_CONFIG} has {key[:100]}, which is not available; {MERGE_IT}")
    start = config.init_lora_weights
    if isinstance(start, str) and start not in PLAIN_STARTS:
        problem = (
            f"init_lora_weights '{start[:40]}' changes the base's weights; save the adapter with "
            "path_initial_model_for_weight_conversion, which makes a plain one of it"
        )
        raise InvalidCheckpoint(source, problem)
    return config
