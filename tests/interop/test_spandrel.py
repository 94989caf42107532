"""A program built on spandrel loads every form of ELAN, and takes it for nothing else."""
import pytest
import safetensors.torch
import torch

from elan_basicsr.archs.elan_arch import ELAN
from elan_basicsr.checkpoint import load_elan

from ..archs.golden import GOLDEN, load_golden

spandrel = pytest.importorskip('spandrel')


@pytest.mark.parametrize('name', GOLDEN)
def test_a_reference_loads_from_its_file(name):
    golden = load_golden(name)
    descriptor = spandrel.ModelLoader().load_from_file(golden.checkpoint)
    assert descriptor.architecture.id == 'ELAN' and descriptor.purpose == 'SR'
    assert descriptor.scale == int(name[-1])
    assert (descriptor.input_channels, descriptor.output_channels) == (3, 3)
    x = golden.tensor('input').float() / 255
    with torch.no_grad():
        expected = load_elan(golden.checkpoint)(x)
    assert torch.equal(descriptor(x), expected.clamp(0, 1))
    reference = (golden.tensor('output') / 255).clamp(0, 1)
    assert (descriptor(x) - reference).abs().max() < 1e-4


@pytest.mark.parametrize('form', ['bare', 'params', 'params_ema', 'safetensors', 'without mean'])
def test_every_form_is_detected(form, tmp_path):
    golden = load_golden('tiny_shared_x2')
    net = load_elan(golden.checkpoint)
    state = net.state_dict()
    path = tmp_path / ('w.safetensors' if form == 'safetensors' else 'w.pth')
    if form == 'safetensors':
        safetensors.torch.save_file(state, path)
    elif form == 'without mean':  # traiNNer-redux
        official = torch.load(golden.checkpoint, weights_only=True)['model_state_dict']
        state = {key.removeprefix('module.'): value for key, value in official.items()
                 if 'sub_mean' not in key and 'add_mean' not in key}
        torch.save(state, path)
        net = load_elan(path)
        assert net.img_range == 1
    else:
        torch.save(state if form == 'bare' else {form: state}, path)
    x = torch.rand(1, 3, 9, 30)
    with torch.no_grad():
        assert torch.equal(spandrel.ModelLoader().load_from_file(path)(x), net(x).clamp(0, 1))


@pytest.mark.parametrize('arguments, tags', [
    (dict(upscale=3, num_feat=60, num_block=4, num_share=1), ['light', '60nf', '4nb', '1ns']),
    (dict(upscale=1, num_feat=180, num_block=2, num_share=0), ['large', '180nf', '2nb', '0ns']),
    (dict(upscale=2, num_feat=15, num_block=3, num_share=2, num_in_ch=1, num_out_ch=1),
     ['light', '15nf', '3nb', '2ns']),
    (dict(upscale=2, num_feat=15, num_block=1, num_share=0, expansion=3), ['light', '15nf', '1nb', '0ns']),
])
def test_hyperparameters_become_the_description(arguments, tags):
    state = ELAN(**arguments).state_dict()
    descriptor = spandrel.MAIN_REGISTRY.load(state)
    assert descriptor.tags == tags
    assert descriptor.scale == arguments['upscale']
    assert descriptor.purpose == ('SR' if arguments['upscale'] > 1 else 'Restoration')
    assert descriptor.input_channels == arguments.get('num_in_ch', 3)
    assert descriptor.size_requirements.none
    loaded = descriptor.model.state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)


def test_detection_keeps_apart():
    state = ELAN(upscale=2, num_feat=15, num_block=2).state_dict()
    official = torch.load(load_golden('tiny_masked_x4').checkpoint, weights_only=True)['model_state_dict']
    official = {key.removeprefix('module.'): value for key, value in official.items()}
    ours = spandrel.MAIN_REGISTRY['ELAN']
    for support in spandrel.MAIN_REGISTRY:
        assert support is ours or not (support.detect(state) or support.detect(official)), support.architecture.id
    from basicsr.archs.edsr_arch import EDSR
    from basicsr.archs.rcan_arch import RCAN
    for other in (EDSR(3, 3, num_feat=8, num_block=1), RCAN(3, 3, num_feat=16, num_group=1, num_block=1)):
        assert not ours.detect(other.state_dict())
