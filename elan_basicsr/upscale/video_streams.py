"""What a video's file holds beside its pictures, how its colours are meant, and what of it an output can hold."""
from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path

from elan_basicsr.errors import UserError

# ffmpeg's names of what tells the three primary colours of YUV, as its filter `scale` knows them.
_MATRICES = {'bt709': 'bt709', 'fcc': 'fcc', 'bt470bg': 'bt470', 'smpte170m': 'smpte170m', 'smpte240m': 'smpte240m',
             'bt2020nc': 'bt2020'}
_TRANSFER_OPTIONS = {'bt470m': 'gamma22', 'bt470bg': 'gamma28'}  # ffprobe's names where ffmpeg's options have others
_HDR = {'smpte2084': 'PQ', 'arib-std-b67': 'HLG'}
_TONE_MAPPING = ('zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=hable,zscale=t=bt709:m=bt709:r=tv,'
                 'format=yuv420p')
_MP4 = ('.mp4', '.m4v', '.mov')
_TEXT = ('subrip', 'ass', 'ssa', 'webvtt', 'mov_text', 'text')
# The encoder of texts by container. MKV holds every other kind as it is, MP4 and AVI no pictures as subtitles.
_TEXT_IN = {'.mkv': 'srt', '.webm': 'webvtt', **dict.fromkeys(_MP4, 'mov_text')}
_SAME_TEXT = {'.mkv': ('subrip', 'ass', 'ssa', 'webvtt', 'text'), '.webm': ('webvtt',),
              **dict.fromkeys(_MP4, ('mov_text',))}
_COVERS = {'mjpeg': ('.jpg', 'image/jpeg'), 'png': ('.png', 'image/png')}
_KEPT_DATA = ('tmcd', 'text')  # data streams of MP4 that hold timecode and chapters, which are kept by themselves


@dataclass(frozen=True)
class Probe:
    """What is known of a video before it is decoded; `frames` is an estimate.

    Attributes:
        delay: Seconds by which the pictures begin later than the rest.
        stream: What ffprobe tells of the pictures, covers aside.
        others: The same of every other stream.
    """
    path: Path
    width: int
    height: int
    rate: Fraction
    frames: int
    delay: float = 0
    stream: dict = field(default_factory=dict)
    others: tuple[dict, ...] = ()

    @property
    def depth(self) -> int:
        """Bits of a value."""
        found = re.search(r'(9|10|12|14|16|48|64)(le|be)$', self.stream.get('pix_fmt', ''))
        return {48: 16, 64: 16}.get(int(found[1]), int(found[1])) if found else 8

    @property
    def full_range(self) -> bool:
        return self.stream.get('color_range') == 'pc' and self.stream.get('color_space') != 'gbr'

    @property
    def hdr(self) -> str | None:
        return _HDR.get(self.stream.get('color_transfer', ''))

    @property
    def interlaced(self) -> bool:
        # Containers tell it, or say "progressive" of what the pictures themselves mark as interlaced.
        return self.stream.get('field_order') in ('tt', 'bb', 'tb', 'bt') or bool(
            self._first_frame.get('interlaced_frame'))

    @property
    def _space(self) -> str:
        """The matrix of YUV; where nothing is said, what players take for a video of the source's size."""
        said = self.stream.get('color_space', 'unknown')
        if said in ('unknown', 'reserved', 'gbr'):
            return 'bt709' if self.height >= 720 or said == 'gbr' else 'smpte170m'
        return said

    @property
    def matrix(self) -> str:
        """The same as the filter `scale` names it."""
        return _MATRICES[self._space]

    @property
    def pixel_aspect(self) -> str:
        """Width by height of a pixel, of the picture as it is shown."""
        width, _, height = self.stream.get('sample_aspect_ratio', '1:1').partition(':')
        if '0' in (width, height):
            width = height = '1'
        turned = any(abs(int(each.get('rotation', 0))) % 180 == 90 for each in self._side_data)
        return f'{height}/{width}' if turned else f'{width}/{height}'

    @property
    def _side_data(self) -> list[dict]:
        return self.stream.get('side_data_list') or []

    def labels(self) -> list[str]:
        """Options of ffmpeg that label the colours as the source does."""
        said = {'-colorspace': self._space, '-color_primaries': self.stream.get('color_primaries', 'unknown'),
                '-color_trc': self.stream.get('color_transfer', 'unknown')}
        return [word for option, value in said.items() if value not in ('unknown', 'reserved')
                for word in (option, _TRANSFER_OPTIONS.get(value, value) if option == '-color_trc' else value)]

    def keeps_depth(self, target: Path) -> bool:
        """Whether the result has 10 bits: in AVI, which has no place for HEVC, it has 8."""
        return self.depth > 8 and target.suffix.lower() != '.avi'

    def refuse_colours(self, target: Path) -> None:
        """Raise UserError where the result would show other colours."""
        dolby = next((each.get('dv_profile') for each in self._side_data if 'dv_profile' in each), None)
        if dolby == 5 or self._space not in _MATRICES:
            said = 'Dolby Vision of profile 5' if dolby == 5 else f'the colour space {self._space}'
            raise UserError(f'{self.path}: is in {said}, which is not read; make it BT.709 first, as with: ffmpeg -i '
                            f'{shlex.quote(str(self.path))} -vf libplacebo=colorspace=bt709:color_primaries=bt709'
                            ':color_trc=bt709:format=yuv420p -c:a copy sdr.mkv')
        if self.hdr and self.depth > 8 and not self.keeps_depth(target):
            raise UserError(f'{self.path}: is HDR ({self.hdr}), and {target.suffix} has no place for that; name a .mp4 '
                            f'or .mkv, or make it SDR first: ffmpeg -i {shlex.quote(str(self.path))} -vf '
                            f'{_TONE_MAPPING} -c:a copy sdr.mkv')

    def changes(self, target: Path) -> list[str]:
        """What becomes of another kind in the result, in words."""
        said = []
        if self.interlaced:
            said.append('is interlaced and becomes progressive (bwdif, a frame of two fields)')
        kept = 10 if self.keeps_depth(target) else 8
        if self.depth != kept:
            said.append(f'{self.depth} bits become {kept}')
        form = self.stream.get('pix_fmt', '')
        sampling = '4:2:2' if '422' in form else '4:4:4' if '444' in form else 'RGB' if re.match(
            '[0ax2]*(gbr|rgb|bgr)', form) else None
        if sampling:
            said.append(f'{sampling} becomes 4:2:0')
        if re.match('yuva|gbrap|rgba|bgra|argb|abgr|ya', form) or self.stream.get('tags', {}).get('alpha_mode') == '1':
            said.append('its transparency is left out')
        if any('dv_profile' in each for each in self._side_data):
            said.append('what Dolby Vision adds is left out, the picture below it stays')
        if target.suffix.lower() == '.webm' and self.hdr and self.mastering():
            said.append('what HDR10 says of the screen it was made on is left out')
        if any('HDR10+' in each.get('side_data_type', '') for each in self._first_frame.get('side_data_list', [])):
            said.append('what HDR10+ adds is left out, HDR10 stays')
        return said

    @cached_property
    def _first_frame(self) -> dict:
        found = _ffprobe('-select_streams', 'V:0', '-read_intervals', '%+#1', '-show_frames', f'file:{self.path}')[0]
        return (found.get('frames') or [{}])[0]

    def mastering(self) -> list[str]:
        """x265's parameters for what HDR10 says of the screen it was made on."""
        parameters = []
        for each in self._first_frame.get('side_data_list', []):
            if 'red_x' in each and 'max_luminance' in each:
                points = {name: ','.join(str(round(Fraction(each[f'{of}_{axis}']) * 50000)) for axis in 'xy')
                          for name, of in (('G', 'green'), ('B', 'blue'), ('R', 'red'), ('WP', 'white_point'))}
                luminance = ','.join(str(round(Fraction(each[f'{which}_luminance']) * 10000))
                                     for which in ('max', 'min'))
                parameters.append('master-display=' + ''.join(f'{name}({at})' for name, at in points.items())
                                  + f'L({luminance})')
            if 'max_content' in each:
                parameters.append(f'max-cll={each["max_content"]},{each["max_average"]}')
        return parameters


def probe(path: Path) -> Probe:
    """Ask ffprobe for a video's first stream of pictures, and for what lies beside it.

    Raises:
        UserError: ffmpeg is not installed, or the file is no video it can read.
    """
    for name in ('ffmpeg', 'ffprobe'):
        if shutil.which(name) is None:
            raise UserError(f'{path}: videos need {name}, which is not installed; install ffmpeg')
    found, said = _ffprobe('-show_streams', '-show_format', f'file:{path}')
    try:
        stream = [stream for stream in found['streams'] if stream.get('codec_type') == 'video'
                  and not _is_cover(stream)][0]
        rate = _rate(stream)
        whole = found.get('format', {})
        seconds = float(stream.get('duration') or whole.get('duration') or 0)
        delay = float(stream.get('start_time') or 0) - float(whole.get('start_time') or 0)
        return Probe(path, stream['width'], stream['height'], rate, int(stream.get('nb_frames') or seconds * rate),
                     delay, stream, tuple(other for other in found['streams'] if other is not stream))
    except (ValueError, KeyError, IndexError, ZeroDivisionError):
        raise UserError(f'{path}: is no readable video ({said})') from None


def _rate(stream: dict) -> Fraction:
    """Frames per second: the average, or the nominal rate where an average of rounded times is off by a little."""
    average, nominal = (Fraction(*(map(int, stream[key].split('/')))) if not stream[key].startswith('0/') else None
                        for key in ('avg_frame_rate', 'r_frame_rate'))
    if average is None or nominal is not None and average.denominator not in (1, 1001) \
            and abs(average / nominal - 1) < 0.01:
        average = nominal
    if average is None:
        raise ValueError('no frame rate')
    return average


def carried(found: Probe, target: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Options of ffmpeg that carry all but the pictures from its second input, and what is left out, in words.

    Covers that go into MKV are written to `folder`, for ffmpeg takes them from files only.
    """
    suffix = target.suffix.lower()
    options = ['-map_metadata', '1', '-map_chapters', '1', '-c', 'copy', *_tags(found)]
    left_out: list[str] = ['chapters'] if suffix == '.avi' and _has_chapters(found) else []
    subtitles = covers = 0
    # ffmpeg numbers the files it attaches after the attachments it copies.
    attached = sum(stream.get('codec_type') == 'attachment' for stream in found.others)
    for stream in found.others:
        kind, codec, place = stream.get('codec_type'), stream.get('codec_name', 'unknown'), f'1:{stream["index"]}'
        if kind == 'audio':
            options += ['-map', place]
            if suffix == '.avi' and float(stream.get('start_time') or 0) > 0.1:
                left_out.append('the late start of a sound track')
        elif kind == 'subtitle' and (encoder := _subtitle_encoder(codec, suffix)):
            options += ['-map', place, f'-c:s:{subtitles}', encoder]
            subtitles += 1
        elif kind == 'video' and _is_cover(stream) and codec in _COVERS and suffix in ('.mp4', '.m4v'):
            covers += 1
            options += ['-map', place, f'-c:v:{covers}', 'copy', f'-disposition:v:{covers}', 'attached_pic']
        elif kind == 'video' and _is_cover(stream) and codec in _COVERS and suffix == '.mkv':
            ending, mime = _COVERS[codec]
            file = folder / f'cover{attached}{ending}'
            subprocess.run(['ffmpeg', '-v', 'quiet', '-nostdin', '-i', f'file:{found.path}', '-map',
                            f'0:{stream["index"]}', '-frames:v', '1', '-c', 'copy', '-f', 'image2', '-update', '1',
                            f'file:{file}'])
            options += ['-attach', f'file:{file}', f'-metadata:s:t:{attached}', f'mimetype={mime}',
                        f'-metadata:s:t:{attached}', f'filename=cover{ending}']
            attached += 1
        elif kind == 'attachment' and suffix == '.mkv':
            options += ['-map', place]
        elif not (kind == 'data' and stream.get('codec_tag_string') in _KEPT_DATA):
            name = 'a cover' if _is_cover(stream) else 'further pictures' if kind == 'video' else kind or 'a stream'
            left_out.append(name if codec == 'unknown' else f'{name} ({codec})')
    return options, left_out


def _subtitle_encoder(codec: str, suffix: str) -> str | None:
    """How subtitles of a kind come into a container; None if they do not."""
    if codec in _SAME_TEXT.get(suffix, ()) or suffix == '.mkv' and codec not in _TEXT:
        return 'copy'
    return _TEXT_IN.get(suffix) if codec in _TEXT else None


def _tags(found: Probe) -> list[str]:
    """The title and language of the pictures, and the timecode they begin with."""
    tags = {name.lower(): value for name, value in found.stream.get('tags', {}).items()}
    for stream in found.others:
        if 'timecode' in stream.get('tags', {}):
            tags.setdefault('timecode', stream['tags']['timecode'])
    return [word for name in ('title', 'language', 'timecode') if name in tags
            for word in ('-metadata:s:v:0', f'{name}={tags[name]}')]


def _has_chapters(found: Probe) -> bool:
    return bool(_ffprobe('-show_chapters', f'file:{found.path}')[0].get('chapters'))


def _is_cover(stream: dict) -> bool:
    return bool(stream.get('disposition', {}).get('attached_pic'))


def _ffprobe(*options: str) -> tuple[dict, str]:
    """What ffprobe finds, empty where it fails, and the last line it says."""
    done = subprocess.run(['ffprobe', '-v', 'error', '-of', 'json', *options], capture_output=True, text=True,
                          encoding='utf-8', errors='replace', stdin=subprocess.DEVNULL)
    try:
        return json.loads(done.stdout or '{}'), last_line(done.stderr)
    except ValueError:
        return {}, last_line(done.stderr)


def last_line(text: str) -> str:
    """The last line of what a program said, shortened."""
    lines = text.strip().splitlines()
    return lines[-1][:160] if lines else 'it says nothing'
