"""Videos through ffmpeg: frames stream out of one process and into another, one at a time.

What the container carries beside the pictures is copied as it is, where the output can hold it, as `video_streams`
decides.
"""
from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from elan_basicsr.errors import UserError
from elan_basicsr.upscale.enlarge import Enlarger
from elan_basicsr.upscale.image_files import whole_file
from elan_basicsr.upscale.video_streams import Probe, carried, last_line, probe

__all__ = ['Probe', 'enlarge', 'pixels', 'probe']

# Nearly without visible loss: what the network made is not to be lost in the encoder.
_VP9 = ('libvpx-vp9', '-crf', '20', '-b:v', '0')
_H264 = ('libx264', '-crf', '14', '-preset', 'medium')
# Without them swscale makes pictures darker by a grey level on the way to RGB and back.
_EXACT = 'flags=bicubic+accurate_rnd+full_chroma_int'
_HEVC = ('libx265', '-crf', '14', '-preset', 'medium')


def pixels(path: Path) -> int:
    """About how many pixels the frames of a video have together; 0 if it cannot be read."""
    try:
        found = probe(path)
    except UserError:
        return 0
    return found.width * found.height * found.frames


def enlarge(source: Path, target: Path, enlarger: Enlarger, max_pixels: int, advance: Callable[[int], None]) -> int:
    """Enlarge a video's pictures and copy what comes with them. Returns the pixels of the result.

    The frame rate is constant; H.264 of 8 bit, HEVC of 10 bit where the source has more than 8, VP9 in WebM; colours as
    the source labels them. Pictures lie as players show them. What changes in kind or is left out is told through
    `enlarger.say` in one line.

    Raises:
        UserError: ffmpeg is not installed, or the video cannot be read, has frames of more than `max_pixels`, has
            colours that ffmpeg or the output cannot keep, or cannot be written.
    """
    found = probe(source)
    if found.width * found.height > max_pixels:
        raise UserError(f'{source}: has frames of {found.width}x{found.height} pixels, more than --max-pixels '
                        f'{max_pixels}; raise it if there is memory')
    found.refuse_colours(target)
    total = 0
    encoder = None
    changes = found.changes(target)
    dtype = np.uint16 if found.keeps_depth(target) else np.uint8
    try:
        with whole_file(target) as temporary, tempfile.TemporaryFile() as log, \
                tempfile.TemporaryDirectory() as folder:
            streams, left_out = carried(found, target, Path(folder))
            try:
                for frame in _frames(found, dtype, changes):
                    result = _even(enlarger.pixels(frame, dtype, advance))
                    if encoder is None:
                        encoder = _encoder(found, temporary, result, streams, log)
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
                raise UserError(f'{target}: cannot be written by ffmpeg ({_first_said(log)}); {_advice(log)}') from None
            finally:
                if encoder is not None and encoder.poll() is None:
                    encoder.kill()
                    encoder.wait()
    except OSError as error:
        raise UserError(f'{target}: cannot be written ({error.strerror or error})') from None
    if left_out:
        changes.append(f'left out, as {target.suffix} or ffmpeg cannot hold it: {", ".join(left_out)}')
    if changes:
        enlarger.say(f'{source}: {"; ".join(changes)}')
    return total


def _frames(found: Probe, dtype: type, changes: list[str]) -> Iterator[np.ndarray]:
    """A video's frames, (H, W, 3) RGB. As PPM images, which say their size: ffmpeg turns them upright first.

    Frames that ffmpeg shows twice or leaves out for the constant rate are counted in `changes` at the end.
    """
    deep = dtype is np.uint16
    deinterlaced = 'bwdif=mode=send_frame:deint=interlaced,' if found.interlaced else ''
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as folder:
        progress = Path(folder, 'progress')
        decoder = subprocess.Popen(
            ['ffmpeg', '-v', 'error', '-nostdin', '-progress', f'file:{progress}', '-i', f'file:{found.path}',
             '-map', '0:V:0', '-r', str(found.rate), '-vf',
             f'{deinterlaced}scale=in_color_matrix={found.matrix}:{_EXACT}',
             '-f', 'image2pipe', '-c:v', 'ppm', '-pix_fmt', 'rgb48be' if deep else 'rgb24', '-'],
            stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL)
        assert decoder.stdout is not None  # it is a pipe
        try:
            while (frame := _read_ppm(decoder.stdout)) is not None:
                yield frame
            if decoder.wait():
                raise UserError(f'{found.path}: ffmpeg cannot decode it ({_said(log)})')
            counts = dict(line.split('=', 1) for line in progress.read_text(errors='replace').splitlines()
                          if '=' in line)  # the last report of several is the whole
            twice, gone = (int(counts.get(name) or 0) for name in ('dup_frames', 'drop_frames'))
            twice -= round(found.delay * found.rate)  # which is filled with the first frame
            if twice > 1 or gone > 1:  # one is a matter of rounding
                changes.append(f'the frame rate varies and becomes a constant {float(found.rate):.5g}, for which '
                               f'{twice} frames are repeated and {gone} left out')
        finally:
            decoder.stdout.close()
            decoder.kill()
            decoder.wait()


def _read_ppm(stream: IO[bytes]) -> np.ndarray | None:
    if stream.readline() != b'P6\n':
        return None
    width, height = map(int, stream.readline().split())
    kind = np.dtype(np.uint8) if int(stream.readline()) == 255 else np.dtype('>u2')
    data = stream.read(width * height * 3 * kind.itemsize)
    if len(data) < width * height * 3 * kind.itemsize:
        return None
    return np.frombuffer(data, kind).reshape(height, width, 3).astype(kind.newbyteorder('='), copy=False)


def _encoder(found: Probe, target: Path, first: np.ndarray, streams: list[str], log: IO[bytes]) -> subprocess.Popen:
    """An ffmpeg that takes frames like the `first` and writes them to `target` with the other `streams`."""
    deep = first.dtype == np.uint16
    suffix = target.suffix.lower()
    codec = [*(_VP9 if suffix == '.webm' else _HEVC if deep else _H264)]
    if codec[0] == 'libx265':
        codec += ['-x265-params', ':'.join(['log-level=error', *found.mastering()])]
        codec += ['-tag:v:0', 'hvc1'] if suffix in ('.mp4', '.m4v', '.mov') else []  # what Apple's players look for
    range_ = 'pc' if found.full_range else 'tv'
    return subprocess.Popen(
        ['ffmpeg', '-v', 'error', '-y', '-f', 'rawvideo', '-pix_fmt', 'rgb48' if deep else 'rgb24', '-s',
         f'{first.shape[1]}x{first.shape[0]}', '-r', str(found.rate), '-i', '-', '-i', f'file:{found.path}',
         '-map', '0:v', *streams, '-filter:v:0',
         f'scale=out_color_matrix={found.matrix}:out_range={range_}:{_EXACT},setsar={found.pixel_aspect}',
         '-pix_fmt:v:0', 'yuv420p10le' if deep else 'yuv420p', *found.labels(), '-color_range', range_, '-c:v:0',
         *codec, *(('-f', 'mp4') if suffix == '.m4v' else ()), f'file:{target}'],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log)


def _even(frame: np.ndarray) -> np.ndarray:
    """The frame with its last row or column twice where that makes them even, as 4:2:0 needs them."""
    height, width = frame.shape[:2]
    if height % 2 or width % 2:
        frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode='edge')
    return np.ascontiguousarray(frame)


def _said(log: IO[bytes]) -> str:
    log.seek(0)
    return last_line(log.read().decode(errors='replace'))


def _first_said(log: IO[bytes]) -> str:
    """What stopped the encoder; the lines after it tell what could then not go on either."""
    log.seek(0)
    lines = log.read().decode(errors='replace').splitlines()
    return re.sub(r'^\[[^]]* @ 0x\w+\] ', '', lines[0])[:160] if lines else 'it says nothing'


def _advice(log: IO[bytes]) -> str:
    log.seek(0)
    if b'Unknown encoder' in log.read():
        return f'install an ffmpeg with that encoder, such as the one of your system ({shutil.which("ffmpeg")} is used)'
    return 'if its container cannot hold what the video carries, name a .mkv, which holds nearly everything'
