"""DIV2K from archives of the official names and layout, in miniature, over a web server that misbehaves."""
import hashlib
import http.server
import io
import os
import threading
import zipfile
from fractions import Fraction

import cv2
import numpy as np
import pytest

from elan_basicsr.cli import main
from elan_basicsr.data import div2k, raw_lmdb
from elan_basicsr.data.resize import imresize
from elan_basicsr.errors import UserError

NUMBERS = {'train': range(1, 5), 'valid': range(801, 803)}


def image(number):
    noise = np.random.default_rng(number).integers(0, 256, (12, 18, 3), np.uint8)
    return cv2.resize(noise, (72, 48), interpolation=cv2.INTER_CUBIC)


def stored(transaction, key):
    """The BGR image under a key of a raw LMDB."""
    return raw_lmdb.to_bgr(raw_lmdb.decode(transaction.get(key.encode())))


def archive(folder, names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as file:
        for name, img in names.items():
            file.writestr(f'{folder}/{name}.png', cv2.imencode('.png', img)[1].tobytes())
    return buffer.getvalue()


@pytest.fixture(scope='module')
def archives():
    """The bytes of each archive by its name."""
    made = {}
    for split, numbers in NUMBERS.items():
        made[f'DIV2K_{split}_HR.zip'] = archive(f'DIV2K_{split}_HR', {f'{n:04d}': image(n) for n in numbers})
        for scale in (2, 4):
            made[f'DIV2K_{split}_LR_bicubic_X{scale}.zip'] = archive(
                f'DIV2K_{split}_LR_bicubic/X{scale}',
                {f'{n:04d}x{scale}': imresize(image(n), Fraction(1, scale)) for n in numbers})
    return made


@pytest.fixture
def server(archives, monkeypatch):
    """Serves the archives; the first answer for each breaks off in the middle. Yields URL and the ranges asked for."""
    monkeypatch.setattr(div2k, 'SPLITS', NUMBERS)
    checksums = {name: hashlib.md5(data).hexdigest() for name, data in archives.items()}
    monkeypatch.setattr(div2k, 'MD5', {**div2k.MD5, **checksums})
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rsplit('/', 1)[1]
            data = archives.get(name)
            if data is None:
                self.send_error(404)
                return
            start = int(self.headers.get('Range', 'bytes=0-')[6:-1])
            first = not any(name == other for other, _ in asked)
            asked.append((name, start))
            self.send_response(206 if start else 200)
            self.send_header('Content-Length', str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start:len(data) // 2 if first else None])

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}/', asked
    httpd.shutdown()
    httpd.server_close()


def test_dropped_connections_are_resumed_and_everything_is_built(server, archives, tmp_path, capsys):
    url, asked = server
    command = ['data', 'div2k', '--root', str(tmp_path), '--download', '--url', url, '--scales', '2', '4']
    assert main(command) == 0
    for name, data in archives.items():
        assert (name, len(data) // 2) in asked  # went on where it had stopped
        assert (tmp_path / name).read_bytes() == data
    printed = capsys.readouterr().out
    assert 'DIV2K_train_LR_bicubic_X4_raw.lmdb: 0 bytes of 4 LR images differ from our bicubic' in printed
    assert raw_lmdb.read_keys(tmp_path / 'DIV2K_train_HR_raw.lmdb') == ['0001', '0002', '0003', '0004']
    number = len(asked)
    assert main(command) == 0
    assert len(asked) == number  # nothing is fetched twice
    assert main(['data', 'verify', str(tmp_path / 'DIV2K_train_HR_raw.lmdb')]) == 0


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_a_full_disk_is_not_called_a_broken_connection(server, archives, tmp_path):
    (tmp_path / 'DIV2K_train_HR.zip.part').symlink_to('/dev/full')
    with pytest.raises(UserError, match=r'DIV2K_train_HR\.zip\.part: cannot be written \(No space left on device\)'):
        div2k.prepare_div2k(root=tmp_path, scales=[2], fetch=True, url=server[0])
    assert len(server[1]) == 1  # and not tried again


def test_a_damaged_archive_is_refused_and_kept(server, archives, tmp_path):
    data = bytearray(archives['DIV2K_train_HR.zip'])
    data[100] ^= 255
    (tmp_path / 'DIV2K_train_HR.zip').write_bytes(data)
    for fetch in (False, True):
        with pytest.raises(UserError, match=r'DIV2K_train_HR\.zip: its MD5 is .* damaged'):
            div2k.prepare_div2k(root=tmp_path, scales=[2], fetch=fetch, url=server[0])
    assert (tmp_path / 'DIV2K_train_HR.zip').read_bytes() == data
    assert not (tmp_path / 'DIV2K_train_HR').exists()


def test_hr_alone_is_enough(server, archives, tmp_path):
    for split in NUMBERS:
        (tmp_path / f'DIV2K_{split}_HR.zip').write_bytes(archives[f'DIV2K_{split}_HR.zip'])
    paths = div2k.prepare_div2k(root=tmp_path, scales=[3])
    with raw_lmdb.open_readonly(paths[1]).begin(buffers=True) as transaction:
        assert np.array_equal(stored(transaction, '0003'), imresize(image(3), Fraction(1, 3)))


@pytest.mark.parametrize('arguments, expected', [
    (dict(), 'not there'), (dict(scales=[5]), '--scales 5'),
    (dict(fetch=True, url='http://127.0.0.1:9/'), 'connection'),
])
def test_what_is_missing_is_named(arguments, expected, server, tmp_path):
    with pytest.raises(UserError, match=expected) as caught:
        div2k.prepare_div2k(root=tmp_path, **arguments)
    assert '\n' not in str(caught.value)


def test_missing_images_are_named(server, archives, tmp_path):
    for split in NUMBERS:
        (tmp_path / f'DIV2K_{split}_HR.zip').write_bytes(archives[f'DIV2K_{split}_HR.zip'])
    div2k.prepare_div2k(root=tmp_path, scales=[2])
    (tmp_path / 'DIV2K_train_HR' / '0002.png').unlink()
    with pytest.raises(UserError, match=r'1 images are missing, the first: 0002'):
        div2k.prepare_div2k(root=tmp_path, scales=[2])
