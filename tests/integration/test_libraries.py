"""What a merge imports: libraries that take seconds only once it is planned."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import edit_json, tiny_checkpoint

PROGRAM = """
import json, sys
from worker.engine.catalog.contracts.spec import MergeSpec
from worker.engine.catalog.primitives.errors import IncompatibleCheckpoints
from worker.engine.jobs.engine import Engine
def told(phase, done, total, unit):
    pass
try:
    Engine().merge(MergeSpec.model_validate_json(sys.argv[1]), told)
except IncompatibleCheckpoints:
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
LATE = {"transformers", "sklearn", "scipy", "pandas", "pyarrow", "datasets", "sentencepiece"}


@pytest.mark.parametrize("method", ["linear", "mask_fisher"])
def test_a_merge_that_its_plan_refuses_imports_nothing_that_loads_a_model(tmp_path: Path, method: str) -> None:
    folders = [tiny_checkpoint(tmp_path / name, seed=seed) for seed, name in enumerate("ab", 1)]
    edit_json(folders[1] / "config.json", hidden_act="relu")
    spec = {
        "name": "test",
        "models": [{"name": folder.name, "source": f"local:{folder.name}", "path": str(folder)} for folder in folders],
        "base": None,
        "method": {"name": method},
        "output": {},
        "evaluate": False,
        "recipe": {},
        "folder": str(tmp_path / "out"),
    }
    run = subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(spec)], capture_output=True, text=True, check=True)
    imported = set(json.loads(run.stdout.splitlines()[-1]))
    assert "torch" in imported
    assert not imported & LATE


MEANWHILE = """
import sys
from threading import Thread
from worker.engine.runtime.libraries import IMPORTED, optuna, preload
importing = Thread(target=preload)
importing.start()
while IMPORTED[0] not in sys.modules:
    pass
assert IMPORTED[-1] not in sys.modules
assert optuna.TrialPruned
print(*(name for name in IMPORTED if name not in sys.modules or sys.modules[name].__spec__._initializing))
importing.join()
"""


@pytest.mark.long
def test_who_uses_a_library_while_they_are_imported_waits_for_all() -> None:
    run = subprocess.run([sys.executable, "-c", MEANWHILE], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip()) == (0, ""), run.stderr
