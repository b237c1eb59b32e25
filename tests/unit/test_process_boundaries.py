"""What the API process may load, and what it may weigh."""

import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "transformers", "datasets", "safetensors", "numpy", "scipy", "sklearn")
MOST_BYTES = 150_000_000

PROBE = """
import sys
from pathlib import Path
from app.contracts.settings import Settings
from app.main import create_app
app = create_app(Settings(redis_url="redis://127.0.0.1:1", data_dir=Path(sys.argv[1])))
app.openapi()
resident = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")][0]
print(int(resident.split()[1]) * 1024)
print(" ".join(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_the_api_process_loads_nothing_heavy_and_stays_under_150_mb(tmp_path: Path) -> None:
    output = subprocess.run([sys.executable, "-c", PROBE, str(tmp_path)], check=True, capture_output=True, text=True)
    resident, modules = output.stdout.splitlines()
    assert set(HEAVY).isdisjoint(modules.split())
    assert int(resident) < MOST_BYTES


def test_the_worker_process_itself_loads_nothing_heavy() -> None:
    probe = "import sys, worker.__main__; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    output = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True)
    assert {*HEAVY, "jinja2"}.isdisjoint(output.stdout.split())  # pages are drawn by the API and the engine
