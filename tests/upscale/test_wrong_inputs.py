"""Everything a person may give that cannot work, or hardly: one line, and nothing lost."""
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def save(name, size=(12, 9), mode='RGB', **options):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    image = Image.effect_noise(size, 60).convert(mode)
    image.save(name, **options)
    return Path(name).read_bytes()


def truncated(name, share=0.6, **options):
    data = save(name, (60, 60), **options)
    Path(name).write_bytes(data[:int(len(data) * share)])


def tiff_of_floats():
    Image.fromarray(np.random.rand(9, 9).astype(np.float32)).save('bad.tif')


def png_that_claims_much():
    data = bytearray(save('bad.png'))
    data[16:24] = (200_000).to_bytes(4, 'big') * 2
    import zlib
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, 'big')
    Path('bad.png').write_bytes(data)


def damaged_in_the_middle():
    data = bytearray(save('bad.png', (60, 60)))
    data[len(data) // 2] ^= 255
    Path('bad.png').write_bytes(data)


def several(name, **options):
    frames = [Image.effect_noise((12, 9), 60).convert('RGB') for _ in range(3)]
    frames[0].save(name, save_all=True, append_images=frames[1:], **options)


# The file bad.* is reported in one line with these words; good.png beside it is enlarged, and the exit code is 1.
BAD = {
    'empty file': (lambda: Path('bad.png').touch(), 'is empty'),
    'text named .png': (lambda: Path('bad.png').write_text('dear diary\n'), 'no readable image'),
    'text named .mp4': (lambda: Path('bad.mp4').write_text('dear diary\n'), 'bad.mp4'),
    'text named .tif': (lambda: Path('bad.tif').write_text('II*\0 dear diary\n'), 'no readable image'),
    'truncated png': (lambda: truncated('bad.png'), 'cut off'),
    'truncated jpeg': (lambda: truncated('bad.jpg'), 'cut off'),
    'truncated webp': (lambda: truncated('bad.webp'), 'cut off'),
    'truncated tiff': (lambda: truncated('bad.tif'), 'cut off'),
    'truncated bmp': (lambda: truncated('bad.bmp'), 'cut off'),
    'truncated 16-bit png': (lambda: (save('bad.png', (60, 60), 'I;16'), Path('bad.png').write_bytes(
        Path('bad.png').read_bytes()[:900])), 'cut off'),
    'header alone': (lambda: truncated('bad.jpg', 0.02), 'cut off'),
    'damaged in the middle': (damaged_in_the_middle, 'damaged'),
    'animated gif': (lambda: several('bad.gif'), '3 frames'),
    'animated webp': (lambda: several('bad.webp'), '3 frames'),
    'animated png': (lambda: several('bad.png'), '3 frames'),
    'tiff of pages': (lambda: several('bad.tif'), '3 frames or pages'),
    'tiff of floats': (tiff_of_floats, '32-bit'),
    'claims 200000x200000 pixels': (png_that_claims_much, '--max-pixels'),
    'more than --max-pixels': (lambda: save('bad.png', (101, 100)), '101x100 pixels, more than --max-pixels 10000'),
    'no suffix': (lambda: Path('bad.png').symlink_to('gone.png'), 'no such file'),
}


@pytest.mark.parametrize('case', BAD)
def test_a_bad_file_is_reported_and_the_rest_goes_on(run, case):
    make, words = BAD[case]
    make()
    save('good.png')
    bad = next(path for path in Path().iterdir() if path.name.startswith('bad'))
    inputs = ['.'] if bad.suffix != '.mp4' else ['bad.mp4', 'good.png']
    code, out, err = run(*inputs, '-o', 'out', '--max-pixels', '10000')
    assert code == 1 and '1 failed' in out
    assert err.count('\n') == 1 and words in err and bad.name in err and 'Traceback' not in err
    assert [path.name for path in Path('out').iterdir()] == ['good.png']


# Nothing starts: exit code 2 and one line with these words.
REFUSED = {
    'no such file': (lambda: ['gone.png'], 'gone.png: no such file or folder'),
    'a pattern without a match': (lambda: ['*.png'], 'no file matches'),
    'an empty folder': (lambda: (os.mkdir('empty'), ['empty'])[1], 'holds no images'),
    'a folder of other files': (lambda: (os.mkdir('d'), Path('d/a.txt').touch(), ['d'])[2], 'holds no images'),
    'a suffix of no image': (lambda: (Path('a.txt').touch(), ['a.txt'])[1], 'suffix'),
    'output equal to input': (lambda: (save('a.png'), ['a.png', '-o', '.'])[1], 'written over'),
    'output equal to input, as a file': (lambda: (save('a.png'), ['a.png', '-o', 'a.png'])[1], 'written over'),
    'output over another input': (lambda: (save('a.png'), save('d/a.png'), ['d/a.png', 'a.png', '-o', 'd'])[2],
                                  'written over'),
    'two inputs, one output': (lambda: (save('a/x.png'), save('b/x.png'), ['a', 'b', '-o', 'out'])[2], 'as would'),
    'two formats, one output': (lambda: (save('x.png'), save('x.jpg'), ['.', '-o', 'o', '--format', 'png'])[2],
                                'as would'),
    'two inputs, a file as output': (lambda: (save('a.png'), save('b.png'), ['.', '-o', 'c.png'])[2], 'one file'),
    'an image into a video': (lambda: (save('a.png'), ['a.png', '-o', 'a.mp4'])[1], 'cannot become'),
    'a file in the way of the folder': (lambda: (save('a.png'), Path('o').touch(), ['a.png', '-o', 'o'])[2],
                                        'is a file, expected a folder'),
    'a file in the way further up': (lambda: (save('a.png'), Path('o').touch(), ['a.png', '-o', 'o/p'])[2],
                                     'is a file, expected a folder'),
    'scale beyond the network': (lambda: (save('a.png'), ['a.png', '--scale', '3'])[1], 'enlarges by 2'),
    'scale of nothing': (lambda: (save('a.png'), ['a.png', '--scale', '0'])[1], '--scale'),
    'scale that is no number': (lambda: (save('a.png'), ['a.png', '--scale', 'nan'])[1], '--scale'),
    'a negative tile': (lambda: (save('a.png'), ['a.png', '--tile', '-1'])[1], '--tile -1'),
    'an unknown format': (lambda: (save('a.png'), ['a.png', '--format', 'gif'])[1], '--format gif'),
    'an unknown dtype': (lambda: (save('a.png'), ['a.png', '--dtype', 'int4'])[1], '--dtype int4'),
    'a quality beyond': (lambda: (save('a.png'), ['a.png', '--quality', '101'])[1], '--quality 101'),
    'a quality that is no number': (lambda: (save('a.jpg'), ['a.jpg', '--quality', 'best'])[1], '--quality best'),
    'a quality for what has none': (lambda: (save('a.png'), ['a.png', '--quality', '80'])[1], 'no output is JPEG'),
    'lossless jpeg': (lambda: (save('a.jpg'), ['a.jpg', '--quality', 'lossless'])[1], 'out/a.jpg cannot be'),
    'no pixels allowed': (lambda: (save('a.png'), ['a.png', '--max-pixels', '0'])[1], '--max-pixels 0'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_nothing_starts(run, case):
    make, words = REFUSED[case]
    given = make()
    before = {path: path.stat().st_mtime_ns for path in Path().rglob('*')}
    code, out, err = run(*given, *([] if '-o' in given else ['-o', 'out']))
    assert code == 2 and not out
    assert err.startswith('basicsr: error: ') and err.count('\n') == 1 and words in err
    assert {path: path.stat().st_mtime_ns for path in Path().rglob('*')} == before


def test_a_device_that_is_not_there(run):
    save('a.png')
    code, _, err = run('a.png', '-o', 'out', device='cuda:77')
    assert code == 2 and err.count('\n') == 1 and '--device cuda:77' in err


def test_weights_that_are_none(run):
    save('a.png')
    Path('w.pth').write_text('no weights')
    code, _, err = run('a.png', '-o', 'out', weights='w.pth')
    assert code == 2 and err.count('\n') == 1 and 'w.pth' in err


@pytest.mark.parametrize('size', [(1, 1), (1, 5000), (5000, 1), (2, 3), (17, 16)])
def test_sizes(run, size):
    save('a.png', size)
    assert run('a.png', '-o', 'out')[0] == 0
    assert Image.open('out/a.png').size == (2 * size[0], 2 * size[1])


@pytest.mark.parametrize('name', ['two words.png', 'Größe – 寸法.png', "quote'[1].png", '-dash.png', 'UPPER.PNG',
                                  'a.b.png'])
def test_names(run, name):
    save('in/' + name)
    assert run('in', '-o', 'out')[0] == 0
    assert Image.open('out/' + name).size == (24, 18)
    assert run('in/' + name, '-o', 'other')[0] == 0
    assert Path('other', name).exists()


def test_transparency_that_the_format_cannot_hold(run):
    save('a.png', mode='RGBA')
    image = Image.open('a.png')
    image.putalpha(Image.linear_gradient('L').resize((12, 9)))
    image.save('a.png')
    code, _, err = run('a.png', '-o', 'out', '--format', 'jpg')
    assert code == 1 and 'JPEG holds no transparency' in err and not Path('out').exists()


def test_an_edge_that_the_format_cannot_hold(run):
    save('a.webp', (9000, 1))
    code, _, err = run('a.webp', '-o', 'out')
    assert code == 1 and 'WEBP holds 16383' in err and not Path('out').exists()


def test_a_folder_in_the_way_of_an_output(run):
    save('a.png')
    save('b.png')
    Path('out/a.png').mkdir(parents=True)
    code, out, err = run('a.png', 'b.png', '-o', 'out', '--overwrite')
    assert code == 1 and 'a.png' in err and 'cannot be written' in err
    assert sorted(path.name for path in Path('out').iterdir()) == ['a.png', 'b.png'] and Path('out/a.png').is_dir()
