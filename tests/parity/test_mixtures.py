"""Mixtures of experts: every expert's nodes, inputs and tensors against dense computations in which all experts see
all tokens."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import silu

from tests.score_names import assert_same_in_norm
from tests.tiny import (
    HEADS,
    LAYERS,
    NEURONS,
    edit_json,
    edit_tensors,
    merge_spec,
    model_spec,
    read_model,
    silent,
    tiny_checkpoint,
    write_rows,
)
from tests.tiny_families import TINY_MIXTURES, TinyFamily
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.data.rows import RowFile, sample
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.families import FAMILIES, KV_HEADS, ScoreName
from worker.engine.catalog.families import HEADS as HEAD_NODES
from worker.engine.catalog.families import NEURONS as NEURON_NODES
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.catalog.primitives.errors import EngineError, InvalidCheckpoint
from worker.engine.inputs.examples import Example, plan_batches, tokenize
from worker.engine.jobs.engine import Engine
from worker.engine.models.loading import LoadedModel, load
from worker.engine.scoring.estimators import Estimator
from worker.engine.scoring.fisher import fisher
from worker.engine.scoring.gram import grams
from worker.engine.scoring.scorer import score
from worker.engine.tasks.drawing import uniform

ROWS = 12
CPU = torch.device("cpu")
TOLERANCE = 1e-4  # of a score in norm, float32 against float64
TASKS = {"SequenceClassification": "expected", "CausalLM": "sampled"}
MEASURED = ("mask_fisher", "fisher", "regmean", "mask_regmean")


@dataclass(frozen=True)
class Case:
    """Two models of one ancestor, `one` and `two`, with rows beside them."""

    tiny: TinyFamily
    task: str
    root: Path

    @property
    def models(self) -> dict[str, Path]:
        return {name: self.root / name for name in ("one", "two")}

    @property
    def estimator(self) -> Estimator:
        return Estimator(TASKS[self.task], seed=5)  # type: ignore[arg-type]

    def loaded(self) -> LoadedModel:
        return load(inspect_checkpoint(self.root / "one", "one"), CPU)

    def exact(self) -> Any:
        """The model in float64, as transformers loads it; its fused products take float32 alone."""
        auto_class = getattr(transformers, f"AutoModelFor{self.task}")
        plain = {"dtype": torch.float64, "experts_implementation": "eager"}
        return auto_class.from_pretrained(self.root / "one", **plain).eval()

    def dataset(self, name: str = "one") -> DatasetSpec:
        label = "label" if self.task == "SequenceClassification" else None
        return DatasetSpec(source=name, path=self.root / f"{name}.jsonl", label=label)

    def examples(self, loaded: LoadedModel) -> list[Example]:
        spec = self.dataset()
        rows = sample(RowFile(spec), spec, None, shuffle=False)
        return tokenize(rows, spec, loaded.tokenizer, loaded.max_length, None, reading=loaded.kind).examples


CASES = [("qwen3_moe", "SequenceClassification"), ("qwen3_moe", "CausalLM"), ("mixtral", "CausalLM")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, task = request.param
    root = tmp_path_factory.mktemp(name)
    for seed, model in enumerate(("one", "two"), start=1):
        tiny_checkpoint(root / model, family=TINY_MIXTURES[name], seed=seed, task=task)
        write_rows(root / f"{model}.jsonl", count=ROWS, seed=seed)
    return Case(TINY_MIXTURES[name], task, root)


def with_masks(model: Any, tiny: TinyFamily) -> dict[ScoreName, Tensor]:
    """Multiply every node's activation by a mask, and compute each token by all experts, most of them with weight 0."""
    masks: dict[ScoreName, Tensor] = {}

    def made(name: ScoreName, count: int) -> Tensor:
        masks[name] = torch.ones(count, dtype=torch.float64, requires_grad=True)
        return masks[name]

    for number, layer in enumerate(model.base_model.layers):
        heads, shared = made(ScoreName(number, HEAD_NODES), HEADS), made(ScoreName(number, KV_HEADS), tiny.kv_heads)
        layer.self_attn.o_proj.register_forward_pre_hook(multiplied(heads))
        layer.self_attn.o_proj.register_forward_pre_hook(multiplied(shared))
        neurons = [made(ScoreName(number, NEURON_NODES, expert), NEURONS) for expert in range(tiny.experts)]
        layer.mlp.experts.forward = all_experts(layer.mlp.experts, neurons)
    return masks


def multiplied(mask: Tensor) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
    return lambda _, inputs: (inputs[0] * mask.repeat_interleave(inputs[0].shape[-1] // len(mask)),)


def all_experts(experts: Any, masks: list[Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def forward(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden)
        for expert, mask in enumerate(masks):
            gate, up = (hidden @ experts.gate_up_proj[expert].T).chunk(2, -1)
            share = (weights * (chosen == expert)).sum(-1, keepdim=True)
            total = total + share * ((silu(gate) * up * mask) @ experts.down_proj[expert].T)
        return total

    return forward


def outputs(case: Case, model: Any, example: Example) -> list[tuple[float, Tensor]]:
    """The log-likelihoods whose squared gradients count, with their weights: of all labels, or of drawn tokens."""
    tokens = example.encoding["input_ids"]
    logp = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    if case.task == "SequenceClassification":
        return [(float(one.detach().exp()), one) for one in logp]
    chosen = []
    for position, p in enumerate(logp[:-1].detach().exp()):
        draw = uniform(case.estimator.seed, example.index, position)
        chosen.append(min(int((p.cumsum(0) <= draw).sum()), len(p) - 1))
    return [(1.0, logp[torch.arange(len(chosen)), chosen].sum())]


def expected_squares(case: Case, model: Any, examples: list[Example], of: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """Mean squared gradients by the tensors in `of`, a row at a time, without padding."""
    total = {name: torch.zeros_like(tensor) for name, tensor in of.items()}
    for example in examples:
        for weight, output in outputs(case, model, example):
            found = torch.autograd.grad(output, list(of.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(of, found, strict=True):
                total[name] += 0.0 if gradient is None else weight * gradient**2 / len(examples)
    return total


def test_scores_are_those_of_masks_that_are_there(case: Case) -> None:
    loaded, model = case.loaded(), case.exact()
    examples = case.examples(loaded)
    found = score(loaded, examples, case.estimator, "float32", "rows", silent).scores()
    assert_same_in_norm(found, expected_squares(case, model, examples, with_masks(model, case.tiny)), TOLERANCE)


def test_scores_do_not_depend_on_batches_order_or_padding(case: Case) -> None:
    loaded = case.loaded()
    examples = case.examples(loaded)
    assert len({example.length for example in examples}) > 3

    def scores(batches: list[list[Example]]) -> dict[ScoreName, Tensor]:
        return score(loaded, examples, case.estimator, "float32", "rows", silent, batches).scores()

    alone = scores([[example] for example in examples])
    assert_same_in_norm(scores([examples]), alone, 1e-5)
    assert_same_in_norm(scores([examples[::-1][i : i + 5] for i in range(0, ROWS, 5)]), alone, 1e-5)


def test_left_padding_changes_nothing(case: Case) -> None:
    loaded, exact = case.loaded(), case.exact()
    rows = [example.encoding["input_ids"] for example in case.examples(loaded)[:4]]
    longest = max(map(len, rows))
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    ids = torch.tensor([[loaded.padding["input_ids"]] * (longest - len(row)) + row for row in rows])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        found = loaded.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        alone = [exact(input_ids=torch.tensor([row])).logits for row in rows]
    for of_row, own in zip(found, alone, strict=True):
        last = of_row if case.task == "SequenceClassification" else of_row[-1]
        torch.testing.assert_close(last.double(), own[0] if own.dim() == 2 else own[0, -1], rtol=1e-3, atol=1e-3)


def test_fisher_information_is_that_of_autograd(case: Case) -> None:
    loaded, model = case.loaded(), case.exact()
    examples = case.examples(loaded)[:4]
    found = fisher(loaded, examples, case.estimator, "float32", "rows", silent)
    parameters = dict(model.named_parameters())
    for name, expected in expected_squares(case, model, examples, parameters).items():
        if name.startswith(case.tiny.head):
            continue
        of_experts = {name: expected}
        if ".mlp.experts." in name:  # of all experts: their own modules follow one another
            path, _, stacked = name.rpartition(".")
            modules = ("gate_proj", "up_proj") if stacked == "gate_up_proj" else ("down_proj",)
            parts = zip(modules, expected.chunk(len(modules), 1), strict=True)
            of_experts = {
                f"{path}.{expert}.{module}.weight": part[expert]
                for module, part in parts
                for expert in range(case.tiny.experts)
            }
        for own, part in of_experts.items():
            least = max(1e-6 * float(part.max()), 1e-10)
            torch.testing.assert_close(found.pop(own).double(), part, rtol=2e-4, atol=least, msg=own)
    assert not found


def test_gram_matrices_are_of_the_tokens_that_an_expert_gets(case: Case) -> None:
    loaded, model = case.loaded(), case.exact()
    examples = case.examples(loaded)
    found = grams(loaded, plan_merge([loaded.info]).linear_inputs, plan_batches(examples), "float32", "rows", silent)
    seen: dict[str, list[Tensor]] = {}
    for number, layer in enumerate(model.base_model.layers):

        def see(experts: Any, inputs: tuple[Tensor, Tensor, Tensor], number: int = number) -> None:
            hidden, chosen, _ = inputs
            seen.setdefault(f"layers.{number}.feed_forward", []).append(hidden)
            for expert in range(case.tiny.experts):
                x = hidden[(chosen == expert).any(-1)]
                gate, up = (x @ experts.gate_up_proj[expert].T).chunk(2, -1)
                seen.setdefault(f"layers.{number}.experts.{expert}.feed_forward", []).append(x)
                seen.setdefault(f"layers.{number}.experts.{expert}.neurons", []).append(silu(gate) * up)

        layer.mlp.experts.register_forward_pre_hook(see)
    with torch.no_grad():
        for example in examples:
            model(input_ids=torch.tensor([example.encoding["input_ids"]]))
    assert {name for name in found if "attention" not in name and not name.endswith("heads")} == seen.keys()
    for name, parts in seen.items():
        x = torch.cat(parts)
        torch.testing.assert_close(found[name].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6, msg=name)


def merged(engine: Engine, folder: Path, case: Case, models: Mapping[str, Path], method: Mapping[str, Any]) -> Any:
    """The result, and the tensors of the first published model."""
    specs = [
        model_spec(path, name=name, dataset=case.dataset(rows))
        for (name, path), rows in zip(models.items(), ("one", "two"), strict=True)
    ]
    result = engine.merge(merge_spec(folder, specs, method, align_heads=False), silent)
    first = folder / "models" / next(iter(models)) if case.task == "SequenceClassification" else folder / "model"
    return result, read_model(first), first


@pytest.mark.parametrize("method", MEASURED)
def test_a_model_merged_with_itself_is_itself(case: Case, engine: Engine, tmp_path: Path, method: str) -> None:
    own = case.models["one"]
    _, found, _ = merged(engine, tmp_path, case, {"first": own, "second": own}, {"name": method})
    assert found.keys() == read_model(own).keys()
    assert [name for name, tensor in read_model(own).items() if not torch.equal(found[name], tensor)] == []


METHODS: list[dict[str, Any]] = [
    *({"name": name} for name in MEASURED),
    {"name": "mask_fisher", "rest": "model"},
    {"name": "mask_fisher", "preset": "paper"},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: "-".join(map(str, method.values())))
def test_a_measured_merge_is_no_average_and_loads(
    case: Case, engine: Engine, tmp_path: Path, method: dict[str, Any]
) -> None:
    _, found, folder = merged(engine, tmp_path, case, case.models, method)
    auto_class = getattr(transformers, f"AutoModelFor{case.task}")
    model, report = auto_class.from_pretrained(folder, output_loading_info=True)
    assert {kind: list(names) for kind, names in report.items() if names} == {}
    model.save_pretrained(tmp_path / "again")
    again = read_model(tmp_path / "again")
    assert again.keys() == found.keys()
    assert all(torch.equal(again[name], tensor) and bool(tensor.isfinite().all()) for name, tensor in found.items())
    one, two = map(read_model, case.models.values())
    of_experts = [name for name in found if ".experts." in name]
    assert of_experts
    for name in of_experts:
        assert not torch.allclose(found[name], (one[name] + two[name]) / 2, atol=1e-4), name


def test_an_experts_slices_have_the_weights_of_its_neurons(case: Case, engine: Engine, tmp_path: Path) -> None:
    _, found, _ = merged(engine, tmp_path, case, case.models, {"name": "mask_fisher"})
    of_models = [load_file(tmp_path / "scores" / f"{name}.safetensors") for name in case.models]
    one, two = map(read_model, case.models.values())
    columns = {"down_proj", "w2"}
    names = [name for name in found if ".experts." in name]
    assert len(names) == 3 * LAYERS * case.tiny.experts
    for name in names:
        _, _, layer, _, _, expert, module, _ = name.split(".")
        scores = [of[f"layers.{layer}.experts.{expert}.neurons"] for of in of_models]
        shares = torch.stack([of / of.mean() for of in scores]).clamp_min(1e-3)
        share = (shares / shares.sum(0))[1]
        share = share[None] if module in columns else share[:, None]
        expected = one[name].double() + share * (two[name].double() - one[name].double())
        torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=1e-6, msg=name)
    routers = [name for name in found if name.endswith(".gate.weight")]
    assert len(routers) == LAYERS
    for name in routers:
        torch.testing.assert_close(found[name], (one[name] + two[name]) / 2, rtol=0, atol=1e-6, msg=name)


def stacked(case: Case, folder: Path) -> Path:
    """Store the first model with one tensor for all experts, as transformers can."""
    shutil.copytree(case.root / "one", folder)
    auto_class = getattr(transformers, f"AutoModelFor{case.task}")
    auto_class.from_pretrained(case.root / "one").save_pretrained(folder, save_original_format=False)
    assert any(name.endswith(".mlp.experts.gate_up_proj") for name in read_model(folder))
    return folder


def test_experts_in_one_tensor_are_merged_as_those_in_many(case: Case, engine: Engine, tmp_path: Path) -> None:
    models = {"one": stacked(case, tmp_path / "one"), "two": case.root / "two"}
    for number, method in enumerate(MEASURED):
        _, expected, _ = merged(engine, tmp_path / f"apart{number}", case, case.models, {"name": method})
        _, found, _ = merged(engine, tmp_path / f"stacked{number}", case, models, {"name": method})
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=f"{method}: {name}")


@pytest.mark.parametrize("method", ["mask_fisher", "regmean"])
def test_an_expert_that_no_row_reaches_follows_the_other_model_or_else_the_weights(
    case: Case, engine: Engine, tmp_path: Path, method: str
) -> None:
    """With one expert a token, one of two opposite routers is above 0, where the others are."""
    models = {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in case.models.items()}
    reached = {"one": (0, 1), "two": (0, 2)}

    def route(tensors: dict[str, Tensor], name: str) -> None:
        for key in [key for key in tensors if key.endswith(".gate.weight")]:
            first, second = reached[name]
            router = torch.zeros_like(tensors[key])
            router[first], router[second] = tensors[key][0], -tensors[key][0]
            tensors[key] = router

    for name, path in models.items():
        edit_json(path / "config.json", num_experts_per_tok=1)
        edit_tensors(path, lambda tensors, name=name: route(tensors, name))  # type: ignore[misc]
    result, found, _ = merged(engine, tmp_path / "out", case, models, {"name": method})
    one, two = map(read_model, models.values())
    for name in [name for name in found if ".experts." in name]:
        expert = int(name.split(".experts.")[1].partition(".")[0])
        alone = {1: one, 2: two}.get(expert)
        if expert == 3:
            torch.testing.assert_close(found[name], (one[name] + two[name]) / 2, rtol=0, atol=1e-6, msg=name)
        elif alone is not None and method == "mask_fisher":
            assert torch.equal(found[name], alone[name]), name
        assert bool(found[name].isfinite().all())
    experts = LAYERS * case.tiny.experts
    for name in reached:
        noted = f"no row of {name} tells anything of {experts // 2} of {experts} experts of {name} (layers.0.experts."
        assert any(noted in note for note in result.notes), result.notes


def assert_refused(paths: list[Path], *words: str) -> None:
    with pytest.raises(EngineError) as caught:
        plan_merge([inspect_checkpoint(path, f"local:{path.name}") for path in paths])
    assert [word for word in words if word not in caught.value.message] == [], caught.value.message


def test_experts_that_are_missing_or_fit_no_other_are_refused(case: Case, tmp_path: Path) -> None:
    pair = [Path(shutil.copytree(path, tmp_path / name)) for name, path in case.models.items()]
    last = f".experts.{case.tiny.experts - 1}."
    edit_tensors(pair[1], lambda tensors: {name: tensor for name, tensor in tensors.items() if last not in name})
    if case.task == "SequenceClassification":
        assert_refused(pair, "local:two", f"{case.tiny.experts - 1} experts are there, config.json says 4")
    else:
        assert_refused(pair, last, "is missing in the second")
    routed = [Path(shutil.copytree(path, tmp_path / f"routed-{name}")) for name, path in case.models.items()]
    edit_json(routed[1] / "config.json", num_experts_per_tok=case.tiny.experts + 1)
    assert_refused(routed, "local:routed-two", f"num_experts_per_tok {case.tiny.experts + 1}, and {case.tiny.experts}")
    odd = stacked(case, tmp_path / "odd")
    edit_tensors(
        odd, lambda tensors: {n: t[:, :5].clone() if n.endswith("gate_up_proj") else t for n, t in tensors.items()}
    )
    with pytest.raises(InvalidCheckpoint, match=r"gate_up_proj has shape \[4, 5, 16\]"):
        inspect_checkpoint(odd, "odd")
    both = stacked(case, tmp_path / "both")
    name = next(name for name in read_model(case.root / "one") if ".experts.0." in name)
    edit_tensors(both, lambda tensors: {**tensors, name: torch.zeros(2, 2)})
    with pytest.raises(InvalidCheckpoint, match="under two spellings"):
        inspect_checkpoint(both, "both")


def test_layers_without_experts_have_no_table(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "one", family=TINY_MIXTURES["qwen3_moe"])
    edit_json(checkpoint / "config.json", mlp_only_layers=[1])
    assert_refused([checkpoint, checkpoint], "mlp_only_layers", "not available")


def test_a_tables_modules_and_settings_are_those_of_transformers(case: Case) -> None:
    table = FAMILIES[case.tiny.model_type]
    modules = dict(case.loaded().model.named_modules())
    for module in table.layer_modules:
        assert table.layer_path(0) + module.format(expert=3) in modules
    defaults = vars(transformers.AutoConfig.for_model(case.tiny.model_type))
    for key, absent in {**table.settings, **table.supported}.items():
        given = defaults[key]
        if key != "sliding_window":  # it counts only where use_sliding_window is true
            assert table.setting({key: given}, key) == table.setting({}, key), (key, absent)
    for what, key in table.config_names.items():
        assert what == "head_size" or key in defaults, key
    other = dict.fromkeys(table.config_names.values(), 7)
    assert {what: table.size(other, what) for what in table.config_names} == dict.fromkeys(table.config_names, 7)
    assert table.size({"num_experts": 9}, "experts") == 9


def test_every_setting_and_size_must_be_shared(case: Case, tmp_path: Path) -> None:
    if case.task != "SequenceClassification":
        pytest.skip("language models are merged by name, and settings compared whatever the table says")
    table = FAMILIES[case.tiny.model_type]
    for key in (*(key for key in table.settings if key != "vocab_size"), "num_experts_per_tok"):
        pair = [Path(shutil.copytree(path, tmp_path / key / name)) for name, path in case.models.items()]
        own = json.loads((pair[1] / "config.json").read_text()).get(key)
        other: Any = not own if isinstance(own, bool) else 3 if isinstance(own, int) or "sliding" in key else 7.0
        other = {"hidden_act": "relu", "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}.get(key, other)
        edit_json(pair[1] / "config.json", **{key: other, **({"use_sliding_window": True} if "sliding" in key else {})})
        if key == "sliding_window":
            edit_json(pair[0] / "config.json", use_sliding_window=True)
        assert_refused(pair, f"{key} differs")
