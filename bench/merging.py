"""How fast tensors are merged, how much that holds, and what another merger makes of the same folders.

    python bench/merging.py [--shapes NAME ...] [--folder DIR] [--mergekit PYTHON] [--json FILE]

The floor of a merge is the least that its bytes can cost: all of its inputs are read to nowhere, into the same memory
again and again, and as many as its output has are written to a file that has its final size, by large blocks, on one
thread or on as many as the engine has, whichever is faster. Warm, the inputs are in the page cache and nothing is
flushed; cold, they come from the disk, and all that was written goes there. All take turns, and the least of several
rounds counts. What comes out faster than its floor says that there was none, and is not met. Inputs are made up:
weights around a common base, in the shapes of BERT-base (float32) and TinyLlama 1.1B (bfloat16, five shards). Those of
Llama 2 7B are files of holes, and serve to measure memory alone.
"""

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from bench.experts import base_model_folder
from bench.table import shown
from worker.engine.catalog.checkpoints.files import INDEX
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.report import MergeResult
from worker.engine.catalog.contracts.spec import MergeSpec
from worker.engine.catalog.methods import METHODS
from worker.engine_process import EngineProcess, Failed, Finished

ROUNDS = 3
BLOCK_BYTES = 1 << 20  # that the floor moves by one call: larger ones leave a core's cache
PIECE_BYTES = 16 << 20  # that a thread of the floor takes at a time
NO_FLOOR = "no floor: it took longer than this"
SAMPLE_S = 0.02
WARM, COLD = 2.0, 1.3  # times the floor
OTHERS = 3.0  # times the simplest method
MEMORY = 400_000_000  # bytes beside what an idle engine holds
MERGEKIT = 1 / 3  # of its time
AGREEMENT = 1e-5
SPREAD, STEP = 0.02, 0.002  # of the base's weights, and of what fine-tuning adds
POOL = 1 << 22  # random numbers, which all tensors draw from in turn

DTYPES = {"float32": "F32", "bfloat16": "BF16"}
METHODS_MEASURED: dict[str, dict[str, Any]] = {
    "average": {},
    "linear": {},
    "slerp": {},
    "task_arithmetic": {"scale": 1.0},
    "ties": {"density": 0.5},
    "dare_ties": {"density": 0.5},
}
"""Methods to measure, as far as they are registered, with their parameters."""
AGAINST_FLOOR = ("average", "linear")
AGAINST_MERGEKIT = ("linear", "slerp", "task_arithmetic", "ties", "dare_ties")
RANDOM = ("dare_ties",)
TRIMMED = {"ties": 1e-5}
"""Share of a tensor's values that may equal the threshold, at most; mergekit keeps some of those, here all are kept."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """What checkpoints are made of. `settings` are its configuration's."""

    name: str
    model_type: str
    dtype: str
    shards: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    holes: bool = False
    """Files have no bytes but their headers."""

    def config(self) -> Any:
        config = AutoConfig.for_model(self.model_type, **self.settings)
        config.architectures = [self._model(config).__name__]
        config.dtype = self.dtype
        return config

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name, of a model that is not made."""
        config = self.config()
        with torch.device("meta"):
            model = self._model(config)(config)
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def _model(self, config: Any) -> Any:
        auto = AutoModelForSequenceClassification if self.model_type == "bert" else AutoModelForCausalLM
        return auto._model_mapping[type(config)]


LLAMA = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "vocab_size": 32000}
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("bert-base", "bert", "float32", 1),
        Shape(
            "llama-1.1b",
            "llama",
            "bfloat16",
            5,
            {
                **LLAMA,
                "hidden_size": 2048,
                "num_hidden_layers": 22,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "intermediate_size": 5632,
            },
        ),
        Shape(
            "llama-7b",
            "llama",
            "bfloat16",
            3,
            {
                **LLAMA,
                "hidden_size": 4096,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "intermediate_size": 11008,
            },
            holes=True,
        ),
    )
}


# --- inputs -------------------------------------------------------------------------------------------


def write_checkpoint(shape: Shape, folder: Path, seed: int) -> Path:
    """The base, or with another `seed` than 0 what was fine-tuned from it."""
    folder.mkdir(parents=True)
    shape.config().save_pretrained(folder)
    write_tokenizer(shape, folder)
    pool = None if shape.holes else as_stored(shape.dtype, weights(seed))
    tensors = shape.tensors()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(np.array_split(list(tensors), shape.shards), start=1):
        file = f"model-{number:05d}-of-{shape.shards:05d}.safetensors" if shape.shards > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(map(str, names), file)
        write_shard(folder / file, shape.dtype, {str(name): tensors[str(name)] for name in names}, pool)
    if shape.shards > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def weights(seed: int) -> NDArray[np.float32]:
    base = SPREAD * np.random.default_rng(0).standard_normal(POOL, np.float32)
    return base + STEP * np.random.default_rng(seed).standard_normal(POOL, np.float32) if seed else base


def as_stored(dtype: str, values: NDArray[np.float32]) -> bytes:
    """A bfloat16 is the upper half of a float32."""
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.tobytes()


def write_shard(path: Path, dtype: str, tensors: Mapping[str, tuple[int, ...]], pool: bytes | None) -> None:
    """Numbers of the pool in turn, in every file from its start on; holes where there is no pool."""
    header, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + int(np.prod(shape)) * (2 if dtype == "bfloat16" else 4)
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        if pool is not None:
            for position in range(0, end, len(pool)):
                file.write(memoryview(pool)[: end - position])
        file.truncate(8 + len(raw) + end)


def write_tokenizer(shape: Shape, folder: Path) -> None:
    if shape.model_type == "bert":
        AutoTokenizer.from_pretrained(base_model_folder()).save_pretrained(folder)
        return
    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(100))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "</s>"}))


@dataclass(frozen=True)
class Inputs:
    """Two models and the base that they come from, and a place for what is made of them."""

    shape: Shape
    experts: tuple[Path, Path]
    base: Path
    out: Path

    @classmethod
    def made(cls, shape: Shape, folder: Path) -> "Inputs":
        base, first, second = (
            write_checkpoint(shape, folder / shape.name / name, seed) for seed, name in enumerate(("base", "a", "b"))
        )
        return cls(shape, (first, second), base, folder / "out")

    def files(self, folders: Sequence[Path]) -> list[Path]:
        return [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]

    def spec(self, method: str) -> MergeSpec:
        checkpoints = [{"name": path.name, "source": path.name, "path": path} for path in self.experts]
        base = {"source": "base", "path": self.base} if "base" in METHODS[method].needs else None
        return MergeSpec.model_validate(
            {
                "name": method,
                "models": checkpoints,
                "base": base,
                "method": {"name": method, **METHODS_MEASURED[method]},
                "output": {},
                "evaluate": False,
                "recipe": {},
                "folder": self.out,
            }
        )

    def written_bytes(self) -> int:
        """Count the bytes of tensors that a merge writes: the backbone once, and every model's own head."""
        seen = {file.stat().st_ino: file.stat().st_size for file in self.out.rglob("*.safetensors")}
        return sum(seen.values())


# --- measuring ----------------------------------------------------------------------------------------


class WarmEngine:
    """A worker's engine process that has merged before."""

    def __init__(self, threads: int, tiny: Inputs) -> None:
        self._process = EngineProcess(threads)
        self._process.start()
        while not self._process.is_warm:  # until then it takes more memory by itself
            self._process.poll(1)
        self.merge(tiny, "average")
        shutil.rmtree(tiny.out)
        self.idle_bytes = anonymous_bytes(self._process.pid)

    def merge(self, inputs: Inputs, method: str) -> MergeResult:
        """Leaves its artifact. Raises RuntimeError when the job fails."""
        return merged(self._process, inputs, method)

    def peak_bytes(self, inputs: Inputs, method: str) -> int:
        """Measure the peak of the engine's anonymous memory during a merge, above what it holds when it is idle."""
        with peak_of(self._process.pid) as seen:
            self.merge(inputs, method)
        return max(seen) - self.idle_bytes

    def close(self) -> None:
        self._process.kill()


def merged(process: EngineProcess, inputs: Inputs, method: str) -> MergeResult:
    process.run(inputs.spec(method))
    while True:
        for event in process.poll(1):
            if isinstance(event, Failed):
                raise RuntimeError(f"{inputs.shape.name}, {method}: {event.error.message}")
            if isinstance(event, Finished) and isinstance(event.result, MergeResult):
                return event.result


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that no file stands behind."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not tell Pss_Anon")


@contextmanager
def peak_of(pid: int) -> Iterator[list[int]]:
    """Samples, of which there is one at least."""
    seen = [anonymous_bytes(pid)]
    ended = Event()

    def watch() -> None:
        while not ended.wait(SAMPLE_S):
            seen.append(anonymous_bytes(pid))

    watching = Thread(target=watch)
    watching.start()
    try:
        yield seen
    finally:
        ended.set()
        watching.join()


@dataclass(frozen=True)
class Piece:
    """Consecutive bytes of an open file, to be read to nowhere or written."""

    descriptor: int
    start: int
    count: int
    is_written: bool

    def move(self, block: memoryview) -> None:
        done = 0
        while done < self.count:
            some, place = block[: self.count - done], self.start + done
            done += (
                os.pwrite(self.descriptor, some, place)
                if self.is_written
                else os.preadv(self.descriptor, [some], place)
            )

    @classmethod
    def of_file(cls, descriptor: int, size: int, *, is_written: bool) -> "list[Piece]":
        return [
            cls(descriptor, start, min(PIECE_BYTES, size - start), is_written) for start in range(0, size, PIECE_BYTES)
        ]


def move_bytes(read: Sequence[Path], written: Path, count: int, threads: int = 1) -> None:
    """Every byte of some files to nowhere, and `count` bytes to another, which has its place before the first comes.

    Reads and writes take turns, as they do in a merge.
    """
    written.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        sources = [stack.enter_context(path.open("rb", buffering=0)) for path in read]
        out = stack.enter_context(written.open("wb", buffering=0)).fileno()
        os.posix_fallocate(out, 0, count)
        reads = [
            piece
            for file in sources
            for piece in Piece.of_file(file.fileno(), os.fstat(file.fileno()).st_size, is_written=False)
        ]
        writes = Piece.of_file(out, count, is_written=True)
        in_turns = sorted(
            ((number / len(pieces), piece) for pieces in (reads, writes) for number, piece in enumerate(pieces)),
            key=lambda item: item[0],
        )
        waiting = deque(piece for _, piece in in_turns)

        def run() -> None:
            block = memoryview(bytearray(BLOCK_BYTES))
            while True:
                try:
                    piece = waiting.popleft()
                except IndexError:
                    return
                piece.move(block)

        if threads == 1:
            run()
            return
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(run) for _ in range(threads)]:
                done.result()


def forget(files: Sequence[Path]) -> None:
    """Have the next read come from the disk."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def flush(folder: Path) -> None:
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())


@dataclass
class Turns:
    """Works that take turns; of each the least seconds of `ROUNDS`, after one round that does not count."""

    out: Path
    rounds: int = ROUNDS

    def time(
        self, works: Mapping[str, Callable[[], object]], before: Callable[[], None], after: Callable[[], None]
    ) -> dict[str, float]:
        """`before` and `after` each work; what it leaves is then removed. The time of `after` counts."""
        best = dict.fromkeys(works, float("inf"))
        for turn in range(self.rounds + 1):
            for name, work in works.items():
                before()
                start = time.perf_counter()
                work()
                after()
                if turn:
                    best[name] = min(best[name], time.perf_counter() - start)
                shutil.rmtree(self.out)
        return best


def nothing() -> None:
    """Neither before nor after."""


def row(what: str, ours: float, reference: float, most: float, target: str) -> Row:
    ratio = ours / reference
    return {"what": what, "ours": ours, "reference": reference, "ratio": ratio, "target": target, "met": ratio <= most}


def against_least(what: str, ours: float, floor: float, most: float) -> Row:
    """What is faster than its floor was measured against none: the machine was busy, or the floor does too much."""
    found = row(what, ours, floor, most, f"<= {most}")
    return found if found["ratio"] >= 1 else {**found, "target": NO_FLOOR, "met": False}


def registered(methods: Sequence[str]) -> list[str]:
    return [method for method in methods if method in METHODS]


def against_floor(engine: WarmEngine, inputs: Inputs, threads: int) -> Iterator[Row]:
    """Jobs and their merging phases against the floor, other methods against the simplest."""
    experts = inputs.files(inputs.experts)
    engine.merge(inputs, "average")
    count = inputs.written_bytes()
    shutil.rmtree(inputs.out)
    phases: dict[str, float] = {}

    def merging(method: str) -> Callable[[], None]:
        def run() -> None:
            seconds = engine.merge(inputs, method).timings.merge_seconds
            phases[method] = min(phases.get(method, float("inf")), seconds or float("inf"))

        return run

    floors: dict[str, Callable[[], object]] = {
        f"floor, threads: {number}": partial(move_bytes, experts, inputs.out / "copy", count, number)
        for number in sorted({1, threads})
    }
    works = {method: merging(method) for method in registered(list(METHODS_MEASURED))}
    simple = registered(AGAINST_FLOOR)
    turns = Turns(inputs.out)
    warm = turns.time({**floors, **works}, nothing, nothing)
    least = min(warm[name] for name in floors)
    merge_seconds = dict(phases)
    for method in simple:
        for what, seconds in (("merging phase", merge_seconds[method]), ("whole job", warm[method])):
            named = f"{inputs.shape.name}: {method}, {what}, warm, against reading and writing, s"
            yield against_least(named, seconds, least, WARM)
    reference = simple[-1]
    for method in [method for method in works if method not in simple]:
        named = f"{inputs.shape.name}: {method} against {reference}, merging phase, s"
        yield row(named, merge_seconds[method], merge_seconds[reference], OTHERS, f"<= {OTHERS}")
    cold = turns.time(
        {**floors, **{method: works[method] for method in simple}}, lambda: forget(experts), lambda: flush(inputs.out)
    )
    least = min(cold[name] for name in floors)
    for method in simple:
        named = f"{inputs.shape.name}: {method}, whole job, cold and flushed, against reading and writing, s"
        yield against_least(named, cold[method], least, COLD)


def memory(engine: WarmEngine, inputs: Inputs, methods: Sequence[str]) -> Iterator[Row]:
    for method in methods:
        held = engine.peak_bytes(inputs, method)
        shutil.rmtree(inputs.out)
        named = f"{inputs.shape.name}: {method}, most anonymous memory above the idle engine's, MB"
        yield row(named, held / 1e6, MEMORY / 1e6, 1, f"<= {MEMORY / 1e6:g}")


# --- mergekit -----------------------------------------------------------------------------------------


def mergekit_config(inputs: Inputs, method: str) -> dict[str, Any]:
    """What it calls the same merge."""
    parameters = {key: value for key, value in METHODS_MEASURED[method].items() if key == "density"}
    sources = [{"model": str(path), "parameters": {"weight": 1.0, **parameters}} for path in inputs.experts]
    config: dict[str, Any] = {"merge_method": method, "models": sources, "dtype": inputs.shape.dtype}
    if method == "slerp":
        config |= {"base_model": str(inputs.experts[0]), "parameters": {"t": 0.5}}
    elif "base" in METHODS[method].needs:
        config["base_model"] = str(inputs.base)
    return config


def run_mergekit(python: Path, inputs: Inputs, method: str, out: Path) -> None:
    file = inputs.out.with_name("mergekit.yml")
    file.write_text(json.dumps(mergekit_config(inputs, method)))  # JSON is YAML
    command = [str(python), "-m", "mergekit.scripts.run_yaml", str(file), str(out), "--quiet"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment, cwd=inputs.out.parent, stdout=subprocess.DEVNULL)


def run_ours(inputs: Inputs, method: str, threads: int) -> None:
    """Run our merge in a process that is started for it, and ended, as mergekit's is."""
    process = EngineProcess(threads)
    process.start()
    try:
        merged(process, inputs, method)
    finally:
        process.kill()


def against_mergekit(python: Path, inputs: Inputs, threads: int) -> Iterator[Row]:
    methods = registered(AGAINST_MERGEKIT)
    works: dict[str, Callable[[], object]] = {}
    for method in methods:
        works[f"ours {method}"] = partial(run_ours, inputs, method, threads)
        works[f"mergekit {method}"] = partial(run_mergekit, python, inputs, method, inputs.out)
    seconds = Turns(inputs.out, rounds=2).time(works, nothing, nothing)
    for method in methods:
        ours, theirs = seconds[f"ours {method}"], seconds[f"mergekit {method}"]
        named = f"{inputs.shape.name}: {method}, whole process against mergekit's, s"
        yield row(named, ours, theirs, MERGEKIT, "<= 1/3")
    if inputs.shape.dtype != "float32":
        return
    theirs_at = inputs.out.with_name("theirs")
    for method in [method for method in methods if method not in RANDOM]:
        run_ours(inputs, method, threads)
        run_mergekit(python, inputs, method, theirs_at)
        most = difference(next(path.parent for path in inputs.out.rglob(INDEX)), theirs_at, TRIMMED.get(method, 0))
        named = f"{inputs.shape.name}: {method}, most that mergekit's differs"
        yield row(named, most, AGREEMENT, 1, f"<= {AGREEMENT:g}")
        for folder in (inputs.out, theirs_at):
            shutil.rmtree(folder)


def difference(ours: Path, theirs: Path, but_for: float) -> float:
    """The largest between tensors of the same name, but for a share of each tensor's values.

    Heads are each model's own here, and are left out.
    """
    theirs_info = inspect_checkpoint(theirs, "mergekit's")
    largest = 0.0
    for name, tensor in inspect_checkpoint(ours, "ours").tensors.items():
        if not name.startswith("classifier"):
            apart = (read(tensor.path, name) - read(theirs_info.tensors[name].path, name)).abs().flatten()
            largest = max(largest, float(apart.topk(1 + int(but_for * len(apart))).values[-1]))
    return largest


def read(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        values: Tensor = file.get_tensor(name)
    return values.double()


# --- all of it ----------------------------------------------------------------------------------------


def measure(engine: WarmEngine, shape: Shape, folder: Path, python: Path | None, threads: int) -> Iterator[Row]:
    inputs = Inputs.made(shape, folder)
    if shape.holes:
        yield from memory(engine, inputs, ["average"])
    else:
        yield from against_floor(engine, inputs, threads)
        yield from memory(engine, inputs, registered(list(METHODS_MEASURED)))
        if python is not None:
            yield from against_mergekit(python, inputs, threads)
    shutil.rmtree(folder / shape.name)


def tiny() -> Shape:
    """Return the shape of what an engine merges to be warm."""
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    return Shape("tiny", "bert", "float32", 1, sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--layers", type=int, help="fewer than the shapes have, to try this out")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the engine (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where there is room: up to 14 GB are taken, without llama-7b 11")
    parser.add_argument("--mergekit", type=Path, help="the Python of an environment that has it")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args()
    found: list[Row] = []
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        engine = WarmEngine(options.threads, Inputs.made(tiny(), folder))
        try:
            for shape in (SHAPES[name] for name in options.shapes):
                fewer = {} if options.layers is None else {"num_hidden_layers": options.layers}
                settings = {**shape.settings, **fewer}
                for measured in measure(
                    engine, replace(shape, settings=settings), folder, options.mergekit, options.threads
                ):
                    print(*measured.values(), flush=True)
                    found.append(measured)
        finally:
            engine.close()
            shown(options.json, found)


if __name__ == "__main__":
    main()
