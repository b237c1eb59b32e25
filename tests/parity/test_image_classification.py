"""Labels of images: scores, metrics and merges of every family that reads images against independent computations."""

import io
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow.parquet import write_table
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, CLIPConfig, CLIPModel, CLIPVisionModel

from tests.score_names import assert_same_in_norm
from tests.siblings import CPU, TOLERANCE, scores_by_masks
from tests.tiny import (
    HEADS,
    NEURONS,
    dataset_spec,
    edit_json,
    edit_tensors,
    insert_masks,
    merge_spec,
    model_spec,
    read_model,
    silent,
    tiny_checkpoint,
    write_lines,
)
from tests.tiny_families import TINY_VISION, TinyFamily
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.spec import CheckpointSpec, EvaluationSpec
from worker.engine.catalog.data.images import MAX_IMAGE_BYTES
from worker.engine.catalog.data.rows import Row, RowFile, Rows, check_first_rows, sample
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.families import FAMILIES, ScoreName
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.catalog.primitives.errors import EngineError, InvalidCheckpoint, InvalidDataset, InvalidRequest
from worker.engine.catalog.tasks import ImageClassification, LabelMap, column_problems
from worker.engine.inputs.examples import Example
from worker.engine.inputs.tables import read_parquet
from worker.engine.jobs.engine import Engine
from worker.engine.models.loading import LoadedModel, load
from worker.engine.scoring.estimators import estimator_for
from worker.engine.scoring.sample import Sample
from worker.engine.scoring.scorer import score
from worker.engine.tasks.drawing import uniform

NAMES = ("cat", "dog", "owl")
OTHERS = ("night", "day")
ROWS = 18
INVARIANCE = 1e-5  # relative in norm per layer and kind: what METHOD promises of float32


def picture(seed: int, size: tuple[int, int] = (23, 17), mode: str = "RGB") -> Image.Image:
    channels = {"RGB": 3, "RGBA": 4}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(values, mode)


def encoded(image: Image.Image, form: str = "PNG", **how: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **how)
    return stream.getvalue()


def write_images(file: Path, seed: int, names: Sequence[str], count: int = ROWS) -> Path:
    """JSON lines of paths and names of labels, with the images in a folder beside them, of all formats and shapes."""
    lines = []
    for index in range(count):
        form, ending = (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"))[index % 3]
        path = file.with_suffix("") / f"{index}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(1000 * seed + index, (10 + 3 * index, 19)), form))
        label = names[(seed + index * index) % len(names)]
        lines.append(json.dumps({"image": str(path.relative_to(file.parent)), "label": label}))
    return write_lines(file, lines)


@dataclass(frozen=True)
class Case:
    """Two classifiers of one ancestor, `one` and `two`, of other labels, with rows beside them."""

    tiny: TinyFamily
    root: Path

    @property
    def models(self) -> dict[str, Path]:
        return {name: self.root / name for name in ("one", "two")}

    def loaded(self, name: str = "one") -> LoadedModel:
        return load(inspect_checkpoint(self.root / name, name), CPU)

    def rows(self, name: str = "one") -> tuple[DatasetSpec, list[Row]]:
        spec = dataset_spec(self.root / f"{name}.jsonl")
        return spec, sample(RowFile(spec, ImageClassification.rows), spec, None, shuffle=False)

    def examples(self, loaded: LoadedModel) -> list[Example]:
        spec, rows = self.rows()
        return examples_of(loaded, spec, rows)


def examples_of(loaded: LoadedModel, spec: DatasetSpec, rows: Sequence[Row]) -> list[Example]:
    labels = LabelMap(loaded.task)
    return loaded.kind.tokenized(rows, spec, loaded.tokenizer, loaded.max_length, labels).examples


@pytest.fixture(scope="module", params=TINY_VISION)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp(request.param)
    tiny = TINY_VISION[request.param]
    for seed, (name, labels) in enumerate((("one", NAMES), ("two", OTHERS)), start=1):
        tiny_checkpoint(root / name, family=tiny, seed=seed, names=labels, task="ImageClassification")
        write_images(root / f"{name}.jsonl", seed, labels)
        write_images(root / f"{name}-held-out.jsonl", 10 + seed, labels)
    return Case(tiny, root)


# As transformers reads them


def float64_model(folder: Path) -> Any:
    return AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float64).eval()


def pixels(folder: Path, rows: Path) -> list[Tensor]:
    """The pixel values of each row, (1, channels, height, width), float64, by the library's own means alone."""
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    paths = [json.loads(line)["image"] for line in rows.read_text().splitlines()]
    pictures = [Image.open(rows.parent / path).convert("RGB") for path in paths]
    return [processor(images=one, return_tensors="pt")["pixel_values"].double() for one in pictures]


def ids(rows: Path, names: Sequence[str] = NAMES) -> list[int]:
    return [names.index(json.loads(line)["label"]) for line in rows.read_text().splitlines()]


def one_by_one(case: Case, estimator: str) -> dict[ScoreName, Tensor]:
    """Scores by masks that are there: an image at a time, float64, a backward pass for every label."""
    folder, rows = case.models["one"], case.root / "one.jsonl"
    model = float64_model(folder)
    masks = insert_masks(model, case.tiny)
    labels = ids(rows)

    def likelihoods() -> Iterator[list[tuple[float, Tensor]]]:
        for index, values in enumerate(pixels(folder, rows)):
            logp = model(pixel_values=values).logits[0].log_softmax(-1)
            p = logp.detach().exp()
            drawn = int((p.cumsum(0)[:-1] <= uniform(7, index)).sum())
            yield {
                "expected": [(float(p[k]), logp[k]) for k in range(len(p))],
                "sampled": [(1.0, logp[drawn])],
                "empirical": [(1.0, logp[labels[index]])],
            }[estimator]

    return scores_by_masks(case.tiny, masks, likelihoods())


# Scores


@pytest.mark.parametrize("estimator", ["expected", "sampled", "empirical"])
def test_scores_are_those_of_masks_that_are_there(case: Case, estimator: Any) -> None:
    loaded = case.loaded()
    found = score(
        loaded, case.examples(loaded), estimator_for(estimator, loaded.task, seed=7), "float32", "rows", silent
    )
    assert_same_in_norm(found.scores(), one_by_one(case, estimator), TOLERANCE)


def test_scores_do_not_depend_on_batches_or_order(case: Case) -> None:
    loaded = case.loaded()
    examples = case.examples(loaded)
    estimator = estimator_for("expected", loaded.task, seed=0)

    def scores(batches: list[list[Example]]) -> dict[ScoreName, Tensor]:
        return score(loaded, examples, estimator, "float32", "rows", silent, batches).scores()

    alone = scores([[example] for example in examples])
    assert_same_in_norm(scores([examples]), alone, INVARIANCE)
    assert_same_in_norm(scores([examples[::-1][i : i + 5] for i in range(0, ROWS, 5)]), alone, INVARIANCE)


def test_what_a_node_owns_is_what_its_mask_multiplies(case: Case, tmp_path: Path) -> None:
    """Behind its activation, and in the names that files have."""
    table, folder = FAMILIES[case.tiny.model_type], case.models["one"]
    values = torch.cat(pixels(folder, case.root / "one.jsonl")[:3])
    for place, (nodes, count) in enumerate(case.tiny.counts(HEADS, NEURONS).items()):
        masked = float64_model(folder)
        with torch.no_grad():
            insert_masks(masked, case.tiny)[place][1, 2] = -1.7
            expected = masked(pixel_values=values).logits
            assert not torch.allclose(expected, float64_model(folder)(pixel_values=values).logits)
        scaled = Path(shutil.copytree(folder, tmp_path / nodes))

        def scale(tensors: dict[str, Tensor], nodes: str = nodes, count: int = count) -> dict[str, Tensor]:
            wide = {name: tensor.double() for name, tensor in tensors.items()}
            owned = 0
            for name, tensor in wide.items():
                slot = table.slot(name)
                assert slot is not None, name
                assert slot.stored == name
                if slot.owner is not None and slot.owner.scores == (f"layers.1.{nodes}",) and slot.owner.axis == 1:
                    width = tensor.shape[1] // count
                    tensor[:, 2 * width : 3 * width] *= -1.7
                    owned += 1
            assert owned == 1
            return wide

        edit_tensors(scaled, scale)
        with torch.no_grad():
            found = float64_model(scaled)(pixel_values=values).logits
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_table_owns_what_is_written_down_here_too(case: Case) -> None:
    table = FAMILIES[case.tiny.model_type]
    for name, _ in float64_model(case.models["one"]).named_parameters():
        slot = table.slot(name)
        assert slot is not None, name
        found = None if slot.owner is None else (str(slot.owner.scores[0]), slot.owner.axis)
        slices = case.tiny.slices_of(name, HEADS, NEURONS)
        assert found == (None if slices is None else (slices.owners[0][0], slices.axis))


# Merges


def merge(engine: Engine, folder: Path, case: Case, names: Sequence[str], method: Mapping[str, Any], **how: Any) -> Any:
    models = []
    for name in names:
        checkpoint, rows = case.models[name], case.root / f"{name}.jsonl"
        models.append(model_spec(checkpoint, rows, evaluation=how.get("evaluations", {}).get(name)))
    output = {key: value for key, value in how.items() if key not in ("evaluations", "evaluate")}
    return engine.merge(merge_spec(folder, models, method, evaluate=how.get("evaluate", False), **output), silent)


METHODS = ({"name": "mask_fisher"}, {"name": "regmean"}, {"name": "fisher"}, {"name": "aligned_regmean"})


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_merged_with_itself_a_model_stays_bit_identical(
    case: Case, engine: Engine, tmp_path: Path, method: Mapping[str, Any]
) -> None:
    twin = Case(case.tiny, tmp_path / "twin")
    for name in ("one", "two"):
        shutil.copytree(case.models["one"], twin.root / name)
        shutil.copytree(case.root / "one", twin.root / name, dirs_exist_ok=True)
        write_images(twin.root / f"{name}.jsonl", 1, NAMES)
    merge(engine, tmp_path / "out", twin, ("one", "two"), method, align_heads=False)
    expected = read_model(case.models["one"])
    for name in ("one", "two"):
        found = read_model(tmp_path / "out" / "models" / name)
        assert found.keys() == expected.keys()
        if method["name"] != "aligned_regmean":  # which solves a regression with what is left of rounding
            assert all(torch.equal(found[tensor], expected[tensor]) for tensor in expected)
        for tensor in expected:
            torch.testing.assert_close(found[tensor], expected[tensor], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_merged_with_a_sibling_it_loads_under_the_names_that_transformers_writes(
    case: Case, engine: Engine, tmp_path: Path, method: Mapping[str, Any]
) -> None:
    merge(engine, tmp_path / "out", case, ("one", "two"), method, align_heads=False)
    states = {name: read_model(tmp_path / "out" / "models" / name) for name in ("one", "two")}
    for name, labels in (("one", NAMES), ("two", OTHERS)):
        folder = tmp_path / "out" / "models" / name
        model, report = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert list(model.config.id2label.values()) == list(labels)
        own = read_model(case.models[name])
        assert states[name].keys() == own.keys()
        assert all(torch.equal(states[name][head], own[head]) for head in own if head.startswith("classifier"))
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        values = processor(images=picture(5), return_tensors="pt")["pixel_values"]
        assert bool(model(pixel_values=values).logits.isfinite().all())
        model.save_pretrained(tmp_path / "again")
        assert read_model(tmp_path / "again").keys() == states[name].keys()
    merged = [name for name in states["one"] if not name.startswith("classifier")]
    one, two = (read_model(case.models[name]) for name in ("one", "two"))
    for tensor in merged:
        assert torch.equal(states["one"][tensor], states["two"][tensor])
        if method["name"] in ("mask_fisher", "fisher"):  # convex in every value
            low, high = torch.minimum(one[tensor], two[tensor]), torch.maximum(one[tensor], two[tensor])
            assert bool((low - 1e-6 <= states["one"][tensor]).all() and (states["one"][tensor] <= high + 1e-6).all())


def test_accuracy_is_that_of_transformers_own_predictions_and_heads_are_aligned(
    case: Case, engine: Engine, tmp_path: Path
) -> None:
    evaluations = {}
    for name in ("one", "two"):
        file = case.root / f"{name}-held-out.jsonl"
        evaluations[name] = EvaluationSpec(source=name, path=file, label="label", metric="accuracy")
    result = merge(
        engine,
        tmp_path / "out",
        case,
        ("one", "two"),
        {"name": "mask_fisher"},
        evaluations=evaluations,
        evaluate=True,
        align_heads=True,
    )
    for name, labels in (("one", NAMES), ("two", OTHERS)):
        rows = case.root / f"{name}-held-out.jsonl"
        truth = ids(rows, labels)

        def accuracy(folder: Path, rows: Path = rows, truth: list[int] = truth) -> float:
            model = AutoModelForImageClassification.from_pretrained(folder).eval()
            with torch.no_grad():
                found = [int(model(pixel_values=one.float()).logits.argmax()) for one in pixels(folder, rows)]
            return float(np.mean([one == other for one, other in zip(found, truth, strict=True)]))

        assert result.metrics is not None
        metrics = result.metrics[name]
        assert metrics.expert == pytest.approx(accuracy(case.models[name]))
        assert metrics.merged == pytest.approx(accuracy(tmp_path / "out" / "models" / name))
        own, merged = read_model(case.models[name]), read_model(tmp_path / "out" / "models" / name)
        assert not torch.equal(own["classifier.weight"], merged["classifier.weight"])


def test_scores_are_kept_by_the_images_bytes_and_what_makes_inputs_of_them(case: Case, tmp_path: Path) -> None:
    loaded = case.loaded()
    spec, rows = case.rows()
    found = Sample(rows, ROWS, spec, loaded, None)
    assert found.tokens.inputs == ["pixel_values"]
    assert found.tokens.versions.keys() == {"numpy", "pillow", "transformers"}
    assert found.longest() == loaded.max_length == 17  # 4 x 4 patches, and one token before them
    assert [example.length for block in found.blocks(0, ROWS) for example in block] == [17] * ROWS
    other = Path(shutil.copytree(case.models["one"], tmp_path / "other"))
    edit_json(other / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3])
    darker = Sample(rows, ROWS, spec, load(inspect_checkpoint(other, "other"), CPU), None)
    assert darker.tokens != found.tokens
    assert darker.digest(ROWS, with_labels=False) == found.digest(ROWS, with_labels=False)
    moved = Path(shutil.copytree(case.root / "one", tmp_path / "moved"))
    lines = [json.dumps({"image": f"moved/{Path(json.loads(line)['image']).name}"}) for line in spec_lines(spec)]
    elsewhere = dataset_spec(write_lines(tmp_path / "rows.jsonl", lines), label=None)
    read = sample(RowFile(elsewhere, ImageClassification.rows), elsewhere, None, shuffle=False)
    assert Sample(read, ROWS, elsewhere, loaded, None).digest(ROWS, with_labels=False) == found.digest(
        ROWS, with_labels=False
    )
    (moved / "0.png").write_bytes(encoded(picture(77)))
    with pytest.raises(InvalidDataset, match=r"line 1\b.*was changed while the job ran"):
        loaded.kind.tokenized(read, elsewhere, loaded.tokenizer, loaded.max_length, None)


def spec_lines(spec: DatasetSpec) -> list[str]:
    assert spec.path is not None
    return spec.path.read_text().splitlines()


# Rows


def images_in_parquet(file: Path, values: Sequence[Any], kind: Any) -> DatasetSpec:
    columns = {"image": pyarrow.array(values, kind), "label": pyarrow.array(["cat"] * len(values))}
    write_table(pyarrow.table(columns), file)
    return dataset_spec(file)


def read(rows: Rows, spec: DatasetSpec) -> list[Row]:
    return sample(rows, spec, None, shuffle=False)


OBJECT = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def test_bytes_in_parquet_are_read_as_the_hub_stores_them_and_never_the_path(case: Case, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(encoded(picture(1)))
    contents = [encoded(picture(seed)) for seed in (1, 2, 1)]
    objects = [{"bytes": content, "path": "secret.png"} for content in contents]
    loaded = case.loaded()
    found = []
    for name, values, kind in (("objects", objects, OBJECT), ("plain", contents, pyarrow.binary())):
        spec = images_in_parquet(tmp_path / f"{name}.parquet", values, kind)
        rows = read(read_parquet(spec, ImageClassification.rows), spec)
        assert [row.image.read() for row in rows if row.image] == contents
        assert rows[0].content == rows[2].content != rows[1].content
        found.append(examples_of(loaded, spec, rows))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.encoding["pixel_values"], other.encoding["pixel_values"])
    spec = images_in_parquet(tmp_path / "paths.parquet", [{"bytes": None, "path": "secret.png"}], OBJECT)
    with pytest.raises(InvalidDataset, match=r"row 1\b.*column 'image' has no"):
        read(read_parquet(spec, ImageClassification.rows), spec)


def test_equal_images_of_a_small_file_are_held_once(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(1_000_000)
    values = [{"bytes": content, "path": None}] * 2000  # 2 GB, if each row had its own
    spec = images_in_parquet(tmp_path / "bomb.parquet", values, OBJECT)
    assert (tmp_path / "bomb.parquet").stat().st_size < 50_000_000
    rows = read(read_parquet(spec, ImageClassification.rows), spec)
    assert len({id(row.image.content) for row in rows if row.image}) < 100


def as_png(pixels: int) -> bytes:
    """A file of a few hundred bytes that says it has this many pixels a side."""
    content = bytearray(encoded(picture(0, (8, 8))))
    content[16:24] = pixels.to_bytes(4, "big") * 2
    header = bytes(content[12:29])
    content[29:33] = zlib.crc32(header).to_bytes(4, "big")
    return bytes(content)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def several(form: str) -> bytes:
    return encoded(picture(0), form, save_all=True, append_images=[picture(1)])


BAD: Mapping[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "no image of a known format"),
    "text": (lambda: b"not an image", "no image of a known format"),
    "gif": (lambda: encoded(picture(0), "GIF"), "no image of a known format"),
    "tiff": (lambda: encoded(picture(0), "TIFF"), "no image of a known format"),
    "cut png": (lambda: cut(encoded(picture(0))), "damaged"),
    "cut jpeg": (lambda: cut(encoded(picture(0), "JPEG")), "damaged"),
    "cut webp": (lambda: cut(encoded(picture(0), "WEBP")), "damaged|no image of a known format"),
    "large": (lambda: as_png(7100), "pixels"),
    "bomb": (lambda: as_png(60_000), "pixels"),
    "animated png": (lambda: several("PNG"), "several pictures"),
    "animated webp": (lambda: several("WEBP"), "several pictures"),
    "16 bits": (lambda: encoded(Image.fromarray(np.full((8, 8), 40_000, np.uint16))), "8 bits"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_refused_by_its_row_and_the_next_one_is_read(case: Case, tmp_path: Path, name: str) -> None:
    make, words = BAD[name]
    (tmp_path / "good.png").write_bytes(encoded(picture(3)))
    (tmp_path / "bad.png").write_bytes(make())
    lines = [json.dumps({"image": f"{which}.png", "label": "cat"}) for which in ("good", "bad")]
    spec, loaded = dataset_spec(write_lines(tmp_path / "rows.jsonl", lines)), case.loaded()
    rows = read(RowFile(spec, ImageClassification.rows), spec)
    with pytest.raises(InvalidDataset, match=words) as caught:
        examples_of(loaded, spec, rows)
    assert "line 2" in caught.value.message
    assert "'image'" in caught.value.message
    assert len(examples_of(loaded, spec, rows[:1])) == 1


def test_paths_stay_in_the_data_sets_folder_and_roots(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "data").mkdir(parents=True)
    outside.mkdir()
    for file in (outside / "a.png", root / "a.png", root / "data" / "a.png"):
        file.write_bytes(encoded(picture(0)))
    (root / "data" / "out.png").symlink_to(outside / "a.png")
    (root / "data" / "folder").symlink_to(outside)
    (root / "data" / "inside.png").symlink_to(root / "a.png")
    os.mkfifo(root / "data" / "pipe")
    (root / "data" / "huge.png").write_bytes(bytes(MAX_IMAGE_BYTES + 1))
    good = {"a.png", "./a.png", "inside.png"}
    bad: dict[Any, str] = {
        "out.png": "symbolic link out of",
        "folder/a.png": "symbolic link out of",
        "../a.png": "out of the data set's folder",
        str(root / "a.png"): "out of the data set's folder",
        "missing.png": "No such file",
        "pipe": "not a regular file",
        ".": "no path of a file",
        "": "no path of a file",
        "a\0.png": "no path of a file",
        "huge.png": f"more than {MAX_IMAGE_BYTES} bytes",
        "http://localhost/a.png": "No such file",
        3: "neither bytes nor the path",
        None: "neither bytes nor the path",
    }
    for path in good:
        assert len(read_paths(root, [path])) == 1
    for path, words in bad.items():
        with pytest.raises(InvalidDataset, match=words) as caught:
            read_paths(root, ["a.png", path])
        assert "line 2" in caught.value.message
        assert caught.value.detail["column"] == "image"


def read_paths(root: Path, paths: Sequence[Any]) -> list[Row]:
    file = write_lines(root / "data" / "rows.jsonl", [json.dumps({"image": path}) for path in paths])
    spec = DatasetSpec(source="local:rows.jsonl", path=file, root=root)
    check_first_rows(spec, None, reader=ImageClassification.rows)
    return read(RowFile(spec, ImageClassification.rows), spec)


def test_columns_of_texts_and_lengths_are_refused(case: Case) -> None:
    task = case.loaded().task
    found = dict(column_problems(dataset_spec(case.root / "one.jsonl", text="image", max_length=5), task))
    assert found.keys() == {"text", "max_length"}
    assert not dict(column_problems(dataset_spec(case.root / "one.jsonl", image="picture"), task))


# Checkpoints


def refused(path: Path, act: Callable[[Path], object]) -> str:
    with pytest.raises(EngineError) as caught:
        act(path)
    return caught.value.message


def planned(path: Path) -> object:
    return plan_merge([inspect_checkpoint(path, "local:x")])


def loaded_anew(path: Path) -> object:
    return load(inspect_checkpoint(path, "local:x"), CPU)


def test_image_processors_that_do_not_suit_their_model_are_refused(case: Case, tmp_path: Path) -> None:
    def changed(name: str, **keys: Any) -> Path:
        folder = Path(shutil.copytree(case.models["one"], tmp_path / name))
        edit_json(folder / "preprocessor_config.json", **keys)
        return folder

    without = changed("without")
    (without / "preprocessor_config.json").unlink()
    assert planned(without)  # weights are merged without one
    assert "no preprocessor_config.json" in refused(without, loaded_anew)
    other = changed("other", size={"height": 8, "width": 8}, crop_size={"height": 8, "width": 8})
    assert "[3, 8, 8], and the model takes [3, 16, 16]" in refused(other, loaded_anew)
    assert "beyond 4096 pixels" in refused(changed("wide", size={"height": 10**6, "width": 16}), loaded_anew)
    unknown = changed("unknown", image_processor_type="os.system", auto_map={"AutoImageProcessor": "x.Y"})
    assert "image processor" in refused(unknown, loaded_anew)
    assert "fails" in refused(changed("mean", image_mean="x"), loaded_anew)
    code = changed("code", auto_map={"AutoImageProcessor": "evil.Processor"})
    (code / "evil.py").write_text("raise SystemExit")
    assert loaded_anew(code)


def test_heads_of_one_or_of_several_labels_at_once_are_refused(case: Case, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(case.models["one"], tmp_path / "several"))
    edit_json(folder / "config.json", problem_type="multi_label_classification")
    with pytest.raises(InvalidCheckpoint, match="one label out of several"):
        planned(folder)


def test_older_names_of_clips_tensors_are_those_of_its_files_today(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "new", family=TINY_VISION["clip"], names=NAMES, task="ImageClassification")
    older = Path(shutil.copytree(folder, tmp_path / "older"))
    renamed = {name: name.replace("vision_model.", "vision_model.vision_model.") for name in read_model(folder)}
    edit_tensors(older, lambda found: {renamed[name]: tensor for name, tensor in found.items()})
    assert read_model(older).keys() != read_model(folder).keys()
    plans = [plan_merge([inspect_checkpoint(path, "local:x")]) for path in (folder, older)]
    new, old = ({tensor.slot.stored for tensor in plan.backbone} for plan in plans)
    assert new == old
    assert {name for name in read_model(folder) if not name.startswith("classifier")} == new
    values = torch.randn(2, 3, 16, 16)
    found = [
        load(inspect_checkpoint(path, "local:x"), CPU).model(pixel_values=values).logits for path in (folder, older)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("part", ["whole", "tower"])
def test_what_clip_was_pre_trained_as_may_be_a_base(tmp_path: Path, part: str) -> None:
    """Image classifiers begin with CLIP or its vision tower, whose text vocabulary does not matter here."""
    family = TINY_VISION["clip"]
    folders = [
        tiny_checkpoint(tmp_path / name, family=family, seed=seed, names=NAMES, task="ImageClassification")
        for seed, name in enumerate("ab", 1)
    ]
    vision = CLIPConfig.from_pretrained(folders[0]).vision_config
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = CLIPConfig(
        text_config={**text, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2},
        vision_config=vision.to_dict(),
        projection_dim=8,
    )
    ancestor = CLIPModel(config) if part == "whole" else CLIPVisionModel(vision)
    ancestor.save_pretrained(tmp_path / "base")
    spec = merge_spec(tmp_path / "out", [model_spec(folder, None) for folder in folders], {"name": "task_arithmetic"})
    base = CheckpointSpec(source="local:base", path=tmp_path / "base")
    Engine(CPU).merge(spec.model_copy(update={"base": base}), silent)
    merged, first, second = (read_model(path) for path in (tmp_path / "out/models/a", *folders))
    origin = {
        name if part == "whole" else f"vision_model.{name}": v for name, v in read_model(tmp_path / "base").items()
    }
    backbone = [name for name in merged if not name.startswith("classifier")]
    assert len(backbone) == len(plan_merge([inspect_checkpoint(folders[0], "local:a")]).backbone)
    for name in backbone:
        summed = first[name].double() + second[name].double() - 2 * origin[name].double()
        torch.testing.assert_close(merged[name].double(), origin[name].double() + 0.4 * summed, rtol=0, atol=1e-6)
    if part == "tower":
        info = inspect_checkpoint(tmp_path / "base", "local:base")
        with pytest.raises(InvalidRequest, match="configuration of a part alone"):
            plan_merge([inspect_checkpoint(folder, "local:x") for folder in folders], base=info, config_from=info)
