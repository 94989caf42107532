"""Known weights: fetched once from whoever publishes them, whole and checked or not there; a local server stands in."""
import ctypes
import dataclasses
import hashlib
import http.server
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from elan_basicsr.archs.elan_arch import ELAN
from elan_basicsr.cli import main
from elan_basicsr.config.options import load_options
from elan_basicsr.data.resize import imresize
from elan_basicsr.errors import UserError
from elan_basicsr.interop import weights
from elan_basicsr.interop.networks import load_network, load_option_file
from elan_basicsr.report.subjects import Subject
from tests.conftest import with_checkout

NAME = 'tiny-x4'


class Server(http.server.ThreadingHTTPServer):
    """Sends `content`, or what `send` sends of the `length` announced; counts how often it was asked."""
    content = b''
    length = None
    asked = 0
    send = None

    def __init__(self):
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.asked += 1
                self.send_response(200)
                self.send_header('Content-Length', str(server.length or len(server.content)))
                self.end_headers()
                (server.send or self.wfile.write)(*([self] if server.send else [server.content]))

            def log_message(self, *args):
                pass

        super().__init__(('127.0.0.1', 0), Handler)


@pytest.fixture(scope='module')
def content(tmp_path_factory) -> bytes:
    """The file of an ELAN x4 that takes a moment."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('made') / 'tiny.pth'
    net = ELAN(upscale=4, num_feat=15, num_block=2, num_share=1)
    torch.save({'params': net.state_dict()}, path)
    return path.read_bytes()


@pytest.fixture
def server(content, monkeypatch, tmp_path):
    """The table holds one entry, at a server of this machine; the cache is a folder that is not there yet."""
    server = Server()
    server.content = content
    threading.Thread(target=server.serve_forever, daemon=True).start()
    known = dataclasses.replace(
        weights.KNOWN['ELAN-light-x4'], name=NAME, url=f'http://127.0.0.1:{server.server_port}/commit/tiny.pth',
        size=len(content), sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(weights, 'KNOWN', {NAME: known})
    monkeypatch.setenv('ELAN_WEIGHTS', str(tmp_path / 'cache'))
    monkeypatch.chdir(tmp_path)
    cv2.imwrite('photo.png', np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8))
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def stored(server, tmp_path) -> Path:
    return tmp_path / 'cache' / 'tiny-x4.pth'


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob('**/*'))


def one_line(capsys, *words: str) -> str:
    """What a command that fails says, which is a line beside the one that names what is fetched."""
    assert main([*words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith('basicsr: fetching')]
    assert len(lines) == 1, lines
    return lines[0]


def in_process(table: dict, words: list[str], **more) -> subprocess.Popen:
    """The command in a process of its own, with this table."""
    code = (f'import importlib.util, sys\n'
            f'spec = importlib.util.find_spec("elan_basicsr")\n'
            f'sys.modules["elan_basicsr"] = importlib.util.module_from_spec(spec)  # as the console script does\n'
            f'from elan_basicsr.interop import weights\n'
            f'weights.KNOWN = {{name: weights.Weights(**values) for name, values in {table!r}.items()}}\n'
            f'from elan_basicsr.cli import main\nsys.exit(main({words!r}))')
    return subprocess.Popen([sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': with_checkout()}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def table() -> dict:
    return {name: vars(known) for name, known in weights.KNOWN.items()}


# ------------------------------------------------------------------------------------------------------- as it should

def test_a_photograph_is_all_it_takes_and_the_second_time_no_network(server, stored, capsys):
    assert main(['upscale', 'photo.png', '-o', 'out', '--device', 'cpu']) == 0
    said = capsys.readouterr().err
    assert said.count('fetching') == 1 and 'Fried Rice Lab' in said and 'MIT' in said and NAME in said
    assert cv2.imread('out/photo.png').shape == (36, 48, 3)
    assert stored.read_bytes() == server.content and files(stored.parent) == [stored.name]
    assert stored.stat().st_mode & 0o444 == 0o444
    server.shutdown()
    server.server_close()
    assert main(['upscale', 'photo.png', '-o', 'again', '--device', 'cpu']) == 0
    assert 'fetching' not in capsys.readouterr().err and server.asked == 1
    assert Path('again/photo.png').read_bytes() == Path('out/photo.png').read_bytes()


@pytest.mark.parametrize('scale, ratio', [('2', (1, 2)), ('3', (3, 4)), ('4', None), ('2.5', (5, 8))])
def test_a_scale_without_weights_is_x4_and_the_bicubic_of_its_result(scale, ratio, server):
    from fractions import Fraction
    assert main(['upscale', 'photo.png', '-o', 'whole.png', '--device', 'cpu']) == 0
    assert main(['upscale', 'photo.png', '-o', 'scaled.png', '--scale', scale, '--device', 'cpu']) == 0
    expected = cv2.imread('whole.png')
    if ratio:
        expected = imresize(expected, Fraction(*ratio))
    assert np.array_equal(cv2.imread('scaled.png'), expected)


def test_of_several_the_smallest_scale_that_suffices_is_taken(server, monkeypatch):
    known = weights.KNOWN[NAME]
    monkeypatch.setattr(weights, 'KNOWN', {name: dataclasses.replace(known, name=name, scale=scale)
                                           for name, scale in (('a-x4', 4), ('b-x2', 2), ('c-x3', 3), ('d-x2', 2))})
    assert [weights.fitting(scale) for scale in (0.5, 2, 2.5, 3, 4)] == ['b-x2', 'b-x2', 'c-x3', 'c-x3', 'a-x4']


@pytest.mark.parametrize('scale', ['0', '-1', 'nan', 'inf', '4.5'])
def test_a_scale_out_of_reach_fetches_nothing(scale, server, capsys):
    assert '--scale' in one_line(capsys, 'upscale', 'photo.png', '-o', 'out', f'--scale={scale}')
    assert server.asked == 0


def test_what_cannot_be_done_anyway_fetches_nothing(server, capsys):
    assert 'gone.png' in one_line(capsys, 'upscale', 'gone.png', '-o', 'out')
    assert one_line(capsys, 'convert', NAME, 'no/folder.pth') and one_line(capsys, 'export', NAME, 'x.pth')
    assert server.asked == 0


def test_a_name_stands_wherever_a_command_takes_a_file(server, options, data, tmp_path):
    """upscale, compare, explain and export read through `load_network`; the others have their own way to a file."""
    import yaml
    assert load_network(NAME).scale == Subject(NAME, 4).build().upscale == 4
    assert main(['convert', NAME, 'converted.safetensors']) == 0
    assert main(['compare', NAME, f'other={NAME}', 'bicubic', '--data', str(data / 'test' / 'GT'), '-o', 'report',
                 '--device', 'cpu']) == 0
    options.update(scale=4, network_g={**options['network_g'], 'upscale': 4}, path={'pretrain_network_g': NAME})
    for dataset in options['datasets'].values():
        dataset['scale'] = 4
    Path('o.yml').write_text(yaml.safe_dump(options))
    assert load_option_file('o.yml').scale == 4
    assert load_options('o.yml', is_train=True)['path']['pretrain_network_g'] == str(tmp_path / 'cache' / 'tiny-x4.pth')
    assert server.asked == 1


def test_a_file_comes_before_a_name(server, content, tmp_path):
    Path(NAME).write_bytes(content)
    assert weights.local_file(NAME) == Path(NAME) and server.asked == 0


def test_a_folder_of_that_name_hides_nothing(server, stored):
    Path(NAME).mkdir()
    assert weights.local_file(NAME) == stored


@pytest.mark.parametrize('words', [
    ['upscale', 'photo.png', '-o', 'out', '--weights', 'tiny-X4'], ['compare', 'tiny-X4', '--data', '.'],
    ['convert', 'tiny-X4', 'a.pth'], ['weights', 'get', 'tiny-X4'],
])
def test_a_word_that_is_neither_file_nor_name_is_answered_with_the_nearest(words, server, capsys):
    line = one_line(capsys, *words)
    assert 'tiny-X4' in line and NAME in line and '`basicsr weights`' in line
    assert 'no such file' in line or words[0] == 'weights'


def test_so_it_is_in_an_option_file(server, options):
    import yaml
    options['path']['pretrain_network_g'] = 'tiny-X4'
    Path('o.yml').write_text(yaml.safe_dump(options))
    with pytest.raises(UserError, match=f'tiny-X4: no such file, expected a checkpoint, or a name .* such as {NAME}'):
        load_options('o.yml', is_train=True)


def test_the_list_says_what_is_there(server, stored, capsys):
    def listed() -> str:
        assert main(['weights']) == 0
        return capsys.readouterr().out

    assert 'not there' in listed() and server.asked == 0 and not stored.parent.exists()
    assert main(['weights', 'get', NAME]) == 0
    assert capsys.readouterr().out == f'{stored}\n'
    assert f'{stored}: there\n' in listed() and 'MIT, Copyright (c) 2022 Fried Rice Lab' in listed()
    stored.write_bytes(b'no weights')
    assert f'{stored}: has 10 bytes, expected' in listed()


def test_get_to_a_folder_takes_it_from_where_it_is(server, stored, capsys):
    assert main(['weights', 'get', NAME, '--to', 'first']) == 0 and not stored.exists()
    assert capsys.readouterr().out == f'{Path("first", stored.name).absolute()}\n'
    assert main(['weights', 'get', NAME]) == 0 and server.asked == 2
    assert main(['weights', 'get', NAME, '--to', 'second']) == 0 and server.asked == 2
    assert Path('second', stored.name).read_bytes() == server.content


def test_the_users_cache_is_the_place_where_no_variable_says_another(monkeypatch, tmp_path):
    monkeypatch.delenv('ELAN_WEIGHTS', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert weights.cache_folder() == tmp_path / 'elan-basicsr' / 'weights'


def test_the_table_is_complete():
    for name, known in weights.KNOWN.items():
        assert known.name == name and re.fullmatch('[0-9a-f]{64}', known.sha256) and known.figures
        assert re.search('/[0-9a-f]{40}/', known.url) and known.url.startswith('https://')
        assert known.licence and known.holder and known.origin and 0 < known.size < 10**9


def test_the_first_entry_is_the_file_that_was_measured(shared):
    known = weights.KNOWN['ELAN-light-x4']
    assert weights._wrong(shared / 'trained' / 'frl_light_x4.pth', known) is None


# ------------------------------------------------------------------------------------------------------ what goes wrong

def half_and_close(handler) -> None:
    handler.wfile.write(handler.server.content[:10_000])
    handler.close_connection = True


def test_a_connection_that_drops_once_is_tried_again(server, stored):
    def once(handler) -> None:
        server.send = None
        half_and_close(handler)

    server.send = once
    assert weights.get(NAME) == stored and server.asked == 2
    assert stored.read_bytes() == server.content and files(stored.parent) == [stored.name]


def broken(server: Server) -> str:
    server.send = half_and_close
    return 'connection broke'


def other_content(server: Server) -> str:
    server.content = server.content[:-1] + b'x'
    return 'sha256|SHA256'


def too_much(server: Server) -> str:
    server.content += b'x' * 100_000
    return 'sends more than'


def too_little(server: Server) -> str:
    server.content = server.content[:-1]
    return 'connection broke'


def nothing(server: Server) -> str:
    server.shutdown()
    server.server_close()
    return 'refused'


def not_found(server: Server) -> str:
    server.RequestHandlerClass.do_GET = lambda self: self.send_error(404)
    return '404'


@pytest.mark.parametrize('fault', [broken, other_content, too_much, too_little, nothing, not_found])
def test_what_does_not_arrive_whole_leaves_nothing_and_is_one_line(fault, server, stored, capsys):
    expected = fault(server)
    line = one_line(capsys, 'upscale', 'photo.png', '-o', 'out')
    assert re.search(expected, line) and files(stored.parent) == [] and not Path('out').exists()
    if fault is not too_much:
        assert weights.KNOWN[NAME].url in line and line.endswith(f'put it at {stored}')
        stored.write_bytes(weights.KNOWN[NAME].name.encode())  # by hand, and the wrong one
        assert re.search('bytes, expected .* remove it', one_line(capsys, 'upscale', 'photo.png', '-o', 'out'))


def test_more_than_expected_is_not_waited_for(server, stored):
    """A server that sends without end is left as soon as the size is passed."""
    sent = []

    def endless(handler) -> None:
        while len(sent) < 1000:
            handler.wfile.write(b'x' * 1_000_000)
            sent.append(1)

    server.length, server.send = 10**9, endless
    with pytest.raises(UserError, match='sends more than'):
        weights.get(NAME)
    assert len(sent) < 20 and server.asked == 1


def test_a_file_put_there_by_hand_is_taken_when_it_is_the_one(server, stored, content, capsys):
    stored.parent.mkdir()
    stored.write_bytes(content)
    assert main(['upscale', 'photo.png', '-o', 'out', '--device', 'cpu']) == 0 and server.asked == 0
    stored.write_bytes(content[:-1] + b'x')
    line = one_line(capsys, 'upscale', 'photo.png', '-o', 'other')
    assert str(stored) in line and 'sha256' in line and server.asked == 0 and stored.read_bytes()[-1:] == b'x'


def test_no_space_leaves_nothing(server, stored, capsys):
    """A limit on the size of files fails where a full disk does, in write()."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        line = one_line(capsys, 'upscale', 'photo.png', '-o', 'out')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert 'cannot be written: File too large' in line and 'ELAN_WEIGHTS' in line and files(stored.parent) == []


def test_a_folder_that_cannot_be_written_is_named(server, stored):
    stored.parent.mkdir()
    stored.parent.chmod(0o555)

    def as_others_are() -> None:  # root writes everywhere, unless its process has lost CAP_DAC_OVERRIDE
        ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)

    check = subprocess.run([sys.executable, '-c', f'import os; print(os.access({str(stored.parent)!r}, os.W_OK))'],
                           preexec_fn=as_others_are, capture_output=True, text=True)
    if check.stdout != 'False\n':
        pytest.skip('this process may write everywhere, and cannot give that up')
    process = in_process(table(), ['weights', 'get', NAME], preexec_fn=as_others_are)
    error = process.communicate(timeout=120)[1].splitlines()
    assert process.returncode == 2 and len(error) == 2 and error[0].startswith('basicsr: fetching')
    assert f'{stored}: cannot be written: Permission denied' in error[1] and 'ELAN_WEIGHTS' in error[1]


def test_processes_that_fetch_at_once_do_not_disturb_each_other(server, stored):
    together = threading.Barrier(2, timeout=60)

    def slowly(handler) -> None:
        together.wait()
        for start in range(0, len(server.content), 10_000):
            handler.wfile.write(server.content[start:start + 10_000])
            time.sleep(0.01)

    server.send = slowly
    processes = [in_process(table(), ['weights', 'get', NAME]) for _ in range(2)]
    for process in processes:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0 and out == f'{stored}\n', error
    assert server.asked == 2 and stored.read_bytes() == server.content and files(stored.parent) == [stored.name]


@pytest.fixture
def interruptible():
    """Whatever started the tests: a shell starts what runs in its background with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_leaves_nothing(server, stored, capsys, interruptible):
    def interrupt(handler) -> None:
        handler.wfile.write(server.content[:10_000])
        handler.wfile.flush()
        while not files(stored.parent):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)

    server.send = interrupt
    assert main(['weights', 'get', NAME]) == 130
    assert capsys.readouterr().err.endswith('basicsr: interrupted\n') and files(stored.parent) == []
