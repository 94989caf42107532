"""Which files become which, what is left alone, and how a picture comes out of tiles."""
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from elan_basicsr.archs import cpu
from elan_basicsr.checkpoint import load_elan
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


def test_patterns_and_several_inputs(run):
    for name in ('p/a.png', 'p/q/b.png', 'p/q/c.bmp', 'd.tif'):
        save(name)
    assert [(str(job.source), str(job.target)) for job in plan(['p/**/*.png', 'd.tif', 'd.tif'], 'o')] == [
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


def test_the_tile_is_what_the_memory_allows(monkeypatch):
    chosen = {}
    for budget in (2**20, 2**28, 2**34):
        monkeypatch.setattr(enlarge, 'available_memory', lambda budget=budget: 2 * budget)
        chosen[budget] = enlarger()._fitting_tile(500, 500)
    monkeypatch.setattr(enlarge, 'CPU_BUDGET', 2**34)
    assert enlarger()._fitting_tile(500, 500) == 0
    assert 64 == chosen[2**20] < chosen[2**28] and all(tile % 16 == 0 for tile in chosen.values())
    assert enlarge.available_memory() > 0


def test_memory_that_runs_out_halves_the_tile():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    small = enlarger(tile=0)
    net, done = small.network.net, []

    def net_of_little_memory(x):
        if x.shape[2] * x.shape[3] > 50 * 50:
            raise torch.OutOfMemoryError('no')
        return net(x)

    small.network.net = net_of_little_memory
    small._fitting_tile = lambda h, w: 0
    assert (small.pixels(pixels, np.uint8, done.append) == enlarger(tile=32).pixels(pixels, np.uint8)).all()
    assert sum(done) == 64 * 64 and small.tile == 32


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
