"""A picture that is read is the picture that the file holds, or a line names what it is that cannot be read."""
import io
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import skimage.color
import skimage.data
import tifffile
from PIL import Image

from elan_basicsr.data.images import decode_bgr, read_bgr
from elan_basicsr.data.pictures import decode_picture
from elan_basicsr.errors import UserError
from tests.data import cells

from basicsr.utils import imfrombytes


def read(content, **options):
    return decode_picture(io.BytesIO(content), 'x', 10**6, **{'bound': '--max-pixels', 'first_frame': False, **options})


def wrong(cell) -> str:
    """What is wrong with how a cell is read; empty if nothing is."""
    try:
        picture = read(cell.content)
    except UserError as error:
        return '' if cell.refused and cell.refused in str(error) else f'{cell.name}: {error}'
    if cell.refused:
        return f'{cell.name}: was read, expected: {cell.refused}'
    for what, found, expected in (('colour', picture.colour, cell.colour), ('alpha', picture.alpha, cell.alpha)):
        if (found is None) != (expected is None) or (found is not None and found.shape != expected.shape):
            return f'{cell.name}: {what} {getattr(found, "shape", None)}, expected {getattr(expected, "shape", None)}'
        if found is not None and (off := np.abs(found.astype(int) - expected).max()) > cell.tolerance:
            return f'{cell.name}: {what} is off by {off}'
    return ''


COUNTS = {'tiff': (578, 269), 'png': (156, 0), 'bmp': (13, 0)}  # cells, and those of them that are refused


@pytest.mark.parametrize('kind', COUNTS)
def test_pixels_are_those_of_the_file_or_refused_by_name(kind):
    """The matrix: each file was written by hand from the pixels with which the reading is compared."""
    table = list(getattr(cells, f'{kind}_cells')())
    assert (len(table), sum(bool(cell.refused) for cell in table)) == COUNTS[kind]
    assert [words for cell in table if (words := wrong(cell))] == []


def test_hand_written_tiffs_hold_what_tifffile_reads():
    """So the matrix does not compare one misunderstanding of the format with another."""
    compared = 0
    for bits in (8, 16):
        for layout in cells.LAYOUTS:
            if layout.get('compression') != 5:
                pixels = cells.waves(bits, 3)
                page = tifffile.TiffFile(io.BytesIO(cells.tiff(pixels, bits, 2, **layout))).pages[0]
                found = page.asarray()
                assert (np.moveaxis(found, 0, -1) if layout.get('planar') else found).tolist() == pixels.tolist()
                compared += 1
    assert compared == 18


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('bits, compression', [(8, 1), (8, 5), (16, 8), (16, 5)])
def test_a_tiff_is_turned_upright_whoever_decodes_it(orientation, bits, compression):
    pixels = cells.waves(bits, 3)
    turned = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.swapaxes(0, 1),
              6: np.rot90(pixels, -1), 7: pixels[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(pixels)}[orientation]
    picture = read(cells.tiff(pixels, bits, 2, compression=compression, tags=[(274, 'H', [orientation])]))
    assert (picture.colour == turned).all() and 274 not in picture.exif


@pytest.mark.parametrize('bits, sample_format, words', [
    (8, 2, '8-bit signed'), (16, 2, '16-bit signed'), (32, 2, '32-bit signed'), (16, 3, '16-bit floating-point'),
    (32, 3, '32-bit floating-point'), (32, 6, '32-bit complex')])
def test_numbers_that_are_no_levels_are_named(bits, sample_format, words):
    with pytest.raises(UserError, match=words):
        read(cells.tiff(cells.waves(bits, 1), bits, 1, sample_format=sample_format))


def encoded(image, kind, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bgr(content) -> np.ndarray:
    """What the second reader, OpenCV, makes of it."""
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)


PHOTOGRAPH = Image.fromarray(skimage.data.astronaut()[:57, 200:281])
JPEGS = {
    'plain': (PHOTOGRAPH, {'quality': 75}), 'grey': (PHOTOGRAPH.convert('L'), {'quality': 75}),
    '4:4:4': (PHOTOGRAPH, {'subsampling': 0}), '4:2:2': (PHOTOGRAPH, {'subsampling': 1}),
    'progressive': (PHOTOGRAPH, {'progressive': True}), 'RGB': (PHOTOGRAPH, {'keep_rgb': True}),
    'restarts': (PHOTOGRAPH, {'restart_marker_blocks': 2}), 'turned': (PHOTOGRAPH, {'exif': b'Exif\0\0MM\0*\0\0\0\x08\0'
    b'\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0'}),
}


@pytest.mark.parametrize('kind', JPEGS)
def test_jpegs_are_what_a_second_reader_makes_of_them(kind):
    image, options = JPEGS[kind]
    content = encoded(image, 'JPEG', **options)
    picture = read(content)
    assert picture.colour.shape[2] == (1 if kind == 'grey' else 3)
    assert (bgr(content)[..., ::-1] == picture.colour).all()
    upright = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    assert (decode_bgr(content, 'x') == upright).all() and (upright.shape[0] == 81) == (kind == 'turned')


@pytest.mark.parametrize('transform', [0, 2])
def test_cmyk_and_ycck_jpegs_have_their_colours(transform):
    """Adobe's marker says whether four channels are CMYK (0) or YCCK (2)."""
    content = bytearray(encoded(PHOTOGRAPH.convert('CMYK'), 'JPEG', quality=95, subsampling=0))
    content[content.index(b'Adobe') + 11] = transform
    picture = read(bytes(content))
    assert np.abs(picture.colour.astype(int) - bgr(bytes(content))[..., ::-1]).max() <= 1
    assert picture.changes == ['CMYK becomes sRGB']
    if not transform:
        assert np.abs(picture.colour.astype(int) - np.asarray(PHOTOGRAPH)).mean() < 5


@pytest.mark.parametrize('options', [{'quality': 75}, {'lossless': True}, {'lossless': True, 'exact': True}])
@pytest.mark.parametrize('mode', ['RGB', 'RGBA'])
def test_webps_are_what_a_second_reader_makes_of_them(mode, options):
    image = PHOTOGRAPH.copy()
    if mode == 'RGBA':
        image.putalpha(Image.linear_gradient('L').resize(image.size))
    content = encoded(image, 'WEBP', **options)
    picture = read(content)
    found = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    assert (found[..., 2::-1] == picture.colour).all()
    assert (picture.alpha is None) == (mode == 'RGB') and (mode == 'RGB' or (found[..., 3] == picture.alpha).all())


@pytest.mark.parametrize('compression', ['jpeg', 'tiff_lzw', 'group4', 'tiff_adobe_deflate', 'packbits'])
def test_compressed_tiffs_are_what_a_second_reader_makes_of_them(compression):
    image = PHOTOGRAPH.convert('1') if compression == 'group4' else PHOTOGRAPH
    content = encoded(image, 'TIFF', compression=compression)
    found = bgr(content)[..., ::-1]
    assert np.abs(found.astype(int) - read(content).colour).max() <= (1 if compression == 'jpeg' else 0)


def test_lab_and_ycbcr_tiffs_become_rgb():
    lab = skimage.color.rgb2lab(np.asarray(PHOTOGRAPH))
    stored = np.dstack([lab[..., 0] * 2.55, lab[..., 1:] % 256]).round().astype(np.uint32) % 256
    for pixels, photometric, tags in (
            (stored, 8, []), (np.asarray(PHOTOGRAPH.convert('YCbCr')), 6, [(530, 'H', [1, 1])])):
        for layout in ({}, {'compression': 8, 'rows': 8}):
            found = read(cells.tiff(pixels, 8, photometric, tags=tags, **layout))
            assert np.abs(found.colour.astype(int) - np.asarray(PHOTOGRAPH)).mean() < 4, (photometric, layout)
    for layout, words in (({}, 'subsampled chroma'), ({'planar': True}, 'YCbCr pixels in planes')):
        with pytest.raises(UserError, match=words):
            read(cells.tiff(cells.waves(8, 3), 8, 6, **layout))


def test_cmyk_tiffs_become_rgb_and_sixteen_bits_eight():
    pixels = np.asarray(PHOTOGRAPH.convert('CMYK'))
    for layout in ({}, {'planar': True}, {'compression': 8}):
        assert np.abs(read(cells.tiff(pixels, 8, 5, **layout)).colour.astype(int) - np.asarray(PHOTOGRAPH)).max() < 2
    wide = read(cells.tiff(pixels * np.uint32(257), 16, 5))
    assert np.abs(wide.colour.astype(int) - np.asarray(PHOTOGRAPH)).max() < 2
    assert wide.changes == ['16 bits become 8', 'CMYK becomes sRGB']
    with pytest.raises(UserError, match='CMYK pixels of 16 bit with 4 channels in planes'):
        read(cells.tiff(pixels * np.uint32(257), 16, 5, planar=True))


def test_a_palette_whose_values_were_written_as_bytes_is_no_darkness():
    palette = np.random.default_rng(0).integers(0, 256, (3, 256))
    pixels = cells.waves(8, 1)
    found = read(cells.tiff(pixels, 8, 3, tags=[(320, 'H', palette.ravel().tolist())]))
    assert (found.colour == palette.T[pixels[..., 0]]).all()


def test_a_thumbnail_is_no_second_page_and_a_second_page_is_told():
    page, file = cells.waves(16, 3).astype(np.uint16), io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(page, photometric='rgb')
        writer.write(page[::2, ::2], photometric='rgb', subfiletype=1)
    assert (read(file.getvalue()).colour == page).all()
    with tifffile.TiffWriter(file := io.BytesIO()) as writer:
        writer.write(page, photometric='rgb')
        writer.write(page, photometric='rgb')
    with pytest.raises(UserError, match='2 frames or pages'):
        read(file.getvalue())
    first = read(file.getvalue(), first_frame=True)
    assert (first.colour == page).all() and first.changes == ['of several frames or pages the first is taken']


@pytest.mark.parametrize('share', [0.3, 0.9, 0.999])
@pytest.mark.parametrize('layout', cells.LAYOUTS)
def test_a_tiff_that_lacks_its_end_is_damaged(layout, share):
    content = cells.tiff(cells.waves(16, 3, 60, 50), 16, 2, **layout)
    words = 'imagecodecs' if layout == {'compression': 5, 'planar': True} else 'damaged'
    with pytest.raises(UserError, match=words):
        read(content[:int(len(content) * share)])


def jpeg_behind_which(more: bytes) -> bytes:
    return encoded(PHOTOGRAPH, 'JPEG') + more


BEHIND = {
    'a video': lambda: jpeg_behind_which(b'\0\0\0\x18ftypmp42' + bytes(9000)),
    'zeros behind a jpeg': lambda: jpeg_behind_which(bytes(9000)),
    'text behind a png': lambda: encoded(PHOTOGRAPH, 'PNG') + b'x' * 9000,
    'text behind a bmp': lambda: encoded(PHOTOGRAPH, 'BMP') + b'x' * 9000,
    'text behind a webp': lambda: encoded(PHOTOGRAPH, 'WEBP') + b'x' * 9000,
    'text behind a tiff': lambda: encoded(PHOTOGRAPH, 'TIFF') + b'x' * 9000,
    'an mpo': lambda: encoded(PHOTOGRAPH, 'MPO', save_all=True, append_images=[PHOTOGRAPH.resize((9, 9))]),
}


@pytest.mark.parametrize('what', BEHIND)
def test_what_stands_behind_the_image_is_no_damage(what):
    content = BEHIND[what]()
    found = read(content)
    assert np.abs(found.colour.astype(int) - np.asarray(PHOTOGRAPH)).mean() < 8
    assert decode_bgr(content, 'x').shape == (57, 81, 3)
    assert bool(found.left_out) == (what in ('a video', 'an mpo'))


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'BMP', 'WEBP', 'AVIF'])
def test_what_is_missing_is_damage(kind):
    content = encoded(PHOTOGRAPH, kind)
    with pytest.raises(UserError, match='damaged'):
        read(content[:len(content) * 2 // 3])


def test_avif_is_what_a_second_reader_makes_of_it():
    content = encoded(PHOTOGRAPH, 'AVIF', quality=90)
    found = read(content)
    assert found.changes == [] and np.abs(bgr(content)[..., ::-1].astype(int) - found.colour).max() <= 2


def test_more_than_eight_bits_of_avif_are_told_and_hdr_is_refused():
    _, content = cv2.imencode('.avif', cells.waves(10, 3).astype(np.uint16),
                              [cv2.IMWRITE_AVIF_DEPTH, 10, cv2.IMWRITE_AVIF_QUALITY, 95])
    assert read(content.tobytes()).changes == ['10 bits become 8']
    label = b'colrnclx\0\x01\0\x0d'
    plain = encoded(PHOTOGRAPH, 'AVIF')
    assert label in plain
    with pytest.raises(UserError, match=r'is HDR \(PQ\)'):
        read(plain.replace(label, b'colrnclx\0\x09\0\x10'))
    assert 'primaries 12' in read(plain.replace(label, b'colrnclx\0\x0c\0\x0d')).changes[0]


def test_readings_side_by_side_leave_pillows_bound_as_it_was():
    """The bound is one of the process, and every image of a build is read by one of many threads."""
    before, content = Image.MAX_IMAGE_PIXELS, encoded(PHOTOGRAPH, 'PNG')
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, [content] * 200))
    assert Image.MAX_IMAGE_PIXELS == before


def test_the_toolboxs_datasets_see_a_tiff_as_every_command_does():
    for kind, options in (('RGB', {'planar': True}), ('white is 0', {})):
        photometric, channels, _ = cells.KINDS[kind]
        content = cells.tiff(cells.waves(16, channels), 16, photometric, **options)
        expected = decode_bgr(content, 'x')
        assert (imfrombytes(content) == expected >> 8).all()
        assert np.allclose(imfrombytes(content, float32=True), (expected >> 8) / 255)
    with pytest.raises(ValueError, match='floating-point'):
        imfrombytes(cells.tiff(cells.waves(32, 1), 32, 1, sample_format=3), float32=True)


def test_the_files_that_were_reported_are_their_pictures(shared):
    reports = shared / 'reports'
    for name, picture in (('rgb16_planar.tif', 'rgb16.png'), ('grey16_miniswhite.tif', 'grey16.png')):
        assert (read_bgr(reports / name) == read_bgr(reports / picture)).all()
    assert read_bgr(reports / 'motion.jpg').shape == read_bgr(reports / 'mixed' / 'photo.avif').shape == (40, 48, 3)
