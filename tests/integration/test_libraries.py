"""What a merge imports: libraries that take seconds only where it needs them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import tiny_checkpoint
from tests.tiny_language_models import LLAMA, tiny_model

PROGRAM = """
import json, sys
from worker.engine.catalog.contracts.spec import MergeSpec
from worker.engine.jobs.engine import Engine
imported = []
def told(phase, done, total, unit):
    if (phase, done) == ("merging", total):
        imported.append(sorted({name.partition(".")[0] for name in sys.modules}))
Engine().merge(MergeSpec.model_validate_json(sys.argv[1]), told)
print(json.dumps(imported[-1]))
"""
LATE = {"transformers", "sklearn", "scipy", "pandas", "pyarrow", "datasets", "sentencepiece"}


@pytest.mark.parametrize("kind", ["encoder", "language model"])
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_merge_that_loads_no_model_imports_nothing_that_loads_one_before_it_is_written(
    tmp_path: Path, kind: str, method: str
) -> None:
    def made(name: str, seed: int) -> Path:
        if kind == "encoder":
            return tiny_checkpoint(tmp_path / name, seed=seed)
        return tiny_model(tmp_path / name, LLAMA, seed=seed)

    base, *folders = [made(name, seed) for seed, name in enumerate(("base", "a", "b"))]
    spec = {
        "name": "test",
        "models": [{"name": folder.name, "source": f"local:{folder.name}", "path": str(folder)} for folder in folders],
        "base": {"source": "local:base", "path": str(base)} if method == "ties" else None,
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


def test_who_uses_a_library_while_they_are_imported_waits_for_all() -> None:
    run = subprocess.run([sys.executable, "-c", MEANWHILE], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip()) == (0, ""), run.stderr
