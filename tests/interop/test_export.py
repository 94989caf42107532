"""An exported network computes what the original computes, at every size, and says what it is."""
import pytest
import torch

from elan_basicsr.archs.elan_arch import ELAN
from elan_basicsr.checkpoint import load_elan, save_atomic
from elan_basicsr.cli import main
from elan_basicsr.errors import UserError
from elan_basicsr.interop.networks import load_network
from elan_basicsr.version import __version__

pytest.importorskip('onnxscript')
pytest.importorskip('onnxruntime')
from elan_basicsr.interop.export import OLDEST_TORCH, export

enough = pytest.mark.skipif(torch.__version__ < OLDEST_TORCH, reason='torch is older than what exports ELAN')

# Single pixels, less than a window, whole windows, odd, many to one side, several images.
SIZES = ((1, 1, 1), (1, 16, 16), (1, 5, 64), (1, 64, 64), (2, 17, 9), (3, 33, 47), (1, 128, 2))


def calibrated(**arguments) -> ELAN:
    """A small network whose attention is as sharp as a trained one's."""
    torch.manual_seed(0)
    net = ELAN(**{**dict(upscale=2, num_feat=15, num_block=2, num_share=0), **arguments})
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        net.train()(torch.rand(4, net.head.in_channels, 32, 32))
    return net.eval()


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp('export') / 'source.pth'
    save_atomic({'params': calibrated().state_dict()}, path)
    return path


@pytest.fixture(scope='module')
def dynamic(source):
    """A dynamic ONNX file, checked as it was written."""
    target = source.with_name('dynamic.onnx')
    checks = export(source, target, dynamic=True, check=True)
    assert len(checks) >= 5 and all(difference < 1e-4 for _, difference in checks)
    return target


def images():
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(batch, 3, h, w, generator=generator) for batch, h, w in SIZES]


@enough
@pytest.mark.slow
def test_a_dynamic_file_agrees_at_every_size(source, dynamic):
    net, network = load_elan(source), load_network(dynamic)
    assert (network.name, network.scale, network.channels, network.multiple, network.window) == (
        'ELAN', 2, (3, 3), 1, 16)
    for x in images():
        with torch.no_grad():
            expected = net(x)
        assert network.net(x).shape == expected.shape
        assert (network.net(x) - expected).abs().max() < 1e-4, x.shape


@enough
@pytest.mark.slow
def test_the_file_says_what_it_is_and_nothing_of_this_machine(source, dynamic):
    import onnx
    model = onnx.load(dynamic)
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert said['scale'] == '2' and said['range'] == '0..1' and said['colour'] == 'RGB'
    assert said['licence'].startswith('Apache-2.0') and said['producer'] == f'elan-basicsr {__version__}'
    [image], [restored] = model.graph.input, model.graph.output
    assert (image.name, restored.name) == ('input', 'output')
    dims = [dim.dim_param or dim.dim_value for dim in image.type.tensor_type.shape.dim]
    assert dims == ['batch', 3, 'height', 'width']
    assert b'/site-packages/' not in dynamic.read_bytes() and b'elan_arch.py' not in dynamic.read_bytes()


@enough
def test_a_fixed_file_takes_smaller_images_and_refuses_larger_ones(source, capsys, tmp_path):
    target = tmp_path / 'fixed.onnx'
    assert main(['export', str(source), str(target), '--size', '33', '20', '--check']) == 0
    assert '1x33x20: largest difference to PyTorch' in capsys.readouterr().out
    network = load_network(target)
    assert network.scale == 2
    x = torch.rand(1, 3, 20, 20)
    assert network.net(x).shape == (1, 3, 40, 40)
    with pytest.raises(UserError, match=r'fixed\.onnx: is made for images of 20x33, not 40x33.*--dynamic'):
        network.net(torch.rand(1, 3, 33, 40))


@enough
def test_half_precision_and_an_older_opset(source, tmp_path):
    import onnx
    [(_, difference)] = export(source, tmp_path / 'h.onnx', size=(24, 40), fp16=True, opset=18, check=True)
    assert 0 < difference < 1e-2
    model = onnx.load(tmp_path / 'h.onnx')
    assert {entry.version for entry in model.opset_import if not entry.domain} == {18}
    halves = sum(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)
    assert halves > 10 and load_network(tmp_path / 'h.onnx').net(torch.rand(1, 3, 24, 40)).dtype == torch.float32


@enough
@pytest.mark.parametrize('arguments', [dict(num_share=1, num_block=4), dict(num_in_ch=1, num_out_ch=1)])
def test_variants_are_exported(arguments, tmp_path):
    save_atomic({'params': calibrated(**arguments).state_dict()}, tmp_path / 'a.pth')
    [(_, difference)] = export(tmp_path / 'a.pth', tmp_path / 'a.onnx', size=(17, 31), check=True)
    assert difference < 1e-4


@enough
def test_torch_export_takes_every_size(source):
    net = load_elan(source)
    free = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        program = torch.export.export(net, (torch.rand(2, 3, 20, 35),), dynamic_shapes=({0: free, 2: free, 3: free},),
                                      prefer_deferred_runtime_asserts_over_guards=True).module()
        for x in images():
            assert (program(x) - net(x)).abs().max() < 1e-4, x.shape


@enough
@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::torch.jit.TracerWarning')
def test_torchscript_takes_every_size(source, tmp_path):
    net = load_elan(source)
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(net, torch.rand(1, 3, 20, 35)), tmp_path / 'traced.pt')
        traced = torch.jit.load(tmp_path / 'traced.pt')
        for x in images():
            assert (traced(x) - net(x)).abs().max() < 1e-4, x.shape


@enough
def test_a_wrong_call_is_answered_in_a_line_and_writes_nothing(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'there.onnx').write_bytes(b'precious')
    (tmp_path / 'text.pth').write_text('no checkpoint')
    for words, message in (
            ([str(source), 'there.onnx'], 'there.onnx: is there already'),
            ([str(source), 'x.pth'], 'x.pth: expected a name that ends in .onnx'),
            ([str(source), 'absent/x.onnx'], 'the folder absent does not exist'),
            (['text.pth', 'x.onnx'], 'text.pth: is no PyTorch checkpoint'),
            (['absent.pth', 'x.onnx'], 'absent.pth: no such file'),
            ([str(source), 'x.onnx', '--size', '0', '5'], '--size 0 5: expected'),
            ([str(source), 'x.onnx', '--opset', '3'], '--opset 3: torch.onnx cannot write it')):
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert main(['export', *words]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith('basicsr: error: ') and message in printed and printed.count('\n') == 1
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(torch.__version__ >= OLDEST_TORCH, reason='torch exports ELAN')
def test_an_older_torch_is_one_line(source, tmp_path, capsys):
    assert main(['export', str(source), str(tmp_path / 'a.onnx')]) == 2
    assert 'export needs torch 2.11 or later' in capsys.readouterr().err
