"""Any trained network comes in by one call, runs on any size, and what is none is named in a line."""
import sys

import pytest
import torch
import yaml

from elan_basicsr.archs.elan_arch import ELAN
from elan_basicsr.checkpoint import load_elan
from elan_basicsr.errors import UserError
from elan_basicsr.interop.networks import load_network, load_option_file

from ..archs.golden import load_golden

SWINIR = dict(upscale=2, in_chans=3, img_size=16, window_size=8, img_range=1., depths=[2], embed_dim=12, num_heads=[2],
              mlp_ratio=2, upsampler='pixelshuffledirect', resi_connection='1conv')
EDSR = dict(type='EDSR', num_in_ch=3, num_out_ch=3, num_block=1, num_feat=8)


def swinir():
    from basicsr.archs.swinir_arch import SwinIR
    torch.manual_seed(0)
    return SwinIR(**SWINIR).eval()


def run(network, *size, batch=1):
    with torch.no_grad():
        return network.net(torch.rand(batch, network.channels[0], *size, generator=torch.Generator().manual_seed(1)))


def test_an_elan_is_loaded_without_spandrel(monkeypatch):
    monkeypatch.setitem(sys.modules, 'spandrel', None)
    path = load_golden('tiny_shared_x3').checkpoint
    network = load_network(path)
    assert (network.name, network.scale, network.channels, network.multiple, network.window) == (
        'ELAN', 3, (3, 3), 1, 16)
    assert not network.net.training
    x = torch.rand(2, 3, 5, 17)
    with torch.no_grad():
        assert torch.equal(network.net(x), load_elan(path)(x))


@pytest.mark.parametrize('form', ['params', 'safetensors'])
def test_another_architecture_comes_through_spandrel(form, tmp_path):
    spandrel = pytest.importorskip('spandrel')
    import safetensors.torch
    net = swinir()
    path = tmp_path / {'params': 'w.pth', 'safetensors': 'w.safetensors'}[form]
    if form == 'params':
        torch.save({'params': net.state_dict()}, path)
    else:
        safetensors.torch.save_file(net.state_dict(), path)
    network = load_network(path)
    assert (network.name, network.scale, network.channels, network.window) == ('SwinIR', 2, (3, 3), 8)
    descriptor = spandrel.ModelLoader().load_from_file(path)
    for size in ((16, 24), (7, 40), (1, 1)):
        y = run(network, *size)
        assert y.shape == (1, 3, 2 * size[0], 2 * size[1])
        x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
        assert torch.equal(y.clamp(0, 1), descriptor(x))
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    network.net(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_a_program_is_no_network(tmp_path):
    """TorchScript can write files while it is loaded."""
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), tmp_path / 'w.pt')
    with pytest.raises(UserError, match=r'w\.pt: is TorchScript, which is a program'):
        load_network(tmp_path / 'w.pt')


def test_what_needs_spandrel_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'spandrel', None)
    torch.save({'params': swinir().state_dict()}, tmp_path / 'w.pth')
    with pytest.raises(UserError, match=r'w\.pth: is no ELAN: it holds 41 tensors, .*pip install spandrel') as caught:
        load_network(tmp_path / 'w.pth')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('name, content, message', [
    ('foreign.pth', {'params': {'conv.weight': torch.zeros(3)}}, 'of no architecture that is known here'),
    ('list.pth', [1, 2], 'holds a list'),
    ('text.pth', b'no checkpoint', 'cannot be read|no PyTorch checkpoint'),
    ('text.safetensors', b'no checkpoint', 'cannot be read as safetensors'),
    ('empty.pt', b'', 'cut off or damaged'),
    ('huge.pth', {'params': {'conv_first.weight': torch.zeros(10**6, 3, 1, 1), 'conv_first.bias': torch.zeros(1)}},
     'of no architecture|cannot be loaded'),
    ('text.onnx', b'no network', 'ONNX Runtime .*cannot load it|pip install onnxruntime'),
    ('absent.pth', None, 'no such file'),
    ('absent.onnx', None, 'no such file'),
])
def test_what_is_no_network_is_named_in_a_line(name, content, message, tmp_path):
    pytest.importorskip('spandrel')
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(UserError, match=message) as caught:
        load_network(tmp_path / name)
    assert '\n' not in str(caught.value) and name in str(caught.value)


def test_another_architecture_is_found_under_keys_and_prefixes(tmp_path):
    """Beside a discriminator, of which spandrel knows nothing."""
    pytest.importorskip('spandrel')
    net = swinir()
    state = {f'module.generator.{name}': value for name, value in net.state_dict().items()}
    state['module.discriminator.fc.weight'] = torch.zeros(2, 2)
    torch.save({'x': {'state_dict': state}}, tmp_path / 'w.pth')
    network = load_network(tmp_path / 'w.pth')
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert network.name == 'SwinIR' and torch.equal(network.net(x), net(x))


def test_the_nearest_architecture_is_named_with_what_is_missing_of_it(tmp_path):
    pytest.importorskip('spandrel')
    state = {name: value for name, value in swinir().state_dict().items() if 'patch_embed.norm.weight' not in name}
    without = {name: value for name, value in state.items() if not name.startswith('conv_first.')}
    torch.save(without, tmp_path / 'w.pth')
    with pytest.raises(UserError, match=rf'w\.pth: is of no architecture .* holds {len(without)} tensors, .*; nearest '
                                        r'is \w+, of which .*conv_first\.weight.* missing') as caught:
        load_network(tmp_path / 'w.pth')
    assert '\n' not in str(caught.value)


def test_what_is_detected_and_does_not_fit_says_which_shape(tmp_path):
    pytest.importorskip('spandrel')
    from basicsr.archs.rrdbnet_arch import RRDBNet
    torch.save(RRDBNet(3, 3, 4, 8, 1, 4).state_dict(), tmp_path / 'w.pth')  # spandrel's has 32 where this has 4
    with pytest.raises(UserError, match=r'w\.pth: holds 42 tensors and cannot be loaded as ESRGAN .*size mismatch'):
        load_network(tmp_path / 'w.pth')


def write_options(path, network_g, weights, **more):
    paths = {'pretrain_network_g': str(weights) if weights else None}
    path.write_text(yaml.safe_dump({'name': 'x', 'network_g': network_g, 'path': paths, **more}))
    return path


def test_an_option_file_names_a_network_of_the_toolbox(tmp_path):
    net = swinir()
    torch.save({'params': net.state_dict()}, tmp_path / 'w.pth')
    network = load_option_file(write_options(tmp_path / 'o.yml', {'type': 'SwinIR', **SWINIR}, tmp_path / 'w.pth'))
    assert (network.name, network.scale, network.channels, network.multiple, network.window) == (
        'SwinIR', 2, (3, 3), 8, 8)
    assert run(network, 13, 30, batch=2).shape == (2, 3, 26, 60)
    x = torch.rand(1, 3, 16, 8)
    with torch.no_grad():
        assert torch.equal(network.net(x), net(x))


def test_an_option_file_tells_what_weights_do_not(tmp_path):
    arguments = dict(upscale=2, num_feat=16, num_block=2, window_sizes=[2, 6], img_range=1., rgb_mean=[0., 0., 0.])
    net = ELAN(**arguments).eval()
    torch.save({'params': net.state_dict()}, tmp_path / 'w.pth')
    network = load_option_file(write_options(tmp_path / 'o.yml', {'type': 'ELAN', **arguments}, tmp_path / 'w.pth'))
    assert network.window == 6 and network.scale == 2
    x = torch.rand(1, 3, 9, 9)
    with torch.no_grad():
        assert torch.equal(network.net(x), net(x))


@pytest.mark.parametrize('network_g, weights, message', [
    (EDSR, None, 'pretrain_network_g.*not set'),
    (EDSR, 'w.pth', 'does not fit the network: it holds 1 tensor, conv.weight; .*expected the weights of an EDSR'),
    ({'type': 'ELAN', 'upscale': 2}, 'w.pth', 'does not fit the network'),
    ({'type': 'ELEN'}, 'w.pth', 'ELAN'),
    (None, 'w.pth', 'network_g: is missing'),
])
def test_a_wrong_option_file_is_answered_in_a_line(network_g, weights, message, tmp_path):
    torch.save({'params': {'conv.weight': torch.zeros(1)}}, tmp_path / 'w.pth')
    path = write_options(tmp_path / 'o.yml', network_g, weights and tmp_path / weights)
    with pytest.raises(UserError, match=message) as caught:
        load_option_file(path)
    assert '\n' not in str(caught.value)
