"""Every form of checkpoint comes in with its hyper-parameters, goes out whole, and never runs code."""
import os
import pickle
import re
import time

import cv2
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elan_basicsr.archs.elan_arch import ELAN
from elan_basicsr.checkpoint import damage, load_elan, load_into, read_state_dict, read_training_state, save_atomic
from elan_basicsr.contents import find_networks
from elan_basicsr.errors import UserError
from elan_basicsr.forms import (
    AUTHORS,
    FORMS,
    FRIED_RICE_LAB,
    OURS,
    Form,
    elan_hyperparameters,
    is_elan,
    to_native,
    to_official,
)
from elan_basicsr.interop.convert import convert
from elan_basicsr.interop.networks import load_network

from .archs.golden import load_golden
from basicsr.metrics import calculate_psnr

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

def in_form(net: ELAN, form: Form) -> dict[str, torch.Tensor]:
    """The weights of a network as a program with that form's names would save them."""
    state = net.state_dict() if form is OURS else to_official(net)
    if form in (OURS, AUTHORS):
        return state
    renamed = {}
    for name, value in state.items():
        convolution = re.fullmatch(r'(body\.\d+)\.modules_lfe\.lfe_(\d+)\.conv([01])\.shift_conv\.(.*)', name)
        if convolution and form is FRIED_RICE_LAB:
            block, module, number, leaf = convolution.groups()
            leaf = {'weight': 'mask', 'conv1x1.weight': 'weight', 'conv1x1.bias': 'bias'}[leaf]
            name = f'{block}.modules_lfe.{module}.lfe.{2 * int(number)}.{leaf}'
        elif form is FRIED_RICE_LAB:
            name = name.replace('head.0.', 'head.').replace('.gmsa_', '.')
        elif convolution:
            kernel = state[name.rpartition('shift_conv.')[0] + 'shift_conv.weight']
            if name.endswith('shift_conv.weight'):
                name = name.removesuffix('weight') + 'm'
                value = kernel.transpose(0, 1).expand(
                    len(state[name.removesuffix('m') + 'conv1x1.weight']), -1, -1, -1).clone()
            elif name.endswith('weight'):
                name, value = name.removesuffix('conv1x1.weight') + 'w', value * kernel.transpose(0, 1)
            else:
                name = name.removesuffix('conv1x1.bias') + 'b'
        renamed[name] = value
    return renamed


def small(seed: int = 0) -> ELAN:
    torch.manual_seed(seed)
    return ELAN(**{**SMALL, 'num_block': 4}).eval()


@pytest.mark.parametrize('form', FORMS, ids=lambda form: form.title)
def test_every_form_is_recognised_and_read(form, tmp_path):
    """`load_elan`, `load_into` with a part of the weights, and `load_network` take each form alike."""
    net, path = small(), tmp_path / 'w.pth'
    state = in_form(net, form)
    torch.save({'params': state}, path)
    assert [other for other in FORMS if state.keys() >= set(other.first())] == [form]
    assert same_weights(load_elan(path), net) and load_elan(path).img_range == 255
    assert same_weights(load_network(path).net, net)
    torch.save({name: value for name, value in state.items() if 'body.1' not in name and 'tail' not in name}, path)
    target = ELAN(**{**SMALL, 'num_block': 4, 'upscale': 3})
    missing = load_into(target, path, strict=False)
    assert missing and all(name.startswith(('body.1', 'tail')) for name in missing)
    assert torch.equal(target.body[0].lfe[0].conv1.weight, net.body[0].lfe[0].conv1.weight)


PREFIXES = ('module.', '_orig_mod.', 'generator.', 'model.', 'net_g.', 'netG.', 'state_dict.', 'my_own.')
KEYS = ('params', 'params_ema', 'model_state_dict', 'state_dict', 'model', 'net', 'generator', 'anything', 'a.b')


@settings(max_examples=60, deadline=None)
@given(form=st.sampled_from(FORMS), prefixes=st.lists(st.sampled_from(PREFIXES), max_size=4),
       keys=st.lists(st.sampled_from(KEYS), max_size=4), beside=st.booleans())
def test_any_nesting_of_keys_and_prefixes_leads_to_the_network(form, prefixes, keys, beside):
    net = small()
    content = {''.join(prefixes) + name: value for name, value in in_form(net, form).items()}
    for key in keys:
        content = {key: content, **({'epoch': 3, 'meta': {'seed': 1}, 'n_averaged': torch.tensor(2)} if beside else {})}
    found = find_networks(content, is_elan)
    assert len(found) == 1
    read = to_native(next(iter(found.values())))
    assert read.keys() == net.state_dict().keys()
    assert all(torch.equal(read[name], value) for name, value in net.state_dict().items())


def prefixed(**networks) -> dict[str, torch.Tensor]:
    return {f'{prefix}.{name}': value for prefix, net in networks.items() for name, value in net.state_dict().items()}


def test_of_a_generator_and_others_the_generator_is_taken(tmp_path, caplog):
    plain, average, other = small(1), small(2), torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3), torch.nn.Conv2d(3, 3, 3))
    path = tmp_path / 'gan.pth'
    torch.save({'state_dict': prefixed(generator=plain, discriminator=other)}, path)
    assert same_weights(load_elan(path), plain) and not caplog.records
    torch.save({'state_dict': prefixed(generator=plain, generator_ema=average, discriminator=other)}, path)
    assert same_weights(load_elan(path), average)
    assert 'state_dict.generator_ema is taken, not state_dict.generator' in caplog.text
    for key, expected in (('params', plain), ('params_ema', average), ('generator', plain), ('generator_ema', average)):
        assert same_weights(load_elan(path, param_key=key), expected), key
    torch.save({'g': plain.state_dict(), 'd': other.state_dict(), 'g_ema': average.state_dict()}, path)
    assert same_weights(load_elan(path), average)


def test_several_networks_are_named_with_the_way_to_choose(tmp_path):
    student, teacher, path = small(1), small(2), tmp_path / 'two.pth'
    torch.save({'state_dict': prefixed(student=student, teacher=teacher)}, path)
    with pytest.raises(UserError, match=r'two\.pth: holds 2 networks: state_dict\.student, state_dict\.teacher; choose '
                                        'one by param_key_g') as caught:
        load_elan(path)
    assert '\n' not in str(caught.value)
    assert same_weights(load_elan(path, param_key='teacher'), teacher)
    target = small(3)
    load_into(target, path, param_key='state_dict.student')
    assert same_weights(target, student)
    torch.save(prefixed(model=student, copy=student), path)
    assert same_weights(load_elan(path), student)


def test_a_number_before_the_names_is_no_wrapper(tmp_path):
    """In a Sequential something can stand before the network, and not be left out."""
    torch.save({f'1.{name}': value for name, value in small().state_dict().items()}, tmp_path / 'w.pth')
    with pytest.raises(UserError, match='not those of an ELAN'):
        load_elan(tmp_path / 'w.pth')


@pytest.mark.parametrize('content, message', [
    ({'params': {'conv.weight': torch.zeros(3)}}, 'it holds 1 tensor, conv.weight; no known architecture has a name'),
    ({'net': {f'a.{n}': torch.zeros(1) for n in 'bcdef'}}, r'it holds 5 tensors, a\.b, a\.c, a\.d and 2 more; no'),
    ({name: value for name, value in in_form(small(), FRIED_RICE_LAB).items() if not name.startswith('tail')},
     "nearest is ELAN in FriedRiceLab's form, of which tail.0.weight is missing"),
    ({'x': {f'y.{name}': value for name, value in small().state_dict().items() if 'norm' not in name}},
     r'y\.head\.weight, y\.head\.bias, .*; nearest is ELAN, of which body\.0\.gmsa\.0\.norm\.running_var is missing'),
    ({'epoch': 3, 'meta': {}}, 'no network weights found: it holds epoch, meta and no tensor'),
    ({}, 'no network weights found: it is empty'),
])
def test_what_is_no_network_is_described(content, message, tmp_path):
    torch.save(content, tmp_path / 'w.pth')
    with pytest.raises(UserError, match=rf'w\.pth: .*{message}') as caught:
        load_elan(tmp_path / 'w.pth')
    assert '\n' not in str(caught.value)


def test_a_shape_that_does_not_fit_is_named(tmp_path):
    torch.save({**small().state_dict(), 'body.1.lfe.0.conv0.bias': torch.zeros(4)}, tmp_path / 'w.pth')
    with pytest.raises(UserError, match=r'body\.1\.lfe\.0\.conv0\.bias is \(4,\) there and \(30,\) here'):
        load_elan(tmp_path / 'w.pth')


@pytest.mark.parametrize('form', FORMS[1:], ids=lambda form: form.title)
def test_kernels_that_shift_otherwise_are_refused(form, tmp_path):
    """They would compute something else, and nothing else would tell."""
    state = in_form(small(), form)
    name = next(name for name in state if re.search(r'shift_conv\.(weight|m)$|mask$', name))
    torch.save({**state, name: state[name].flip(3)}, tmp_path / 'w.pth')
    with pytest.raises(UserError, match=rf'w\.pth: .*{re.escape(name)} is no kernel that shifts'):
        load_elan(tmp_path / 'w.pth')


def read_all(path):
    yield lambda: load_elan(path)
    yield lambda: load_into(small(3), path)
    yield lambda: load_into(small(3), path, strict=False)
    yield lambda: read_state_dict(path)
    yield lambda: load_network(path)
    yield lambda: convert(path, path.with_name('new.pth'))


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_named_when_they_are_loaded(value, dtype, tmp_path):
    net, path = small().to(dtype), tmp_path / 'w.pth'
    net.body[1].lfe[0].conv0.bias.data[:2] = value
    net.tail.bias.data[0] = value
    torch.save({'params': net.state_dict()}, path)
    for read in read_all(path):
        with pytest.raises(UserError, match=r'w\.pth: its weights hold NaN or infinity: body\.1\.lfe\.0\.conv0\.bias '
                                            'and 1 more tensor, 3 values'):
            read()


def test_another_network_is_found_under_its_prefix(tmp_path):
    """A network of the toolbox's is known by its own names, where it is loaded into one."""
    source, target = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3)), torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3))
    torch.save({'state_dict': {f'module.net.{name}': value for name, value in source.state_dict().items()}},
               tmp_path / 'w.pth')
    assert load_into(target, tmp_path / 'w.pth') == [] and same_weights(source, target)


def test_names_and_dicts_without_end_are_searched_in_a_moment():
    """A file can hold one dict at a million places, and a name of a million prefixes."""
    content = {'a' + '.a' * 10**6: torch.zeros(1)}
    for _ in range(18):
        content = {'x': content, 'y': content, 'z': content}
    begin = time.monotonic()
    assert find_networks(content, is_elan) == {}
    assert time.monotonic() - begin < 5


def test_the_form_of_friedricelab_is_theirs(shared):
    """Their published file, whose figures `docs/formats.md` gives."""
    path = shared / 'trained' / 'frl_light_x4.pth'
    if not path.is_file():
        pytest.skip('needs the file of FriedRiceLab')
    net = load_elan(path)
    assert (net.upscale, net.img_range, net.window_sizes, len(net.body)) == (4, 255, (4, 8, 16), 12)
    hr = cv2.imread(str(shared / 'data' / 'Set5' / 'HR' / 'butterfly.png'))
    lr = cv2.imread(str(shared / 'data' / 'Set5' / 'LRbicx4' / 'butterfly.png'))
    with torch.no_grad():
        y = net(torch.from_numpy(lr[..., ::-1].copy()).permute(2, 0, 1)[None] / 255)
    sr = y[0].clamp(0, 1).mul(255).round().permute(1, 2, 0).numpy()[..., ::-1]
    assert calculate_psnr(sr, hr, crop_border=4, test_y_channel=True) > 28.5


def test_a_prefix_of_mmagic_is_taken_off(shared):
    path = shared / 'reports' / 'generator_prefix_x2.pth'
    if not path.is_file():
        pytest.skip('needs the file of MMagic')
    assert same_weights(load_elan(path), load_elan(load_golden('tiny_shared_x2').checkpoint))
