"""Merges of architectures without a table, against dense computations, and what transformers makes of the results."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import (
    Tensors,
    edit_json,
    edit_tensors,
    merge_spec,
    model_spec,
    read_model,
    silent,
    tiny_checkpoint,
    write_rows,
)
from tests.tiny_language_models import (
    GPT2,
    LLAMA,
    MASKED_BERT,
    QWEN2,
    T5,
    TINY_MODELS,
    TinyModel,
    loaded_model,
    logits_of,
    tiny_model,
)
from worker.engine.catalog.contracts.report import MergeResult
from worker.engine.catalog.contracts.spec import CheckpointSpec, EvaluationSpec
from worker.engine.catalog.primitives.errors import EngineError, IncompatibleCheckpoints, InvalidCheckpoint
from worker.engine.jobs.engine import Engine

WEIGHTS = (1.0, 3.0)
METHODS: dict[str, dict[str, Any]] = {
    "average": {"name": "average"},
    "task_arithmetic": {"name": "task_arithmetic", "scale": 0.7},
    "ties": {"name": "ties", "density": 0.4},
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(torch.device("cpu"))


def merged(
    engine: Engine, folder: Path, models: list[Path], method: Mapping[str, Any], base: Path | None = None, **output: Any
) -> MergeResult:
    specs = [model_spec(path, weight=weight) for path, weight in zip(models, WEIGHTS, strict=False)]
    spec = merge_spec(folder, specs, method, **output)
    if base is not None:
        spec = spec.model_copy(update={"base": CheckpointSpec(source=f"local:{base.name}", path=base)})
    return engine.merge(spec, silent)


def expected(method: str, versions: list[Tensor], base: Tensor) -> Tensor:
    """The formulas of the papers, on whole tensors in float64."""
    versions, base = [version.double() for version in versions], base.double()
    total = sum(WEIGHTS)
    if method == "average":
        return torch.stack([w * v for w, v in zip(WEIGHTS, versions, strict=True)]).sum(0) / total
    deltas = torch.stack([version - base for version in versions])
    lambdas = torch.tensor(WEIGHTS, dtype=torch.float64).view(2, *(1 for _ in base.shape))
    if method == "task_arithmetic":
        return base + 0.7 * (lambdas * deltas).sum(0)
    kept = max(1, round(0.4 * base.numel()))
    least = deltas.abs().flatten(1).sort(descending=True).values[:, kept - 1].view(lambdas.shape)
    deltas = torch.where(deltas.abs() >= least, deltas, 0.0)
    sign = (lambdas * deltas).sum(0).sign()
    agrees = (deltas.sign() == sign).double()
    return base + (lambdas * deltas * agrees).sum(0) / (lambdas * agrees).sum(0).clamp_min(1e-300)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", TINY_MODELS.values(), ids=TINY_MODELS)
def test_the_merge_is_the_formulas_and_loads_with_its_logits(
    engine: Engine, tmp_path: Path, model: TinyModel, method: str
) -> None:
    base, *models = [tiny_model(tmp_path / name, model, seed=seed) for seed, name in enumerate(("base", "a", "b"))]
    result = merged(engine, tmp_path / "out", models, METHODS[method], base)
    states = [read_model(folder) for folder in (base, *models)]
    found = read_model(tmp_path / "out" / "model")
    assert found.keys() == states[0].keys()
    wanted = {name: expected(method, [state[name] for state in states[1:]], states[0][name]) for name in found}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-5, atol=1e-6, msg=name)
    assembled = loaded_model(models[0], model.architecture)
    copies = {copy: wanted[of] for copy, of in model.tied.items()}
    assembled.load_state_dict({**wanted, **copies})
    logits = logits_of(loaded_model(tmp_path / "out" / "model", model.architecture))
    torch.testing.assert_close(logits, logits_of(assembled), rtol=1e-4, atol=1e-5)
    assert [m.weight_share for m in result.models] == pytest.approx([0.25, 0.75])
    assert result.notes == []


def test_shards_come_in_and_go_out_in_any_number(engine: Engine, tmp_path: Path) -> None:
    folders = [tiny_model(tmp_path / "a", seed=1), tiny_model(tmp_path / "b", seed=2, max_shard_size="4KB")]
    assert len(list(folders[1].glob("*.safetensors"))) > 3
    merged(engine, tmp_path / "one", folders, {"name": "average"})
    merged(engine, tmp_path / "many", folders, {"name": "average"}, max_shard_bytes=3000)
    one, many = (tmp_path / name / "model" for name in ("one", "many"))
    assert len(list(many.glob("*.safetensors"))) > 3
    whole, parts = read_model(one), read_model(many)
    assert all(torch.equal(whole[name], parts[name]) for name in whole | parts)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in whole.values())
    assert torch.equal(*(logits_of(loaded_model(folder, "LlamaForCausalLM")) for folder in (one, many)))


@pytest.mark.parametrize(
    ("dtypes", "asked", "stored"),
    [
        ((torch.bfloat16, torch.bfloat16), "auto", torch.bfloat16),
        ((torch.bfloat16, torch.float16), "auto", torch.float32),
        ((torch.float64, torch.float32), "auto", torch.float64),
        ((torch.float32, torch.float32), "float16", torch.float16),
        ((torch.float16, torch.float16), "float64", torch.float64),
    ],
    ids=str,
)
def test_dtypes_mix_and_values_are_rounded_once(
    engine: Engine, tmp_path: Path, dtypes: tuple[torch.dtype, ...], asked: str, stored: torch.dtype
) -> None:
    folders = [tiny_model(tmp_path / n, seed=s, dtype=d) for s, n, d in zip((1, 2), "ab", dtypes, strict=True)]
    merged(engine, tmp_path / "out", folders, {"name": "average"}, dtype=asked)
    first, second = (read_model(folder) for folder in folders)
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    for name, tensor in read_model(tmp_path / "out" / "model").items():
        assert tensor.dtype == stored
        exact = expected("average", [first[name], second[name]], first[name])
        rounding = torch.finfo(stored).eps + 4 * torch.finfo(wide).eps
        torch.testing.assert_close(tensor.double(), exact, rtol=rounding, atol=rounding)
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert config["dtype"] == str(stored).removeprefix("torch.")


def test_buffers_are_copied_bit_by_bit(engine: Engine, tmp_path: Path) -> None:
    base, *models = [tiny_model(tmp_path / name, GPT2, seed=seed) for seed, name in enumerate(("base", "a", "b"))]
    for seed, folder in enumerate((base, *models)):
        buffers = {
            "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool).tril(),
            "transformer.h.0.attn.masked_bias": torch.tensor(-1e4 - seed),
            "transformer.counts": torch.tensor([2**60 + seed, -1]),
        }
        edit_tensors(folder, lambda tensors, more=buffers: {**tensors, **more})  # type: ignore[misc]
    for name, with_base, seed in (("first", None, 1), ("base", base, 0)):
        merged(engine, tmp_path / f"out-{name}", models, {"name": "average"}, with_base, dtype="bfloat16")
        found = read_model(tmp_path / f"out-{name}" / "model")
        assert found["transformer.counts"].tolist() == [2**60 + seed, -1]
        assert found["transformer.h.0.attn.masked_bias"].dtype == torch.float32
        assert float(found["transformer.h.0.attn.masked_bias"]) == -1e4 - seed
        assert found["transformer.h.0.attn.bias"].dtype == torch.bool
        assert found["transformer.wte.weight"].dtype == torch.bfloat16
        assert logits_of(loaded_model(tmp_path / f"out-{name}" / "model", "GPT2LMHeadModel")).isfinite().all()


def test_names_of_older_checkpoints_merge_and_load(engine: Engine, tmp_path: Path) -> None:
    def older(name: str) -> str:
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        return name.removeprefix("transformer.")

    for model in (MASKED_BERT, GPT2):
        root = tmp_path / model.model_type
        folders = [tiny_model(root / name, model, seed=seed) for seed, name in enumerate("ab", 1)]
        merged(engine, root / "newer", folders, {"name": "average"})
        for name, changed in (("second", folders[1:]), ("both", folders[:1])):
            for folder in changed:
                edit_tensors(folder, lambda tensors: {older(n): t for n, t in tensors.items()})
            merged(engine, root / name, folders, {"name": "average"})
            logits = [logits_of(loaded_model(root / one / "model", model.architecture)) for one in ("newer", name)]
            assert torch.equal(*logits), (model.model_type, name)


def store_copies(folder: Path, model: TinyModel, change: float = 0.0) -> None:
    def add(tensors: Tensors) -> Tensors:
        return {**tensors, **{copy: tensors[of] + change for copy, of in model.tied.items()}}

    edit_tensors(folder, add)


@pytest.mark.parametrize("model", [QWEN2, GPT2, T5, MASKED_BERT], ids=lambda model: model.model_type)
def test_a_stored_copy_of_a_tied_matrix_changes_nothing(engine: Engine, tmp_path: Path, model: TinyModel) -> None:
    folders = [tiny_model(tmp_path / name, model, seed=seed) for seed, name in enumerate("ab", 1)]
    merged(engine, tmp_path / "without", folders, {"name": "average"})
    store_copies(folders[1], model)
    merged(engine, tmp_path / "with", folders, {"name": "average"})
    without, found = (read_model(tmp_path / name / "model") for name in ("without", "with"))
    assert without.keys() == found.keys()
    assert all(torch.equal(without[name], found[name]) for name in without)
    store_copies(folders[0], model, change=0.5)
    with pytest.raises(InvalidCheckpoint, match=r"local:a: tensor .* differs from .* tie_word_embeddings to false"):
        merged(engine, tmp_path / "differing", folders, {"name": "average"})


def in_all(**changes: Any) -> Callable[[list[Path]], None]:
    def edit(folders: list[Path]) -> None:
        for folder in folders:
            edit_json(folder / "config.json", **changes)

    return edit


def in_second(**changes: Any) -> Callable[[list[Path]], None]:
    return lambda folders: edit_json(folders[1] / "config.json", **changes)


def without(name: str) -> Callable[[list[Path]], None]:
    def remove(folders: list[Path]) -> None:
        for folder in folders:
            edit_tensors(folder, lambda tensors: {n: t for n, t in tensors.items() if n != name})

    return remove


REFUSED: dict[str, tuple[Callable[[list[Path]], None], type[EngineError], list[str]]] = {
    "a default that the other's value is not": (
        in_second(num_key_value_heads=None), IncompatibleCheckpoints, ["num_key_value_heads", "2, 4"],
    ),
    "a default of a key that changes the computation": (
        in_second(rope_parameters=None), IncompatibleCheckpoints, ["rope_parameters.rope_theta", "5000.0, 10000.0"],
    ),
    "a tensor that the architecture needs": (
        without("model.layers.1.mlp.up_proj.weight"), InvalidCheckpoint, ["no tensor model.layers.1.mlp.up_proj"],
    ),
    "a size that shapes contradict": (
        in_all(intermediate_size=32), InvalidCheckpoint, ["mlp.down_proj.weight", "[16, 24]", "[16, 32]"],
    ),
    "heads that shapes contradict": (
        in_all(num_key_value_heads=4), InvalidCheckpoint, ["k_proj.weight", "[8, 16]", "[16, 16]"],
    ),
    "a configuration that transformers does not take": (
        in_all(hidden_act="no such"), InvalidCheckpoint, ["hidden_act 'no such'"],
    ),
    "text for a number": (
        in_all(rms_norm_eps="1e-6"), InvalidCheckpoint, ["rms_norm_eps '1e-6'", "no number"],
    ),
    "a class that is no model": (
        in_all(architectures=["LlamaPreTrainedModel"]), InvalidCheckpoint, ["LlamaPreTrainedModel", "own class"],
    ),
    "the class of all models": (
        in_all(architectures=["PreTrainedModel"]), InvalidCheckpoint, ["PreTrainedModel", "own class"],
    ),
    "settings that do not fit each other": (
        in_all(layer_types=["full_attention"]), InvalidCheckpoint, ["num_hidden_layers 2", "layer_types of 1 layers"],
    ),
    "a tokenizer that no library reads": (
        lambda folders: edit_json(folders[0] / "tokenizer.json", pre_tokenizer={"type": "no such"}),
        InvalidCheckpoint, ["local:a", "tokenizer.json cannot be loaded"],
    ),
    "a tokenizer at which the library panics": (
        lambda folders: edit_json(
            folders[0] / "tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
        ),
        InvalidCheckpoint, ["local:a", "tokenizer.json cannot be loaded", "precompiled_charsmap"],
    ),
    "numbers that are none": (
        lambda folders: edit_tensors(folders[1], lambda ts: {**ts, "lm_head.weight": ts["lm_head.weight"] / 0}),
        InvalidCheckpoint, ["local:b", "lm_head.weight", "NaN or infinite"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_headers_do_not_show_is_refused_before_or_while_merging(engine: Engine, tmp_path: Path, case: str) -> None:
    spoil, error, words = REFUSED[case]
    rotary = {"rope_theta": 5000.0, "rope_type": "default"}
    folders = [tiny_model(tmp_path / n, seed=s, rope_parameters=rotary) for s, n in enumerate("ab", 1)]
    spoil(folders)
    with pytest.raises(error) as caught:
        merged(engine, tmp_path / "out", folders, {"name": "average"})
    missing = [word for word in words if word not in caught.value.message]
    assert not missing, caught.value.message


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "unheard_of", "architectures": ["UnheardOfForCausalLM"]},
        {"architectures": ["AutoModelForCausalLM"]},
        {"architectures": ["__loader__"]},
        {"architectures": None},
    ],
    ids=str,
)
def test_what_transformers_does_not_know_is_merged_by_names_alone(
    engine: Engine, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folders = [tiny_model(tmp_path / name, seed=seed) for seed, name in enumerate("ab", 1)]
    in_all(**changes)(folders)
    merged(engine, tmp_path / "out", folders, {"name": "average"})
    first, second = (read_model(folder) for folder in folders)
    name = "model.layers.1.mlp.up_proj.weight"
    found = read_model(tmp_path / "out" / "model")[name]
    torch.testing.assert_close(found.double(), expected("average", [first[name], second[name]], first[name]))


def test_what_transformers_does_not_read_is_merged_and_noted(engine: Engine, tmp_path: Path) -> None:
    folders = [tiny_model(tmp_path / name, GPT2, seed=seed) for seed, name in enumerate("ab", 1)]
    assert merged(engine, tmp_path / "plain", folders, {"name": "average"}).notes == []

    def extend(tensors: Tensors, value: int) -> None:
        tensors |= {"extra.weight": torch.full((3,), float(value)), "extra.bias": torch.zeros(3)}
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()  # a buffer

    for value, folder in enumerate(folders):
        edit_tensors(folder, partial(extend, value=value))
    [note] = merged(engine, tmp_path / "out", folders, {"name": "average"}).notes
    assert note.startswith("tensor extra.")
    assert "(like 1 more) is not one that GPT2LMHeadModel reads; it was merged all the same" in note
    assert read_model(tmp_path / "out" / "model")["extra.weight"].tolist() == [0.75] * 3


def test_the_card_says_how_to_load_it(engine: Engine, tmp_path: Path) -> None:
    folders = [tiny_model(tmp_path / name, seed=seed) for seed, name in enumerate("ab", 1)]
    (folders[0] / "chat_template.jinja").write_text("{{ messages }}")
    (folders[0] / "preprocessor_config.json").write_text("{}")
    merged(engine, tmp_path / "out", folders, {"name": "average"})
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: text-generation\n" in card
    assert 'AutoModelForCausalLM.from_pretrained("model")' in card
    assert {path.name for path in (tmp_path / "out" / "model").iterdir()} == {
        "config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
        "preprocessor_config.json",
        "model.safetensors",
    }  # fmt: skip
    files = {file["name"]: file for file in json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]}
    assert "model/config.json" in files


def test_every_chat_template_is_published_and_found_by_the_library(engine: Engine, tmp_path: Path) -> None:
    folders = [tiny_model(tmp_path / name, seed=seed) for seed, name in enumerate("ab", 1)]
    templates = {
        "chat_template.jinja": "chat", "additional_chat_templates/tool_use.jinja": "{{ tools }}",
        "additional_chat_templates/rag.jinja": "{{ documents }}",
        "chat_template.json": '{"chat_template": "of images"}',
    }  # fmt: skip
    for folder in folders:
        (folder / "additional_chat_templates").mkdir()
        for name, content in templates.items():
            (folder / name).write_text(content)
    assert merged(engine, tmp_path / "out", folders, {"name": "average"}).notes == []
    published = tmp_path / "out" / "model"
    assert {name: (published / name).read_text() for name in templates} == templates
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(published).chat_template
    assert found == {"default": "chat", "tool_use": "{{ tools }}", "rag": "{{ documents }}"}


def pages(folder: Path) -> tuple[str, str]:
    return (folder / "README.md").read_text(), (folder / "report.html").read_text()


def test_card_and_report_of_a_merge_without_rows_say_what_was_done(engine: Engine, tmp_path: Path) -> None:
    base, *folders = [tiny_model(tmp_path / name, seed=seed) for seed, name in enumerate(("base", "a", "b"))]
    specs = [model_spec(folder) for folder in folders]
    specs[1] = specs[1].model_copy(update={"parameters": {"density": 0.7}})
    ancestor = CheckpointSpec(source="local:base", path=base)
    spec = merge_spec(tmp_path / "out", specs, {"name": "ties", "density": 0.4}).model_copy(update={"base": ancestor})
    result = engine.merge(spec, silent)
    assert "precision" not in result.method
    assert "precision" not in json.loads((tmp_path / "out" / "manifest.json").read_text())["method"]
    card, report = pages(tmp_path / "out")
    assert "A merge of 2 models (a, b) by `ties`." in card
    assert "density `0.4`" in card
    assert f"| b | `local:b` | `{result.models[1].digest}` | 0.500 | density `0.7` |" in card
    assert '<th scope="row">base</th><td>local:base</td>' in report
    for other in ("rows measured", "was aligned", "its error", ">score</th>", ">align</th>", "slices follow"):
        assert other not in report
    assert '<th scope="row">merge</th>' in report


def test_card_and_report_of_a_stack_show_its_slices(engine: Engine, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "a")
    slices = [{"model": "a", "layers": [0, 2]}, {"model": "a", "layers": [1, 2]}]
    engine.merge(merge_spec(tmp_path / "out", [model_spec(folder)], {"name": "passthrough", "slices": slices}), silent)
    card, report = pages(tmp_path / "out")
    assert "Layers of one model (a), stacked by `passthrough`." in card
    assert "| 0 to 1 | a | 0 to 1 |\n| 2 to 2 | a | 1 to 1 |\n" in card
    assert "mean merge weight" not in card + report
    assert "base_model" not in card


@pytest.mark.parametrize("model", [LLAMA, QWEN2, GPT2, MASKED_BERT], ids=lambda model: model.model_type)
def test_stacked_layers_are_the_sources_bit_by_bit(engine: Engine, tmp_path: Path, model: TinyModel) -> None:
    bfloat16 = torch.bfloat16
    a, b = (tiny_model(tmp_path / n, model, seed=s, layers=3, dtype=bfloat16) for s, n in enumerate("ab", 1))
    slices = [{"model": "a", "layers": [0, 2]}, {"model": "b", "layers": [1, 3]}, {"model": "b", "layers": [2, 3]}]
    spec = merge_spec(
        tmp_path / "out",
        [model_spec(a), model_spec(b)],
        {"name": "passthrough", "slices": slices},
        max_shard_bytes=3000,
    )
    result = engine.merge(spec, silent)
    found = read_model(tmp_path / "out" / "model")
    states = {"a": read_model(a), "b": read_model(b)}
    stack = {"llama": "model.layers", "qwen2": "model.layers", "gpt2": "transformer.h", "bert": "bert.encoder.layer"}
    prefix = stack[model.model_type]
    order = [("a", 0), ("a", 1), ("b", 1), ("b", 2), ("b", 2)]
    wanted = {n: t for n, t in states["a"].items() if not n.startswith(prefix) and "emb" in n.replace("wte", "emb")}
    wanted |= {n: t for n, t in states["a"].items() if n == "transformer.wpe.weight"}
    wanted |= {n: t for n, t in states["b"].items() if not n.startswith(prefix) and n not in wanted}
    for number, (name, of) in enumerate(order):
        layer = {n: t for n, t in states[name].items() if n.startswith(f"{prefix}.{of}.")}
        wanted |= {n.replace(f"{prefix}.{of}.", f"{prefix}.{number}."): t for n, t in layer.items()}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert config[model.layers] == 5
    stacked = loaded_model(tmp_path / "out" / "model", model.architecture)
    assert stacked.config.num_hidden_layers == 5
    assembled = type(stacked)(stacked.config).double().eval()
    assembled.load_state_dict({**wanted, **{copy: wanted[of] for copy, of in model.tied.items()}})
    torch.testing.assert_close(logits_of(stacked), logits_of(assembled))
    of_a = sum(t.numel() for n, t in wanted.items() if n in states["a"] and torch.equal(t, states["a"][n]))
    share = of_a / sum(t.numel() for t in wanted.values())
    assert [one.weight_share for one in result.models] == pytest.approx([share, 1 - share])


def test_encoders_with_a_table_stack_with_the_last_ones_head(engine: Engine, tmp_path: Path) -> None:
    a, b = (tiny_checkpoint(tmp_path / name, seed=seed) for seed, name in enumerate("ab"))
    slices = [{"model": "a", "layers": [0, 2]}, {"model": "b", "layers": [0, 2]}]
    spec = merge_spec(tmp_path / "out", [model_spec(a), model_spec(b)], {"name": "passthrough", "slices": slices})
    engine.merge(spec, silent)
    found, states = read_model(tmp_path / "out" / "model"), [read_model(folder) for folder in (a, b)]
    for name in ("classifier.weight", "bert.pooler.dense.weight"):
        assert torch.equal(found[name], states[1][name])
    inner = "bert.encoder.layer.{}.output.dense.weight"
    assert torch.equal(found[inner.format(3)], states[1][inner.format(1)])
    stacked = loaded_model(tmp_path / "out" / "model", "AutoModelForSequenceClassification")
    assert len(stacked.bert.encoder.layer) == 4
    assert logits_of(stacked).shape == (2, 2)


def test_models_of_different_depths_stack(engine: Engine, tmp_path: Path) -> None:
    a, b = (tiny_model(tmp_path / name, QWEN2, seed=seed, layers=seed + 1) for seed, name in enumerate("ab", 1))
    slices = [{"model": "a", "layers": [0, 2]}, {"model": "b", "layers": [2, 3]}]
    spec = merge_spec(tmp_path / "out", [model_spec(a), model_spec(b)], {"name": "passthrough", "slices": slices})
    engine.merge(spec, silent)
    assert logits_of(loaded_model(tmp_path / "out" / "model", "Qwen2ForCausalLM")).shape == (2, 12, 128)


@pytest.mark.parametrize("method", ["average", "mask_fisher", "fisher", "regmean", "mask_regmean", "aligned_regmean"])
def test_heads_of_classifiers_are_averaged_where_they_are_merged(engine: Engine, tmp_path: Path, method: str) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", count=60)
    held_out = write_rows(tmp_path / "held-out.jsonl", count=30, seed=1)
    measured = None if method == "average" else rows
    folders = [tiny_checkpoint(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    evaluation = EvaluationSpec(source="x", path=held_out, label="label", metric="accuracy")
    models = [
        model_spec(folder, measured, weight=weight, evaluation=evaluation)
        for folder, weight in zip(folders, WEIGHTS, strict=True)
    ]
    spec = merge_spec(tmp_path / "out", models, {"name": method}, evaluate=True, heads="merged")
    result = engine.merge(spec, silent)
    first, second = (read_model(folder) for folder in folders)
    found = read_model(tmp_path / "out" / "model")
    assert found.keys() == first.keys()
    for name in ("classifier.weight", "classifier.bias"):
        wanted = expected("average", [first[name], second[name]], first[name])
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-6, atol=1e-6)
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} <= {"model", "scores"}
    assert result.metrics is not None
    assert set(result.metrics) == {"a", "b"}
    assert "pipeline_tag: text-classification" in (tmp_path / "out" / "README.md").read_text()
