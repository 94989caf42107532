"""Videos through ffmpeg: frames stream out of one process and into another, one at a time; sound is copied as it is."""
from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from elan_basicsr.errors import UserError
from elan_basicsr.upscale.enlarge import Enlarger
from elan_basicsr.upscale.image_files import whole_file

# Nearly without visible loss: what the network made is not to be lost in the encoder.
_ENCODERS = {'.webm': ('libvpx-vp9', '-crf', '20', '-b:v', '0')}
_H264 = ('libx264', '-crf', '14', '-preset', 'medium')
_BT709 = ('-colorspace', 'bt709', '-color_primaries', 'bt709', '-color_trc', 'bt709', '-color_range', 'tv')


class Probe(NamedTuple):
    """What is known of a video before it is decoded; `frames` is an estimate."""
    width: int
    height: int
    rate: Fraction
    frames: int


def probe(path: Path) -> Probe:
    """Ask ffprobe for a video's first stream of pictures.

    Raises:
        UserError: ffmpeg is not installed, or the file is no video it can read.
    """
    for name in ('ffmpeg', 'ffprobe'):
        if shutil.which(name) is None:
            raise UserError(f'{path}: videos need {name}, which is not installed; install ffmpeg')
    done = subprocess.run(
        ['ffprobe', '-v', 'error', '-select_streams', 'v:0', '-of', 'json', '-show_entries',
         'stream=width,height,avg_frame_rate,r_frame_rate,nb_frames,duration:format=duration', f'file:{path}'],
        capture_output=True, text=True, errors='replace', stdin=subprocess.DEVNULL)
    try:
        found = json.loads(done.stdout)
        stream = found['streams'][0]
        rates = [stream[key] for key in ('avg_frame_rate', 'r_frame_rate') if not stream[key].startswith('0/')]
        rate = Fraction(rates[0])
        seconds = float(stream.get('duration') or found.get('format', {}).get('duration') or 0)
        return Probe(stream['width'], stream['height'], rate, int(stream.get('nb_frames') or seconds * rate))
    except (ValueError, KeyError, IndexError, ZeroDivisionError):
        raise UserError(f'{path}: is no readable video ({_last_line(done.stderr)})') from None


def pixels(path: Path) -> int:
    """About how many pixels the frames of a video have together; 0 if it cannot be read."""
    try:
        found = probe(path)
    except UserError:
        return 0
    return found.width * found.height * found.frames


def enlarge(source: Path, target: Path, enlarger: Enlarger, max_pixels: int, advance: Callable[[int], None]) -> int:
    """Enlarge a video's pictures and copy its sound. Returns the pixels of the result.

    The frame rate is constant, H.264 (VP9 in WebM), 8 bit, BT.709; pictures lie as players show them.

    Raises:
        UserError: The video cannot be read, has frames of more than `max_pixels`, or cannot be written.
    """
    found = probe(source)
    if found.width * found.height > max_pixels:
        raise UserError(f'{source}: has frames of {found.width}x{found.height} pixels, more than --max-pixels '
                        f'{max_pixels}; raise it if there is memory')
    total = 0
    encoder = None
    try:
        with whole_file(target) as temporary, tempfile.TemporaryFile() as log:
            try:
                for frame in _frames(source, found.rate):
                    result = _even(enlarger.pixels(frame, np.uint8, advance))
                    if encoder is None:
                        encoder = _encoder(source, temporary, result.shape[1], result.shape[0], found.rate, log)
                    assert encoder.stdin is not None  # it is a pipe
                    encoder.stdin.write(result.data)
                    total += result.shape[0] * result.shape[1]
                if encoder is None:
                    raise UserError(f'{source}: holds no frames')
                assert encoder.stdin is not None
                encoder.stdin.close()
                if encoder.wait():
                    raise BrokenPipeError
            except BrokenPipeError:
                raise UserError(f'{target}: cannot be written by ffmpeg ({_said(log)})') from None
            finally:
                if encoder is not None and encoder.poll() is None:
                    encoder.kill()
                    encoder.wait()
    except OSError as error:
        raise UserError(f'{target}: cannot be written ({error.strerror or error})') from None
    return total


def _frames(path: Path, rate: Fraction) -> Iterator[np.ndarray]:
    """A video's frames, (H, W, 3) RGB uint8. As PPM images, which say their size: ffmpeg turns them upright first."""
    with tempfile.TemporaryFile() as log:
        decoder = subprocess.Popen(
            ['ffmpeg', '-v', 'error', '-nostdin', '-i', f'file:{path}', '-map', '0:v:0', '-r', str(rate), '-f',
             'image2pipe', '-c:v', 'ppm', '-pix_fmt', 'rgb24', '-'],
            stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL)
        assert decoder.stdout is not None  # it is a pipe
        try:
            while (frame := _read_ppm(decoder.stdout)) is not None:
                yield frame
            if decoder.wait():
                raise UserError(f'{path}: ffmpeg cannot decode it ({_said(log)})')
        finally:
            decoder.stdout.close()
            decoder.kill()
            decoder.wait()


def _read_ppm(stream: IO[bytes]) -> np.ndarray | None:
    if stream.readline() != b'P6\n':
        return None
    width, height = map(int, stream.readline().split())
    stream.readline()  # the largest value, 255
    data = stream.read(width * height * 3)
    if len(data) < width * height * 3:
        return None
    return np.frombuffer(data, np.uint8).reshape(height, width, 3)


def _encoder(source: Path, target: Path, width: int, height: int, rate: Fraction, log: IO[bytes]) -> subprocess.Popen:
    return subprocess.Popen(
        ['ffmpeg', '-v', 'error', '-y', '-f', 'rawvideo', '-pix_fmt', 'rgb24', '-s', f'{width}x{height}', '-r',
         str(rate), '-i', '-', '-i', f'file:{source}', '-map', '0:v', '-map', '1:a?', '-c:a', 'copy', '-map_metadata',
         '1', '-vf', 'scale=out_color_matrix=bt709:out_range=tv', '-pix_fmt', 'yuv420p', *_BT709, '-c:v',
         *_ENCODERS.get(target.suffix.lower(), _H264), f'file:{target}'],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log)


def _even(frame: np.ndarray) -> np.ndarray:
    """The frame with its last row or column twice where that makes them even, as 4:2:0 needs them."""
    height, width = frame.shape[:2]
    if height % 2 or width % 2:
        frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode='edge')
    return np.ascontiguousarray(frame)


def _said(log: IO[bytes]) -> str:
    log.seek(0)
    return _last_line(log.read().decode(errors='replace'))


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:160] if lines else 'it says nothing'
