"""No file that a run reads through the toolbox runs code, or takes the memory that it claims."""
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from elan_basicsr.config.reader import read_yaml
from elan_basicsr.errors import UserError

from .conftest import with_checkout
from .fuzz import CODE, Payload
from basicsr.utils import FileClient, imfrombytes


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path(CODE).exists(), 'code was run'


def load_discriminator(path):
    from basicsr.models.base_model import BaseModel
    model = BaseModel({'num_gpu': 0, 'is_train': False})
    model.load_network(torch.nn.Conv2d(1, 1, 1), path)


def load_spynet(path):
    from basicsr.archs.spynet_arch import SpyNet
    SpyNet(load_path=path)


def load_vgg(path):
    from basicsr.archs import vgg_arch
    Path(vgg_arch.VGG_PRETRAIN_PATH).parent.mkdir(parents=True)
    os.rename(path, vgg_arch.VGG_PRETRAIN_PATH)
    vgg_arch.VGGFeatureExtractor(['relu1_1'])


def load_resume_state(path):
    import basicsr.train
    basicsr.train.load_resume_state({'path': {'resume_state': path}})


@pytest.mark.parametrize('load', [load_discriminator, load_spynet, load_vgg, load_resume_state])
def test_the_toolbox_unpickles_nothing_but_tensors(load, monkeypatch):
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    torch.save({'params': Payload(), 'iter': 1}, 'x.pth')
    with pytest.raises(UserError, match=r'holds Python objects beside tensors \(_?io\.open\)'):
        load('x.pth')


def test_the_toolbox_reads_what_is_sound():
    net = torch.nn.Conv2d(1, 1, 1)
    torch.save({'params': net.state_dict()}, 'x.pth')
    load_discriminator('x.pth')


def test_an_option_file_names_no_folder_of_code():
    Path('mc.py').write_text(f"open('{CODE}', 'w')")
    with pytest.raises(ValueError, match='io_backend.sys_path would run the code of a folder'):
        FileClient('memcached', server_list_cfg='a', client_cfg='b', sys_path=os.getcwd())
    assert os.getcwd() not in sys.path


@pytest.mark.parametrize('override, message', [
    ('datasets.train.io_backend.sys_path=/x', 'sys_path: is .*expected nothing, for the Python code'),
    ('val.suffix=../../x', 'suffix: is .*expected a text without /')])
def test_an_option_file_that_reaches_for_more_is_refused(override, message):
    from elan_basicsr.config.options import load_options
    file = Path(__file__).parents[1] / 'options/train_ELAN_light_x4.yml'
    with pytest.raises(UserError, match=message):
        load_options(file, is_train=True, overrides=[override])


def test_a_yaml_tag_runs_nothing_in_our_reader_or_the_toolboxs():
    Path('x.yml').write_text(f'name: !!python/object/apply:builtins.open [{CODE}, w]\n')
    with pytest.raises(UserError, match='x.yml:1: the tag'):
        read_yaml('x.yml')
    import yaml

    from basicsr.utils.options import ordered_yaml
    with pytest.raises(yaml.YAMLError), open('x.yml') as file:
        yaml.load(file, Loader=ordered_yaml()[0])


def png(width: int, height: int) -> bytes:
    """The beginning of a PNG of that size, with one line of it."""
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack('>I', len(content)) + name + content + struct.pack('>I', zlib.crc32(name + content))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)) + chunk(
        b'IDAT', zlib.compress(bytes(3 * width + 1))) + chunk(b'IEND', b'')


LARGE = '''
import os, sys
from pathlib import Path
import elan_basicsr
from elan_basicsr.data.images import read_bgr
from elan_basicsr.data.verify import verify_path
from elan_basicsr.errors import UserError
from basicsr.utils import imfrombytes
def peak():
    return int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0]) >> 10
before = peak()
for read, kind in ((lambda: read_bgr('images/x.png'), UserError),
                   (lambda: imfrombytes(Path('images/x.png').read_bytes(), float32=True), ValueError)):
    try:
        read()
        sys.exit('was read')
    except kind as error:
        assert 'OPENCV_IO_MAX_IMAGE_PIXELS' in str(error), error
assert 'OPENCV_IO_MAX_IMAGE_PIXELS' in verify_path('images').problems[0]
print(peak() - before)
'''


def test_an_image_that_claims_much_is_refused_before_memory_is_taken():
    Path('images').mkdir()
    Path('images/x.png').write_bytes(png(30_000, 30_000))
    environment = {key: value for key, value in os.environ.items() if key != 'OPENCV_IO_MAX_IMAGE_PIXELS'}
    environment.update(PYTHONPATH=with_checkout(), OMP_NUM_THREADS='1')
    done = subprocess.run([sys.executable, '-c', LARGE], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) < 50


def test_what_is_no_image_is_named_in_a_line():
    with pytest.raises(ValueError, match='an image of 4 bytes cannot be decoded'):
        imfrombytes(b'text', float32=True)
    import cv2
    img = np.full((2, 2, 3), 7, np.uint8)
    assert (imfrombytes(cv2.imencode('.png', img)[1].tobytes()) == img).all()
