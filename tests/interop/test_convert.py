"""Every form becomes every other form and comes back without a differing weight; nothing is overwritten."""
import itertools
import json

import pytest
import safetensors
import torch

from elan_basicsr.archs.elan_arch import ELAN
from elan_basicsr.checkpoint import load_elan, save_atomic
from elan_basicsr.cli import main
from elan_basicsr.errors import UserError
from elan_basicsr.interop.convert import FORMS, convert

from ..archs.golden import GOLDEN, load_golden

SUFFIX = {'basicsr': '.pth', 'official': '.pt', 'safetensors': '.safetensors'}


def differing(a: dict, b: dict) -> list[str]:
    return sorted(a.keys() ^ b.keys()) + [name for name in a if name in b and not torch.equal(a[name], b[name])]


@pytest.mark.parametrize('name', GOLDEN)
def test_a_round_through_every_form_changes_nothing(name, tmp_path):
    original = load_golden(name).checkpoint
    at = original
    for number, form in enumerate(('basicsr', 'safetensors', 'official', 'safetensors', 'basicsr', 'official')):
        target = tmp_path / f'{number}{SUFFIX[form]}'
        convert(at, target, form)
        at = target
    assert differing(load_elan(original).state_dict(), load_elan(at).state_dict()) == []
    before, after = (torch.load(path, weights_only=True)['model_state_dict'] for path in (original, at))
    if 'masked' not in name:  # that variant comes back as the other one, which computes the same
        assert list(before) == list(after) and differing(before, after) == []


@pytest.mark.parametrize('first, second', list(itertools.product(FORMS, FORMS)))
@pytest.mark.parametrize('arguments', [
    dict(img_range=1., rgb_mean=[0., 0., 0.]),
    dict(img_range=255., rgb_mean=[0.5, 0.4, 0.3]),
    dict(img_range=1., rgb_mean=[0.5, 0.4, 0.3], window_sizes=[2, 6], num_feat=16),
])
def test_what_weights_do_not_tell_goes_along(first, second, arguments, tmp_path):
    net = ELAN(**{**dict(upscale=2, num_feat=15, num_block=2), **arguments}).eval()
    source = tmp_path / 'source.pth'
    note = {key: arguments[key] for key in ('img_range', 'rgb_mean', 'window_sizes') if key in arguments}
    save_atomic({'params': net.state_dict(), 'hyperparameters': note}, source)
    one, two = tmp_path / f'one{SUFFIX[first]}', tmp_path / f'two{SUFFIX[second]}'
    convert(source, one, first)
    convert(one, two, second)
    back = load_elan(two)
    assert differing(net.state_dict(), back.state_dict()) == []
    assert torch.equal(net.mean_in, back.mean_in) and net.window_sizes == back.window_sizes
    x = torch.rand(1, 3, 9, 13)
    with torch.no_grad():
        assert torch.equal(net(x), back(x))


@pytest.mark.parametrize('arguments', [dict(img_range=1., rgb_mean=[0., 0., 0.]), dict(rgb_mean=[0.5, 0.4, 0.3]),
                                       dict(img_range=1.)])
def test_the_official_form_tells_range_and_mean_without_the_note(arguments, tmp_path):
    net = ELAN(upscale=2, num_feat=15, num_block=2, **arguments)
    save_atomic({'params': net.state_dict(), 'hyperparameters': arguments}, tmp_path / 'a.pth')
    convert(tmp_path / 'a.pth', tmp_path / 'b.pt', 'official')
    content = torch.load(tmp_path / 'b.pt', weights_only=True)
    torch.save({'model_state_dict': content['model_state_dict']}, tmp_path / 'c.pt')
    back = load_elan(tmp_path / 'c.pt')
    assert back.img_range == net.img_range and torch.equal(back.mean_in, net.mean_in)


def test_the_note_is_in_the_file(tmp_path):
    note = {'window_sizes': [4, 8, 16], 'img_range': 255.0, 'rgb_mean': [0.4488, 0.4371, 0.4040]}
    convert(load_golden('tiny_shared_x2').checkpoint, tmp_path / 'a.safetensors')
    with safetensors.safe_open(tmp_path / 'a.safetensors', 'pt') as file:
        assert json.loads(file.metadata()['hyperparameters']) == note
    convert(tmp_path / 'a.safetensors', tmp_path / 'a.pth')
    assert torch.load(tmp_path / 'a.pth', weights_only=True)['hyperparameters'] == note


def test_ema_is_taken_when_asked_for(tmp_path):
    plain, average = (ELAN(upscale=2, num_feat=15, num_block=2) for _ in range(2))
    save_atomic({'params': plain.state_dict(), 'params_ema': average.state_dict()}, tmp_path / 'both.pth')
    convert(tmp_path / 'both.pth', tmp_path / 'plain.pth')
    convert(tmp_path / 'both.pth', tmp_path / 'ema.pth', ema=True)
    assert differing(load_elan(tmp_path / 'plain.pth').state_dict(), plain.state_dict()) == []
    assert differing(load_elan(tmp_path / 'ema.pth').state_dict(), average.state_dict()) == []
    with pytest.raises(UserError, match=r'plain\.pth: has no params_ema; it holds params'):
        convert(tmp_path / 'plain.pth', tmp_path / 'x.pth', ema=True)


def wrong_calls(folder):
    (folder / 'there.pth').write_bytes(b'precious')
    net = ELAN(upscale=2, num_feat=15, num_block=2)
    save_atomic({'params': net.state_dict()}, folder / 'good.pth')
    save_atomic({'params': net.double().state_dict()}, folder / 'double.pth')
    save_atomic({'params': ELAN(upscale=2, num_in_ch=1, num_out_ch=1, num_feat=15, num_block=2).state_dict()},
                folder / 'grey.pth')
    save_atomic({'params': {'conv.weight': torch.zeros(1)}}, folder / 'other.pth')
    save_atomic({'params': net.float().state_dict(), 'hyperparameters': {'window_sizes': [0]}}, folder / 'noted.pth')
    yield ['good.pth', 'there.pth'], 'there.pth: is there already'
    yield ['good.pth', 'x.pth', '--to', 'safetensors'], 'ends in .safetensors'
    yield ['good.pth', 'x.safetensors', '--to', 'official'], 'ends in .pth'
    yield ['good.pth', 'absent/x.pth'], 'the folder absent does not exist'
    yield ['absent.pth', 'x.pth'], 'absent.pth: no such file'
    yield ['other.pth', 'x.pth'], 'other.pth: its weights are not those of an ELAN'
    yield ['grey.pth', 'x.pt', '--to', 'official'], 'a network from 1 to 1 channels has no official form'
    yield ['double.pth', 'x.pt'], 'double.pth: its weights are float64'
    yield ['noted.pth', 'x.pt'], 'noted.pth: window_sizes'


def test_a_wrong_call_is_answered_in_a_line_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words, message in wrong_calls(tmp_path):
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert main(['convert', *words]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith('basicsr: error: ') and message in printed and printed.count('\n') == 1
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_command_says_what_it_did(tmp_path, capsys):
    target = tmp_path / 'a.pth'
    assert main(['convert', str(load_golden('tiny_shared_x2').checkpoint), str(target)]) == 0
    assert capsys.readouterr().out.startswith(f'{target}: ELAN x2, ')
