"""Every form of checkpoint comes in with its hyper-parameters, goes out whole, and never runs code."""
import os
import pickle

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elan_basicsr.archs.elan_arch import ELAN
from elan_basicsr.checkpoint import (
    damage,
    elan_hyperparameters,
    load_elan,
    load_into,
    read_state_dict,
    read_training_state,
    save_atomic,
)
from elan_basicsr.errors import UserError

from .archs.golden import load_golden

SMALL = dict(upscale=2, num_feat=15, num_block=2)


def same_weights(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize('wrap', ['official', 'bare', 'module', 'params', 'params_ema', 'safetensors'])
@pytest.mark.parametrize('name', ['tiny_shared_x2', 'tiny_masked_x4'])
def test_every_form_gives_the_same_network(name, wrap, tmp_path):
    official = torch.load(load_golden(name).checkpoint, weights_only=True)['model_state_dict']
    bare = {key.removeprefix('module.'): value for key, value in official.items()}
    path = tmp_path / ('w.safetensors' if wrap == 'safetensors' else 'w.pth')
    if wrap == 'safetensors':
        safetensors.torch.save_file({key: value.contiguous() for key, value in bare.items()}, path)
    else:
        torch.save({'official': {'epoch': 3, 'model_state_dict': official}, 'bare': bare, 'module': official,
                    'params': {'params': bare}, 'params_ema': {'params_ema': bare}}[wrap], path)
    net = load_elan(path)
    assert not net.training
    assert same_weights(net, load_elan(load_golden(name).checkpoint))


@settings(max_examples=25, deadline=None)
@given(upscale=st.integers(1, 5), channels=st.sampled_from([1, 3]), groups=st.integers(2, 8), share=st.integers(0, 2),
       blocks=st.integers(1, 3), expansion=st.integers(1, 3))
def test_hyperparameters_are_read_off_the_shapes(upscale, channels, groups, share, blocks, expansion):
    arguments = dict(upscale=upscale, num_in_ch=channels, num_out_ch=channels, num_feat=3 * groups,
                     num_block=blocks * (1 + share), num_share=share, expansion=expansion)
    with torch.device('meta'):
        state = ELAN(**arguments).state_dict()
    assert elan_hyperparameters(state) == arguments


def test_range_and_mean_follow_the_form(tmp_path):
    official = torch.load(load_golden('tiny_shared_x2').checkpoint, weights_only=True)['model_state_dict']
    without_mean = {key: value for key, value in official.items() if 'sub_mean' not in key and 'add_mean' not in key}
    torch.save(without_mean, tmp_path / 'redux.pth')
    net = load_elan(tmp_path / 'redux.pth')
    assert net.img_range == 1 and not net.mean_in.any()
    for key in ('sub_mean', 'add_mean'):
        official[f'module.{key}.bias'] = official[f'module.{key}.bias'] / 255
    torch.save(official, tmp_path / 'one.pth')
    assert load_elan(tmp_path / 'one.pth').img_range == 1
    assert load_elan(tmp_path / 'one.pth', img_range=255., window_sizes=(2, 4, 8)).window_sizes == (2, 4, 8)


def test_an_x2_network_starts_an_x4_one(tmp_path):
    source = ELAN(**SMALL)
    save_atomic({'params': source.state_dict()}, tmp_path / 'x2.pth')
    target = ELAN(**{**SMALL, 'upscale': 4})
    before = target.tail.weight.clone()
    assert load_into(target, tmp_path / 'x2.pth', strict=False) == ['tail.weight', 'tail.bias']
    assert torch.equal(target.tail.weight, before)
    assert torch.equal(target.body[0].lfe[0].conv0.weight, source.body[0].lfe[0].conv0.weight)
    with pytest.raises(UserError, match=r'x2\.pth.*tail.*the file is x2, the network x4.*strict_load_g') as caught:
        load_into(target, tmp_path / 'x2.pth')
    assert '\n' not in str(caught.value)


class Payload:
    def __reduce__(self):
        return os.mkdir, ('it_ran',)


def bad_files(folder):
    """Files that are no checkpoints, by name."""
    good = ELAN(**SMALL).state_dict()
    torch.save({'params': good}, folder / 'good.pth')
    whole = (folder / 'good.pth').read_bytes()
    (folder / 'cut.pth').write_bytes(whole[:len(whole) // 2])
    (folder / 'empty.pth').write_bytes(b'')
    (folder / 'text.pth').write_text('no checkpoint')
    (folder / 'pickle.pth').write_bytes(pickle.dumps(Payload()))
    torch.save({'params': good, 'extra': Payload()}, folder / 'code.pth')
    torch.save([1, 2], folder / 'list.pth')
    torch.save({'params': {'a': 1}}, folder / 'numbers.pth')
    torch.save({}, folder / 'nothing.pth')
    torch.save({'params': {'conv.weight': torch.zeros(3)}}, folder / 'other.pth')
    (folder / 'cut.safetensors').write_bytes(safetensors.torch.save(good)[:1000])
    (folder / 'folder.pth').mkdir()
    return ['cut.pth', 'empty.pth', 'text.pth', 'pickle.pth', 'code.pth', 'list.pth', 'numbers.pth', 'nothing.pth',
            'other.pth', 'cut.safetensors', 'folder.pth', 'absent.pth', 'absent.safetensors']


def test_bad_files_give_one_line_and_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in bad_files(tmp_path):
        with pytest.raises(UserError, match=name) as caught:
            load_elan(name)
        assert '\n' not in str(caught.value), name
    assert not (tmp_path / 'it_ran').exists()
    with pytest.raises(UserError, match='is no training state'):
        read_training_state('good.pth')


def test_saving_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / 'net.pth'
    save_atomic({'params': {'a': torch.ones(3)}}, path)
    assert damage(path) is None
    before = path.read_bytes()

    def fail(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(UserError, match=r'net\.pth: cannot be saved: .*No space left'):
        save_atomic({'params': {'a': torch.zeros(3)}}, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ['net.pth']


def test_damage_is_seen(tmp_path):
    path = tmp_path / 'net.pth'
    save_atomic({'a': torch.arange(1000.)}, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert damage(path)
    path.write_bytes(data[:100])
    assert damage(path)
    assert damage(tmp_path / 'absent').startswith('no such file')


def test_the_key_asked_for_is_read(tmp_path):
    save_atomic({'params': {'a': torch.zeros(1)}, 'params_ema': {'a': torch.ones(1)}}, tmp_path / 'both.pth')
    assert read_state_dict(tmp_path / 'both.pth')['a'] == 1
    assert read_state_dict(tmp_path / 'both.pth', 'params')['a'] == 0
