"""How much memory measuring a model takes, against what its plan announces, form by form.

    python bench/memory.py [--forms NAME ...] [--precisions FORMAT ...] [--tokens N] [--row N] [--json FILE]

Each form is measured in a process of its own: it loads the model, scores it and takes Gram matrices from the same
passes, in one batch of as many tokens as the plan counts with. What is compared is the most memory that the process
held.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.table import shown


def measured(name: str, precision: str, tokens: int, row: int) -> tuple[int, int]:
    """Measure in this process. Returns the peak and what the plan announces, in bytes."""
    import torch

    from bench import forms
    from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
    from worker.engine.catalog.methods.mask_regmean import MaskRegMeanParameters
    from worker.engine.catalog.planning.memory import MemoryNeeds, estimate
    from worker.engine.catalog.planning.planner import plan_merge
    from worker.engine.inputs.examples import plan_batches
    from worker.engine.models.loading import load
    from worker.engine.runtime.device import peak_memory_bytes, reset_peak_memory
    from worker.engine.scoring.estimators import estimator_for
    from worker.engine.scoring.gram import GramSums, in_passes
    from worker.engine.scoring.scorer import score

    with TemporaryDirectory() as folder:
        made = [sys.executable, __file__, "--make", folder, "--forms", name]
        subprocess.run(made, check=True, stderr=subprocess.DEVNULL)
        reset_peak_memory()
        info = inspect_checkpoint(Path(folder), name)
        plan = plan_merge([info])
        loaded = load(info, torch.device("cpu"))
        longest = min(row, loaded.max_length)
        examples = forms.rows(loaded, tokens // longest, (longest, longest))
        estimator = estimator_for("auto", loaded.task, seed=0)
        inputs, *_ = in_passes(plan.linear_inputs)
        with GramSums(loaded, inputs, "rows", stops=False) as sums:
            batches = plan_batches(examples, tokens)
            score(loaded, examples, estimator, precision, "rows", lambda _: None, batches, [sums.watching])
            sums.means()
        method = MaskRegMeanParameters(batch_tokens=tokens)
        needs = MemoryNeeds(method, longest_row=longest, value_bytes=2 if precision == "bfloat16" else 4)
        return peak_memory_bytes(), estimate(plan, needs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--forms", nargs="+", default=["llama", "gpt2", "gemma3", "modernbert", "albert", "vit"])
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"], help="number formats (%(default)s)")
    parser.add_argument("--tokens", type=int, default=4096, help="of a batch (%(default)s)")
    parser.add_argument("--row", type=int, default=256, help="tokens of a row (%(default)s)")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        from bench import forms

        forms.write(options.forms[0], options.make)
        return
    if options.here:
        print(json.dumps(measured(options.forms[0], options.precisions[0], options.tokens, options.row)))
        return
    found: list[dict[str, Any]] = []
    for name in options.forms:
        for precision in options.precisions:
            sizes = ["--tokens", str(options.tokens), "--row", str(options.row)]
            command = [sys.executable, __file__, "--here", "--forms", name, "--precisions", precision, *sizes]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            peak, announced = json.loads(run.stdout.splitlines()[-1])
            found.append(
                {
                    "what": f"{name}, {precision}, rows of up to {options.row} tokens: most memory, MB",
                    "ours": peak / 1e6,
                    "reference": announced / 1e6,
                    "ratio": peak / announced,
                    "target": "<= 1",
                    "met": peak <= announced,
                }
            )
    shown(options.json, found)


if __name__ == "__main__":
    main()
