"""Brings a job's inputs on the Hugging Face hub to this machine before the work begins.

Files go to the hub library's own cache, which other programs share and where a file of one commit never changes. The
libraries' own variables set the token, the endpoint and the cache's folder: HF_TOKEN, HF_ENDPOINT, HF_HOME.
"""

import csv
import errno
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import httpx2
import pyarrow
from datasets.packaged_modules.csv.csv import CsvConfig
from huggingface_hub import HfApi, constants, errors, hf_hub_download
from huggingface_hub.file_download import repo_folder_name
from tqdm import tqdm

from worker.engine.catalog.checkpoints.files import described_files, weights_among
from worker.engine.catalog.checkpoints.licences import CARD
from worker.engine.catalog.contracts.spec import CheckpointSpec, JobSpec
from worker.engine.catalog.data.formats import Csv
from worker.engine.catalog.data.rows import ROWS_OF_TEXT, RowReader
from worker.engine.catalog.data.spec import DatasetSpec, HubSource
from worker.engine.catalog.primitives.errors import EngineError, InvalidCheckpoint, InvalidDataset, StorageError
from worker.engine.catalog.primitives.notes import Doubt
from worker.engine.catalog.primitives.paths import in_one_line
from worker.engine.inputs.tables import (
    LISTS,
    EncodedTable,
    FileRows,
    TableRows,
    count_of_parquet,
    rows_of_parquet,
    types_of_parquet,
)
from worker.engine.runtime.progress import OnProgress, Phase
from worker.engine.runtime.protocols import require_others_forbidden
from worker.engine.runtime.resources import is_out_of_memory, require_space

# Formats that hold rows. Others would decode sounds, or read files that are no data of the repository.
BUILDERS = ("arrow", "csv", "imagefolder", "json", "parquet", "text")
MOST_FILES = 20_000  # of a folder of images, each of which is asked for by itself
QUOTES = ("quoting", "quotechar", "escapechar", "doublequote", "dialect")
# Options of CSV that say which lines are rows, besides quotes.
LINES = (
    "header", "names", "skiprows", "nrows", "skipfooter", "comment", "index_col", "skip_blank_lines", "lineterminator",
    "encoding", *QUOTES[1:],
)  # fmt: skip
PARQUET_ROWS = 1000  # number decoded together: equal texts may be stored once, and one text may have a megabyte
EXTRA_COLUMN = "__index_level_0__"  # pandas' name of the first column, if rows have one field more than the header
ABANDONED_S = 3600.0  # a file that nobody has written to for so long is left of a download that was killed

RepositoryType = Literal["model", "dataset"]

datasets.disable_progress_bars()  # they would fill the log
constants.DOWNLOAD_CHUNK_SIZE = 1 << 20  # so that also a slow download makes progress, for want of which a job is lost


@dataclass(frozen=True)
class RemoteFile:
    kind: RepositoryType
    source: HubSource
    name: str
    missing_bytes: int
    """Number of bytes to download; 0 when the file is in the cache."""


@dataclass(frozen=True)
class ParquetFiles:
    """A table that is read from its files, because a decoded file of 130 kB may have 7 GB."""

    parts: tuple[FileRows, ...]
    features: Mapping[str, Any]
    """The repository's description of the columns, by name."""


@dataclass(frozen=True)
class ImageFolder:
    """Rows of images that are files, each in the folder of its label."""

    table: pyarrow.Table
    """Paths from `folder`, and ids of labels where the folders' names are labels."""
    names: tuple[str, ...] | None
    """Names of the labels."""
    folder: Path
    root: Path
    """The cache's folder of the repository, in which its files lie."""


@dataclass
class Fetched:
    """A job's inputs from the hub."""

    checkpoints: dict[HubSource, Path] = field(default_factory=dict)
    """Folders of checkpoints and statistics, by repository and commit."""
    tables: dict[tuple[HubSource, str | None, str | None], "datasets.Dataset | ParquetFiles | ImageFolder"] = field(
        default_factory=dict
    )
    """Tables by repository, configuration and split."""
    notes: dict[tuple[HubSource, str | None, str | None], list[str]] = field(default_factory=dict)
    """Notes of rows that were joined or skipped, by repository, configuration and split."""

    def rows(self, spec: DatasetSpec, reader: RowReader = ROWS_OF_TEXT) -> TableRows:
        """Return the rows of a data set. Raises InvalidDataset."""
        table = self.tables[_table_key(spec)]
        if isinstance(table, ImageFolder):
            beside = spec.model_copy(update={"folder": table.folder, "root": table.root})
            return TableRows(EncodedTable(table.table), beside, table.names, reader=reader)
        if isinstance(table, ParquetFiles):
            column = reader.label_column(spec)
            label = None if column is None else table.features.get(column)
            feature = label.feature if isinstance(label, LISTS) else label
            names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
            return rows_of_parquet(table.parts, spec, names, reader)
        return TableRows(table, spec, notes=self.notes[_table_key(spec)], reader=reader)


def fetch(spec: JobSpec, on_progress: OnProgress) -> Fetched:
    """Download the inputs that are not in the cache yet.

    Raises:
        InvalidCheckpoint, InvalidDataset: there is no such repository, commit, configuration or split, the token may
            not see it, or its format holds no rows.
        StorageError: the hub does not answer.
        DiskFull: the cache has no room for it.
        RuntimeError: the libraries of this process may open files at any address.
    """
    require_others_forbidden()
    folders = [*spec.checkpoints, *spec.given_statistics]
    checkpoints = {folder.hub: folder for folder in folders if folder.hub}
    tables = {_table_key(rows): rows for rows in spec.rows_to_read if rows.hub}
    files: list[RemoteFile] = []
    for source, checkpoint in checkpoints.items():
        with _translated(checkpoint):
            files += _checkpoint_files(source)
    builders = {}
    for (source, config, _), rows in tables.items():
        if (source, config) not in builders:
            with _translated(rows):
                builder = _builder(rows, source)
                builders[source, config] = builder
                files += _data_files(rows, source, builder)
    total = sum(file.missing_bytes for file in files)
    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    require_space(cache, total, "the download")
    downloading = Phase("downloading", total, "bytes", on_progress)
    fetched = Fetched()
    for source, checkpoint in checkpoints.items():
        with _translated(checkpoint):
            fetched.checkpoints[source] = _download(files, "model", source, downloading)
    for (source, config, split), rows in tables.items():
        with _translated(rows):
            folder = _download(files, "dataset", source, downloading)
            builder = builders[source, config]
            if _builder_name(builder) == "imagefolder":
                fetched.tables[source, config, split] = _image_folder(rows, source, builder, folder)
                continue
            files_of_it = _parquet_files(rows, source, builder)
            if files_of_it is not None:
                fetched.tables[source, config, split] = files_of_it
                continue
            table, chosen = _prepared(rows, builder)
            fetched.tables[source, config, split] = table
            fetched.notes[source, config, split] = _notes_of_csv(rows, source, builder, table, chosen)
    return fetched


def _table_key(rows: DatasetSpec) -> tuple[HubSource, str | None, str | None]:
    if rows.hub is None:
        raise TypeError(f"{rows.source} is not on the hub")
    return rows.hub, rows.config, rows.split


def _checkpoint_files(source: HubSource) -> list[RemoteFile]:
    names = HfApi().list_repo_files(source.repository, revision=source.commit)

    def read(name: str) -> bytes:
        return Path(hf_hub_download(source.repository, name, revision=source.commit)).read_bytes()

    cards = [name for name in (CARD,) if name in names]  # for the licence
    wanted = (*described_files(names), *weights_among(names, read), *cards)
    return [_remote_file("model", source, name) for name in wanted]


def _builder(rows: DatasetSpec, source: HubSource) -> Any:
    # A folder of the same name in the working directory would be taken for the data set, so that is empty.
    with tempfile.TemporaryDirectory() as empty, chdir(empty):
        builder = datasets.load_dataset_builder(source.repository, rows.config, revision=source.commit)
        options: dict[str, Any] = {}
        if _builder_name(builder) == "csv":
            options = _csv_options(builder.config)
        elif _builder_name(builder) == "parquet":  # the default is a whole row group, which may be the whole file
            options = {"batch_size": PARQUET_ROWS}
        if options:
            builder = datasets.load_dataset_builder(source.repository, rows.config, revision=source.commit, **options)
    if _builder_name(builder) not in BUILDERS:
        raise InvalidDataset(rows.source, f"its format is {_builder_name(builder)}; known are {', '.join(BUILDERS)}")
    return builder


def _csv_options(config: Any) -> dict[str, Any]:
    """Return new options for the CSV reader.

    Text that spells a missing value, such as NA, is text. No line is skipped because of its fields. In tab-separated
    files a quote is a plain character, unless the data set's own description has an option for quotes.
    """
    options = {"keep_default_na": False, "on_bad_lines": "error"}
    if config.sep == "\t" and all(getattr(config, name) == getattr(CsvConfig(), name) for name in QUOTES):
        options["quoting"] = csv.QUOTE_NONE
    return options


def _notes_of_csv(rows: DatasetSpec, source: HubSource, builder: Any, table: datasets.Dataset, split: str) -> list[str]:
    """Note where the library makes other rows of CSV than its lines say, which it does without a word.

    Raises:
        InvalidDataset: columns are shifted, because rows have more fields than the header.
    """
    if _builder_name(builder) != "csv":
        return []
    config, default = builder.config, CsvConfig()
    if EXTRA_COLUMN in table.column_names:
        problem = "its rows have more fields than its header, so it is not certain which columns these are"
        raise InvalidDataset(rows.source, problem)
    changed = [name for name in LINES if getattr(config, name) != getattr(default, name)]
    if changed:
        said = f"its description sets {', '.join(changed)} for its CSV, which changes what lines are rows"
        return [f"{rows.source}: {said}; they were followed"]
    notes: list[str] = []
    found, uneven = 0, 0
    names = _file_names(rows, source, builder, split)
    for name in names:
        path = _rows_file(source, name)
        if path.suffix not in (".csv", ".tsv"):  # only the library reads compressed files
            return []
        form = Csv(f"{rows.source}, {name}", config.sep, has_quotes=config.quoting != csv.QUOTE_NONE)
        try:
            with path.open("rb") as stream:
                found += sum(1 for _ in form.index(stream))
        except InvalidDataset as error:
            return [Doubt(f"{error.message}; the library read it in its own way")]
        notes += form.notes
        uneven += form.uneven
    if uneven:
        notes.append(
            Doubt(f"{uneven} rows of {rows.source} have fewer fields than the header; others were taken as empty")
        )
    if names and found != len(table):
        notes.append(Doubt(f"{rows.source} has {found} rows of CSV, of which the library made {len(table)}"))
    return notes


def _builder_name(builder: Any) -> str:
    return type(builder).__module__.rpartition(".")[2]


def _data_files(rows: DatasetSpec, source: HubSource, builder: Any) -> list[RemoteFile]:
    """Return the files of all splits of the configuration, because these are prepared together."""
    names = {name for split in builder.config.data_files or {} for name in _file_names(rows, source, builder, split)}
    if _builder_name(builder) == "imagefolder" and len(names) > MOST_FILES:
        problem = f"it is a folder of {len(names)} images; {MOST_FILES} are allowed, and more as Parquet"
        raise InvalidDataset(rows.source, problem)
    return [_remote_file("dataset", source, name) for name in sorted(names)]


def _file_names(rows: DatasetSpec, source: HubSource, builder: Any, split: str) -> list[str]:
    """Return the names of a split's files in the configuration; none for a part of a split."""
    prefix = f"hf://datasets/{source.repository}@{source.commit}/"
    urls = [str(url) for url in (builder.config.data_files or {}).get(split, ())]
    for url in urls:
        if not url.startswith(prefix):
            raise InvalidDataset(rows.source, f"its configuration names {url}, which is outside the repository")
    return [url.removeprefix(prefix) for url in urls]


def _parquet_files(rows: DatasetSpec, source: HubSource, builder: Any) -> ParquetFiles | None:
    """Return the rows that were asked for, or those of the only split; None where the library must make the table.

    It must for files that are no Parquet, and where the repository names other types than the files have, or a choice
    of columns or rows.
    """
    if _builder_name(builder) != "parquet" or builder.config.columns or builder.config.filters:
        return None
    splits = list(builder.config.data_files or {})
    asked = rows.split or (str(splits[0]) if len(splits) == 1 else None)
    names = {str(split): _file_names(rows, source, builder, split) for split in splits}
    if asked is None or not all(name.endswith(".parquet") for of_split in names.values() for name in of_split):
        return None  # others may be compressed as a whole
    files = {split: [_rows_file(source, name) for name in of_split] for split, of_split in names.items()}
    parts = parts_of_split(asked, files)
    features = builder.info.features or {}
    for part in parts or ():
        types = types_of_parquet(part.file)
        if any(name in types and feature() != types[name] for name, feature in features.items() if callable(feature)):
            return None
    return ParquetFiles(tuple(parts), features) if parts else None


def _image_folder(rows: DatasetSpec, source: HubSource, builder: Any, folder: Path) -> ImageFolder:
    """Return the rows that were asked for, or those of the only split, as the library `datasets` makes them.

    Args:
        folder: the repository's files.

    Raises:
        InvalidDataset: there is no such split, or there are other files than images.
    """
    of_splits = {str(split): _file_names(rows, source, builder, split) for split in builder.config.data_files or {}}
    every = [name for names in of_splits.values() for name in names]
    others = [name for name in every if Path(name).suffix.lower() not in builder.EXTENSIONS]
    if others:
        problem = f"it is a folder of images with {others[0]}, which is none"
        raise InvalidDataset(rows.source, f"{problem}; store images and columns as Parquet, as push_to_hub does")
    labels = sorted({Path(name).parent.name for name in every})
    are_labels = len(labels) > 1 and len({name.count("/") for name in every}) == 1
    if builder.config.drop_labels is not None:
        are_labels = not builder.config.drop_labels
    asked = rows.split or (next(iter(of_splits)) if len(of_splits) == 1 else "")
    try:
        runs = datasets.ReadInstruction.from_spec(asked).to_absolute({s: len(names) for s, names in of_splits.items()})
    except (ValueError, AssertionError) as error:
        problem = f"it has the splits {', '.join(of_splits)}; name one as split"
        raise InvalidDataset(rows.source, problem) from error
    chosen = [name for run in runs for name in of_splits[run.splitname][run.from_ : run.to]]
    columns: dict[str, list[Any]] = {"image": chosen}
    if are_labels:
        columns["label"] = [labels.index(Path(name).parent.name) for name in chosen]
    root = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=source.repository, repo_type="dataset")
    return ImageFolder(pyarrow.table(columns), tuple(labels) if are_labels else None, folder, root)


def parts_of_split(asked: str, files: Mapping[str, Sequence[Path]]) -> list[FileRows]:
    """Return the rows that a split's name stands for, as the library `datasets` understands it.

    `train[:100]`, `train[50%:]` and `train+validation` are such names too.

    Args:
        files: the Parquet files of each split.

    Returns:
        Rows of files in order; none if the name is not understood.
    """
    try:
        counts = {split: [count_of_parquet(file) for file in of_split] for split, of_split in files.items()}
        asked_rows = datasets.ReadInstruction.from_spec(asked).to_absolute(
            {split: sum(of_split) for split, of_split in counts.items()}
        )
    except (ValueError, AssertionError):  # the library says what is wrong with it
        return []
    parts = []
    for one in asked_rows:
        begin = 0
        for file, count in zip(files[one.splitname], counts[one.splitname], strict=True):
            first, end = max(one.from_ - begin, 0), min(one.to - begin, count)
            begin += count
            if first < end or one.from_ >= one.to:  # a file of no rows still tells the columns
                parts.append(FileRows(file, first, max(first, end)))
    return parts


def _rows_file(source: HubSource, name: str) -> Path:
    """Return the path of a data set's file, which is in the cache by now."""
    return Path(hf_hub_download(source.repository, name, repo_type="dataset", revision=source.commit))


def _remote_file(kind: RepositoryType, source: HubSource, name: str) -> RemoteFile:
    plan = hf_hub_download(source.repository, name, repo_type=kind, revision=source.commit, dry_run=True)
    return RemoteFile(kind, source, name, (plan.file_size or 0) if plan.will_download else 0)


def _download(files: Sequence[RemoteFile], kind: RepositoryType, source: HubSource, downloading: Phase) -> Path:
    """Download a repository's files, and return the folder of their snapshot."""
    path = Path()
    for file in (file for file in files if (file.kind, file.source) == (kind, source)):
        _remove_abandoned(file)
        path = Path(
            hf_hub_download(
                file.source.repository,
                file.name,
                repo_type=file.kind,
                revision=file.source.commit,
                tqdm_class=_reporter(downloading),
            )
        )
        for _ in Path(file.name).parts:
            path = path.parent
    return path


def _remove_abandoned(file: RemoteFile) -> None:
    """Remove parts of killed downloads: the library starts anew each time and never uses them again."""
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=file.source.repository, repo_type=file.kind)
    for part in folder.glob("blobs/*.incomplete"):
        try:
            if time.time() - part.stat().st_mtime > ABANDONED_S:
                part.unlink()
        except FileNotFoundError:
            continue


def _reporter(phase: Phase) -> Any:
    """Make a class that the library takes for its progress bar, and that reports to `phase`."""

    class Reporter(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            phase.advance(int(n or 0))

    return Reporter


def _prepared(rows: DatasetSpec, builder: Any) -> tuple[datasets.Dataset, str]:
    """Return the table of the split that was asked for, or of the only one, and the split's name."""
    try:
        builder.download_and_prepare(verification_mode="no_checks")  # sizes in a description may be of an older commit
    except Exception as error:
        cause = error.__cause__ or error
        if _is_the_machines(cause):
            raise cause from None
        # The libraries' own words may quote a row.
        problem = f"its files cannot be read as {_builder_name(builder)} ({type(cause).__name__})"
        raise InvalidDataset(rows.source, problem) from error
    splits = list(builder.info.splits)
    split = rows.split or (splits[0] if len(splits) == 1 else None)
    if split is None:
        raise InvalidDataset(rows.source, f"it has the splits {', '.join(splits)}; name one as split")
    return builder.as_dataset(split=split), split


@contextmanager
def _translated(asked: CheckpointSpec | DatasetSpec) -> Iterator[None]:
    """Turn the libraries' exceptions into ours."""
    invalid = InvalidCheckpoint if isinstance(asked, CheckpointSpec) else InvalidDataset
    try:
        yield
    except (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.RemoteEntryNotFoundError,
        datasets.exceptions.DatasetNotFoundError,
    ) as error:
        problem = "it is not on the hub any more, or this service's HF_TOKEN may not see it"
        raise invalid(asked.source, problem) from error
    except (httpx2.HTTPError, ConnectionError, TimeoutError, errors.LocalEntryNotFoundError) as error:
        problem = f"the hub does not answer ({type(error).__name__})"
        raise StorageError(f"{asked.source}: {problem}; try again", source=asked.source) from error
    except (datasets.exceptions.DatasetsError, ValueError, RuntimeError) as error:
        if _is_the_machines(error):
            raise
        raise invalid(asked.source, in_one_line(error)) from error
    except EngineError:
        raise
    except Exception as error:
        if _is_the_machines(error):
            raise
        # A description may break the library anywhere, and its words name folders of this machine.
        finding = "cannot load it" if isinstance(asked, CheckpointSpec) else "finds no rows in it"
        problem = f"the hub's library {finding} ({type(error).__name__})"
        raise invalid(asked.source, problem) from error


def _is_the_machines(error: BaseException) -> bool:
    """Return whether memory or disk space ran out, which is no fault of the input and is reported elsewhere."""
    return is_out_of_memory(error) or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT))
