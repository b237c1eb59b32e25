"""The inspector's first inspection leaves nothing to its copies that every inspection does once."""

import sys
import tempfile
from pathlib import Path

import pytest

from app.contracts.requests import MergeRequest
from app.services.checks import Checker
from app.services.warm_up import OwnMerge
from app.storage.artifacts import open_artifacts
from app.storage.sources import Sources, preload
from app.storage.sources.source import SourceContext
from tests.conftest import tiny_recipe


def test_its_merge_is_sound_and_leaves_no_file_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "own"
    elsewhere.mkdir()
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    merge = OwnMerge(folder)
    written = sorted(folder.rglob("*"))
    merge.inspect()  # raises what would refuse it
    merge.inspect()
    assert list(elsewhere.iterdir()) == []
    assert sorted(folder.rglob("*")) == written


def test_an_inspection_after_it_imports_nothing(tiny_inputs: Path, tmp_path: Path) -> None:
    preload()
    own = tmp_path / "own"
    own.mkdir()
    OwnMerge(own).inspect()
    loaded = set(sys.modules)
    context = SourceContext((tiny_inputs,), tmp_path, open_artifacts("folder", tmp_path), lambda _: None)
    checker = Checker(Sources(context), lambda _: None)
    plan = checker.check(MergeRequest.model_validate(tiny_recipe())).plan
    assert plan is not None
    assert plan.bytes_to_write > 0
    assert set(sys.modules) - loaded == set()
