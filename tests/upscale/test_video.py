"""Videos: every frame through the network; colours, sound and whatever else the file carries as they were, or told."""
import json
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from elan_basicsr.cli import main
from elan_basicsr.errors import UserError
from elan_basicsr.upscale import video
from tests.upscale.conftest import WEIGHTS

needs_ffmpeg = pytest.mark.skipif(shutil.which('ffmpeg') is None or shutil.which('ffprobe') is None,
                                  reason='needs ffmpeg, which is not installed')


def ffmpeg(*words):
    done = subprocess.run(['ffmpeg', '-v', 'error', '-y', *map(str, words)], capture_output=True, text=True)
    if 'Unknown encoder' in done.stderr or 'No such filter' in done.stderr:
        pytest.skip(f'ffmpeg was built without something: {done.stderr.splitlines()[-1]}')
    assert done.returncode == 0, done.stderr


def film(name, *options, rate=10):
    ffmpeg('-f', 'lavfi', '-i', f'testsrc=size=32x18:rate={rate}:duration=0.5', '-f', 'lavfi', '-i',
           'sine=duration=0.5', *options, '-pix_fmt', 'yuv420p', name)


def silent_film(name, *options, size='64x48', seconds=0.2):
    ffmpeg('-f', 'lavfi', '-i', f'testsrc=size={size}:rate=25:duration={seconds}', *options, name)


def told(name, *words):
    """What ffprobe tells of a file."""
    return json.loads(subprocess.run(['ffprobe', '-v', 'error', '-of', 'json', *words, str(name)], check=True,
                                     capture_output=True).stdout)


def streams(name):
    return told(name, '-show_streams')['streams']


def sound(name, which='a'):
    return subprocess.run(['ffmpeg', '-v', 'error', '-i', name, '-map', f'0:{which}', '-c', 'copy', '-f', 'md5', '-'],
                          check=True, capture_output=True).stdout


class Doubling:
    """In the place of a network, where colours are looked at: every pixel four times."""

    def __init__(self):
        self.lines, self.types = [], set()
        self.say = self.lines.append

    def pixels(self, frame, dtype, advance):
        self.types.add((frame.dtype.type, dtype))
        return frame.repeat(2, 0).repeat(2, 1)


def doubled(source, target):
    """Enlarge a film by repeating pixels; returns what was said."""
    enlarger = Doubling()
    assert video.enlarge(Path(source), Path(target), enlarger, 10**6, lambda n: None)
    assert all(frame is dtype for frame, dtype in enlarger.types)
    return enlarger.lines


def frames(name):
    """All frames, (N, H, W, 3) RGB of 16 bit, as players show them."""
    stream = streams(name)[0]
    raw = subprocess.run(['ffmpeg', '-v', 'error', '-i', str(name), '-map', '0:V:0', '-vf',
                          'scale=flags=bicubic+accurate_rnd+full_chroma_int', '-f', 'rawvideo', '-pix_fmt', 'rgb48le',
                          '-'], check=True, capture_output=True).stdout
    return np.frombuffer(raw, '<u2').reshape(-1, stream['height'], stream['width'], 3)


@needs_ffmpeg
@pytest.mark.parametrize('name', ['a b.mp4', 'ä.mkv'])
def test_frames_grow_and_sound_stays(run, name):
    film(name)
    code, out, err = run(name, '-o', 'out')
    assert (code, err) == (0, '') and '1 of 1 done' in out
    before, after = video.probe(Path(name)), video.probe(Path('out', name))
    assert (after.width, after.height, after.rate) == (64, 36, before.rate)
    assert len(frames(f'out/{name}')) == 5 and sound(name) == sound(f'out/{name}')
    assert '1 already there' in run(name, '-o', 'out')[1]


@needs_ffmpeg
def test_odd_sizes_come_back_with_their_edges_doubled(tmp_path):
    """What goes through the encoder and back is the same picture."""
    film(tmp_path / 'a.mp4')
    pixels = np.zeros((35, 61, 3), np.uint8)
    pixels[..., 0], pixels[:17, :, 1], pixels[:, 30:, 2] = 200, 150, 90

    class Fixed:
        def pixels(self, frame, dtype, advance):
            return pixels

    assert video.enlarge(tmp_path / 'a.mp4', tmp_path / 'b.mp4', Fixed(), 10**6, lambda n: None) == 5 * 36 * 62
    frame = frames(tmp_path / 'b.mp4')[0] / 257
    assert frame.shape == (36, 62, 3) and np.abs(frame[:35, :61] - pixels).mean() < 4


@needs_ffmpeg
def test_hdr_stays_hdr(run, shared):
    """The report's film: 10 bits of PQ in BT.2020 go through the network as 16 and come out as 10, labelled alike."""
    code, _, err = run(str(shared / 'reports' / 'hdr.mkv'), '-o', 'hdr.mkv')
    assert (code, err) == (0, '')
    before, after = streams(shared / 'reports' / 'hdr.mkv')[0], streams('hdr.mkv')[0]
    for key in ('codec_name', 'pix_fmt', 'color_space', 'color_transfer', 'color_primaries', 'color_range'):
        assert after[key] == before[key]
    assert (after['width'], after['height']) == (2 * before['width'], 2 * before['height'])


LABELS = {
    'pq': ('libx265', 'yuv420p10le', 'bt2020nc', 'bt2020', 'smpte2084', 'tv'),
    'hlg': ('libx265', 'yuv420p10le', 'bt2020nc', 'bt2020', 'arib-std-b67', 'tv'),
    'hd': ('libx264', 'yuv420p', 'bt709', 'bt709', 'bt709', 'tv'),
    'pal': ('libx264', 'yuv420p', 'bt470bg', 'bt470bg', 'gamma28', 'tv'),
    'telephone': ('libx264', 'yuvj420p', 'smpte170m', 'smpte170m', 'smpte170m', 'pc'),
    'unlabelled': ('libx264', 'yuv420p', None, None, None, 'tv'),
}


@needs_ffmpeg
@pytest.mark.parametrize('name, suffix', [*((name, '.mkv') for name in LABELS), ('pq', '.mp4'), ('pq', '.webm'),
                                          ('unlabelled', '.mp4'), ('telephone', '.webm'), ('hd', '.avi')])
def test_colours_stay_what_they_were_under_the_labels_they_had(name, suffix, tmp_path):
    codec, form, *labels, range_ = LABELS[name]
    source, target = tmp_path / f'{name}.mp4', tmp_path / f'new{suffix}'
    options = zip(('-colorspace', '-color_primaries', '-color_trc'), labels, strict=True)
    silent_film(source, '-c:v', codec, *(('-x265-params', 'log-level=error') if codec == 'libx265' else ()), '-pix_fmt',
                form, '-crf', 2, '-color_range', range_, *(word for pair in options if pair[1] for word in pair))
    assert doubled(source, target) == []
    before, after = streams(source)[0], streams(target)[0]
    for key in ('color_primaries', 'color_transfer'):
        assert after.get(key) == before.get(key)
    assert after['color_range'] == range_
    assert after['color_space'] == before.get('color_space', 'smpte170m')  # what players take small videos for
    assert after['pix_fmt'].replace('j', '') == form.replace('j', '')
    difference = frames(target)[:, ::2, ::2].astype(int) - frames(source)
    assert np.abs(difference).mean() < 257 * 6 and np.abs(difference.mean(axis=(0, 1, 2))).max() < 257


@needs_ffmpeg
def test_what_hdr10_says_of_the_screen_is_kept(tmp_path):
    screen = 'G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50)'
    silent_film(tmp_path / 'a.mkv', '-c:v', 'libx265', '-pix_fmt', 'yuv420p10le', '-color_trc', 'smpte2084',
                '-x265-params', f'log-level=error:master-display={screen}:max-cll=1000,400')
    assert doubled(tmp_path / 'a.mkv', tmp_path / 'b.mkv') == []
    before, after = (told(tmp_path / name, '-show_frames', '-read_intervals', '%+#1')['frames'][0]['side_data_list']
                     for name in ('a.mkv', 'b.mkv'))
    said = [each for each in before if 'red_x' in each or 'max_content' in each]
    assert len(said) == 2 and all(each in after for each in said)


@needs_ffmpeg
def test_hdr_that_the_output_cannot_hold_is_refused_with_what_to_do(run, shared):
    code, _, err = run(str(shared / 'reports' / 'hdr.mkv'), '-o', 'hdr.avi')
    assert code == 1 and err.count('\n') == 1 and not Path('hdr.avi').exists()
    assert 'is HDR (PQ), and .avi has no place for that' in err and 'tonemap' in err


def described(height=48, **stream):
    return video.Probe(Path('a b.mkv'), 64, height, Fraction(25), 1, stream=stream)


@pytest.mark.parametrize('stream, said', [
    ({'color_space': 'ictcp'}, 'is in the colour space ictcp'),
    ({'color_space': 'ycgco'}, 'is in the colour space ycgco'),
    ({'side_data_list': [{'dv_profile': 5}]}, 'is in Dolby Vision of profile 5')])
def test_colours_that_ffmpeg_would_misread_are_refused_with_what_to_do(stream, said):
    with pytest.raises(UserError) as refused:
        described(**stream).refuse_colours(Path('b.mkv'))
    assert said in str(refused.value) and "ffmpeg -i 'a b.mkv' -vf libplacebo=colorspace=bt709" in str(refused.value)


def test_colours_without_labels_are_what_players_take_them_for():
    assert [described(height).matrix for height in (576, 720)] == ['smpte170m', 'bt709']
    assert described(1080, color_space='bt470bg').matrix == 'bt470'


@needs_ffmpeg
def test_hdr_of_8_bits_and_the_layers_above_it_are_told_apart():
    hlg = described(color_transfer='arib-std-b67', pix_fmt='yuv420p')
    hlg.refuse_colours(Path('b.avi'))  # the labels are H.264's own
    assert '-color_trc' in hlg.labels() and not hlg.keeps_depth(Path('b.mkv'))
    layered = described(pix_fmt='yuv420p10le', side_data_list=[{'dv_profile': 8}])
    layered.refuse_colours(Path('b.mkv'))
    assert layered.depth == 10 and any('Dolby Vision' in line for line in layered.changes(Path('b.mkv')))


@pytest.mark.parametrize('form, depth', [('yuv420p', 8), ('yuv420p10le', 10), ('p010le', 10), ('rgb48be', 16),
                                         ('gbrp12le', 12), ('yuv444p9be', 9), ('nv12', 8), ('x2rgb10le', 10)])
def test_the_depth_is_read_from_the_form_of_the_pixels(form, depth):
    assert described(pix_fmt=form).depth == depth


@needs_ffmpeg
def test_the_advice_for_hdr_makes_a_film_that_is_read(tmp_path, shared):
    """The command that the message gives works."""
    source = tmp_path / 'hdr.mkv'
    shutil.copy(shared / 'reports' / 'hdr.mkv', source)
    with pytest.raises(UserError) as refused:
        doubled(source, tmp_path / 'hdr.avi')
    words = str(refused.value).partition('first: ffmpeg ')[2].split()
    ffmpeg(*words[:-1], tmp_path / words[-1])
    assert doubled(tmp_path / 'sdr.mkv', tmp_path / 'out.mkv') == []
    assert streams(tmp_path / 'out.mkv')[0]['color_transfer'] == 'bt709'


@needs_ffmpeg
@pytest.mark.parametrize('options, expected', [
    (['-c:v', 'prores_ks', '-pix_fmt', 'yuv422p10le'], ['4:2:2 becomes 4:2:0']),
    (['-c:v', 'ffv1', '-pix_fmt', 'gbrp'], ['RGB becomes 4:2:0']),
    (['-c:v', 'ffv1', '-pix_fmt', 'yuv444p12le'], ['12 bits become 10', '4:4:4 becomes 4:2:0']),
    (['-c:v', 'ffv1', '-pix_fmt', 'yuva420p'], ['its transparency is left out']),
    (['-c:v', 'libx264', '-pix_fmt', 'yuv420p', '-flags', '+ilme+ildct', '-x264opts', 'tff=1'],
     ['is interlaced and becomes progressive']),
    (['-c:v', 'libx264', '-vf', "select='not(mod(n,5))+lt(n,10)',format=yuv420p", '-vsync', 'vfr'],
     ['the frame rate varies and becomes a constant 25']),
], ids=['422', 'rgb', '12 bit', 'alpha', 'interlaced', 'variable rate'])
def test_what_changes_in_kind_is_said_once(options, expected, tmp_path):
    silent_film(tmp_path / 'a.mkv', *options, seconds=1)
    lines = doubled(tmp_path / 'a.mkv', tmp_path / 'b.mkv')
    assert len(lines) == 1 and all(words in lines[0] for words in expected), lines
    assert len(frames(tmp_path / 'b.mkv')) in (25, 24)


@needs_ffmpeg
@pytest.mark.parametrize('degrees, shape, aspect', [(0, (56, 72), '16:15'), (90, (72, 56), '15:16')])
def test_pictures_lie_and_stretch_as_players_show_them(degrees, shape, aspect, tmp_path):
    silent_film(tmp_path / 'plain.mp4', '-vf', 'setsar=16/15,format=yuv420p', size='36x28')
    ffmpeg('-i', tmp_path / 'plain.mp4', '-c', 'copy', '-metadata:s:v', f'rotate={degrees}', tmp_path / 'a.mp4')
    if degrees and 'side_data_list' not in streams(tmp_path / 'a.mp4')[0]:
        pytest.skip('this ffmpeg sets no rotation so')
    assert doubled(tmp_path / 'a.mp4', tmp_path / 'b.mp4') == []
    after = streams(tmp_path / 'b.mp4')[0]
    assert (after['height'], after['width']) == shape and after['sample_aspect_ratio'] == aspect
    assert not any(each.get('rotation') for each in after.get('side_data_list', []))


@pytest.fixture
def rich_film(tmp_path):
    """29.97 frames a second, two sound tracks of which one begins late, subtitles, chapters, a cover and a font."""
    (tmp_path / 'a.srt').write_text('1\n00:00:00,000 --> 00:00:00,300\nHello\n\n')
    (tmp_path / 'chapters').write_text(';FFMETADATA1\ntitle=A film\n[CHAPTER]\nTIMEBASE=1/1000\nSTART=0\nEND=200\n'
                                       'title=one\n[CHAPTER]\nTIMEBASE=1/1000\nSTART=200\nEND=500\ntitle=two\n')
    (tmp_path / 'a.ttf').write_bytes(b'a font')
    ffmpeg('-f', 'lavfi', '-i', 'testsrc=size=32x18', '-frames:v', '1', tmp_path / 'cover.jpg')
    film(tmp_path / 'rich.mkv', '-itsoffset', '0.25', '-f', 'lavfi', '-i', 'sine=f=880:duration=0.3', '-i',
         tmp_path / 'a.srt', '-i', tmp_path / 'chapters', '-map', '0', '-map', '1', '-map', '2', '-map', '3',
         '-map_metadata', '4', '-metadata:s:a:0', 'language=eng', '-metadata:s:v:0', 'title=Pictures', '-attach',
         tmp_path / 'cover.jpg', '-metadata:s:t:0', 'mimetype=image/jpeg', '-attach', tmp_path / 'a.ttf',
         '-metadata:s:t:1', 'mimetype=font/ttf', '-c:a', 'aac', rate='30000/1001')
    return tmp_path / 'rich.mkv'


KINDS = {
    '.mkv': (['h264', 'aac', 'aac', 'ass', 'attachment', 'cover'], ''),
    '.mp4': (['h264', 'aac', 'aac', 'mov_text', 'cover'], 'attachment'),
    '.m4v': (['h264', 'aac', 'aac', 'mov_text', 'cover'], 'attachment'),
    '.mov': (['h264', 'aac', 'aac', 'mov_text'], 'a cover (mjpeg), attachment'),
    '.avi': (['h264', 'aac', 'aac'], 'chapters, the late start of a sound track, subtitle (ass), a cover (mjpeg), '
                                     'attachment'),
}


@needs_ffmpeg
@pytest.mark.parametrize('suffix', KINDS)
def test_what_the_file_carries_is_kept_or_said_to_be_left_out(rich_film, suffix, tmp_path):
    target = tmp_path / f'new{suffix}'
    lines = doubled(rich_film, target)
    kinds, left_out = KINDS[suffix]
    found = [stream for stream in streams(target) if stream['codec_type'] != 'data']  # where MP4 has its chapters
    assert [('cover' if stream['disposition']['attached_pic'] else 'attachment' if stream['codec_type'] == 'attachment'
             else stream['codec_name']) for stream in found] == kinds
    assert lines == ([f'{rich_film}: left out, as {suffix} or ffmpeg cannot hold it: {left_out}'] if left_out else [])
    assert [sound(target, f'a:{n}') for n in (0, 1)] == [sound(rich_film, f'a:{n}') for n in (0, 1)]
    assert Fraction(found[0]['r_frame_rate']) == Fraction(30000, 1001)
    content = told(target, '-show_format', '-show_chapters')
    assert content['format']['tags']['title'] == 'A film'
    if suffix != '.avi':
        late = float(found[2]['start_time']) - float(found[0]['start_time'])
        assert late == pytest.approx(0.25, abs=0.05)
        assert [chapter['tags']['title'] for chapter in content['chapters']] == ['one', 'two']
        assert found[1]['tags']['language'] == 'eng'


@needs_ffmpeg
@pytest.mark.parametrize('suffix', ['.mp4', '.mkv'])
def test_an_mp4_with_a_cover_first_and_a_timecode_keeps_both(suffix, tmp_path):
    """The cover is a stream of pictures, too, and not the film."""
    film(tmp_path / 'plain.mp4', '-timecode', '10:00:00:00', rate=25)
    ffmpeg('-f', 'lavfi', '-i', 'testsrc=size=20x20', '-frames:v', '1', tmp_path / 'cover.png')
    ffmpeg('-i', tmp_path / 'cover.png', '-i', tmp_path / 'plain.mp4', '-map', '0', '-map', '1:v', '-map', '1:a', '-c',
           'copy', '-disposition:v:0', 'attached_pic', '-timecode', '10:00:00:00', tmp_path / 'a.mp4')
    assert doubled(tmp_path / 'a.mp4', tmp_path / f'b{suffix}') == []
    found = streams(tmp_path / f'b{suffix}')
    assert (found[0]['width'], found[0]['height']) == (64, 36)
    assert sum(stream['disposition']['attached_pic'] for stream in found) == 1
    assert {name.lower(): value for name, value in found[0]['tags'].items()}['timecode'] == '10:00:00:00'


@needs_ffmpeg
def test_sound_that_the_container_cannot_hold_is_one_line_with_what_to_do(run):
    film('a.mkv', '-c:a', 'pcm_s16le')
    code, _, err = run('a.mkv', '-o', 'a.webm')
    assert code == 1 and err.count('\n') == 1 and not Path('a.webm').exists()
    assert 'WebM' in err and 'name a .mkv' in err


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
