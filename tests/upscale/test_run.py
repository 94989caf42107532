"""Which files become which, what is left alone, and how a picture comes out of tiles."""
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from elan_basicsr.archs import cpu
from elan_basicsr.checkpoint import load_elan
from elan_basicsr.errors import UserError
from elan_basicsr.interop.networks import load_network
from elan_basicsr.upscale import enlarge
from elan_basicsr.upscale.enlarge import Enlarger
from elan_basicsr.upscale.plan import plan
from tests.upscale.conftest import WEIGHTS
from tests.upscale.test_wrong_inputs import save


def enlarger(path=WEIGHTS, **options):
    return Enlarger(load_network(path), device=torch.device('cpu'), **options)


def test_a_folder_keeps_its_structure_and_leaves_out_what_is_no_image(run):
    for name in ('in/a.png', 'in/deep/er/b.jpg', 'in/.hidden.png', 'in/._c.jpg'):
        save(name)
    Path('in/notes.txt').write_text('x')
    os.symlink('..', 'in/deep/loop')
    code, out, _ = run('in', '-o', 'in/out')
    assert code == 0 and '2 of 2 done' in out
    assert sorted(str(path) for path in Path('in/out').rglob('*') if path.is_file()) == [
        'in/out/a.png', 'in/out/deep/er/b.jpg']
    assert '2 already there' in run('in', '-o', 'in/out')[1]  # results below the input are no inputs


def test_what_a_folder_or_pattern_holds_beside_images_is_counted_and_named(run):
    save('in/a.png')
    for name in ('b.heic', 'c.HEIC', 'film.mp4', 'notes.txt', '.hidden'):
        Path('in', name).write_text('x')
    code, out, _ = run('in', '-o', 'out')
    assert code == 0 and '1 of 1 done' in out
    assert out.endswith('; 4 files (.heic 2, .mp4 1, .txt 1: b.heic, c.HEIC, film.mp4, …) passed over\n')
    assert run('in/[abn]*', '-o', 'out')[1].endswith('; 2 files (.heic 1, .txt 1: b.heic, notes.txt) passed over\n')
    os.remove('in/a.png')
    code, _, err = run('in', '-o', 'out')
    assert code == 2 and 'holds no images' in err and 'but 4 files (.heic 2' in err


def test_patterns_and_several_inputs(run):
    for name in ('p/a.png', 'p/q/b.png', 'p/q/c.bmp', 'd.tif'):
        save(name)
    assert [(str(job.source), str(job.target)) for job in plan(['p/**/*.png', 'd.tif', 'd.tif'], 'o')[0]] == [
        ('p/a.png', 'o/a.png'), ('p/q/b.png', 'o/q/b.png'), ('d.tif', 'o/d.tif')]


def test_finished_outputs_are_left_alone_unless_asked(run):
    save('a.png')
    Path('out').mkdir()
    Path('out/a.png').write_text('mine')
    code, out, _ = run('a.png', '-o', 'out')
    assert code == 0 and '1 already there' in out and Path('out/a.png').read_text() == 'mine'
    assert run('a.png', '-o', 'out', '--overwrite')[0] == 0 and Image.open('out/a.png').size == (24, 18)
    assert [path.name for path in Path('out').iterdir()] == ['a.png']


def test_an_interrupted_write_leaves_nothing_and_touches_nothing(run, monkeypatch):
    save('a.png')
    Path('out').mkdir()
    Path('out/a.png').write_text('mine')

    def full(self, path, *args, **options):
        Path(path).write_bytes(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Image.Image, 'save', full)
    code, _, err = run('a.png', '-o', 'out', '--overwrite')
    assert code == 1 and 'No space left' in err
    assert Path('out/a.png').read_text() == 'mine' and [path.name for path in Path('out').iterdir()] == ['a.png']


def test_tiles_are_aligned_and_overlap():
    pixels = np.random.default_rng(0).integers(0, 256, (70, 50, 3), np.uint8)
    whole = enlarger(tile=0).pixels(pixels, np.uint8)
    tiled = enlarger(tile=20).pixels(pixels, np.uint8)  # 32 after rounding, with 16 on every side
    with torch.no_grad():
        x = torch.from_numpy(pixels[:, :, :]).permute(2, 0, 1)[None].float() / 255
        corner = load_elan(WEIGHTS)(x[..., :48, :48]).clamp(0, 1).mul(255).round()[0].permute(1, 2, 0).numpy()
    assert (tiled[:64, :64] == corner[:64, :64]).all() and tiled.shape == whole.shape


def random_pixels(h, w, channels=3, dtype=np.uint8):
    return np.random.default_rng(h * w).integers(0, np.iinfo(dtype).max + 1, (h, w, channels), dtype)


def with_little_memory(most, error=None, **options):
    """An Enlarger on whose device a network takes up to `most` pixels at once, and what it says."""
    small, lines = enlarger(**options), []
    net = small.network.net

    def limited(x):
        if x.shape[2] * x.shape[3] > most:
            raise error or torch.OutOfMemoryError('no')
        return net(x)

    small.network.net, small.say = limited, lines.append
    return small, lines


def test_the_tile_is_what_the_memory_allows(monkeypatch):
    chosen = {}
    for budget in (2**20, 2**28, 2**34):
        monkeypatch.setattr(enlarge, 'available_memory', lambda budget=budget: 2 * budget)
        chosen[budget] = enlarger()._fitting_tile(500, 500, 3)
    monkeypatch.setattr(enlarge, 'CPU_BUDGET', 2**34)
    assert enlarger()._fitting_tile(500, 500, 3) == 0
    assert 64 == chosen[2**20] < chosen[2**28] and all(tile % 16 == 0 for tile in chosen.values())
    assert enlarge.available_memory() > 0


def test_a_gpu_whose_memory_torch_keeps_in_reserve_gives_the_same_tile(monkeypatch):
    """What other images have left in torch's cache is free, and a run asks once: frame 1 and frame 2 are cut alike."""
    def taken(free, reserved, allocated):
        monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (free, 2**34))
        monkeypatch.setattr(torch.cuda, 'memory_reserved', lambda device: reserved)
        monkeypatch.setattr(torch.cuda, 'memory_allocated', lambda device: allocated)

    network = load_network(WEIGHTS)
    taken(8 * 2**30, 2**20, 2**20)
    first = Enlarger(network, device=torch.device('cuda'))
    taken(2**20, 8 * 2**30, 2**20)
    later = Enlarger(network, device=torch.device('cuda'))
    assert first._tiles_to_try(720, 1280, 3) == later._tiles_to_try(720, 1280, 3)
    assert first._tiles_to_try(720, 1280, 3)[0] == 0
    taken(2**20, 2**30, 2**30)
    assert first._tiles_to_try(720, 1280, 3)[0] == 0
    assert Enlarger(network, device=torch.device('cuda'))._tiles_to_try(720, 1280, 3)[0] == 64


def test_memory_that_runs_out_halves_the_tile():
    small, lines = with_little_memory(50 * 50, tile=0)
    done = []
    result = small.pixels(random_pixels(64, 64), np.uint8, done.append)
    assert (result == enlarger(tile=32).pixels(random_pixels(64, 64), np.uint8)).all()
    assert sum(done) == 64 * 64 and len(lines) == 1 and 'tiles of 32' in lines[0]
    small.pixels(random_pixels(64, 64), np.uint8)
    assert len(lines) == 1  # the whole image is not tried again


@settings(max_examples=15, deadline=None)
@given(st.permutations([(64, 64), (40, 40), (96, 33), (20, 120), (64, 64)]), st.integers(500, 5000))
def test_what_becomes_of_an_image_does_not_depend_on_those_before_it(sizes, most):
    """Each gets what it gets alone, whichever of the others did not fit."""
    small, _ = with_little_memory(most, tile=0)
    for size in sizes:
        pixels = random_pixels(*size)
        try:
            result = small.pixels(pixels, np.uint8)
        except UserError:
            result = None
        try:
            alone = with_little_memory(most, tile=0)[0].pixels(pixels, np.uint8)
        except UserError:
            alone = None
        assert (result is None) == (alone is None) and (result is None or (result == alone).all())


def test_a_kernel_that_cannot_take_so_much_leads_to_smaller_tiles_and_then_to_one_line():
    error = RuntimeError('CUDA error: invalid configuration argument\nCUDA kernel errors might be')
    small, _ = with_little_memory(50 * 50, error, tile=0)
    assert small.pixels(random_pixels(64, 64), np.uint8).shape == (128, 128, 3)
    with pytest.raises(UserError, match='tile of 16 pixels does not fit'):
        with_little_memory(100, error, tile=0)[0].pixels(random_pixels(64, 64), np.uint8)


def test_a_lost_device_ends_the_run_with_the_first_file(run, monkeypatch):
    """One line and the exit code of a run that can be repeated, not a line for each of the files."""
    for name in ('in/a.png', 'in/b.png'):
        save(name)
    calls = []

    def illegal(self, pixels):
        calls.append(pixels)
        raise RuntimeError('CUDA error: an illegal memory access was encountered')

    monkeypatch.setattr(Enlarger, '_forward', illegal)
    code, _, err = run('in', '-o', 'out')
    assert code == 1 and len(calls) == 2 and 'illegal' in err  # the fault of each file
    monkeypatch.setattr(enlarge, '_is_lost', lambda device: True)
    code, _, err = run('in', '-o', 'out')
    assert code == 1 and len(calls) == 3 and err.count('\n') == 1 and 'illegal' in err


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), planes=st.sampled_from([1, 3]), channels=st.sampled_from([1, 3]),
       dtype=st.sampled_from([np.uint8, np.uint16]))
def test_rounding_on_the_device_is_numpys(seed, planes, channels, dtype):
    """To the byte, halves and what lies beyond 0..1 included."""
    generator, most = np.random.default_rng(seed), np.float32(np.iinfo(dtype).max)
    y = generator.uniform(-0.2, 1.2, (planes, 9, 7)).astype(np.float32)
    y[:, ::2] = (generator.integers(0, most, y[:, ::2].shape) + np.float32(0.5)) / most
    expected = y.clip(0, 1)
    if channels < planes:
        expected = torch.from_numpy(expected).mean(0, keepdim=True).numpy()
    expected = np.rint(expected * most).astype(dtype).transpose(1, 2, 0)
    result = enlarge._to_integers(torch.from_numpy(y), channels, dtype).numpy()
    assert result.dtype == dtype and result.flags['C_CONTIGUOUS'] and (result == expected).all()


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_what_leaves_a_gpu_are_integers(dtype):
    with FakeTensorMode():
        result = enlarge._to_integers(torch.empty(3, 8, 6, device='cuda'), 1, dtype)
    assert result.device.type == 'cuda' and result.shape == (8, 6, 1) and result.element_size() == dtype().itemsize


def test_read_only_and_turned_pixels_go_in_without_a_warning(recwarn):
    """Frames of a video are read-only, and OpenCV's colours are views from the last channel to the first."""
    pixels = random_pixels(20, 24, 3, np.uint16)
    plain = enlarger().pixels(pixels, np.uint16)
    turned = pixels[..., ::-1].copy()[..., ::-1]
    turned.flags.writeable = False
    assert (enlarger().pixels(turned, np.uint16) == plain).all()
    assert (enlarger().pixels(turned[..., :1], np.uint16) == enlarger().pixels(pixels[..., :1], np.uint16)).all()
    assert not recwarn


def test_self_ensemble_and_half_precision(run, monkeypatch):
    monkeypatch.setattr(cpu, 'stand_in', lambda *_: None)  # which computes in float32 under autocast, too
    save('a.png')
    assert run('a.png', '-o', 'plain')[0] == run('a.png', '-o', 'eight', '--self-ensemble')[0] == 0
    assert run('a.png', '-o', 'half', '--dtype', 'bfloat16')[0] == 0
    plain, eight, half = (np.asarray(Image.open(f'{name}/a.png'), int) for name in ('plain', 'eight', 'half'))
    assert (plain != eight).any() and (plain != half).any() and plain.shape == eight.shape == half.shape


@pytest.mark.slow
def test_set5_with_a_trained_network(shared, run):
    """PyTorch's own output to the byte when whole; in tiles of 64 pixels at least 55 dB from it."""
    weights, folder = shared / 'trained' / 'light_x4.pt', shared / 'data' / 'Set5' / 'LRbicx4'
    assert run(str(folder), '-o', 'whole', '--tile', '0', weights=weights)[0] == 0
    assert run(str(folder), '-o', 'tiled', '--tile', '64', weights=weights)[0] == 0
    net = load_elan(weights)
    for path in folder.glob('*.png'):
        x = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            own = net(x).clamp(0, 1).mul(255).round()[0].permute(1, 2, 0).numpy()
        whole, tiled = (np.asarray(Image.open(f'{name}/{path.name}'), float) for name in ('whole', 'tiled'))
        assert (whole == own).all()
        assert 10 * np.log10(255**2 / ((whole - tiled)**2).mean()) > 55


def test_memory_that_runs_out_in_onnx_runtime_is_told_as_such(tmp_path):
    """Here by a network that makes 2**40 images of one."""
    pytest.importorskip('onnxruntime')
    onnx = pytest.importorskip('onnx')
    helper, kind = onnx.helper, onnx.TensorProto
    many = helper.make_tensor('many', kind.INT64, [4], [2**40, 1, 1, 1])
    model = helper.make_model(helper.make_graph(
        [helper.make_node('Expand', ['x', 'many'], ['y'])], 'greedy',
        [helper.make_tensor_value_info('x', kind.FLOAT, [None, 3, None, None])],
        [helper.make_tensor_value_info('y', kind.FLOAT, [None, 3, None, None])], [many]),
        opset_imports=[helper.make_opsetid('', 18)], ir_version=8)
    helper.set_model_props(model, {'scale': '1', 'window': '16'})
    onnx.save(model, tmp_path / 'greedy.onnx')
    greedy = enlarger(tmp_path / 'greedy.onnx', tile=0)
    lines = []
    greedy.say = lines.append
    with pytest.raises(UserError, match='tile of 16 pixels does not fit'):
        greedy.pixels(random_pixels(32, 32), np.uint8)
    assert len(lines) == 1 and 'tiles of 16' in lines[0]
