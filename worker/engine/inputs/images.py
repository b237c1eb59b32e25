"""Decodes rows' images, within limits, and makes a model's inputs of them."""

import struct
import zlib
from io import BytesIO

import PIL.Image
from PIL import ImageOps, UnidentifiedImageError
from torch import Tensor

from worker.engine.catalog.data.images import Image
from worker.engine.checkpoints.image_processor import ImageProcessor
from worker.engine.runtime.resources import is_out_of_memory

MAX_PIXELS = 50_000_000
"""Largest number of pixels of an image: 150 MB when it is decoded."""
FORMATS = ("PNG", "JPEG", "WEBP")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Kinds of pixels that have a colour of 8 bits a channel; of others, such as 16 bits, colours would be cut off."""

PIL.Image.MAX_IMAGE_PIXELS = MAX_PIXELS


def pixels_of(image: Image, processor: ImageProcessor) -> Tensor:
    """Return an image's pixel values, (channels, height, width), float32, as the processor of its model makes them.

    Raises:
        InvalidDataset: the image is of another format, too large, damaged, or of several pictures; or the processor
            makes another size of it than the model takes.
    """
    values = processor.values_of(decoded(image))
    if values is None or tuple(values.shape) != processor.shape:
        made = "fails on" if values is None else f"makes {list(values.shape)} of"
        problem = f"is an image that the model's image processor {made}; the model takes {list(processor.shape)}"
        raise image.cell.refused(problem)
    if not bool(values.isfinite().all()):
        raise image.cell.refused("is an image of which the model's image processor makes NaN or infinite values")
    return values


def decoded(image: Image) -> PIL.Image.Image:
    """Decode an image to RGB, turned as its EXIF data say. Raises InvalidDataset, see `pixels_of`."""
    content = image.read()
    try:
        with PIL.Image.open(BytesIO(content), formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise image.cell.refused(_too_many(opened.width, opened.height))
            if getattr(opened, "is_animated", False) and opened.format in ("PNG", "WEBP"):
                raise image.cell.refused("is an image of several pictures")
            if opened.mode not in MODES:
                raise image.cell.refused(f"is an image of mode {opened.mode}; save it with 8 bits a channel")
            opened.load()
            return ImageOps.exif_transpose(opened).convert("RGB")
    except UnidentifiedImageError as error:
        raise image.cell.refused(f"is no image of a known format ({', '.join(FORMATS)})") from error
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise image.cell.refused(f"is an image of more than {MAX_PIXELS} pixels") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error) as error:
        if is_out_of_memory(error):
            raise
        raise image.cell.refused(f"is a damaged image ({type(error).__name__})") from error


def _too_many(width: int, height: int) -> str:
    return f"is an image of {width} x {height} pixels; {MAX_PIXELS} are allowed"
