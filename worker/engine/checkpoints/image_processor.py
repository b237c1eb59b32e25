"""Loads the image processor of a checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import PIL.Image
from torch import Tensor

from worker.engine.catalog.checkpoints.companions import companions
from worker.engine.catalog.checkpoints.files import IMAGE_PROCESSOR
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.json_files import read_json
from worker.engine.catalog.checkpoints.limits import MAX_CONFIG_BYTES
from worker.engine.catalog.primitives.errors import InvalidCheckpoint, is_of_library
from worker.engine.catalog.primitives.paths import in_one_line
from worker.engine.checkpoints.configurations import OFFLINE
from worker.engine.runtime.libraries import transformers
from worker.engine.runtime.resources import is_out_of_memory

KEYS = frozenset(
    {
        "image_processor_type", "feature_extractor_type", "do_convert_rgb", "do_resize", "size", "default_to_square",
        "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize", "image_mean",
        "image_std",
    }
)  # fmt: skip
"""Keys of `preprocessor_config.json` that are passed on. They change pixel values; all others are left out."""
SIZES = ("size", "crop_size")
LARGEST_SIDE = 4096
PROBED = (320, 240)
"""Width and height of the image by which it is checked that a processor makes what its model takes."""


@dataclass(frozen=True)
class ImageProcessor:
    """An image processor of the library, and the shape, (channels, height, width), that the model takes."""

    library: Any
    shape: tuple[int, int, int]
    model_input_names: tuple[str, ...] = ("pixel_values",)

    @property
    def values(self) -> int:
        """Number of values of an image."""
        return prod(self.shape)

    def values_of(self, image: PIL.Image.Image) -> Tensor | None:
        """Return pixel values of an RGB image, float32; None where the processor cannot make any of it."""
        try:
            [values] = self.library(images=[image], return_tensors="pt")["pixel_values"]
            return values.float()  # type: ignore[no-any-return]
        except BaseException as error:  # resizing and cropping raise various exceptions
            if is_out_of_memory(error) or not is_of_library(error):
                raise
            return None


def load_image_processor(info: CheckpointInfo, shape: tuple[int, int, int]) -> ImageProcessor:
    """Load a checkpoint's image processor: a class of the library, on allowed keys, computed by Pillow and NumPy.

    Raises:
        InvalidCheckpoint: it does not load, or makes images of another shape than the model takes.
    """
    file = companions(info).get(IMAGE_PROCESSOR)
    if file is None:
        raise InvalidCheckpoint(
            info.source, f"no {IMAGE_PROCESSOR} is there; save the image processor beside the weights"
        )
    content = read_json(file, info.source, MAX_CONFIG_BYTES)
    for key in SIZES:
        if _largest(content.get(key)) > LARGEST_SIDE:
            problem = f"{IMAGE_PROCESSOR} has a {key} beyond {LARGEST_SIDE} pixels"
            raise InvalidCheckpoint(info.source, problem, file=IMAGE_PROCESSOR)
    kept = {key: value for key, value in content.items() if key in KEYS}
    try:
        with TemporaryDirectory(prefix="maskmerge-processor-") as folder:
            (Path(folder) / IMAGE_PROCESSOR).write_text(json.dumps(kept), encoding="utf-8")
            (Path(folder) / "config.json").write_text(json.dumps({"model_type": info.model_type}), encoding="utf-8")
            library = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", **OFFLINE)
    except BaseException as error:  # the library has no exception of its own for files that it cannot read
        if is_out_of_memory(error) or not is_of_library(error):
            raise
        problem = f"its image processor does not load: {in_one_line(error)}"
        raise InvalidCheckpoint(info.source, problem, file=IMAGE_PROCESSOR) from error
    found = ImageProcessor(library, shape)
    values = found.values_of(PIL.Image.new("RGB", PROBED))
    if values is None or tuple(values.shape) != shape:
        made = "fails on an image" if values is None else f"makes images of shape {list(values.shape)}"
        problem = f"its image processor {made}, and the model takes {list(shape)}; correct {IMAGE_PROCESSOR}"
        raise InvalidCheckpoint(info.source, problem, file=IMAGE_PROCESSOR)
    return found


def _largest(size: Any) -> float:
    """Return the largest number in a size, however it is written."""
    values = size.values() if isinstance(size, Mapping) else size if isinstance(size, list) else [size]
    return max((value for value in values if isinstance(value, int | float)), default=0)
