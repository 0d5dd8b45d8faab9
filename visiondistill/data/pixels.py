"""From the bytes of an image file to pixels: one rule for every encoding, the same in training and evaluation."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""What is opened, told by content and not by file name. PIL knows more, some of which start other programs."""

SIXTEEN_BIT = 257
"""65535 / 255: 16-bit grey is divided by it, so that black stays black and white white."""


def decode(data: bytes, channels: int = 3) -> Image.Image:
    """The picture in an image file, as 8-bit grey (mode L) or colour (mode RGB), the right way up.

    - The EXIF orientation is applied. Colour profiles are not: pixels are taken as sRGB.
    - Animations and files of several pages give their first picture.
    - Transparency, of palettes too, is composited on white.
    - 16-bit grey is scaled to 8 bit. Of 16-bit colour PIL reads the high byte, which is the same within 1/255.
    - CMYK becomes RGB without a profile; grey becomes three equal channels, and colour luma (ITU-R
      601), as `channels` asks.

    Args:
        data: the whole file.
        channels: 1 or 3.

    Raises:
        ValueError: no such picture can be read; the message says why: empty, cut off, not an image,
            more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, or 32-bit values of unknown range.
    """
    from PIL import Image, ImageFile, ImageOps

    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set: cut files would pass as whole; set it to False")
    if not data:
        raise ValueError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=_known_formats())
        _refuse_bomb(image.size, Image.MAX_IMAGE_PIXELS)
        image.load()
        # In place: a copy would forget its format, and so the range of its values.
        ImageOps.exif_transpose(image, in_place=True)
        return eight_bit(image, channels)
    except Exception as error:  # what decoders raise on damaged input is not one family
        if isinstance(error, Image.UnidentifiedImageError):
            raise ValueError(f"not an image of a known format ({', '.join(FORMATS)})") from None
        raise ValueError(str(error) or type(error).__name__) from error


def eight_bit(image: Image.Image, channels: int) -> Image.Image:
    """Mode L (`channels` 1) or RGB (3) of a loaded PIL image, by the rule of `decode`."""
    image = _without_depth(image)
    return opaque(image).convert("L" if channels == 1 else "RGB")


def opaque(image: Image.Image) -> Image.Image:
    """The image composited on white where it has transparency, itself where not."""
    from PIL import Image

    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _without_depth(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray(((values + SIXTEEN_BIT // 2) // SIXTEEN_BIT).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit values (mode {image.mode}) have no stated range: save it with 8 or 16 bits")
    return image


def _refuse_bomb(size: tuple[int, int], limit: int | None) -> None:
    if limit is not None and size[0] * size[1] > limit:
        raise ValueError(f"{size[0]}x{size[1]} pixels are more than PIL.Image.MAX_IMAGE_PIXELS = {limit}")


def _known_formats() -> list[str]:
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]
