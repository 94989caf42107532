"""Checkpoints from strangers: read or refused in one line, nothing run, no memory taken for what they only claim.

`ELAN_FUZZ_CHECKPOINTS=1000 pytest tests/test_safe_read.py` tries that many mutated files; each runs in a process whose
address space and time are limited.
"""
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import zipfile
from collections import Counter, OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from elan_basicsr.archs.elan_arch import ELAN
from elan_basicsr.checkpoint import damage, load_elan, load_into, read_state_dict, read_training_state
from elan_basicsr.errors import UserError
from elan_basicsr.safe_read import read_torch

from .conftest import with_checkout
from .fuzz import CODE, mutate, write_originals

FILES = int(os.environ.get('ELAN_FUZZ_CHECKPOINTS', 150))
MEMORY = 400 << 20
"""What a hostile file may add to the size of the process at its peak, in bytes."""
SECONDS = 10
READERS = (read_state_dict, load_elan, read_training_state, damage)


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def peak_memory() -> int:
    """Of this process, in bytes; `ru_maxrss` would be that of the process it was started from, if that was larger."""
    status = Path('/proc/self/status').read_text()
    return int(status.partition('VmHWM:')[2].split()[0]) << 10


def read_every_way(path) -> list[str]:
    """Read a file with every reader; the messages of those that refuse it."""
    messages = []
    for reader in READERS:
        begin = time.monotonic()
        try:
            answer = reader(path)
            messages += [answer] if isinstance(answer, str) else []
        except UserError as error:
            messages.append(str(error))
        assert time.monotonic() - begin < SECONDS, f'{reader.__name__} took {time.monotonic() - begin:.0f} s'
    for message in messages:
        assert len(message.splitlines()) == 1 and message.isprintable() and len(message) <= 1001, message
    assert not Path(CODE).exists(), 'code was run'
    return messages


def fuzz(files: int) -> None:
    """Called in a process of its own."""
    import warnings
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    folder = Path('originals')
    folder.mkdir()
    originals = write_originals(folder)
    for path in folder.iterdir():  # what any reader needs once is not a file's doing
        read_every_way(path)
    before, refused, begin = peak_memory(), 0, time.monotonic()
    for seed in range(files):
        chance = random.Random(seed)
        name = chance.choice(list(originals))
        path = Path(f'mutated_{name}')
        path.write_bytes(mutate(originals[name], name, chance))
        try:
            refused += len(read_every_way(path)) == len(READERS)
        except BaseException as error:
            raise AssertionError(f'seed {seed}, {name}: {type(error).__name__}: {error}') from error
    grown = peak_memory() - before
    assert grown < MEMORY, f'memory grew by {grown >> 20} MiB'
    print(f'{files} mutated checkpoints and states: {refused} refused by every reader, 0 failures, '
          f'{time.monotonic() - begin:.0f} s, {grown >> 20} MiB above the {before >> 20} MiB of the libraries')


def in_process(code: str, limit: int = 8 << 30) -> str:
    """What `code` prints in a process of its own that may address `limit` bytes."""
    source = (f'import resource; resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))\n'
              f'from tests.test_safe_read import *\n{code}')
    environment = {**os.environ, 'PYTHONPATH': with_checkout(), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', source], env=environment, capture_output=True, text=True,
                          timeout=120 + FILES)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_mutated_checkpoints_are_read_or_refused(tmp_path):
    print(in_process(f'fuzz({FILES})'))


# ----------------------------------------------------------------------------------------------- what claims too much

def zip_of(pickled: bytes, storages: dict[str, bytes], kind=zipfile.ZIP_STORED) -> bytes:
    """A file as torch.save lays it out."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', kind) as archive:
        for name, content in {'data.pkl': pickled, 'byteorder': b'little', 'version': b'3\n'}.items():
            archive.writestr(f'a/{name}', content)
        for key, content in storages.items():
            archive.writestr(f'a/data/{key}', content)
    return out.getvalue()


class Claim:
    """Pickles as a tensor of a storage of `numel` floats."""

    def __init__(self, numel: int, sizes: tuple, strides: tuple, offset: int = 0):
        self.numel, self.view = numel, (offset, sizes, strides)

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (Stored(self.numel), *self.view, False, None)


class Stored:
    def __init__(self, numel: int):
        self.numel = numel


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return ('storage', torch.FloatStorage, '0', 'cpu', value.numel) if isinstance(value, Stored) else None


def pickled(value) -> bytes:
    out = io.BytesIO()
    Pickler(out, 2).dump(value)
    return out.getvalue()


def saved(content, **options) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, **options)
    return out.getvalue()


def laughing(levels: int):
    """A few lists that unfold to 10^levels."""
    value = []
    for _ in range(levels):
        value = [value] * 10
    return value


def nested(levels: int):
    value = []
    for _ in range(levels):
        value = [value]
    return value


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def elan(**changed) -> dict:
    return {**ELAN(upscale=2, num_feat=15, num_block=2).state_dict(), **changed}


ABSURD = {
    'a storage of terabytes': lambda: zip_of(pickled({'a': Claim(10**12, (10**12,), (1,))}), {'0': bytes(16)}),
    'a tensor beyond its storage': lambda: zip_of(pickled({'a': Claim(4, (10**12,), (1,))}), {'0': bytes(16)}),
    'an offset beyond its storage': lambda: zip_of(pickled({'a': Claim(4, (1,), (1,), 10**12)}), {'0': bytes(16)}),
    'one number expanded': lambda: saved({'a': torch.zeros(1).expand(10**6, 10**6)}),
    'legacy: one number expanded': lambda: saved({'a': torch.zeros(1).expand(10**6, 10**6)},
                                                 _use_new_zipfile_serialization=False),
    'a deflated bomb': lambda: zip_of(pickled({'a': Claim(1 << 26, (1 << 26,), (1,))}), {'0': bytes(1 << 28)},
                                      zipfile.ZIP_DEFLATED),
    'a sparse tensor': lambda: saved({'a': torch.sparse_coo_tensor(
        torch.zeros(2, 0).long(), torch.zeros(0), (10**9, 9))}),
    'a tensor without storage': lambda: saved({'a': torch.empty(10**6, 10**6, device='meta')}),
    'a byte array': lambda: zip_of(pickled({'a': Call(bytearray, 10**11)}), {}),
    'a tensor by its class': lambda: zip_of(pickled({'a': Call(torch.Tensor, 10**6, 10**6)}), {}),
    'lists that unfold': lambda: saved({'a': laughing(15)}),
    'lists in lists': lambda: zip_of(b'\x80\x02}X\x01\0\0\0a' + b']' * 5000 + b'a' * 4999 + b's.', {}),
    'a dict that holds itself': lambda: zip_of(b'\x80\x02}q\x00X\x01\0\0\0ah\x00s.', {}),
    'millions of lists': lambda: zip_of(b'\x80\x02(' + b']' * 8_000_000 + b't.', {}),
    'a long number': lambda: saved({'a': 10**500}),
    'an element far into the memo': lambda: zip_of(b'\x80\x02}r\xff\xff\xff\x7f.', {}),
    'a codec': lambda: zip_of(b'\x80\x02}X\x01\0\0\0ac_codecs\nencode\nX\x01\0\0\0aX\x04\0\0\0idna\x86Rs.', {}),
    'legacy: a storage of terabytes': lambda: legacy(10**12),
    'a storage larger than its record': lambda: zip_of(pickled({'a': Claim(1000, (1000,), (1,))}), {'0': bytes(16)}),
    'a tuple as key whose hash ends the process': lambda: zip_of(b'\x80\x02})' + b'\x85' * 200_000 + b'K\x01s.', {}),
    'copies of a dict': lambda: zip_of(repeated(b'ccollections\nOrderedDict\n', dict.fromkeys(range(20_000))), {}),
    'copies of counters': lambda: zip_of(repeated(b'ccollections\nCounter\n', dict.fromkeys(range(20_000), 1)), {}),
    'copies of a text': lambda: zip_of(repeated(b'c_codecs\nencode\n', 'x' * (1 << 20), 'latin1'), {}),
    'copies of a shape': lambda: zip_of(repeated(b'ctorch\nSize\n', (1,) * 100_000), {}),
    'a tensor taken apart': lambda: zip_of(pickled({'a': Call(Counter, Claim(4, (10**7,), (0,)))}), {'0': bytes(16)}),
    'pairs taken apart': lambda: zip_of(pickled({'a': Call(OrderedDict, [Claim(4, (10**7,), (0,))])}),
                                          {'0': bytes(16)}),
    'storages by call': lambda: zip_of(repeated(b'ctorch.storage\nUntypedStorage\n', 140_000), {}),
    'one record under many names': lambda: zip_of(pickled({'a': Claim(4, (4,), (1,))}).replace(
        b'X\x01\0\0\x000', b'X\x01\0\0\0A'), {'a': bytes(16)}),
    'an attribute for a method': lambda: zip_of(
        b'\x80\x02ccollections\nOrderedDict\n)R}X\x05\0\0\0itemsK\x05sb.', {}),
    'two tables of records': lambda: two_tables(saved({'a': torch.zeros(1)}), saved({'a': torch.ones(1)})),
}


def repeated(function: bytes, *args) -> bytes:
    """A pickle of a thousand results of one call."""
    call = pickle.dumps(args, 2)[:-1] + b'r\xff\0\0\0' + function + b'r\xfe\0\0\0'
    return b'\x80\x02}X\x01\0\0\0a](' + call[2:] + b'j\xfe\0\0\0j\xff\0\0\0R' * 1000 + b'es.'


def two_tables(first: bytes, second: bytes) -> bytes:
    """Two files in one: its end says how far from the end the second's table lies, and where the first's does."""
    at = struct.unpack('<I', first[-6:-2])[0]
    return first + second[:-98] + second[-22:-6] + struct.pack('<I', at) + bytes(2)


def legacy(numel: int) -> bytes:
    whole = saved({'a': torch.zeros(70_000)}, _use_new_zipfile_serialization=False)
    return whole.replace(b'J' + struct.pack('<i', 70_000), b'\x8a\x08' + struct.pack('<q', numel))


def refuse_all(names) -> None:
    """Called in a process of its own."""
    for name in names:
        before = peak_memory()
        messages = read_every_way(f'{name}.pth')
        print(json.dumps([name, messages[0], (peak_memory() - before) >> 20]))


def test_what_claims_too_much_is_refused_before_memory_is_taken():
    for name, content in ABSURD.items():
        Path(f'{name}.pth').write_bytes(content())
    lines = in_process(f'refuse_all({list(ABSURD)})').splitlines()
    assert len(lines) == len(ABSURD)
    for name, message, grown in map(json.loads, lines):
        print(f'{name}: {message}; {grown} MiB')
        assert message.startswith(f'{name}.pth: ') and grown < 150, (message, grown)


@pytest.mark.parametrize('name, change', {
    'a million blocks': {'body.1000000.lfe.0.conv0.weight': torch.zeros(1)},
    'blocks beyond counting': {f'body.{"9" * 400}.lfe.0.conv0.weight': torch.zeros(1)},
    'a million modules': {'body.0.lfe.1000000.conv0.weight': torch.zeros(1)},
    'a million features': {'head.weight': torch.zeros(10**6, 3, 1, 1)},
    'no features': {'head.weight': torch.zeros(0, 3, 3, 3)},
    'no channels': {'head.weight': torch.zeros(15, 0, 3, 3)},
    'a tail without channels': {'tail.weight': torch.zeros(0, 15, 3, 3)},
    'a scalar for a head': {'head.weight': torch.tensor(1.)},
    'an expansion of thousands': {'body.0.lfe.0.conv0.weight': torch.zeros(15 * 5000, 1, 1, 1)},
}.items())
def test_an_absurd_network_is_refused_before_it_is_built(name, change):
    torch.save(elan(**change), 'x.pth')
    before, begin = peak_memory(), time.monotonic()
    with pytest.raises(UserError, match=r'^x\.pth: '):
        load_elan('x.pth')
    assert peak_memory() - before < 100 << 20 and time.monotonic() - begin < 5


def test_a_masked_kernel_of_another_shape_is_refused():
    state = torch.load(Path(__file__).with_name('golden') / 'tiny_masked_x4.pt', weights_only=True)['model_state_dict']
    name = next(name for name in state if name.endswith('shift_conv.w'))
    torch.save({**state, name: torch.zeros(3, 3)}, 'x.pth')
    for read in (load_elan, lambda path: load_into(ELAN(upscale=4, num_feat=15, num_block=2), path)):
        with pytest.raises(UserError, match=r'^x\.pth: the weights are not those of an ELAN: a masked kernel'):
            read('x.pth')


@pytest.mark.parametrize('note', [
    {'window_sizes': [10**9]}, {'window_sizes': [997, 991]}, {'window_sizes': 'abc'}, {'window_sizes': []},
    {'img_range': float('nan')}, {'img_range': '1'}, {'rgb_mean': [0] * 10**4}, {'rgb_mean': [None] * 3}])
def test_an_absurd_note_beside_the_weights_is_refused(note):
    torch.save({'params': elan(), 'hyperparameters': note}, 'x.pth')
    with pytest.raises(UserError, match=rf'^x\.pth: {next(iter(note))} is '):
        load_elan('x.pth')


def test_safetensors_that_claim_much_are_refused():
    import safetensors.torch
    data = safetensors.torch.save(elan())
    length = struct.unpack('<Q', data[:8])[0]
    header = json.loads(data[8:8 + length])
    header['head.weight']['shape'] = [10**6, 10**6, 3, 3]
    raw = json.dumps(header).encode()
    for content in (struct.pack('<Q', len(raw)) + raw + data[8 + length:], struct.pack('<Q', 2**40) + data[8:],
                    b'\xff' * 8 + data[8:]):
        Path('x.safetensors').write_bytes(content)
        with pytest.raises(UserError, match=r'^x\.safetensors: cannot be read as safetensors'):
            load_elan('x.safetensors')
    safetensors.torch.save_file(elan(), 'x.safetensors', {'hyperparameters': '[' * 100_000})
    with pytest.raises(UserError, match=r'^x\.safetensors: cannot be read as safetensors'):
        load_elan('x.safetensors')


def test_a_pipe_is_not_waited_for():
    os.mkfifo('x.pth')
    for reader in READERS[:3]:
        with pytest.raises(UserError, match='x.pth: is a pipe or a device, expected a checkpoint file'):
            reader('x.pth')
    assert damage('x.pth') == 'is a pipe or a device, expected a checkpoint file'


def test_torchscript_is_a_program_and_refused():
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), 'x.pt')
    with pytest.raises(UserError, match='x.pt: is TorchScript, which is a program'):
        read_state_dict('x.pt')


def test_what_torch_saves_is_read_whole():
    content = {'a': torch.rand(3, 4)[:, ::2], 'b': [torch.tensor(1, dtype=dtype) for dtype in (
        torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.complex64)],
        'c': OrderedDict(x=Counter([1, 1]), y=torch.nn.Parameter(torch.ones(2))),
        'd': (None, True, -1, 1.5, 'é', 2**63), 'e': torch.Size([1, 2]), 'f': torch.zeros(0), 'g': b'bytes',
        'h': torch.device('cpu')}
    for new in (True, False):
        torch.save(content, 'x.pth', _use_new_zipfile_serialization=new)
        read = read_torch('x.pth')
        assert torch.equal(read['a'], content['a']) and read['c']['x'] == Counter({1: 2}) and read['d'] == content['d']
        assert [value.dtype for value in read['b']] == [value.dtype for value in content['b']]
        assert read['g'] == b'bytes' and read['c']['y'].sum() == 2


@pytest.mark.parametrize('new', [True, False])
@pytest.mark.parametrize('module', [b'numpy.core', b'numpy._core'])  # before NumPy 2, and since
def test_numbers_of_numpy_are_numbers(new, module):
    values = [np.float64(30.5), np.float32(0.5), np.float16(2), np.int64(-3), np.uint8(255), np.bool_(True)]
    raw = saved({'best_psnr': values[0], 'all': values, 'w': torch.ones(2)}, _use_new_zipfile_serialization=new)
    if new:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            named = {name.partition('/')[2]: archive.read(name) for name in archive.namelist()}
        pickled, storages = named['data.pkl'], {'0': named['data/0']}
    else:
        pickled = raw
    pickled = pickled.replace(b'cnumpy._core', b'cnumpy.core').replace(b'cnumpy.core', b'c' + module)
    Path('x.pth').write_bytes(zip_of(pickled, storages) if new else pickled)
    read = read_torch('x.pth')
    assert read['all'] == [30.5, 0.5, 2, -3, 255, True] and read['best_psnr'] == 30.5
    assert [type(value) for value in read['all']] == [float, float, float, int, int, bool]


def test_what_python_2_saved_is_read():
    pair = b'](X\x01\0\0\0aK\x05e'
    Path('x.pth').write_bytes(zip_of(b'\x80\x02ccollections\nOrderedDict\n](' + pair + pair + b'e\x85R.', {}))
    assert read_torch('x.pth') == OrderedDict(a=5)


@pytest.mark.parametrize('save', [
    torch.save, partial(torch.save, _use_new_zipfile_serialization=False), partial(torch.save, pickle_protocol=4),
    lambda net, file: Path(file).write_bytes(pickle.dumps(net)),
    lambda net, file: Path(file).write_bytes(pickle.dumps(net, 2)),
    lambda net, file: torch.save({'model': net}, file),
], ids=['zip', 'legacy', 'protocol 4', 'pickle', 'pickle 2', 'nested'])
def test_a_whole_module_is_refused_with_what_to_save_instead(save):
    save(torch.nn.Linear(2, 2), 'net.pth')
    with pytest.raises(UserError, match='whole module|beside tensors') as refused:
        read_torch('net.pth')
    assert str(refused.value).endswith('save its state dict where it was made: torch.save(net.state_dict(), FILE)')


def test_an_object_that_pickle_makes_anew_is_told_as_one():
    """Of a class that a checkpoint may name, so that the operation is what refuses it."""
    with zipfile.ZipFile('net.pth', 'w') as archive:
        archive.writestr('net/data.pkl', b'\x80\x02ccollections\nOrderedDict\n)\x81.')
    with pytest.raises(UserError, match='holds a whole module or other object.*save its state dict'):
        read_torch('net.pth')
