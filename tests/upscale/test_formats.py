"""What belongs to a picture stays with it, in every format and depth."""
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from elan_basicsr.checkpoint import load_elan
from elan_basicsr.data.pictures import Picture
from elan_basicsr.data.resize import imresize
from elan_basicsr.upscale.image_files import write_picture
from tests.data import cells
from tests.upscale.conftest import WEIGHTS

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()


def expected(pixels, most=255):
    """PyTorch's own output for (H, W, 3), as integers."""
    x = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None] / most
    with torch.no_grad():
        y = load_elan(WEIGHTS)(x).clamp(0, 1).mul(most).round()
    return y[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize('suffix', ['.png', '.tif', '.bmp'])
def test_eight_bits_are_pytorchs_own_to_the_byte(run, photograph, suffix):
    Image.fromarray(photograph).save('a' + suffix)
    assert run('a' + suffix, '-o', 'out')[0] == 0
    assert (np.asarray(Image.open('out/a' + suffix)) == expected(photograph)).all()


@pytest.mark.parametrize('suffix', ['.png', '.tif'])
@pytest.mark.parametrize('channels', [1, 3, 4])
def test_sixteen_bits_stay(run, photograph, suffix, channels):
    pixels = np.dstack([photograph * np.uint16(257), np.linspace(0, 65535, 21 * 30).reshape(21, 30)])[..., :channels]
    pixels = pixels.astype(np.uint16)
    cv2.imwrite('a' + suffix, pixels[..., [2, 1, 0, 3][:channels]] if channels > 1 else pixels)
    assert run('a' + suffix, '-o', 'out')[0] == 0
    found = cv2.imread('out/a' + suffix, cv2.IMREAD_UNCHANGED)
    assert found.dtype == np.uint16 and found.shape == (42, 60, channels)[:2 if channels == 1 else 3]
    if channels == 3:
        assert (found[..., ::-1] == expected(pixels, 65535)).all()
    if channels == 1:
        assert np.abs(found - expected(pixels.repeat(3, 2), 65535).mean(2)).max() <= 1


def turned_to_the_right():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, 'maker'
    exif.get_ifd(0x8769).update({0x9003: '2020:02:02 02:02:02', 0xA002: 30, 0xA003: 21})
    return exif


def upright(name):
    """How a viewer shows it."""
    with Image.open(name) as image:
        image.load()
        return np.asarray(ImageOps.exif_transpose(image).convert('RGB'), int)


@pytest.mark.parametrize('suffix', ['.png', '.tif', '.jpg', '.webp'])
def test_profile_orientation_and_camera_stay(run, photograph, suffix):
    exif = turned_to_the_right().tobytes()
    Image.fromarray(photograph).save('a' + suffix, exif=exif, icc_profile=PROFILE, dpi=(300, 300))
    assert run('a' + suffix, '-o', 'out')[0] == 0
    assert upright('out/a' + suffix).shape == (60, 42, 3)
    with Image.open('out/a' + suffix) as found:
        assert found.info['icc_profile'] == PROFILE
        kept = found.getexif()
        assert kept[0x010F] == 'maker' and kept.get_ifd(0x8769)[0x9003] == '2020:02:02 02:02:02'
        if suffix != '.tif':  # whose pixels are turned instead
            assert found.size == (60, 42) and kept[0x0112] == 6 and kept.get_ifd(0x8769)[0xA002] == 60
        assert suffix == '.webp' or round(found.info['dpi'][0]) == 300


@pytest.mark.parametrize('target', ['a.png', 'a.tif'])
@pytest.mark.parametrize('suffix', ['.png', '.tif'])
def test_profile_and_orientation_stay_at_sixteen_bits(run, photograph, suffix, target):
    wide = photograph * np.uint16(257)
    if suffix == '.tif':
        tifffile.imwrite('a.tif', wide, photometric='rgb', iccprofile=PROFILE, resolution=(300, 300),
                         resolutionunit='INCH', extratags=[(0x0112, 'H', 1, 6, True)])
    else:
        write_picture(Picture(wide, None, PROFILE, turned_to_the_right(), (300, 300)), Path('a.png'))
    Path('out').mkdir()
    assert run('a' + suffix, '-o', 'out/' + target)[0] == 0
    turned = np.rot90(wide, -1) if suffix == '.tif' else wide
    shown = np.round(expected(turned, 65535) / 257) if suffix == '.tif' else np.rot90(expected(wide, 65535) / 257, -1)
    assert np.abs(upright('out/' + target) - shown).max() <= 1
    with Image.open('out/' + target) as found:
        assert found.info['icc_profile'] == PROFILE and round(found.info['dpi'][0]) == 300
    assert cv2.imdecode(np.fromfile('out/' + target, np.uint8), 130).dtype == np.uint16  # unchanged, not turned


def test_a_format_without_orientation_gets_the_picture_upright(run, photograph):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photograph).save('a.png', exif=exif)
    assert run('a.png', '-o', 'a.bmp')[0] == run('a.png', '-o', 'b.png')[0] == 0
    upright = ImageOps.exif_transpose(Image.open('b.png'))
    assert Image.open('a.bmp').size == (42, 60) and (np.asarray(Image.open('a.bmp')) == np.asarray(upright)).all()


@pytest.mark.parametrize('mode', ['L', 'LA', '1', 'P', 'RGBA', 'CMYK'])
def test_modes(run, photograph, mode):
    image = Image.fromarray(photograph)
    image.putalpha(Image.linear_gradient('L').resize((30, 21)).point(lambda value: max(value, 1)))
    image = image.convert('RGB' if mode in ('CMYK', 'P') else 'RGBA').convert(mode)
    name = 'a.jpg' if mode == 'CMYK' else 'a.png'
    image.save(name)
    assert run(name, '-o', 'out')[0] == 0
    found = Image.open(f'out/{name}')
    assert found.mode == {'1': 'L', 'P': 'RGB', 'CMYK': 'RGB'}.get(mode, mode) and found.size == (60, 42)
    colours = np.asarray(Image.open(name).convert('L' if found.mode in ('L', 'LA') else 'RGB').convert('RGB'))
    wanted = expected(colours)
    wanted = wanted.mean(2, keepdims=True).repeat(3, 2) if found.mode in ('L', 'LA') else wanted
    assert np.abs(np.asarray(found.convert('RGB')) - wanted).mean() < (8 if mode == 'CMYK' else 1)  # JPEG loses some


def test_cmyk_with_a_profile_that_cannot_be_read_is_converted_without_it(run, photograph):
    Image.fromarray(photograph).convert('CMYK').save('a.jpg', quality=100, icc_profile=b'no profile')
    assert run('a.jpg', '-o', 'a.png')[0] == 0
    found, wanted = np.asarray(Image.open('a.png')), expected(np.asarray(Image.open('a.jpg').convert('RGB')))
    assert (found == wanted).all()


def test_alpha_is_enlarged_by_the_network_as_a_grey_image(run, photograph):
    alpha = np.asarray(Image.linear_gradient('L').resize((30, 21)))
    image = Image.fromarray(photograph)
    image.putalpha(Image.fromarray(alpha))
    image.save('a.png')
    Image.fromarray(alpha).save('alpha.png')
    assert run('a.png', 'alpha.png', '-o', 'out')[0] == 0
    found = np.asarray(Image.open('out/a.png'))
    assert (found[..., 3] == np.asarray(Image.open('out/alpha.png'))).all()


def test_a_colour_that_nobody_sees_does_not_bleed_into_what_is_seen(run, photograph):
    alpha = np.zeros((21, 30), np.uint8)
    alpha[:, 10:20] = 255
    for name, hidden in (('black', 0), ('white', 255)):
        pixels = np.where(alpha[..., None] > 0, photograph, np.uint8(hidden))
        Image.fromarray(np.dstack([pixels, alpha])).save(f'{name}.png')
    assert run('black.png', 'white.png', '-o', 'out')[0] == 0
    assert (np.asarray(Image.open('out/black.png')) == np.asarray(Image.open('out/white.png'))).all()


def test_opaque_and_transparent_palettes(run, photograph):
    image = Image.fromarray(photograph).quantize(16)
    image.save('a.png', transparency=0)
    image.convert('RGB').save('b.png', transparency=tuple(int(v) for v in np.asarray(image.convert('RGB'))[0, 0]))
    assert run('a.png', 'b.png', '-o', 'out')[0] == 0
    assert Image.open('out/a.png').mode == Image.open('out/b.png').mode == 'RGBA'


def test_a_still_gif_becomes_png(run, photograph):
    Image.fromarray(photograph).save('a.gif')
    assert run('a.gif', '-o', 'out')[0] == 0
    assert Image.open('out/a.png').size == (60, 42)


def test_another_format_and_less_than_the_networks_scale(run, photograph):
    Image.fromarray(photograph).save('a.png')
    assert run('a.png', '-o', 'out', '--format', 'webp', '--scale', '1.5')[0] == 0
    assert Image.open('out/a.webp').format == 'WEBP' and Image.open('out/a.webp').size == (45, 32)
    assert run('a.png', '-o', 'out', '--scale', '1.5')[0] == 0
    whole = expected(photograph).astype(np.uint8)
    assert (np.asarray(Image.open('out/a.png')) == imresize(whole, 0.75)).all()


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6" dc:rights="mine"/></x:xmpmeta>'


def with_xmp(name, pixels, xmp=XMP):
    info = PngImagePlugin.PngInfo()
    info.add_itxt('XML:com.adobe.xmp', xmp.decode())
    image = Image.fromarray(pixels)
    if name.endswith('.tif'):
        exif = Image.Exif()
        exif[700] = xmp
        image.save(name, exif=exif)
    else:
        image.save(name, **({'pnginfo': info} if name.endswith('.png') else {'xmp': xmp}))


@pytest.mark.parametrize('source', ['.png', '.jpg', '.webp', '.tif', '.avif'])
@pytest.mark.parametrize('target', ['.png', '.jpg', '.webp', '.tif', '.avif'])
def test_xmp_stays_in_every_format_that_holds_it(run, photograph, source, target):
    with_xmp('a' + source, photograph)
    code, _, err = run('a' + source, '-o', 'out' + target)
    assert code == 0 and err == ''
    with Image.open('out' + target) as found:
        turned = source == '.tif'  # whose pixels are upright
        assert found.info['xmp'].rstrip(b'\0') == (XMP.replace(b'"6"', b'"1"') if turned else XMP)


@pytest.mark.parametrize('target', ['.png', '.tif'])
def test_xmp_and_the_label_of_the_colours_stay_at_sixteen_bits(run, photograph, target):
    gamma = (100_000).to_bytes(4, 'big')
    picture = Picture(photograph * np.uint16(257), xmp=XMP, chunks={b'gAMA': gamma})
    write_picture(picture, Path('a.png'))
    code, _, err = run('a.png', '-o', 'out' + target)
    assert code == 0 and ('gAMA of a PNG' in err) == (target == '.tif')
    with Image.open('out' + target) as found:
        assert found.info['xmp'].rstrip(b'\0') == XMP and found.info.get('gamma') == (1 if target == '.png' else None)


def test_the_label_of_the_colours_stays_with_a_png(run, photograph):
    info = PngImagePlugin.PngInfo()
    info.add(b'gAMA', (100_000).to_bytes(4, 'big'))
    Image.fromarray(photograph).save('a.png', pnginfo=info)
    code, _, err = run('a.png', '-o', 'b.png')
    assert (code, err) == (0, '')
    assert Image.open('b.png').info['gamma'] == 1
    assert 'gAMA of a PNG' in run('a.png', '-o', 'b.jpg')[2]


def test_xmp_that_speaks_of_a_video_behind_the_picture_goes_with_it(run, photograph):
    with_xmp('a.jpg', photograph, XMP.replace(b'dc:rights="mine"', b'GCamera:MotionPhoto="1"'))
    code, _, err = run('a.jpg', '-o', 'out')
    assert code == 0 and err.count('\n') == 1 and 'XMP is left out' in err
    assert 'xmp' not in Image.open('out/a.jpg').info


def test_what_changes_its_kind_or_is_lost_is_said_once(run, photograph):
    """Four images, three of them of 16 bits, one with all that a BMP cannot hold: a line for each thing."""
    for name in ('a', 'b', 'c'):
        write_picture(Picture(photograph * np.uint16(257)), Path(f'in/{name}.png'))
    Image.fromarray(photograph).convert('CMYK').save('in/d.jpg', exif=turned_to_the_right(), xmp=XMP)
    Image.fromarray(photograph).save('in/e.png', icc_profile=PROFILE)
    code, _, err = run('in', '-o', 'out', '--format', 'bmp')
    assert code == 0 and sorted(err.splitlines()) == [
        'basicsr: in/a.png and 2 more: 16 bits become 8, since BMP holds no more',
        'basicsr: in/d.jpg: CMYK becomes sRGB',
        'basicsr: in/d.jpg: EXIF data is left out, which BMP does not hold',
        'basicsr: in/d.jpg: XMP is left out, which BMP does not hold',
        'basicsr: in/e.png: the colour profile is left out, which BMP does not hold']


def test_avif_is_read_and_written_with_what_belongs_to_it(run, photograph):
    Image.fromarray(photograph).save('a.avif', quality=95, subsampling='4:4:4', exif=turned_to_the_right(),
                                     icc_profile=PROFILE)
    assert run('a.avif', '-o', 'out')[0] == 0
    assert upright('out/a.avif').shape == (60, 42, 3)
    with Image.open('out/a.avif') as found:
        assert found.format == 'AVIF' and found.info['icc_profile'] == PROFILE and found.getexif()[0x010F] == 'maker'
    shown = np.rot90(expected(np.asarray(Image.open('a.avif'))), -1)
    assert np.abs(upright('out/a.avif') - shown).mean() < 4


@pytest.mark.parametrize('suffix', ['.jpg', '.webp', '.avif'])
def test_quality_is_the_encoders(run, photograph, suffix):
    Image.fromarray(photograph).save('a.png')
    sizes = []
    for quality in ('20', '95', None):
        code, _, err = run('a.png', '-o', f'{quality}{suffix}', *(['--quality', quality] if quality else []))
        assert (code, err) == (0, '')
        sizes.append(Path(f'{quality}{suffix}').stat().st_size)
    assert sizes[0] < sizes[1] * 0.7 and sizes[1] == sizes[2]


def test_lossless_webp_is_pytorchs_own_to_the_byte(run, photograph):
    Image.fromarray(photograph).save('a.png')
    assert run('a.png', '-o', 'out', '--format', 'webp', '--quality', 'lossless')[0] == 0
    assert (np.asarray(Image.open('out/a.webp').convert('RGB')) == expected(photograph)).all()


@pytest.mark.parametrize('name, content', [
    ('rgb16_planar.tif', 'rgb16.png'), ('grey16_miniswhite.tif', 'grey16.png')])
def test_a_tiff_gives_what_a_png_of_its_picture_gives(run, name, content):
    """Planes that lie apart and 0 as white were noise and a negative."""
    wide = cells.waves(16, 3)
    Path('rgb16_planar.tif').write_bytes(cells.tiff(wide, 16, 2, planar=True))
    Path('rgb16.png').write_bytes(cells.png(wide, 16, 2))
    Path('grey16_miniswhite.tif').write_bytes(cells.tiff(65535 - wide[..., :1], 16, 0))
    Path('grey16.png').write_bytes(cells.png(wide[..., :1], 16, 0))
    assert run(name, '-o', 'a.png')[0] == run(content, '-o', 'b.png')[0] == 0
    found, expected_ = (cv2.imread(each, cv2.IMREAD_UNCHANGED) for each in ('a.png', 'b.png'))
    assert found.dtype == np.uint16 and (found == expected_).all()
