import sys

import pytest
import torch

from elan_basicsr import ELAN
from elan_basicsr.errors import UserError
from elan_basicsr.report.subjects import Subject

NETWORK = '''
import torch
from timm.models.layers import DropPath
from models.block import body


class ELAN(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.body = body(args.colors, args.colors * args.scale**2)

    def forward(self, x):
        return torch.nn.functional.pixel_shuffle(self.body(x), self.args.scale)
'''


@pytest.fixture
def checkout(tmp_path):
    """A repository laid out as the authors' is, with a network of one convolution."""
    models = tmp_path / 'checkout' / 'models'
    models.mkdir(parents=True)
    (models / '__init__.py').touch()
    (models / 'elan_network.py').write_text(NETWORK)
    (models / 'block.py').write_text('import torch\ndef body(a, b):\n    return torch.nn.Conv2d(a, b, 1)\n')
    return models.parent


@pytest.mark.parametrize('spec, scale, parameters', [
    ('ELAN-light', 2, 582_012), ('ELAN-light', 3, 590_127), ('ELAN-light', 4, 601_488), ('ELAN', 4, 8_312_448),
    ('SwinIR-light', 4, 929_628), ('ELAN-light:num_feat=15,window_sizes=[4,8],num_share=0,num_block=1', 2, None)])
def test_names_with_and_without_arguments(spec, scale, parameters):
    if parameters is None:
        with pytest.raises(UserError, match='num_feat'):
            Subject(spec, scale).build()
        return
    assert Subject(spec, scale).complexity(16, 16).parameters == parameters


def test_arguments_are_read_as_yaml():
    net = Subject('ELAN-light:num_feat=16,window_sizes=[4, 8],num_share=0,num_block=2,use_checkpoint=true', 3).build()
    assert (net.upscale, net.window_sizes, len(net.body), net.use_checkpoint) == (3, (4, 8), 2, True)


def test_weights_are_the_same_each_time():
    first, second = (Subject('ELAN:num_feat=15,num_block=1', 2).build().head.weight for _ in range(2))
    assert torch.equal(first, second)


def test_an_architecture_of_the_registry_gets_scale_and_colours():
    net = Subject('EDSR:num_feat=8,num_block=1', 2).build()
    assert net(torch.rand(1, 3, 4, 5)).shape == (1, 3, 8, 10)


def test_an_option_file_and_a_checkpoint(tmp_path):
    file = tmp_path / 'tiny.yml'
    file.write_text('network_g: {type: ELAN, upscale: 2, num_feat: 15, num_block: 2}\n')
    subject = Subject(str(file), 2)
    weights = tmp_path / 'weights.pth'
    net = ELAN(upscale=2, num_feat=15, num_block=2)
    torch.save({'params': net.state_dict()}, weights)
    assert subject.name == 'tiny' and subject.build().head.out_channels == 15
    assert torch.equal(Subject(str(weights), 2).build().head.weight, net.head.weight)
    with pytest.raises(UserError, match='enlarges by 2; expected 4'):
        Subject(str(weights), 4).build()


def test_labels():
    assert Subject.parse('small=ELAN:num_feat=15', 2) == Subject('ELAN:num_feat=15', 2, None, 'small')
    assert Subject.parse('ELAN:num_feat=15', 2).name == 'ELAN:num_feat=15'


@pytest.mark.parametrize('spec, message', [
    ('ELAN-lihgt', 'is no file and no network'), ('ELAN:expansoin=3', 'did you mean expansion'),
    ('ELAN:num_feat=[', 'cannot be read'), ('ELAN:num_feat=16', 'num_feat'), ('official', 'expected --official DIR'),
    ('ELAN:upscale=3', 'enlarges by 3')])
def test_mistakes_are_one_line(spec, message):
    with pytest.raises(UserError, match=message) as error:
        Subject(spec, 4).build()
    assert '\n' not in str(error.value)


def test_a_network_whose_arguments_make_another_size_is_refused_before_it_is_timed():
    """SwinIR without an upsampler is one for images that are sharp already, and others by default do nothing at all."""
    line = 'makes 16x24 pixels of 16x24; expected 64x96, as --scale says; give its arguments'
    with pytest.raises(UserError, match=line):
        Subject('SwinIR:img_size=16,window_size=8,depths=[1],num_heads=[2],embed_dim=8', 4).complexity(24, 16)


def test_the_official_network_comes_from_its_checkout(checkout):
    path, modules = list(sys.path), set(sys.modules)
    subject = Subject('official', 3, str(checkout))
    net = subject.build()
    args = net.args
    assert (args.scale, args.colors, args.window_sizes, args.m_elan, args.c_elan, args.n_share, args.r_expand,
            args.rgb_range) == (3, 3, [4, 8, 16], 36, 180, 0, 2, 255)
    assert subject.value_range == 255 and Subject('ELAN', 3).value_range == 1
    assert sys.path == path and 'models' not in sys.modules and 'timm' not in set(sys.modules) - modules
    assert not list(checkout.rglob('__pycache__'))
    assert net(torch.rand(1, 3, 4, 4)).shape == (1, 3, 12, 12)


def test_the_papers_macs_of_the_official_network_are_those_of_ours(checkout):
    assert round(Subject('official-light', 4, str(checkout)).complexity(180, 320).paper_macs / 1e9, 1) == 43.2


def test_what_is_no_checkout_of_it(tmp_path, checkout):
    with pytest.raises(UserError, match=r'has no models/elan_network\.py'):
        Subject('official', 4, str(tmp_path)).build()
    (checkout / 'models' / 'block.py').write_text('import a_package_that_is_missing\n')
    with pytest.raises(UserError, match='pip install a_package_that_is_missing'):
        Subject('official', 4, str(checkout)).build()
