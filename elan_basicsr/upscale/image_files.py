"""Image files written with what belongs to the picture.

Pillow writes 8-bit images and all metadata. Images of 16 bits go through OpenCV into PNG, and through tifffile into
TIFF.
"""
from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import tifffile
from PIL import Image, ImageOps, PngImagePlugin, features

from elan_basicsr.data.pictures import BAD_FILE, EXIF_IFD, EXTENSIONS, GPS_IFD, ORIENTATION, Picture, one_line
from elan_basicsr.errors import UserError

READABLE = (*EXTENSIONS, '.gif')
FORMATS = {'.png': 'PNG', '.jpg': 'JPEG', '.jpeg': 'JPEG', '.webp': 'WEBP', '.tif': 'TIFF', '.tiff': 'TIFF',
           '.bmp': 'BMP', **({'.avif': 'AVIF'} if features.check('avif') else {})}
LARGEST_EDGE = {'JPEG': 65500, 'WEBP': 16383, 'AVIF': 65536}  # of the formats' own
WITHOUT_ALPHA = ('JPEG', 'BMP')
WITH_16_BITS = ('PNG', 'TIFF')
WITH_QUALITY = ('JPEG', 'WEBP', 'AVIF')
QUALITY, LOSSLESS = 95, 'lossless'
_SAVE: dict[str, dict] = {'PNG': {'compress_level': 4}, 'JPEG': {'subsampling': 0}, 'WEBP': {'exact': True},
                          'TIFF': {'compression': 'tiff_adobe_deflate'}, 'BMP': {}, 'AVIF': {'subsampling': '4:4:4'}}
_XMP_CHUNK = b'XML:com.adobe.xmp'
_LARGEST_XMP = {'JPEG': 65502}
_EXIF_WIDTH, _EXIF_HEIGHT = 0xA002, 0xA003
_XMP_TAG = 700


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


def lost(picture: Picture, path: Path) -> list[str]:
    """What belongs to an image that was read, and is not in a file of that suffix, in words."""
    kind = FORMATS[path.suffix.lower()]
    told = [*picture.changes, *picture.left_out]
    details = [name for tag, name in ((EXIF_IFD, 'EXIF'), (GPS_IFD, 'GPS')) if tag in picture.exif]
    if picture.colour.dtype == np.uint16:
        if kind not in WITH_16_BITS:
            told.append(f'16 bits become 8, since {kind} holds no more')
        elif kind == 'TIFF' and details:
            told.append(f'{" and ".join(details)} data is left out of a 16-bit TIFF')
    if kind == 'BMP':
        kept = {'the colour profile': picture.icc, 'EXIF data': set(picture.exif) - {ORIENTATION}, 'XMP': picture.xmp}
        told += [f'{name} is left out, which BMP does not hold' for name, value in kept.items() if value]
    elif picture.xmp and not _holds_xmp(picture, kind):
        told.append(f'XMP is left out, which is too long for {kind}')
    if kind != 'PNG':
        told += picture.colour_label
    return told


def _holds_xmp(picture: Picture, kind: str) -> bool:
    return bool(picture.xmp) and kind != 'BMP' and len(picture.xmp or b'') <= _LARGEST_XMP.get(kind, 2**31)


def write_picture(picture: Picture, path: Path, quality: int | str = QUALITY) -> None:
    """Write an image in the format of the path's suffix, whole or not at all.

    JPEG, WebP and AVIF have the `quality` of 1 to 100, without chroma subsampling in JPEG and AVIF; `lossless` is for
    WebP. BMP holds no orientation: the pixels are turned.

    Raises:
        UserError: The file cannot be written.
    """
    kind = FORMATS[path.suffix.lower()]
    try:
        with whole_file(path) as temporary:
            if picture.colour.dtype == np.uint16:
                (_write_png16 if kind == 'PNG' else _write_tiff16)(picture, temporary)
            else:
                _write_8_bit(picture, temporary, kind, quality)
    except (OSError, cv2.error, ValueError) as error:
        raise UserError(f'{path}: cannot be written ({one_line(error, path)})') from None


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


def _write_8_bit(picture: Picture, path: Path, kind: str, quality: int | str) -> None:
    image = Image.fromarray(_pixels(picture))
    if kind == 'BMP':
        image.getexif()[ORIENTATION] = picture.exif.get(ORIENTATION, 1)
        ImageOps.exif_transpose(image, in_place=True)
        image.save(path, kind, **({'dpi': picture.dpi} if picture.dpi else {}))
        return
    keep: dict[str, object] = {'icc_profile': picture.icc, 'dpi': picture.dpi, 'exif': _exif_bytes(picture, kind)}
    options = _SAVE[kind]
    if kind in WITH_QUALITY:
        options = {**options, **({'lossless': True} if quality == LOSSLESS else {'quality': quality})}
    if kind == 'PNG':
        keep['pnginfo'] = chunks = PngImagePlugin.PngInfo()
        for name, content in picture.chunks.items():
            chunks.add(name, content)
        if picture.xmp:
            chunks.add_itxt(_XMP_CHUNK.decode(), picture.xmp.decode(errors='replace'))
    elif _holds_xmp(picture, kind):
        keep['xmp'] = picture.xmp
    if kind == 'TIFF' and (EXIF_IFD in picture.exif or GPS_IFD in picture.exif):
        options = {}  # with compression libtiff writes the file, which refuses nested tags
    image.save(path, kind, **options, **{name: value for name, value in keep.items() if value})


def _pixels(picture: Picture) -> np.ndarray:
    """Colour and alpha as one array, grey without alpha as (H, W)."""
    if picture.alpha is not None:
        return np.concatenate([picture.colour, picture.alpha[..., None]], axis=2)
    return picture.colour[..., 0] if picture.colour.shape[2] == 1 else picture.colour


def _exif_bytes(picture: Picture, kind: str) -> bytes:
    """The EXIF data with the present size, in a TIFF with XMP; empty if there is none."""
    if kind == 'TIFF' and picture.xmp:
        picture.exif[_XMP_TAG] = picture.xmp
    if not len(picture.exif):
        return b''
    try:
        details = picture.exif.get(EXIF_IFD, {})
        for tag, value in ((_EXIF_WIDTH, picture.colour.shape[1]), (_EXIF_HEIGHT, picture.colour.shape[0])):
            if tag in details:
                details[tag] = value
        return picture.exif.tobytes()
    except BAD_FILE:  # cameras write entries that cannot be written again; how the picture lies matters most
        plain = Image.Exif()
        plain[ORIENTATION] = picture.exif.get(ORIENTATION, 1)
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
        for name, content in picture.chunks.items():
            if not (picture.icc and name == b'sRGB'):
                file.write(_chunk(name, content))
        if picture.xmp:
            file.write(_chunk(b'iTXt', _XMP_CHUNK + bytes(5) + picture.xmp))
        if picture.dpi:
            file.write(_chunk(b'pHYs', struct.pack('>IIB', *(round(value / 0.0254) for value in picture.dpi), 1)))
        if exif := _exif_bytes(picture, 'PNG'):
            file.write(_chunk(b'eXIf', exif.removeprefix(b'Exif\0\0')))
        file.write(data[start:].data)


def _chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file: length, name, content, CRC-32."""
    return struct.pack('>I', len(content)) + name + content + struct.pack('>I', zlib.crc32(name + content))


def _write_tiff16(picture: Picture, path: Path) -> None:
    pixels = _pixels(picture)
    tags: list[tuple] = [(tag, 's', 0, value, True) for tag, value in picture.exif.items() if isinstance(value, str)]
    if turned := picture.exif.get(ORIENTATION):  # of a PNG or JPEG
        tags.append((ORIENTATION, 'H', 1, turned, True))
    if picture.xmp:
        tags.append((_XMP_TAG, 'B', len(picture.xmp), picture.xmp, True))
    tifffile.imwrite(
        path, pixels, compression='zlib', predictor=True, metadata=None, iccprofile=picture.icc,
        photometric='rgb' if picture.colour.shape[2] == 3 else 'minisblack', planarconfig='contig',
        extrasamples=['unassalpha'] if picture.alpha is not None else None,
        resolution=picture.dpi, resolutionunit='INCH' if picture.dpi else None,
        extratags=tags)

