"""Three experts that read the mood of tweets, merged into one model by a running service, which sees no label.

    make serve                       # in another terminal
    python examples/sentiment.py [--dir .sentiment]

Each expert is trained on what customers of other companies write. The service is sent the experts and texts without
labels, and hands back one model. Held-out tweets, whose labels stay here, then show what each model is worth.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from demo import compare, merged, progress
from experts import MAX_TOKENS, make_batches, prepare, read_rows, read_sentiment, share_right
from maskmerge import Client
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

DOMAINS = {
    "legacy_airlines": r"@(united|americanair|usairways)\b",
    "budget_airlines": r"@(southwestair|jetblue|virginamerica)\b",
    "technology": r"@apple\b|#aapl\b|iphone|driverless|self.driving|google car",
}
"""Patterns of the tweets. There are tweets on football too, whose labels say something else than a mood: whether the
author believes that a team cheated."""
METHOD = "regmean"


def read_domain(domain: str) -> Iterator[tuple[str, str]]:
    """The tweets that are of this domain alone, each with its label."""
    for text, label in read_sentiment():
        if [name for name, words in DOMAINS.items() if re.search(words, text, re.IGNORECASE)] == [domain]:
            yield text, label


def texts_without_labels(root: Path, domain: str) -> Path:
    """A file with the texts that the expert was trained on; the service needs no more than these."""
    path = root / "tasks" / domain / "texts.jsonl"
    rows = read_rows(root / "tasks" / domain / "train.jsonl")
    path.write_text("".join(json.dumps({"text": row.text}) + "\n" for row in rows), encoding="utf-8")
    return path


def accuracies(checkpoint: Path, root: Path) -> list[float]:
    """The share of held-out tweets of each domain whose label the model finds, and the mean of these."""
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    held_out = [read_rows(root / "tasks" / domain / "validation.jsonl") for domain in DOMAINS]
    found = [share_right(model, make_batches(tokenizer, rows)) for rows in held_out]
    return [*found, sum(found) / len(found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path(".sentiment"), help="where everything is kept (%(default)s)")
    parser.add_argument("--train-rows", type=int, default=500, help="training rows of each expert (%(default)s)")
    parser.add_argument("--validation-rows", type=int, default=200, help="held-out rows of each (%(default)s)")
    options = parser.parse_args()
    root = options.dir
    logging.disable_progress_bar()  # of every checkpoint that is loaded
    with Client() as client:  # of the service at MASKMERGE_URL, by default http://127.0.0.1:8000
        if not client.is_ready():
            sys.exit("no service is ready; start one by `make serve`")
        with progress() as tell:
            prepare(
                root,
                {domain: partial(read_domain, domain) for domain in DOMAINS},
                train_rows=options.train_rows,
                validation_rows=options.validation_rows,
                on_progress=lambda domain, done, total: tell(f"training {domain}", done, total),
            )
        models: list[dict[str, Any]] = [
            {
                "name": domain,
                "checkpoint": client.upload(root / "experts" / domain),
                "dataset": {"source": client.upload(texts_without_labels(root, domain)), "max_length": MAX_TOKENS},
            }
            for domain in DOMAINS
        ]
        one_model = {"heads": "merged"}  # all experts have the same labels, so even their heads can be merged
        checkpoints = {f"{domain} expert": root / "experts" / domain for domain in DOMAINS}
        for method in ("average", METHOD):
            job_id, _ = merged(client, {"method": {"name": method}, "models": models, "output": one_model})
            client.download(job_id, root / "merged" / job_id)
            checkpoints[f"{method} merge"] = root / "merged" / job_id / "model"
    found = {name: accuracies(folder, root) for name, folder in checkpoints.items()}
    compare("Accuracy on tweets that no model has seen", [*DOMAINS, "mean"], found, digits=3)
    print(f"The merge is in {checkpoints[f'{METHOD} merge']}")


if __name__ == "__main__":
    main()
