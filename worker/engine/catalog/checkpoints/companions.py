"""Finds the files that are published unchanged beside a model's weights: tokenizer, chat templates, settings."""

from pathlib import Path

from worker.engine.catalog.checkpoints.files import (
    COMPANIONS,
    MORE_CHAT_TEMPLATES,
    PROCESSORS,
    TOKENIZER_FILES,
    described_files,
    file_names,
)
from worker.engine.catalog.checkpoints.info import CheckpointInfo


def companions(info: CheckpointInfo) -> dict[str, Path]:
    """Return the path of each file that is published as it is, by its published name.

    An adapter usually has a tokenizer but no settings of generation and of processors; those of its base are taken.
    """
    found = {}
    if info.base is not None:
        names = ("generation_config.json", *PROCESSORS)
        found = {name: info.base.path / name for name in names if (info.base.path / name).is_file()}
    described = described_files({*file_names(info.tokenizer_path)})
    mine = [
        name
        for name in described
        if name in TOKENIZER_FILES or name in COMPANIONS or MORE_CHAT_TEMPLATES.fullmatch(name)
    ]
    return found | {name: info.tokenizer_path / name for name in mine if (info.tokenizer_path / name).is_file()}
