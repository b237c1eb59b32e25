"""What holding a model in less memory costs: time and memory of scoring, for each way, and what plans announce.

    python bench/holding.py [--layers N] [--hidden N] [--tokens N] [--json FILE]

The model is a Llama of random weights in bfloat16. Each way runs in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.table import shown

ROW = 128
"""Number of tokens of a row."""


def made(folder: Path, layers: int, hidden: int) -> None:
    """Write the model and rows for it."""
    import torch

    from tests.tiny import write_lines
    from tests.tiny_families import WORDS
    from tests.tiny_language_models import tiny_model

    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_attention_heads": 8}
    tiny_model(folder, layers=layers, dtype=torch.bfloat16, max_position_embeddings=ROW, **sizes)
    words = (WORDS * ROW)[:ROW]
    write_lines(folder / "rows.jsonl", [json.dumps({"text": " ".join(words)})] * 64)


def measured(folder: Path, way: str, tokens: int) -> dict[str, float]:
    """Score two batches in this process, the first for warming up."""
    import torch

    from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
    from worker.engine.catalog.data.rows import RowFile, sample
    from worker.engine.catalog.data.spec import DatasetSpec
    from worker.engine.catalog.methods import MaskFisherParameters
    from worker.engine.catalog.planning.holding import Holding
    from worker.engine.catalog.planning.memory import MemoryNeeds, estimate
    from worker.engine.catalog.planning.planner import plan_merge
    from worker.engine.inputs.examples import tokenize
    from worker.engine.models.loading import load
    from worker.engine.runtime.device import peak_memory_bytes, reset_peak_memory
    from worker.engine.scoring.estimators import estimator_for
    from worker.engine.scoring.scorer import score

    reset_peak_memory()
    info = inspect_checkpoint(folder, "local:model")
    loaded = load(info, torch.device("cpu"), Holding[way])
    spec = DatasetSpec(source="rows", path=folder / "rows.jsonl")
    rows = sample(RowFile(spec), spec, None, shuffle=False)
    examples = tokenize(rows, spec, loaded.tokenizer, loaded.max_length, None, reading=loaded.kind).examples
    batch, estimator = examples[: tokens // ROW], estimator_for("sampled", loaded.task, seed=0)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        score(loaded, batch, estimator, "float32", "rows", lambda _: None, [batch])
        seconds.append(time.perf_counter() - start)
    method = MaskFisherParameters(batch_tokens=tokens)
    needs = MemoryNeeds(method, longest_row=ROW, holding=Holding[way], publishes=False)
    return {"s": min(seconds), "bytes": peak_memory_bytes(), "planned": estimate(plan_merge([info]), needs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=24, help="(%(default)s)")
    parser.add_argument("--hidden", type=int, default=768, help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="of a batch (%(default)s)")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measured(options.folder, options.way, options.tokens)))
        return
    found: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        made(Path(folder), options.layers, options.hidden)
        by_way = {}
        for way in ("WHOLE", "STORED", "STREAMED"):
            sizes = ["--way", way, "--folder", folder, "--tokens", str(options.tokens)]
            run = subprocess.run([sys.executable, __file__, *sizes], check=True, stdout=subprocess.PIPE, text=True)
            by_way[way] = json.loads(run.stdout.splitlines()[-1])
    whole = by_way["WHOLE"]["s"]
    for way, one in by_way.items():
        for what, ours, reference, most in (
            ("seconds of a batch, against WHOLE", one["s"], whole, 2.0),
            ("most memory against the plan, MB", one["bytes"] / 1e6, one["planned"] / 1e6, 1.0),
        ):
            ratio = ours / reference
            names = {"what": f"{way}: {what}", "ours": ours, "reference": reference}
            found.append({**names, "ratio": ratio, "target": f"<= {most:g}", "met": ratio <= most})
    shown(options.json, found)


if __name__ == "__main__":
    main()
