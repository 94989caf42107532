"""Image files written by hand, for what TIFF, PNG and BMP can say about their pixels, with the pixels they hold."""
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Cell(NamedTuple):
    """A file and what it shows: colour (H, W, 1 or 3), alpha (H, W) or None; or words of the line that refuses it."""
    name: str
    content: bytes
    colour: np.ndarray | None = None
    alpha: np.ndarray | None = None
    refused: str = ''
    tolerance: int = 0


def waves(bits: int, channels: int, height: int = 19, width: int = 23) -> np.ndarray:
    """(height, width, channels) integers of so many bits that use their whole range."""
    y, x, c = np.mgrid[:height, :width, :channels]
    return ((2**bits - 1) * (0.5 + 0.5 * np.sin(x / 5 + y / 7 + c * 2))).round().astype(np.uint32)


# ------------------------------------------------------------------------------------------------------------- TIFF

SIZES = {'B': (1, 1), 'H': (3, 2), 'I': (4, 4)}  # code of the type in a TIFF, bytes
LAYOUTS = ({}, {'planar': True}, {'order': '>'}, {'compression': 8, 'rows': 5}, {'tile': 16},
           {'planar': True, 'compression': 8}, {'compression': 32773, 'rows': 4}, {'predictor': 2, 'compression': 8},
           {'fill_order': 2}, {'compression': 5}, {'compression': 5, 'planar': True})
# Photometric interpretation, channels of colour, and which ExtraSamples: 0 unspecified, 1 associated, 2 not.
KINDS = {'white is 0': (0, 1, None), 'grey': (1, 1, None), 'RGB': (2, 3, None), 'palette': (3, 1, None),
         'grey, alpha': (1, 1, (2,)), 'grey, associated alpha': (1, 1, (1,)), 'grey, unspecified': (1, 1, (0,)),
         'white is 0, alpha': (0, 1, (2,)), 'RGB, alpha': (2, 3, (2,)), 'RGB, associated alpha': (2, 3, (1,)),
         'RGB, unspecified': (2, 3, (0,)), 'RGB, alpha without the tag': (2, 3, ()),
         'RGB, alpha and another': (2, 3, (2, 0)), 'RGB, another and associated alpha': (2, 3, (0, 1)),
         'CMYK, spot colour': (5, 4, (0,)), 'transparency mask': (4, 1, None), 'ICCLAB': (9, 3, None),
         'CFA': (32803, 1, None), 'LogL': (32844, 1, None), 'linear raw': (34892, 3, None)}


def tiff(pixels, bits, photometric, *, planar=False, extra=None, order='<', compression=1, tags=(), rows=None,
         tile=None, sample_format=None, predictor=None, fill_order=None) -> bytes:
    """A TIFF of (H, W, channels) unsigned integers; `tags` are (number, type, values)."""
    height, width, channels = pixels.shape
    rows = rows or height
    blocks = []
    for plane in [pixels[..., i:i + 1] for i in range(channels)] if planar else [pixels]:
        if tile:
            padded = np.pad(plane, ((0, -height % tile), (0, -width % tile), (0, 0)), mode='edge')
            parts = [padded[y:y + tile, x:x + tile] for y in range(0, height, tile) for x in range(0, width, tile)]
        else:
            parts = [plane[y:y + rows] for y in range(0, height, rows)]
        blocks += [press(pack(part, bits, order, predictor, fill_order), compression) for part in parts]
    entries = {256: ('I', [width]), 257: ('I', [height]), 258: ('H', [bits] * channels), 259: ('H', [compression]),
               262: ('H', [photometric]), 277: ('H', [channels]), 284: ('H', [2 if planar else 1])}
    optional = {338: extra, 339: sample_format and [sample_format] * channels, 317: predictor and [predictor],
                266: fill_order and [fill_order]}
    entries |= {tag: ('H', list(value)) for tag, value in optional.items() if value}
    at, counts = (324, 325) if tile else (273, 279)
    entries |= {at: ('I', [0] * len(blocks)), counts: ('I', [len(block) for block in blocks])}
    entries |= {322: ('I', [tile]), 323: ('I', [tile])} if tile else {278: ('I', [rows])}
    entries |= {tag: (code, list(values)) for tag, code, values in tags}
    lengths = [len(values) * SIZES[code][1] for code, values in entries.values()]
    after = 8 + 2 + 12 * len(entries) + 4
    start = after + sum(length for length in lengths if length > 4)
    entries[at][1][:] = [start + sum(map(len, blocks[:i])) for i in range(len(blocks))]
    head = {'<': b'II*\0', '>': b'MM\0*'}[order] + struct.pack(f'{order}IH', 8, len(entries))
    values = b''
    for tag, (code, content) in sorted(entries.items()):
        data = struct.pack(f'{order}{len(content)}{code}', *content)
        head += struct.pack(f'{order}HHI', tag, SIZES[code][0], len(content))
        head += struct.pack(f'{order}I', after + len(values)) if len(data) > 4 else data.ljust(4, b'\0')
        values += data if len(data) > 4 else b''
    return head + bytes(4) + values + b''.join(blocks)


def pack(block, bits, order='>', predictor=None, fill_order=None) -> bytes:
    """Rows of integers as bytes, each row from a whole byte on."""
    if predictor:
        block = np.diff(block.astype(np.int64), axis=1, prepend=0) % 2**bits
    if bits >= 8 and bits != 12:
        data = block.astype(f'{order}u{bits // 8}').tobytes()
    else:
        wide = block.reshape(block.shape[0], -1, 1).astype('>u4').view(np.uint8)
        data = np.packbits(np.unpackbits(wide, axis=2)[..., -bits:].reshape(len(block), -1), axis=1).tobytes()
    if fill_order == 2:
        data = np.packbits(np.unpackbits(np.frombuffer(data, np.uint8)[:, None], axis=1)[:, ::-1]).tobytes()
    return data


def press(data: bytes, compression: int) -> bytes:
    if compression == 8:
        return zlib.compress(data)
    if compression == 32773:
        return b''.join(bytes([len(run) - 1]) + run for run in (data[i:i + 128] for i in range(0, len(data), 128)))
    return lzw(data) if compression == 5 else data


def lzw(data: bytes) -> bytes:
    """LZW that never uses its table, which it clears before the codes grow wider than nine bits."""
    codes = [code for i in range(0, len(data), 250) for code in (256, *data[i:i + 250])] + [257]
    bits = ''.join(f'{code:09b}' for code in codes)
    return int(bits.ljust(-(-len(bits) // 8) * 8, '0'), 2).to_bytes(-(-len(bits) // 8), 'big')


def tiff_cells() -> Iterator[Cell]:
    for bits in (1, 2, 4, 8, 12, 16, 32):
        for kind, (photometric, colours, extra) in KINDS.items():
            if photometric == 3 and bits > 8:
                continue
            channels = colours + (1 if extra == () else len(extra or ()))
            rare = bits in (12, 32) or photometric > 3 or bits < 8 and channels > 1
            if photometric > 3 and bits < 8:
                continue
            for layout in LAYOUTS[:3 if rare else None]:
                if (layout.get('planar') and channels == 1) or (layout.get('predictor') and bits % 8):
                    continue
                pixels = waves(bits, channels)
                pixels[..., colours:] = np.maximum(pixels[..., colours:], 1)
                palette = np.random.default_rng(0).integers(0, 65536, (3, 2**bits)) if photometric == 3 else None
                tags = [] if palette is None else [(320, 'H', palette.ravel().tolist())]
                content = tiff(pixels, bits, photometric, extra=extra, tags=tags, **layout)
                name = f'{bits} bit, {kind}, {layout}'
                if words := refusal(bits, photometric, channels, layout, extra):
                    yield Cell(name, content, refused=words)
                else:
                    rounded = extra and 1 in extra and layout.get('compression') == 5  # by Pillow, downwards
                    yield Cell(name, content, *shown(pixels, bits, photometric, extra, palette),
                               tolerance=int(bool(rounded)))


def refusal(bits, photometric, channels, layout, extra) -> str:
    """What no reader here gives back right, and by which words it is refused."""
    if bits in (12, 32):
        return f'{bits}-bit unsigned'
    if photometric in (4, 9, 32803, 32844, 34892):
        return 'photometric interpretation'
    if bits < 8 and channels > 1:
        return f'{channels} channels of {bits} bit'
    if photometric == 5:
        return f'CMYK pixels of {bits} bit with 5 channels'
    if bits < 8 and photometric == 3 and layout.get('fill_order'):
        return '1 channels'
    if layout.get('compression') == 5:  # tifffile's codecs know no LZW; OpenCV reads what is not in planes
        simple = channels in (1, 3, 4) if bits == 16 else channels == {0: 1, 1: 1, 2: 3, 3: 1}[photometric] or (
            photometric == 2 and channels == 4)
        if (layout.get('planar') and (bits == 16 or extra is not None)) or not simple:
            return 'imagecodecs'
    return ''


def shown(pixels, bits, photometric, extra, palette) -> tuple[np.ndarray, np.ndarray | None]:
    """What the file shows, by the standard: colour and alpha."""
    most = 2**16 - 1 if bits == 16 else 255
    whole = pixels * (most // (2**bits - 1))
    colour = whole[..., :3 if photometric == 2 else 1]
    if photometric == 0:
        colour = most - colour
    if photometric == 3:
        return palette.T[pixels[..., 0]] >> 8, None
    kinds = (2,) if extra == () else extra or ()
    at = next((i for i, kind in enumerate(kinds) if kind), None)
    if at is None:
        return colour, None
    alpha = whole[..., colour.shape[2] + at]
    if kinds[at] == 1:
        colour = np.minimum(np.round(colour * most / alpha[..., None]), most).astype(np.uint32)
    return colour, alpha


# -------------------------------------------------------------------------------------------------------------- PNG

ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack('>I', len(content)) + name + content + struct.pack('>I', zlib.crc32(name + content))


def png(pixels, bits, colour_type, *, interlaced=False, chunks=b'') -> bytes:
    """A PNG of (H, W, channels) integers; `chunks` stand before the pixels."""
    height, width = pixels.shape[:2]
    passes = [pixels[y::dy, x::dx] for x, y, dx, dy in ADAM7] if interlaced else [pixels]
    rows = b''.join(b'\0' + pack(row[None], bits) for part in passes if part.size for row in part)
    header = struct.pack('>IIBBBBB', width, height, bits, colour_type, 0, 0, interlaced)
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunks + chunk(b'IDAT', zlib.compress(rows))
            + chunk(b'IEND', b''))


def png_cells() -> Iterator[Cell]:
    depths = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
    labels = {'': b'', ', gamma 1': chunk(b'gAMA', struct.pack('>I', 100000)),
              ', sRGB': chunk(b'sRGB', b'\0') + chunk(b'gAMA', struct.pack('>I', 45455))}
    for colour_type, bits in [(kind, bits) for kind, several in depths.items() for bits in several]:
        channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type]
        pixels = waves(bits, channels)
        for key in (False, True) if colour_type in (0, 2, 3) else (False,):
            for interlaced in (False, True):
                for label, chunks in labels.items():
                    palette = np.random.default_rng(0).integers(0, 256, (2**bits, 3), np.uint8)
                    if colour_type == 3:
                        chunks += chunk(b'PLTE', palette.tobytes())
                    if key:
                        chunks += chunk(b'tRNS', bytes([0, 100]) if colour_type == 3 else
                                        pixels[3, 4].astype('>u2').tobytes())
                    name = f'type {colour_type}, {bits} bit{label}{", key" * key}{", interlaced" * interlaced}'
                    yield Cell(name, png(pixels, bits, colour_type, interlaced=interlaced, chunks=chunks),
                               *png_shown(pixels, bits, colour_type, key, palette))


def png_shown(pixels, bits, colour_type, key, palette) -> tuple[np.ndarray, np.ndarray | None]:
    most = 2**16 - 1 if bits == 16 else 255
    if colour_type == 3:
        opacity = np.r_[0, 100, np.full(2**bits, 255)]
        return palette[pixels[..., 0]], opacity[pixels[..., 0]] if key else None
    whole = pixels * (most // (2**bits - 1))
    if key:
        return whole, np.where((pixels == pixels[3, 4]).all(2), 0, most)
    return (whole[..., :-1], whole[..., -1]) if colour_type in (4, 6) else (whole, None)


# -------------------------------------------------------------------------------------------------------------- BMP

def bmp(rows: bytes, width, height, bits, *, compression=0, palette=b'', masks=(), core=False) -> bytes:
    if core:
        header = struct.pack('<IHHHH', 12, width, height, 1, bits)
    else:
        header = struct.pack('<IiiHHIIiiII', 40, width, height, 1, bits, compression, len(rows), 0, 0,
                             len(palette) // 4, 0)
        if len(masks) == 4:  # the fifth version of the header
            header = struct.pack('<I', 124) + header[4:] + struct.pack('<4I', *masks) + b'BGRs' + bytes(64)
        else:
            header += struct.pack(f'<{len(masks)}I', *masks)
    start = 14 + len(header) + len(palette)
    return b'BM' + struct.pack('<IHHI', start + len(rows), 0, 0, start) + header + palette + rows


def bmp_cells() -> Iterator[Cell]:
    height, width = 19, 23

    def rows(pixels, bits, order='<'):
        """Upside down, each row filled up to a multiple of four bytes."""
        data = [pack(row[None], bits, order) for row in pixels[::-1]]
        return b''.join(row.ljust(-(-len(row) // 4) * 4, b'\0') for row in data)

    rgb = waves(8, 3)
    yield Cell('24 bit', bmp(rows(rgb[..., ::-1], 8), width, height, 24), rgb)
    yield Cell('24 bit, top down', bmp(rows(rgb[::-1, :, ::-1], 8), width, -height, 24), rgb)
    yield Cell('24 bit, OS/2', bmp(rows(rgb[..., ::-1], 8), width, height, 24, core=True), rgb)
    alpha = waves(8, 4)[..., 3]
    four = np.dstack([rgb[..., ::-1], alpha])
    yield Cell('32 bit', bmp(rows(four, 8), width, height, 32), rgb)
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    yield Cell('32 bit, alpha', bmp(rows(four, 8), width, height, 32, compression=3, masks=masks), rgb, alpha)
    yield Cell('32 bit, masks', bmp(rows(four, 8), width, height, 32, compression=3, masks=masks[:3]), rgb)
    for name, widths in (('555', (5, 5, 5)), ('565', (5, 6, 5))):
        levels = np.dstack([waves(8, 3)[..., i] >> (8 - bits) for i, bits in enumerate(widths)])
        words = (levels[..., 0] << (widths[1] + 5)) | (levels[..., 1] << 5) | levels[..., 2]
        given = {} if name == '555' else {'compression': 3, 'masks': (0xF800, 0x7E0, 0x1F)}
        colour = np.dstack([levels[..., i] * 255 // (2**bits - 1) for i, bits in enumerate(widths)])
        yield Cell(f'16 bit, {name}', bmp(rows(words[..., None], 16), width, height, 16, **given), colour, None, '', 1)
    for bits in (1, 4, 8):
        palette = np.random.default_rng(0).integers(0, 256, (2**bits, 4), np.uint8)
        index = waves(bits, 1)
        colour = palette[index[..., 0], 2::-1]
        yield Cell(f'{bits} bit', bmp(rows(index, bits), width, height, bits, palette=palette.tobytes()), colour)
        if bits > 1:
            packed = [pack(row[None], bits) for row in index[::-1]]
            runs = b''.join(b''.join(struct.pack('BB', 8 // bits, byte) for byte in row) + b'\0\0' for row in packed)
            if bits == 4:  # an odd width: the last run is one pixel too long for the row
                runs = b''.join(b''.join(struct.pack('BB', min(2, width - 2 * i), byte) for i, byte in enumerate(row))
                                + b'\0\0' for row in packed)
            yield Cell(f'{bits} bit, runs', bmp(runs + b'\0\1', width, height, bits, compression=3 - bits // 4,
                                                palette=palette.tobytes()), colour)
