"""What a TIFF says of its pixels, and those that Pillow would cut down or mix up."""
from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import BinaryIO

import cv2
import numpy as np
import tifffile
from PIL import Image

from elan_basicsr.errors import UserError

MAGIC = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')
_WHITE_IS_0, _GREY, _RGB, _PALETTE, _CMYK, _YCBCR, _LAB = 0, 1, 2, 3, 5, 6, 8
# Channels of colour that each photometric interpretation has.
_COLOURS = {_WHITE_IS_0: 1, _GREY: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4, _YCBCR: 3, _LAB: 3}
PILLOW, TIFFFILE, OPENCV = 'Pillow', 'tifffile', 'OpenCV'
_TIFFFILES = (_WHITE_IS_0, _GREY, _RGB)
_NUMBERS = {2: 'signed', 3: 'floating-point', 5: 'complex', 6: 'complex'}
_ASSOCIATED, _UNASSOCIATED = 1, 2
_REDUCED_OR_MASK = 1 | 4  # of the tag NewSubfileType
logging.getLogger('tifffile').addHandler(logging.NullHandler())  # or what it says of odd tags goes to stderr


@dataclass
class Layout:
    """How a TIFF's first picture lies in its file.

    `pictures` counts those of the file without thumbnails and masks; `changes` says what a reader leaves out.
    """
    page: tifffile.TiffPage
    pictures: int
    changes: list[str]

    @property
    def reader(self) -> str:
        """Who reads the pixels right: tifffile grey, RGB and YCbCr without compression, Pillow the rest.

        Where tifffile lacks the compression Pillow reads 8 bits and OpenCV 16, of channels that they do not mix up.
        """
        page = self.page
        if page.photometric == _YCBCR and page.compression == 1:  # Pillow before 13 takes four bytes for each pixel
            return TIFFFILE
        if page.photometric not in _TIFFFILES or page.bitspersample < 8:
            return PILLOW
        count = _COLOURS[page.photometric]
        plain = page.samplesperpixel == count or (page.samplesperpixel == 4 and page.planarconfig == 1 and count == 3)
        if _tifffile_decodes(page) or not plain:
            return TIFFFILE
        if page.bitspersample == 8:
            return PILLOW
        return OPENCV if page.planarconfig == 1 else TIFFFILE

    @property
    def palette_of_bytes(self) -> bytes | None:
        """A palette whose values some programs write as bytes, where a TIFF has 16 bits: R, G, B of each entry."""
        colours = self.page.colormap
        if self.page.photometric != _PALETTE or colours is None or colours.max() > 255:
            return None
        return colours.T.astype(np.uint8).tobytes()


def read_layout(file: BinaryIO, path) -> Layout:
    """Look at a TIFF's tags.

    Raises:
        UserError: The pixels are of a kind that no reader here gives back right; the line names it.
    """
    file.seek(0)
    opened = tifffile.TiffFile(file)
    page = opened.pages.first
    bits, kind = page.bitspersample, page.photometric
    if page.sampleformat in _NUMBERS or bits not in (1, 2, 4, 8, 16):
        number = _NUMBERS.get(page.sampleformat, 'unsigned')
        raise UserError(f'{path}: has {bits}-bit {number} pixels, expected unsigned ones of 8 or 16 bit; convert it '
                        'first')
    if kind not in _COLOURS or (bits == 16 and kind in (_PALETTE, _YCBCR, _LAB)):
        raise UserError(f'{path}: has {bits}-bit pixels of photometric interpretation {name(kind)}, which are not '
                        'read; convert it to RGB first')
    if bits < 8 and (page.samplesperpixel > 1 or page.fillorder == 2 and kind == _PALETTE):
        raise UserError(f'{path}: has {page.samplesperpixel} channels of {bits} bit, expected 8 or 16 bit; convert it '
                        'first')
    planes = page.planarconfig == 2
    if kind == _YCBCR and (planes or page.compression == 1 and tuple(page.subsampling or (2, 2)) != (1, 1)):
        how = 'in planes' if planes else 'with subsampled chroma and no compression'
        raise UserError(f'{path}: has YCbCr pixels {how}, which are not read; convert it to RGB first')
    if kind == _CMYK and (page.samplesperpixel > 4 or planes and bits == 16):
        raise UserError(f'{path}: has CMYK pixels of {bits} bit with {page.samplesperpixel} channels'
                        f'{" in planes" * planes}, which are not read; convert it to RGB first')
    if page.samplesperpixel < _COLOURS[kind]:
        raise UserError(f'{path}: has {page.samplesperpixel} channels, {name(kind)} has {_COLOURS[kind]}; it may be '
                        'damaged')
    _, _, further = _channels(page)
    changes = [f'{further} channels beside colour and alpha are left out'] if further else []
    if kind == _CMYK and bits == 16:
        changes.append('16 bits become 8')
    return Layout(page, sum(not getattr(each, 'subfiletype', 0) & _REDUCED_OR_MASK for each in opened.pages), changes)


def name(value: int) -> str:
    """What tifffile calls the value of a tag."""
    return getattr(value, 'name', str(value))


def _channels(page) -> tuple[int, int | None, int]:
    """How many channels are colour, which is alpha, and how many are of no known meaning.

    Without the tag ExtraSamples a fourth channel beside RGB is alpha, as OpenCV writes it.
    """
    count = _COLOURS[page.photometric]
    extra = tuple(page.extrasamples) or (_UNASSOCIATED,) * (page.samplesperpixel - count)
    alpha = next((count + i for i, what in enumerate(extra) if what in (_ASSOCIATED, _UNASSOCIATED)), None)
    return count, alpha, page.samplesperpixel - count - (alpha is not None)


def read_pixels(layout: Layout, file: BinaryIO, path) -> tuple[np.ndarray, np.ndarray | None]:
    """Colour (H, W, 1 or 3) and alpha (H, W) or None of grey, RGB and YCbCr, uint8 or uint16, as the picture is shown.

    Raises:
        UserError: The compression is one that needs imagecodecs.
    """
    page = layout.page
    pixels = _samples(layout, file, path)
    most = np.iinfo(pixels.dtype).max
    count, at, _ = _channels(page)
    colour, alpha = pixels[..., :count], None if at is None else pixels[..., at]
    if page.photometric == _WHITE_IS_0:
        colour = most - colour
    elif page.photometric == _YCBCR:
        h, w = colour.shape[:2]
        colour = np.asarray(Image.frombytes('YCbCr', (w, h), colour.tobytes()).convert('RGB'))
    if alpha is not None and [what for what in page.extrasamples if what][:1] == [_ASSOCIATED]:
        share = np.maximum(alpha, 1)[..., None] / most
        colour = np.minimum(np.round(colour / share), most).astype(pixels.dtype)
    return colour, alpha


def _tifffile_decodes(page) -> bool:
    """Without imagecodecs it decodes the compressions of Python's library, not LZW."""
    return page.compression in tifffile.TIFF.DECOMPRESSORS and page.predictor in tifffile.TIFF.UNPREDICTORS


def _samples(layout: Layout, file: BinaryIO, path) -> np.ndarray:
    """(H, W, all channels) as the file has them, turned upright."""
    page = layout.page
    if _tifffile_decodes(page):
        planes = page.asarray(squeeze=False)[:, 0]  # (planes, H, W, channels of a plane)
        return turned(np.concatenate(list(planes), axis=-1), page.tags.valueof('Orientation', default=1))
    file.seek(0)
    pixels: np.ndarray | None = None
    if layout.reader == OPENCV:
        pixels = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)  # turns the pixels as well
    if pixels is None or pixels.dtype != page.dtype:
        raise UserError(f'{path}: has {page.samplesperpixel} channels of {page.bitspersample} bit'
                        f'{" in planes" * (page.planarconfig == 2)}, compressed by {name(page.compression)}, for which '
                        'imagecodecs is needed; install it, or save the file without compression')
    return pixels[..., None] if pixels.ndim == 2 else pixels[..., [2, 1, 0, 3][:pixels.shape[2]]]


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, …) as shown, by the tag that TIFF and EXIF have for it."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels
