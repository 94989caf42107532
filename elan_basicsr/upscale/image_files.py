"""Image files as a person has them: read with what belongs to the picture, written back with it.

Pillow reads and writes 8-bit images and all metadata. It would cut 16-bit colour down to 8 bits, so those pixels go
through OpenCV, and through tifffile into TIFF.
"""
from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import tifffile
from PIL import Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError

from elan_basicsr.data.images import EXTENSIONS
from elan_basicsr.errors import UserError

READABLE = (*EXTENSIONS, '.gif')
FORMATS = {'.png': 'PNG', '.jpg': 'JPEG', '.jpeg': 'JPEG', '.webp': 'WEBP', '.tif': 'TIFF', '.tiff': 'TIFF',
           '.bmp': 'BMP'}
LARGEST_EDGE = {'JPEG': 65500, 'WEBP': 16383}  # of the formats' own
WITHOUT_ALPHA = ('JPEG', 'BMP')
WITH_16_BITS = ('PNG', 'TIFF')
_JPEG = {'quality': 95, 'subsampling': 0}
_SAVE: dict[str, dict] = {'PNG': {'compress_level': 4}, 'JPEG': _JPEG, 'WEBP': {'quality': 95, 'exact': True},
         'TIFF': {'compression': 'tiff_adobe_deflate'}, 'BMP': {}}
_ORIENTATION, _EXIF_IFD, _GPS_IFD, _EXIF_WIDTH, _EXIF_HEIGHT = 0x0112, 0x8769, 0x8825, 0xA002, 0xA003
# Description, make, model, orientation, software, date, artist, copyright.
_TIFF_KEPT = (0x010E, 0x010F, 0x0110, _ORIENTATION, 0x0131, 0x0132, 0x013B, 0x8298)
_BAD_FILE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, cv2.error, KeyError, IndexError,
             TypeError, OverflowError, Image.DecompressionBombError)


@dataclass
class Picture:
    """An image as its file stores it: pixels unturned, the orientation in `exif`; those of a TIFF are turned upright.

    `colour` is (H, W, 3) RGB or (H, W, 1) grey, uint8 or uint16; `alpha` (H, W) of the same type, or None; `icc` the
    colour profile's bytes; `dpi` the resolution.
    """
    colour: np.ndarray
    alpha: np.ndarray | None = None
    icc: bytes | None = None
    exif: Image.Exif = field(default_factory=Image.Exif)
    dpi: tuple[float, float] | None = None


# ---------------------------------------------------------------------------------------------------------- reading

def read_size(path: Path) -> tuple[int, int]:
    """Width and height from a file's header; (0, 0) if it cannot be read, which `read_picture` then explains."""
    try:
        with _unbounded(), Image.open(path) as image:
            return image.size
    except _BAD_FILE:
        return 0, 0


def read_picture(path: Path, max_pixels: int) -> Picture:
    """Read an image whole.

    Palettes become colours, and CMYK becomes sRGB by its profile, which has then served.

    Raises:
        UserError: The file is missing, empty, cut off or no image; it has several frames or pages, more than
            `max_pixels` pixels, or a type of pixels other than 8 and 16 bit; nothing large was allocated for it.
    """
    try:
        if os.path.getsize(path) == 0:
            raise UserError(f'{path}: is empty')
        with _unbounded(), Image.open(path) as image:
            _check_header(image, path, max_pixels)
            is_16_bit, exif = _is_16_bit(image), _exif(image)
            image.load()  # of a 16-bit file as well: OpenCV would fill up one that is cut off
            icc, dpi = image.info.get('icc_profile'), _dpi(image)
            if image.format == 'TIFF':
                exif.pop(_ORIENTATION, None)  # Pillow has turned the pixels, as OpenCV does
            if is_16_bit:
                colour, alpha = _read_16_bit(path)
            else:
                plain, icc = _to_plain_mode(image, icc)
                pixels = np.asarray(plain)
                pixels = pixels[..., None] if pixels.ndim == 2 else pixels
                count = len(plain.getbands()) - plain.mode.endswith('A')
                colour, alpha = pixels[..., :count], pixels[..., count] if plain.mode.endswith('A') else None
    except _BAD_FILE as error:
        if isinstance(error, FileNotFoundError):
            raise UserError(f'{path}: no such file') from None
        raise UserError(f'{path}: is no readable image, it may be cut off or damaged ({_one_line(error, path)})'
                        ) from None
    return Picture(colour, alpha, icc, exif, dpi)


@contextmanager
def _unbounded() -> Iterator[None]:
    """Without Pillow's own bound on pixels, in whose place `max_pixels` stands."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _check_header(image: ImageFile.ImageFile, path: Path, max_pixels: int) -> None:
    w, h = image.size
    if w * h > max_pixels:
        raise UserError(f'{path}: has {w}x{h} pixels, more than --max-pixels {max_pixels}; raise it if there is memory')
    # The further frames of a phone's MPO are previews and gain maps; the first is the photograph.
    frames = getattr(image, 'n_frames', 1) if image.format != 'MPO' else 1
    if frames > 1:
        raise UserError(f'{path}: has {frames} frames or pages, expected one; split it, or make it a video')
    if image.mode == 'F' or (image.mode == 'I' and not _is_16_bit(image)):
        raise UserError(f'{path}: has 32-bit pixels, expected 8 or 16 bit; convert it first')


def _is_16_bit(image: ImageFile.ImageFile) -> bool:
    """Of an image not yet loaded. Pillow opens 16-bit colour as 8-bit; the decoder's argument, RGB;16B, tells."""
    return any(';16' in str(tile[3]) for tile in image.tile)


def _exif(image: Image.Image) -> Image.Exif:
    """A copy of the EXIF data of an image not yet loaded: camera and position as dicts, without the thumbnail."""
    exif, kept = image.getexif(), Image.Exif()
    for tag, value in exif.items():
        if tag in _TIFF_KEPT or image.format != 'TIFF':  # whose EXIF tags stand among those of its layout
            kept[tag] = value
    for tag in (_EXIF_IFD, _GPS_IFD):
        if details := dict(exif.get_ifd(tag)):
            kept[tag] = details
        elif tag in kept:
            del kept[tag]
    return kept


def _dpi(image: Image.Image) -> tuple[float, float] | None:
    x, y = map(float, image.info.get('dpi') or (0, 0))
    return (x, y) if x > 0 and y > 0 else None


def _read_16_bit(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None or pixels.dtype != np.uint16:
        raise UserError(f'{path}: is no 16-bit image that OpenCV reads; convert it to a 16-bit PNG first')
    if pixels.ndim == 2:
        return pixels[..., None], None
    alpha = pixels[..., 3] if pixels.shape[2] == 4 else None
    colour = pixels[..., 2::-1]
    grey_with_alpha = alpha is not None and (colour[..., :1] == colour).all()  # which OpenCV reads as colour
    return (colour[..., :1] if grey_with_alpha else colour), alpha


def _to_plain_mode(image: Image.Image, icc: bytes | None) -> tuple[Image.Image, bytes | None]:
    """The image as L, LA, RGB or RGBA, and the profile that holds for it."""
    if image.mode == 'CMYK':
        return _cmyk_to_srgb(image, icc), None
    if image.mode in ('RGBa', 'La', 'PA') or 'transparency' in image.info:
        return image.convert('LA' if image.mode in ('L', 'La', '1') else 'RGBA'), icc
    if image.mode not in ('L', 'LA', 'RGB', 'RGBA'):
        return image.convert('L' if image.mode == '1' else 'RGB'), icc
    return image, icc


def _cmyk_to_srgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    converted = None
    if icc:
        with suppress(ImageCms.PyCMSError):  # a damaged profile: the plain conversion shows the picture still
            converted = ImageCms.profileToProfile(image, io.BytesIO(icc), ImageCms.createProfile('sRGB'),
                                                  outputMode='RGB')
    return converted or image.convert('RGB')


# ---------------------------------------------------------------------------------------------------------- writing

def check_target(path: Path, size: tuple[int, int], has_alpha: bool) -> None:
    """Raise UserError if the format of `path` cannot hold an image of this (width, height)."""
    kind = FORMATS[path.suffix.lower()]
    if has_alpha and kind in WITHOUT_ALPHA:
        raise UserError(f'{path}: {kind} holds no transparency, which the image has; use --format png')
    if max(size) > LARGEST_EDGE.get(kind, 2**31):
        raise UserError(f'{path}: would have {size[0]}x{size[1]} pixels, {kind} holds {LARGEST_EDGE[kind]} to an edge; '
                        'use --format png')


def holds_16_bits(path: Path) -> bool:
    """Whether the format of `path` keeps 16 bits per channel."""
    return FORMATS[path.suffix.lower()] in WITH_16_BITS


def write_picture(picture: Picture, path: Path) -> None:
    """Write an image in the format of the path's suffix, whole or not at all.

    JPEG and WebP have quality 95, JPEG without chroma subsampling. BMP holds no orientation: the pixels are turned.

    Raises:
        UserError: The file cannot be written.
    """
    kind = FORMATS[path.suffix.lower()]
    try:
        with whole_file(path) as temporary:
            if picture.colour.dtype == np.uint16:
                (_write_png16 if kind == 'PNG' else _write_tiff16)(picture, temporary)
            else:
                _write_8_bit(picture, temporary, kind)
    except (OSError, cv2.error, ValueError) as error:
        raise UserError(f'{path}: cannot be written ({_one_line(error, path)})') from None


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, with its suffix, that takes its place if all goes well, and is gone if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.stem[:60]}.{os.getpid()}.tmp{path.suffix}')
    try:
        yield temporary
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_8_bit(picture: Picture, path: Path, kind: str) -> None:
    image = Image.fromarray(_pixels(picture))
    if kind == 'BMP':
        image.getexif()[_ORIENTATION] = picture.exif.get(_ORIENTATION, 1)
        ImageOps.exif_transpose(image, in_place=True)
        image.save(path, kind, **({'dpi': picture.dpi} if picture.dpi else {}))
        return
    keep = {'icc_profile': picture.icc, 'dpi': picture.dpi, 'exif': _exif_bytes(picture)}
    options = _SAVE[kind]
    if kind == 'TIFF' and (_EXIF_IFD in picture.exif or _GPS_IFD in picture.exif):
        options = {}  # with compression libtiff writes the file, which refuses nested tags
    image.save(path, kind, **options, **{name: value for name, value in keep.items() if value})


def _pixels(picture: Picture) -> np.ndarray:
    """Colour and alpha as one array, grey without alpha as (H, W)."""
    if picture.alpha is not None:
        return np.concatenate([picture.colour, picture.alpha[..., None]], axis=2)
    return picture.colour[..., 0] if picture.colour.shape[2] == 1 else picture.colour


def _exif_bytes(picture: Picture) -> bytes:
    """The EXIF data with the present size; empty if there is none."""
    if not len(picture.exif):
        return b''
    try:
        details = picture.exif.get(_EXIF_IFD, {})
        for tag, value in ((_EXIF_WIDTH, picture.colour.shape[1]), (_EXIF_HEIGHT, picture.colour.shape[0])):
            if tag in details:
                details[tag] = value
        return picture.exif.tobytes()
    except _BAD_FILE:  # cameras write entries that cannot be written again; how the picture lies matters most
        plain = Image.Exif()
        plain[_ORIENTATION] = picture.exif.get(_ORIENTATION, 1)
        return plain.tobytes()


def _write_png16(picture: Picture, path: Path) -> None:
    whole = picture
    if picture.alpha is not None and picture.colour.shape[2] == 1:  # OpenCV writes no grey with alpha
        whole = replace(picture, colour=picture.colour.repeat(3, axis=2))
    pixels = _pixels(whole)
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGBA2BGRA if pixels.shape[2] == 4 else cv2.COLOR_RGB2BGR)
    done, data = cv2.imencode('.png', pixels)
    if not done:
        raise OSError('OpenCV cannot encode it')
    start = 8 + 25  # the signature and the first chunk, IHDR, after which these chunks may stand
    with open(path, 'wb') as file:
        file.write(data[:start].tobytes())
        if picture.icc:
            file.write(_chunk(b'iCCP', b'ICC Profile\0\0' + zlib.compress(picture.icc)))
        if picture.dpi:
            file.write(_chunk(b'pHYs', struct.pack('>IIB', *(round(value / 0.0254) for value in picture.dpi), 1)))
        if exif := _exif_bytes(picture):
            file.write(_chunk(b'eXIf', exif.removeprefix(b'Exif\0\0')))
        file.write(data[start:].data)


def _chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file: length, name, content, CRC-32."""
    return struct.pack('>I', len(content)) + name + content + struct.pack('>I', zlib.crc32(name + content))


def _write_tiff16(picture: Picture, path: Path) -> None:
    pixels = _pixels(picture)
    turned = picture.exif.get(_ORIENTATION)  # of a PNG or JPEG
    tifffile.imwrite(
        path, pixels, compression='zlib', predictor=True, metadata=None, iccprofile=picture.icc,
        photometric='rgb' if picture.colour.shape[2] == 3 else 'minisblack', planarconfig='contig',
        extrasamples=['unassalpha'] if picture.alpha is not None else None,
        resolution=picture.dpi, resolutionunit='INCH' if picture.dpi else None,
        extratags=[(_ORIENTATION, 'H', 1, turned, True)] if turned else ())


def _one_line(error: BaseException, path: Path) -> str:
    if isinstance(error, UnidentifiedImageError):
        return 'of no known format'
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = ' '.join(text.replace(repr(str(path)), 'it').split())
    return (text[:120] + '…' if len(text) > 120 else text) or type(error).__name__
