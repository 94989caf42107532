"""Image files as a person has them, read with what belongs to the picture: the one reader of every command.

Pillow reads 8-bit images and all metadata. It would cut 16-bit colour down to 8 bits, so those pixels go through
OpenCV, and of a TIFF through tifffile.
"""
from __future__ import annotations

import io
import re
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
import tifffile
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError, features

from elan_basicsr.data import tiff
from elan_basicsr.errors import UserError

EXTENSIONS = ('.png', '.jpg', '.jpeg', '.webp', '.tif', '.tiff', '.bmp', *(['.avif'] if features.check('avif') else []))
with suppress(ImportError):  # which Pillow reads HEIC with
    import pillow_heif
    pillow_heif.register_heif_opener()
    EXTENSIONS += ('.heic', '.heif')

ORIENTATION, EXIF_IFD, GPS_IFD = 0x0112, 0x8769, 0x8825
# Description, make, model, orientation, software, date, artist, copyright.
_TIFF_KEPT = (0x010E, 0x010F, 0x0110, ORIENTATION, 0x0131, 0x0132, 0x013B, 0x8298)
_COLOUR_CHUNKS = (b'gAMA', b'cHRM', b'sRGB', b'cICP')
_SRGB_GAMMA, _SRGB_CICP = 45455, bytes((1, 13, 0, 1))
# What ITU-T H.273 calls the brightness of HDR, and the primaries that are sRGB's or not told.
_HDR = {16: 'PQ', 18: 'HLG'}
_SRGB_PRIMARIES = (1, 2)
# XMP that tells a reader of the file to look for a video or a gain map behind the picture.
_OF_MORE_THAN_THE_PICTURE = re.compile(rb'GCamera:|GContainer:|Container:Directory|hdrgm:|HasExtendedXMP')
BAD_FILE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, cv2.error, KeyError, IndexError,
             TypeError, OverflowError, NotImplementedError, ZeroDivisionError, Image.DecompressionBombError,
             tifffile.TiffFileError)  # the last is no ValueError yet in what Python 3.10 gets


@dataclass
class Picture:
    """An image as its file stores it: pixels unturned, the orientation in `exif`; those of a TIFF are turned upright.

    `colour` is (H, W, 3) RGB or (H, W, 1) grey, uint8 or uint16; `alpha` (H, W) of the same type, or None; `icc` the
    colour profile's bytes; `dpi` the resolution; `xmp` a packet; `chunks` those of a PNG that tell the colour space.
    `changes` says in words what the pixels have lost, `left_out` what else of the file is not here.
    """
    colour: np.ndarray
    alpha: np.ndarray | None = None
    icc: bytes | None = None
    exif: Image.Exif = field(default_factory=Image.Exif)
    dpi: tuple[float, float] | None = None
    xmp: bytes | None = None
    chunks: dict[bytes, bytes] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def colour_label(self) -> list[str]:
        """In words what is lost with the chunks of a PNG whose colours are not sRGB's, in a list of one or none."""
        gamma = int.from_bytes(self.chunks.get(b'gAMA', b''), 'big')
        needed = ['cICP'] if self.chunks.get(b'cICP', _SRGB_CICP) != _SRGB_CICP else []
        if gamma and abs(gamma - _SRGB_GAMMA) > 500 and not self.icc and b'sRGB' not in self.chunks:
            needed.append('gAMA')
        return [f'the label of the colour space ({" and ".join(needed)} of a PNG) is left out, and the values stay'
                ] if needed else []


def read_size(path: Path) -> tuple[int, int]:
    """Width and height from a file's header; (0, 0) if it cannot be read, which `read_picture` then explains."""
    try:
        with _unbounded(), Image.open(path) as image:
            return image.size
    except BAD_FILE:
        return 0, 0


def read_picture(path, max_pixels: int, *, bound: str = '--max-pixels', first_frame: bool = False) -> Picture:
    """Read an image file whole.

    Palettes become colours, and CMYK becomes sRGB by its profile, which has then served. What stands behind the image
    in its file is no damage; that a part of it is missing is.

    Args:
        max_pixels: Larger images are refused, by a line that names `bound`, before memory is taken.
        first_frame: Take the first of several frames or pages, which are refused otherwise.

    Raises:
        UserError: The file is missing, empty, cut off or no image; it has several frames or pages, more than
            `max_pixels` pixels, or pixels of a kind that is not read right, which the line names.
    """
    try:
        with open(path, 'rb') as file:
            return decode_picture(file, path, max_pixels, bound=bound, first_frame=first_frame)
    except FileNotFoundError:
        raise UserError(f'{path}: no such file') from None
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror or error})') from None


def decode_picture(file: BinaryIO, path, max_pixels: int, *, bound: str, first_frame: bool) -> Picture:
    """What `read_picture` does, of an open file; `path` is what it is called."""
    if not file.read(1):
        raise UserError(f'{path}: is empty')
    try:
        with _unbounded(), Image.open(file) as image:
            _check_size(*image.size, path, max_pixels, bound)
            return _read(image, file, path, first_frame)
    except UnidentifiedImageError as error:
        file.seek(0)
        if file.read(4) in tiff.MAGIC:
            return _read_tiff_alone(file, path, max_pixels, bound, first_frame)
        raise _unreadable(error, path) from None
    except BAD_FILE as error:
        raise _unreadable(error, path) from None


def _unreadable(error: Exception, path) -> UserError:
    return UserError(f'{path}: is no readable image, it may be cut off or damaged ({one_line(error, path)})')


def _read_tiff_alone(file: BinaryIO, path, max_pixels: int, bound: str, first_frame: bool) -> Picture:
    """A TIFF that Pillow does not open, without its EXIF data."""
    try:
        layout = tiff.read_layout(file, path)
        page = layout.page
        _check_size(page.imagewidth, page.imagelength, path, max_pixels, bound)
        changes = _check_frames(layout.pictures, layout.changes, path, first_frame)
        if layout.reader != tiff.TIFFFILE:
            raise UserError(f'{path}: has {page.samplesperpixel} channels of {page.bitspersample} bit, '
                            f'{tiff.name(page.photometric)}, which are not read; convert it to RGB first')
        return Picture(*tiff.read_pixels(layout, file, path), page.tags.valueof(34675), xmp=page.tags.valueof(700),
                       changes=changes)
    except BAD_FILE as error:
        raise _unreadable(error, path) from None


def _check_size(width: int, height: int, path, max_pixels: int, bound: str) -> None:
    if width * height > max_pixels:
        raise UserError(f'{path}: has {width}x{height} pixels, more than {bound} {max_pixels}; raise it if there is '
                        'memory')


_OPEN, _BOUND = threading.Lock(), Image.MAX_IMAGE_PIXELS
_opening = 0


@contextmanager
def _unbounded() -> Iterator[None]:
    """Without Pillow's own bound on pixels, in whose place `max_pixels` stands; it is one of the whole process."""
    global _opening, _BOUND
    with _OPEN:
        if not _opening:
            _BOUND, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _opening += 1
    try:
        yield
    finally:
        with _OPEN:
            _opening -= 1
            if not _opening:
                Image.MAX_IMAGE_PIXELS = _BOUND


def _read(image: ImageFile.ImageFile, file: BinaryIO, path, first_frame: bool) -> Picture:
    layout = tiff.read_layout(file, path) if image.format == 'TIFF' else None
    is_16_bit = _is_16_bit(image)
    if image.mode == 'F' or (image.mode == 'I' and not is_16_bit):
        raise UserError(f'{path}: has 32-bit pixels, expected 8 or 16 bit; convert it first')
    # The further frames of a phone's MPO are previews and gain maps; the first is the photograph.
    frames = layout.pictures if layout else getattr(image, 'n_frames', 1) if image.format != 'MPO' else 1
    changes = _check_frames(frames, layout.changes if layout else [], path, first_frame)
    _scale_key(image)
    exif = _exif(image)
    if layout is None or layout.reader != tiff.TIFFFILE:
        image.load()  # of 16 bits as well: OpenCV would fill up an image that is cut off
    icc, dpi, xmp = image.info.get('icc_profile'), _dpi(image), image.info.get('xmp')
    if layout is not None:
        exif.pop(ORIENTATION, None)  # the pixels are turned
        xmp = xmp and re.sub(rb'(tiff:Orientation(?:="|>))\d', rb'\g<1>1', xmp)
    if layout is not None and layout.reader != tiff.PILLOW:
        colour, alpha = tiff.read_pixels(layout, file, path)
    elif is_16_bit and layout is None:
        colour, alpha = _read_16_bit(file, path, image.info.get('transparency'))
    else:
        if image.mode in ('CMYK', 'LAB'):
            changes = [*changes, f'{image.mode} becomes sRGB']
        if layout is not None and (palette := layout.palette_of_bytes) is not None:
            image.putpalette(palette)
        plain, icc = _to_plain_mode(image, icc)
        pixels = np.asarray(plain)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        count = len(plain.getbands()) - plain.mode.endswith('A')
        colour, alpha = pixels[..., :count], pixels[..., count] if plain.mode.endswith('A') else None
    picture = Picture(colour, alpha, icc, exif, dpi, xmp, changes=changes)
    _look_beside(picture, image, file, path)
    return picture


def _check_frames(frames: int, changes: list[str], path, first_frame: bool) -> list[str]:
    """The changes; raise UserError if there are several pictures and not the first is asked for."""
    if frames <= 1:
        return changes
    if not first_frame:
        raise UserError(f'{path}: has {frames} frames or pages, expected one; split it, or make it a video')
    return [*changes, 'of several frames or pages the first is taken']


def _is_16_bit(image: ImageFile.ImageFile) -> bool:
    """Of an image not yet loaded. Pillow opens 16-bit colour as 8-bit; the decoder's argument, RGB;16B, tells."""
    return any(';16' in str(tile[3]) for tile in image.tile) and image.format != 'BMP'  # 16 bits for three channels


def _scale_key(image: ImageFile.ImageFile) -> None:
    """Pillow scales grey of 2 and 4 bits to 8, but not the level that a PNG says is transparent."""
    bits = {'L;2': 2, 'L;4': 4}.get(str(image.tile[0][3])) if image.tile else None
    if bits and isinstance(image.info.get('transparency'), int):
        image.info['transparency'] *= 255 // (2**bits - 1)


def _exif(image: Image.Image) -> Image.Exif:
    """A copy of the EXIF data of an image not yet loaded: camera and position as dicts, without the thumbnail."""
    exif, kept = image.getexif(), Image.Exif()
    for tag, value in exif.items():
        if tag in _TIFF_KEPT or image.format != 'TIFF':  # whose EXIF tags stand among those of its layout
            kept[tag] = value
    for tag in (EXIF_IFD, GPS_IFD):
        if details := dict(exif.get_ifd(tag)):
            kept[tag] = details
        elif tag in kept:
            del kept[tag]
    return kept


def _dpi(image: Image.Image) -> tuple[float, float] | None:
    x, y = map(float, image.info.get('dpi') or (0, 0))
    return (x, y) if x > 0 and y > 0 else None


def _read_16_bit(file: BinaryIO, path, key: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Colour and alpha; `key` is the grey that is transparent, which OpenCV leaves out of account."""
    file.seek(0)
    pixels = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None or pixels.dtype != np.uint16:
        raise UserError(f'{path}: is no 16-bit image that OpenCV reads; convert it to a 16-bit PNG first')
    if pixels.ndim == 2:
        return pixels[..., None], None if key is None else np.where(pixels == key, 0, 65535).astype(np.uint16)
    alpha = pixels[..., 3] if pixels.shape[2] == 4 else None
    colour = pixels[..., 2::-1]
    grey_with_alpha = alpha is not None and (colour[..., :1] == colour).all()  # which OpenCV reads as colour
    return (colour[..., :1] if grey_with_alpha else colour), alpha


# ---------------------------------------------------------------------------------------------------------- colours

def _to_plain_mode(image: Image.Image, icc: bytes | None) -> tuple[Image.Image, bytes | None]:
    """The image as L, LA, RGB or RGBA, and the profile that holds for it."""
    if image.mode == 'CMYK':
        return _cmyk_to_srgb(image, icc), None
    if image.mode in ('RGBa', 'La', 'PA') or 'transparency' in image.info:
        return image.convert('LA' if image.mode in ('L', 'La', '1') else 'RGBA'), icc
    if image.mode not in ('L', 'LA', 'RGB', 'RGBA'):
        return image.convert('L' if image.mode == '1' else 'RGB'), None if image.mode == 'LAB' else icc
    return image, icc


def _cmyk_to_srgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    converted = None
    if icc:
        with suppress(ImageCms.PyCMSError):  # a damaged profile: the plain conversion shows the picture still
            converted = ImageCms.profileToProfile(image, io.BytesIO(icc), ImageCms.createProfile('sRGB'),
                                                  outputMode='RGB')
    return converted or image.convert('RGB')


def profile_name(icc: bytes | None) -> str:
    """What a colour profile calls itself, empty where there is none."""
    try:
        return ImageCms.getProfileDescription(io.BytesIO(icc)).strip() if icc else ''
    except (ImageCms.PyCMSError, OSError):
        return 'one that cannot be read'


# -------------------------------------------------------------------------------------- what stands beside the pixels

def _look_beside(picture: Picture, image: ImageFile.ImageFile, file: BinaryIO, path) -> None:
    """Put into `picture` what of the file Pillow does not give, or into words what is not kept of it."""
    file.seek(0)
    if image.format == 'PNG':
        picture.chunks = _colour_chunks(file)
    elif image.format in ('AVIF', 'HEIF'):
        picture.changes += _depth_and_colours(file.read(2**16), path)
    elif image.format == 'JPEG' and b'ftyp' in file.read():
        picture.left_out.append('the video behind the image is left out')
    elif image.format == 'MPO':
        picture.left_out.append('further images in the file (previews, gain maps) are left out')
    if picture.xmp and _OF_MORE_THAN_THE_PICTURE.search(picture.xmp):
        picture.xmp = None
        picture.left_out.append('XMP is left out, since it speaks of more than the image')


def _colour_chunks(file: BinaryIO) -> dict[bytes, bytes]:
    """The chunks before the pixels of a PNG that tell its colour space, beside the profile."""
    chunks = {}
    file.seek(8)
    while len(head := file.read(8)) == 8 and head[4:] != b'IDAT':
        length = int.from_bytes(head[:4], 'big')
        if head[4:] in _COLOUR_CHUNKS:
            chunks[head[4:]] = file.read(length)
            length = 0
        file.seek(length + 4, io.SEEK_CUR)
    return chunks


def _depth_and_colours(head: bytes, path) -> list[str]:
    """What AVIF and HEIC lose when Pillow reads them as 8 bits, without the colour space they are labelled with.

    Raises:
        UserError: They are HDR, whose brightness 8 bits do not hold.
    """
    changes = []
    label = re.search(rb'colrnclx(..)(..)', head, re.DOTALL)
    primaries, transfer = (int.from_bytes(value, 'big') for value in label.groups()) if label else (1, 1)
    if transfer in _HDR:
        raise UserError(f'{path}: is HDR ({_HDR[transfer]}), expected an image of usual brightness; tone-map it first')
    if primaries not in _SRGB_PRIMARIES and b'colrprof' not in head and b'colrrICC' not in head:
        changes.append(f'the label of the colour space is left out (primaries {primaries}), and the values stay')
    depths = re.search(rb'pixi\0\0\0\0(.)(.)', head, re.DOTALL)
    if depths and depths[2][0] > 8:
        changes.append(f'{depths[2][0]} bits become 8')
    return changes


def one_line(error: BaseException, path) -> str:
    """The words of an exception without the path, which stands before them already."""
    if isinstance(error, UnidentifiedImageError):
        return 'of no known format'
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = ' '.join(text.replace(repr(str(path)), 'it').split())
    return (text[:120] + '…' if len(text) > 120 else text) or type(error).__name__
