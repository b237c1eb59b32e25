"""Two small language models, trained from scratch on news and on tweets, and merged by a running service.

    make serve                             # in another terminal
    python examples/language_models.py [--dir .language-models]

It prints the perplexity of the ancestor (base), the two experts, their plain average and their merge on texts that none
of them has seen: among how many tokens the model hesitates, on average. Less is better.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from demo import compare, merged
from experts import READERS
from maskmerge import Client
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

DOMAINS = {"news": "topics", "tweets": "sentiment"}  # and the task whose texts they are
METHOD = "aligned_regmean"
VOCABULARY = 1000
ROWS, TOKENS = 16, 48  # of a batch in training
PRE_TRAINING, FINE_TUNING = 150, 150  # steps
MEASURED, JUDGED, LETTERS = 250, 150, 200  # rows that the service measures and judges by, and the letters of each


def trained_tokenizer(texts: Iterable[str]) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def packed(texts: Sequence[str], tokenizer: Any) -> Tensor:
    """Rows of equally many tokens, (rows, tokens), from texts one after the other."""
    tokens = [token for text in texts for token in (tokenizer.bos_token_id, *tokenizer(text)["input_ids"])]
    rows = len(tokens) // TOKENS
    return torch.tensor(tokens[: rows * TOKENS]).view(rows, TOKENS)


def train(model: Any, rows: Tensor, steps: int, rate: float, seed: int) -> Any:
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        drawn = rows[torch.randint(len(rows), (ROWS,), generator=draws)]
        model(input_ids=drawn, labels=drawn).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def prepare(root: Path) -> None:
    """Write the models `base`, `news` and `tweets` to root, and for each domain rows to measure on and to judge by."""
    texts = {domain: [text for text, _ in READERS[task]()] for domain, task in DOMAINS.items()}
    texts = {domain: random.Random(0).sample(of_domain, len(of_domain))[:4000] for domain, of_domain in texts.items()}
    tokenizer = trained_tokenizer(text for of_domain in texts.values() for text in of_domain[:1000])
    rows = {domain: packed(of_domain[JUDGED:], tokenizer) for domain, of_domain in texts.items()}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    some = torch.cat([of_domain[:400] for of_domain in rows.values()])
    base = train(LlamaForCausalLM(config), some, PRE_TRAINING, 3e-3, seed=0)
    trained = {"base": base}
    for seed, (domain, of_domain) in enumerate(rows.items(), start=1):
        trained[domain] = LlamaForCausalLM(config)
        trained[domain].load_state_dict(base.state_dict())
        train(trained[domain], of_domain, FINE_TUNING, 2e-3, seed)
        lines = [json.dumps({"text": text[:LETTERS]}) + "\n" for text in texts[domain]]
        (root / f"{domain}-judged.jsonl").write_text("".join(lines[:JUDGED]))
        (root / f"{domain}-measured.jsonl").write_text("".join(lines[JUDGED : JUDGED + MEASURED]))
    for name, model in trained.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path(".language-models"), help="where everything is kept")
    root = parser.parse_args().dir
    root.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()  # of every checkpoint that is written
    with Client() as client:  # of the service at MASKMERGE_URL, by default http://127.0.0.1:8000
        if not client.is_ready():
            sys.exit("no service is ready; start one by `make serve`")
        print("training three language models, in about a minute", flush=True)
        prepare(root)
        experts = [
            {
                "name": domain,
                "checkpoint": client.upload(root / domain),
                "dataset": {"source": client.upload(root / f"{domain}-measured.jsonl")},
                "evaluation": {"source": client.upload(root / f"{domain}-judged.jsonl")},
            }
            for domain in DOMAINS
        ]
        base = client.upload(root / "base")
        job_id, result = merged(client, {"method": {"name": METHOD}, "base": base, "models": experts})
        client.download(job_id, root / "merged" / job_id)
    found = {name: [kept.base, kept.expert, kept.average, kept.merged] for name, kept in (result.metrics or {}).items()}
    compare("Perplexity on texts that no model has seen", ("base", "expert", "average", METHOD), found, digits=1)
    print(f"The merge is in {root / 'merged' / job_id / 'model'}")


if __name__ == "__main__":
    main()
