"""Mutated checkpoints and training states for tests: from a seed, so that one that fails can be made again."""
from __future__ import annotations

import io
import json
import math
import pickle
import random
import struct
import zipfile
from collections import Counter
from pathlib import Path

import safetensors.torch
import torch

from elan_basicsr.archs.elan_arch import ELAN

CODE = 'code_was_run'
"""The file that a payload makes where it is run."""
HUGE = (0, 1, -1, 2**31 - 1, 2**31, 2**40, 2**62, 2**63, 10**30)


class Payload:
    def __reduce__(self):
        return open, (CODE, 'w')


def write_originals(folder: Path) -> dict[str, bytes]:
    """Whole files of every container and form, by name, and with them those that were made to do harm."""
    net = ELAN(upscale=2, num_feat=15, num_block=2)
    weights = net.state_dict()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.rand(1, 3, 16, 16)).sum().backward()
    optimizer.step()
    state = {'iter': 3, 'epoch': 0, 'optimizers': [optimizer.state_dict()],
             'schedulers': [{'milestones': Counter([5]), 'gamma': 0.5, 'last_epoch': 3}], 'samples': 12,
             'best_metric_results': {'Set5': {'psnr': {'val': 30.5, 'better': 'higher', 'iter': 3}}}}
    note = {'img_range': 1.0, 'rgb_mean': [0.0, 0.0, 0.0], 'window_sizes': [4, 8, 16]}
    for name, content, new in (
            ('params.pth', {'params': weights, 'params_ema': weights, 'hyperparameters': note}, True),
            ('bare.pth', weights, True), ('legacy.pth', {'params': weights}, False), ('3.state', state, True),
            ('legacy.state', state, False), ('code.pth', {'params': weights, 'x': Payload()}, True),
            ('code_legacy.pth', {'params': weights, 'x': Payload()}, False)):
        torch.save(content, folder / name, _use_new_zipfile_serialization=new)
    safetensors.torch.save_file(weights, folder / 'bare.safetensors', {'hyperparameters': json.dumps(note)})
    for name in ('tiny_masked_x4', 'tiny_shared_x2'):  # the authors' two forms
        (folder / f'{name}.pt').write_bytes(Path(__file__).with_name('golden').joinpath(f'{name}.pt').read_bytes())
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def mutate(data: bytes, name: str, chance: random.Random) -> bytes:
    """A file with some damage, from flipped bits to a pickle that claims other things inside a valid zip file."""
    ways = [_flip, _cut, _splice, _overwrite]
    if 'code' not in name and chance.random() < 0.4:
        return mutate_content(data, name, chance)
    if data[:2] == b'PK':
        ways += [_repack] * 6
    elif name.endswith('.safetensors'):
        ways += [_other_header] * 4
    else:
        ways += [lambda data, chance: mutate_pickle(data, chance, 2000)] * 4
    for _ in range(chance.choice((1, 1, 1, 2))):
        data = chance.choice(ways)(data, chance)
    return data


def _flip(data: bytes, chance: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(chance.choice((1, 3, 30))):
        end = chance.choice((min(len(data), 3000), len(data)))
        if end:
            data[chance.randrange(end)] ^= 1 << chance.randrange(8)
    return bytes(data)


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[:chance.randrange(len(data) + 1)]


def _splice(data: bytes, chance: random.Random) -> bytes:
    a, b, c = (chance.randrange(len(data) + 1) for _ in range(3))
    return data[:a] + data[b:b + chance.choice((1, 20, 500))] + data[c if chance.random() < 0.3 else a:]


def _overwrite(data: bytes, chance: random.Random) -> bytes:
    value = chance.choice((b'\xff' * 4, b'\xff' * 8, b'\0' * 8, struct.pack('<q', chance.choice(HUGE[:7]))))
    place = chance.randrange(len(data) + 1)
    return data[:place] + value + data[place + len(value):]


def _repack(data: bytes, chance: random.Random) -> bytes:
    """The same records in a valid zip file, one of them changed, lost, doubled or compressed."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:
        return data
    out = io.BytesIO()
    how = chance.choice(('pickle',) * 6 + ('record', 'lose', 'double', 'deflate', 'bomb'))
    with zipfile.ZipFile(out, 'w') as archive:
        for name, content in records:
            kind = zipfile.ZIP_DEFLATED if how == 'deflate' else zipfile.ZIP_STORED
            if name.endswith('data.pkl') and how == 'pickle':
                content = mutate_pickle(content, chance, len(content))
            elif how == 'record' and chance.random() < 0.2:
                content = _flip(content, chance) if chance.random() < 0.5 else content[:len(content) // 2]
            elif how == 'lose' and chance.random() < 0.2:
                continue
            elif how == 'bomb' and '/data/' in name:
                content, kind = bytes(1 << 20), zipfile.ZIP_DEFLATED
            if how == 'double' and chance.random() < 0.1:
                name = records[0][0]
            archive.writestr(name, content, kind)
    return out.getvalue()


_TOKENS = (
    b'}', b']', b')', b'(', b't', b'R', b'b', b's', b'u', b'a', b'e', b'.', b'0', b'2', b'N', b'Q', b'q\x00', b'h\x00',
    b'h\x02', b'J\xff\xff\xff\x7f', b'J\xff\xff\xff\xff', b'K\x00', b'M\xff\xff', b'\x8a\x08' + b'\xff' * 7 + b'\x7f',
    b'\x8a\xff' + b'\x7f' * 255, b'r\xff\xff\xff\x7f', b'j\xff\xff\xff\x7f', b'X\xff\xff\xff\x7f',
    b'cposix\nsystem\n', b'cbuiltins\nexec\n', b'cbuiltins\nbytearray\n', b'ctorch\nTensor\n',
    b'ctorch\nFloatStorage\n', b'G\x7f\xf8' + bytes(6),
    b'ctorch._utils\n_rebuild_sparse_tensor\n', b'c_codecs\nencode\n', b'ccollections\nCounter\n',
    b'ctorch.jit\nload\n', f'cbuiltins\nopen\nX{chr(len(CODE))}\0\0\0{CODE}X\1\0\0\0w\x86R'.encode(),
    b'\x8e' + b'\xff' * 7 + b'\x7f', b'\x96' + b'\xff' * 7 + b'\x7f', b'\x95' + b'\xff' * 8, b'B\xff\xff\xff\x7f',
    b'i__main__\nx\n', b'o', b'\x81', b'\x92', b'P0\n', b'I999999999999\n', b'L9999L\n', b'F1e999\n', b'S\'a\'\n',
    b'\x8f', b'\x90', b'\x91', b'\x93', b'\x82\x01')


def mutate_pickle(data: bytes, chance: random.Random, end: int) -> bytes:
    """A pickle with other numbers or operations in its first `end` bytes."""
    end = min(end, len(data))
    for _ in range(chance.choice((1, 1, 2, 5))):
        if not end:
            break
        places = [place for place in range(end) if data[place:place + 1] in (b'K', b'M', b'J')]
        if places and chance.random() < 0.5:  # a shape, a stride, an offset, or an iteration
            place = chance.choice(places)
            length = {75: 2, 77: 3, 74: 5}[data[place]]
            new = pickle.dumps(chance.choice((*HUGE, 3, 10**6, 1.5, float('nan'), None, 'x', (), [])), 2)[2:-1]
        else:
            place = chance.randrange(end)
            length = chance.choice((0, 0, 1, 2, 9))
            new = chance.choice(_TOKENS) * chance.choice((1, 1, 1, 2, 1000))
        data = data[:place] + new + data[place + length:]
        end = min(end, len(data))
    return data


def _other_header(data: bytes, chance: random.Random) -> bytes:
    try:
        length = struct.unpack('<Q', data[:8])[0]
        header = json.loads(data[8:8 + length])
    except (ValueError, struct.error):
        return data
    name = chance.choice(list(header) or ['x'])
    entry = header.get(name) if isinstance(header.get(name), dict) else {}
    key = chance.choice([*entry, 'shape', 'dtype', 'data_offsets'])
    entry[key] = chance.choice([[10**6] * 4, [0], [0, 2**63], [-1, 5], 'F64', 'I8', 'X', None, {}, '[' * 5000,
                                '9' * 5000, '{"window_sizes": [1000000007]}', '{"img_range": "x"}',
                                '{"rgb_mean": 1e999}', 'null'])
    header[name] = entry
    raw = json.dumps(header).encode()
    return struct.pack('<Q', chance.choice([len(raw)] * 5 + [2**62, 0, 10**8])) + raw + data[8 + length:]




def mutate_content(data: bytes, name: str, chance: random.Random) -> bytes:
    """A sound file whose weights have other shapes, types and names, or whose state has other values."""
    if name.endswith('.safetensors'):
        content = safetensors.torch.load(data)
    else:
        content = torch.load(io.BytesIO(data), weights_only=True)
    for _ in range(chance.choice((1, 1, 2, 4))):
        section = content
        while True:  # walk down to some dict or list
            inner = section.values() if isinstance(section, dict) else section
            inner = [value for value in inner if isinstance(value, (dict, list)) and value]
            if not inner or chance.random() < 0.2:
                break
            section = chance.choice(inner)
        if not section:  # all its keys have been deleted
            continue
        key = chance.choice(list(section) if isinstance(section, dict) else range(len(section)))
        how = chance.choice(('value', 'value', 'value', 'delete', 'rename', 'cycle'))
        if how == 'delete' or (how == 'rename' and isinstance(section, dict)):
            value = section.pop(key)
            if how == 'rename':
                section[chance.choice((f'{key}.', str(key).replace('0', '1000000'), 7, 'module.' + str(key), 'a\nb'))
                        ] = value
        elif how == 'cycle' and not name.endswith('.safetensors'):
            section[key] = chance.choice((content, section))
        else:
            section[key] = _other_value(section[key], chance)
    out = io.BytesIO()
    if name.endswith('.safetensors'):
        return safetensors.torch.save({str(name): value.contiguous() for name, value in content.items()
                                       if isinstance(value, torch.Tensor) and value.layout == torch.strided
                                       and not value.is_quantized and not value.is_meta and value.numel() < 10**6})
    try:
        torch.save(content, out, _use_new_zipfile_serialization=data[:2] == b'PK')
    except (RuntimeError, AssertionError):  # what holds itself in a place where torch cannot save it
        return data
    return out.getvalue()


def _other_value(value, chance: random.Random):
    is_plain = isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.device.type == 'cpu'
    if is_plain and value.layout == torch.strided and chance.random() < 0.8:
        return chance.choice((
            lambda: value.flatten()[:0], lambda: value.flatten()[:1].squeeze(), lambda: value[..., None].contiguous(),
            lambda: torch.zeros(1).expand(10**6, 10**6), lambda: torch.zeros(1).expand(3, 3), lambda: value * math.nan,
            lambda: value.to(torch.complex64), lambda: value.to(torch.uint8), lambda: value.to(torch.float8_e4m3fn),
            lambda: value.to_sparse(), lambda: torch.zeros(0, 10**9), lambda: torch.zeros(*value.shape, 2)[..., 0],
            lambda: torch.nn.Parameter(value), lambda: torch.zeros(10**5, 1),
            lambda: torch.empty(5, device='meta'),
            lambda: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)))()
    return chance.choice((None, True, -1, 0, 10**6, 2**63, 10**30, math.nan, math.inf, 'x' * 2000, 'a\nb\x1b', (), [],
                          {}, [[[]]], {'a': {}}, {1: 2}, {'window_sizes': [10**9]}, torch.zeros(2), b'bytes', 1j, {3}))
