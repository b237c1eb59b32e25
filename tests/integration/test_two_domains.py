"""Language models of two domains, trained from scratch on packaged English text, and their merges."""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tiny import merge_spec, model_spec, silent, write_lines
from worker.engine.catalog.contracts.spec import EvaluationSpec, ModelSpec
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.jobs.engine import Engine

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import experts as packaged

DOMAINS = {"news": "topics", "tweets": "sentiment"}
VOCABULARY = 1000
TOKENS = 48  # of a row in training
BATCH = 16
PRE_TRAINING, FINE_TUNING = 150, 150  # steps
MEASURED, JUDGED = 250, 150  # rows
LETTERS = 200  # of a row that is measured or judged


def texts_of(domain: str) -> list[str]:
    texts = [text for text, _ in packaged.READERS[DOMAINS[domain]]()]
    random.Random(0).shuffle(texts)
    return texts[:4000]


def trained_tokenizer(texts: Sequence[str]) -> Any:
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
        batch = rows[torch.randint(len(rows), (BATCH,), generator=draws)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts `news` and `tweets` of one ancestor, with rows to measure on and others to judge by."""
    root = tmp_path_factory.mktemp("domains")
    texts = {domain: texts_of(domain) for domain in DOMAINS}
    tokenizer = trained_tokenizer([text for of_domain in texts.values() for text in of_domain[:1000]])
    rows = {domain: packed(of_domain[JUDGED:], tokenizer) for domain, of_domain in texts.items()}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    both = torch.cat([of_domain[:400] for of_domain in rows.values()])
    ancestor = train(LlamaForCausalLM(config), both, PRE_TRAINING, 3e-3, seed=0).state_dict()
    for seed, (domain, of_domain) in enumerate(rows.items(), start=1):
        expert = LlamaForCausalLM(config)
        expert.load_state_dict(ancestor)
        train(expert, of_domain, FINE_TUNING, 2e-3, seed).save_pretrained(root / domain)
        tokenizer.save_pretrained(root / domain)
        cut = [json.dumps({"text": text[:LETTERS]}) for text in texts[domain]]
        write_lines(root / f"{domain}-judged.jsonl", cut[:JUDGED])
        write_lines(root / f"{domain}-measured.jsonl", cut[JUDGED : JUDGED + MEASURED])
    return root


def spec_of(root: Path, domain: str, judged: str) -> ModelSpec:
    measured, held_out = root / f"{domain}-measured.jsonl", root / f"{judged}-judged.jsonl"
    evaluation = EvaluationSpec(source=held_out.name, path=held_out, metric="perplexity")
    return model_spec(root / domain, dataset=DatasetSpec(source=measured.name, path=measured), evaluation=evaluation)


@pytest.mark.parametrize("method", ["fisher", "aligned_regmean"])
def test_a_measured_merge_beats_the_average_and_the_other_domains_expert(
    root: Path, tmp_path: Path, method: str
) -> None:
    engine = Engine()
    own = [spec_of(root, domain, domain) for domain in DOMAINS]
    merged = engine.merge(merge_spec(tmp_path / "merge", own, {"name": method}, evaluate=True), silent)
    other = {
        domain: engine.merge(
            merge_spec(tmp_path / domain, [spec_of(root, expert, domain)], {"name": "average"}, evaluate=True), silent
        )
        for domain, expert in zip(DOMAINS, reversed(DOMAINS), strict=True)
    }
    assert merged.metrics is not None
    for domain, found in merged.metrics.items():
        assert found.merged < found.average
        [of_other] = (other[domain].metrics or {}).values()
        assert found.merged < of_other.expert
        assert found.expert < found.merged
