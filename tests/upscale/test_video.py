"""Videos: every frame through the network, the sound as it was."""
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from elan_basicsr.cli import main
from elan_basicsr.upscale import video
from tests.upscale.conftest import WEIGHTS

needs_ffmpeg = pytest.mark.skipif(shutil.which('ffmpeg') is None, reason='needs ffmpeg, which is not installed')


def film(name, *options):
    subprocess.run(['ffmpeg', '-v', 'error', '-f', 'lavfi', '-i', 'testsrc=size=32x18:rate=10:duration=0.5', '-f',
                    'lavfi', '-i', 'sine=duration=0.5', '-pix_fmt', 'yuv420p', *options, name], check=True)


def sound(name):
    return subprocess.run(['ffmpeg', '-v', 'error', '-i', name, '-map', '0:a', '-c', 'copy', '-f', 'md5', '-'],
                          check=True, capture_output=True).stdout


@needs_ffmpeg
@pytest.mark.parametrize('name', ['a b.mp4', 'ä.mkv'])
def test_frames_grow_and_sound_stays(run, name):
    film(name)
    code, out, err = run(name, '-o', 'out')
    assert (code, err) == (0, '') and '1 of 1 done' in out
    before, after = video.probe(Path(name)), video.probe(Path('out', name))
    assert (after.width, after.height, after.rate) == (64, 36, before.rate)
    frames = list(video._frames(Path('out', name), after.rate))
    assert len(frames) == 5 and sound(name) == sound(f'out/{name}')
    assert '1 already there' in run(name, '-o', 'out')[1]


@needs_ffmpeg
def test_colours_and_odd_sizes_come_back(tmp_path):
    """What goes through the encoder and back is the same picture; odd edges are doubled."""
    film(tmp_path / 'a.mp4')
    pixels = np.zeros((35, 61, 3), np.uint8)
    pixels[..., 0], pixels[:17, :, 1], pixels[:, 30:, 2] = 200, 150, 90

    class Fixed:
        def pixels(self, frame, dtype, advance):
            return pixels

    assert video.enlarge(tmp_path / 'a.mp4', tmp_path / 'b.mp4', Fixed(), 10**6, lambda n: None) == 5 * 36 * 62
    frame = next(video._frames(tmp_path / 'b.mp4', video.probe(tmp_path / 'b.mp4').rate))
    assert frame.shape == (36, 62, 3) and np.abs(frame[:35, :61].astype(int) - pixels).mean() < 4


@needs_ffmpeg
def test_a_film_that_breaks_off_or_is_too_large_leaves_no_output(run):
    film('a.mkv')
    assert run('a.mkv', '-o', 'out', '--max-pixels', '100')[0] == 1
    Path('b.mkv').write_bytes(Path('a.mkv').read_bytes()[:300])
    code, _, err = run('b.mkv', '-o', 'out')
    assert code == 1 and err.count('\n') == 1 and 'b.mkv' in err
    assert not Path('out').exists() or not list(Path('out').iterdir())


def test_without_ffmpeg_one_line_says_so(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv('PATH', str(tmp_path))
    (tmp_path / 'a.mp4').write_bytes(b'x')
    assert main(['upscale', str(tmp_path / 'a.mp4'), '-o', str(tmp_path / 'o'), '--weights', str(WEIGHTS)]) == 1
    printed = capfd.readouterr().err
    assert printed.count('\n') == 1 and 'install ffmpeg' in printed
