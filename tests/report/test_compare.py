"""A comparison gives the digits of `basicsr test`, and a report that stands alone."""
import csv
import json
import os
import re
import shutil
import sys

import cv2
import numpy as np
import pytest
import torch
import yaml

from elan_basicsr import ELAN
from elan_basicsr.cli import main
from elan_basicsr.interop.networks import Network
from elan_basicsr.report import compare as module
from elan_basicsr.report.compare import compare, most_different_square

pytest.importorskip('matplotlib')
NAMES = ['first', '<b> & second', 'EDSR', 'bicubic']


@pytest.fixture(scope='module', autouse=True)
def small_cost():
    """Networks are timed on a small image, which takes seconds less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, 'COST_SIZE', (64, 96))
        yield


@pytest.fixture(scope='module')
def inputs(data, tmp_path_factory):
    """Two ELANs, an EDSR with its option file, and a set as `basicsr data benchmark` lays it out, all x2 and small."""
    from basicsr.utils.registry import ARCH_REGISTRY
    root = tmp_path_factory.mktemp('inputs')
    for seed, name in enumerate(('a', 'b')):
        torch.manual_seed(seed)
        net = ELAN(upscale=2, num_feat=15, num_block=2)
        torch.save({'params': net.state_dict()}, root / f'{name}.pth')
    arguments = dict(num_in_ch=3, num_out_ch=3, num_feat=8, num_block=1, upscale=2)
    torch.save({'params': ARCH_REGISTRY.get('EDSR')(**arguments).state_dict()}, root / 'edsr.pth')
    (root / 'edsr.yml').write_text(yaml.safe_dump({
        'scale': 2, 'network_g': {'type': 'EDSR', **arguments},
        'path': {'pretrain_network_g': str(root / 'edsr.pth')}}))
    shutil.copytree(data / 'test' / 'GT', root / 'three' / 'GTmod12')
    shutil.copytree(data / 'test' / 'LR', root / 'three' / 'LRbicx2')
    return root


@pytest.fixture(scope='module')
def report(inputs, tmp_path_factory):
    """The folder of a report."""
    out = tmp_path_factory.mktemp('report') / 'new'
    files = [f'first={inputs / "a.pth"}', f'<b> & second={inputs / "b.pth"}', f'EDSR={inputs / "edsr.yml"}', 'bicubic']
    assert main(['compare', *files, '--data', str(inputs / 'three'), '-o', str(out)]) == 0
    return out


def rows_of(report):
    with open(report / 'per_image.csv', newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def test_the_digits_are_those_of_basicsr_test(inputs, report, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    border = {'crop_border': 2}
    options = {
        'name': 'check', 'model_type': 'ELANModel', 'scale': 2, 'num_gpu': 0,
        'datasets': {'test': {'name': 'three', 'type': 'PairedImageDataset', 'io_backend': {'type': 'disk'},
                              'dataroot_gt': str(inputs / 'three' / 'GTmod12'),
                              'dataroot_lq': str(inputs / 'three' / 'LRbicx2')}},
        'network_g': {'type': 'ELAN', 'upscale': 2, 'num_feat': 15, 'num_block': 2},
        'path': {'pretrain_network_g': str(inputs / 'a.pth')},
        'val': {'metrics': {'psnr_y': {'type': 'calculate_psnr', 'test_y_channel': True, **border},
                            'ssim_y': {'type': 'calculate_ssim', 'test_y_channel': True, **border},
                            'psnr_rgb': {'type': 'calculate_psnr', **border},
                            'ssim_rgb': {'type': 'calculate_ssim', **border}}},
    }
    (tmp_path / 'test.yml').write_text(yaml.safe_dump(options))
    assert main(['test', '-opt', 'test.yml']) == 0
    log = next((tmp_path / 'results' / 'check').glob('*.log')).read_text()
    means = json.loads((report / 'comparison.json').read_text())['means'][0]
    assert means['network'] == 'first' and means['images'] == 3
    for metric, value in re.findall(r'# (\w+): ([\d.]+)', log):
        assert f'{means[metric]:.4f}' == value
    # The same sets from the option file are the same images.
    assert main(['compare', str(inputs / 'a.pth'), '-opt', 'test.yml', '-o', 'again']) == 0
    assert [row['psnr_y'] for row in rows_of(tmp_path / 'again')] == [
        row['psnr_y'] for row in rows_of(report) if row['network'] == 'first']


def test_every_image_is_in_the_tables_with_every_network(report):
    rows = rows_of(report)
    assert [row['network'] for row in rows] == NAMES * 3
    assert sorted({row['image'] for row in rows}) == ['hubble_deep_field', 'immunohistochemistry', 'retina']
    result = json.loads((report / 'comparison.json').read_text())
    assert [float(row['psnr_y']) for row in rows] == [row['psnr_y'] for row in result['images']]
    assert len(result['differences']) == 2 * 6
    for row in rows:
        name = row["network"].replace("<b> & second", "_b_second")
        written = report / 'images' / 'three' / f'{row["image"]}_{name}.png'
        assert cv2.imread(str(written)) is not None


def test_the_cost_of_each_network_is_in_the_tables_and_figures(report):
    first, second, edsr, bicubic = json.loads((report / 'comparison.json').read_text())['networks']
    assert first['parameters'] == second['parameters'] == sum(
        p.numel() for p in ELAN(upscale=2, num_feat=15, num_block=2).parameters())
    assert (first['architecture'], edsr['architecture']) == ('ELAN', 'EDSR')
    # EDSR at 32x48: convolutions 3-8, twice 8-8, 8-8 and 8-32 there, 8-3 on the enlarged map.
    assert edsr['macs'] == 9 * 32 * 48 * (3 * 8 + 3 * 8 * 8 + 8 * 32 + 4 * 8 * 3)
    assert first['paper_macs'] > 0 and edsr['paper_macs'] is None
    assert all(row['latency'] > 0 for row in (first, second, edsr)) and bicubic['latency'] is None
    for row in (first, second, edsr):
        assert row['latency_min'] <= row['latency'] <= row['latency_max']
    assert re.search(r'>\d+\.\d \(\d+\.\d–\d+\.\d\)</td>', (report / 'report.html').read_text(encoding='utf-8'))
    assert bicubic['memory'] is None and bicubic['macs'] is None
    assert {path.name for path in (report / 'figures').iterdir()} >= {'psnr_latency.png', 'psnr_macs.png'}


def test_networks_are_timed_in_turn():
    """So that a machine that slows down slows all of them: what a report shows is medians and their spread."""
    order = []

    class Noted(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            if x.device.type != 'meta':
                order.append(self.name)
            return x

    contenders = [module.Contender(name, Network(Noted(name), 1, (3, 3), 1, 1, name)) for name in 'ab']
    rows = module.costs([*contenders, module.Contender('bicubic', None)], 1, 'cpu')
    assert ''.join(order).startswith('ab' + 'ab' + 'ba' + 'ab' + 'ba' + 'ab')
    assert [row['latency'] is None for row in rows] == [False, False, True]


def test_hr_images_alone_are_reduced_by_the_bicubic(inputs, report, tmp_path):
    assert compare([str(inputs / 'a.pth')], data=[str(inputs / 'three' / 'GTmod12')], out=tmp_path / 'out') == 0
    ours = {row['image']: row['psnr_y'] for row in rows_of(tmp_path / 'out')}
    assert ours == {row['image']: row['psnr_y'] for row in rows_of(report) if row['network'] == 'first'}


def test_every_network_is_averaged_over_the_same_images_and_what_is_left_out_is_named(inputs, tmp_path, capsys):
    """PSNR of flat images is infinite for bicubic only, and images of a few pixels have no SSIM: neither counts."""
    (tmp_path / 'set').mkdir()
    photo = next((inputs / 'three' / 'GTmod12').iterdir())
    shutil.copy(photo, tmp_path / 'set' / f'photo{photo.suffix}')
    for name, edge, value in (('grey', 48, 128), ('tiny', 12, 90)):
        cv2.imwrite(str(tmp_path / 'set' / f'{name}.png'), np.full((edge, edge, 3), value, np.uint8))
    out = tmp_path / 'out'
    assert main(['compare', str(inputs / 'a.pth'), f'b={inputs / "b.pth"}', 'bicubic', '--data', str(tmp_path / 'set'),
                 '-o', str(out)]) == 0
    text = (out / 'comparison.json').read_text(encoding='utf-8')
    result = json.loads(text, parse_constant=lambda word: pytest.fail(f'{word} is no JSON'))
    rows = {(row['image'], row['network']): row for row in result['images']}
    for mean in result['means']:
        assert mean['psnr_y'] == rows['photo', mean['network']]['psnr_y'] is not None
        assert mean['ssim_y'] == np.mean([rows[image, mean['network']]['ssim_y'] for image in ('grey', 'photo')])
    assert {difference['images'] for difference in result['differences'] if difference['metric'] == 'psnr_y'} == {1}
    left = {each['metric']: each['images'] for each in result['left_out']}
    assert left['psnr_y'] == {'grey': ['bicubic'], 'tiny': ['bicubic']}
    assert left['ssim_y'] == {'tiny': ['a', 'b', 'bicubic']}
    note = 'PSNR Y (dB) on set: 2 of 3 images count for no network, since some have no value there: grey (bicubic), ' \
        'tiny (bicubic); it is infinite where a result equals HR'
    assert any(each.startswith(note) for each in result['notes'])
    assert note in ' '.join(capsys.readouterr().out.split())
    assert note in (out / 'report.html').read_text(encoding='utf-8')


def test_an_image_whose_name_is_not_utf8_is_compared(inputs, tmp_path):
    (tmp_path / 'set').mkdir()
    photo = next((inputs / 'three' / 'GTmod12').iterdir())
    shutil.copy(photo, tmp_path / 'set' / (os.fsdecode(b'c\xffv') + photo.suffix))
    assert main(['compare', str(inputs / 'a.pth'), '--data', str(tmp_path / 'set'), '-o', str(tmp_path / 'out')]) == 0
    [row] = json.loads((tmp_path / 'out' / 'comparison.json').read_text(encoding='utf-8'))['images']
    assert row['image'] == os.fsdecode(b'c\xffv') and 'c\\udcffv' in (tmp_path / 'out' / 'per_image.csv').read_text()


def test_nothing_is_overwritten_unasked(inputs, report, capsys):
    before = {path: path.read_bytes() for path in report.rglob('*') if path.is_file()}
    words = ['compare', str(inputs / 'a.pth'), '--data', str(inputs / 'three'), '-o', str(report)]
    assert main(words) == 2
    assert 'nothing is overwritten unasked' in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in report.rglob('*') if path.is_file()}


def test_the_square_is_where_networks_differ_most():
    images = [np.zeros((60, 150, 3), np.uint8) for _ in range(3)]
    images[1][30:50, 100:120] = 200
    left, top, edge = most_different_square(images)
    assert edge == 24 and left <= 100 and left + edge >= 120 and top <= 30 and top + edge >= 50
    assert most_different_square([np.zeros((9, 7, 3), np.uint8)] * 2) == (0, 0, 7)


@pytest.mark.parametrize('words, expected', [
    (['bicubic', '--data', '{three}'], 'nothing but bicubic'),
    (['{a}'], 'no images; expected --data DIR or -opt FILE'),
    (['{a}', '--data', '{root}/absent'], 'absent: no such folder'),
    (['{root}/absent.pth', '--data', '{three}'], 'absent.pth: no such file'),
    (['{root}/absent.yml', '--data', '{three}'], 'absent.yml: no such option file'),
    (['x={a}', 'x={b}', '--data', '{three}'], 'the name x is taken'),
    (['HR={a}', '--data', '{three}'], 'the name HR is taken'),
    (['{a}', '--data', '{three}', '--images', 'lena'], '--images lena: no such image in the data'),
    (['{a}', '--data', '{three}', '--crop', '50', '50', '60'], '--crop 50 50 60: is not inside'),
    (['{a}', '--data', '{three}', '--crop', '0', '0', '0'], '--crop 0 0 0: is not inside'),
    (['{a}', '{x3}', '--data', '{three}'], 'expected networks of one scale'),
    (['{a}', '--data', '{three}', '{three}'], 'expected each set and image once'),
    (['{a}', '--data', '{three}', '--logs', '{root}'], 'holds no train_'),
    (['{a}', '--data', '{three}', '-o', '{a}'], 'is a file, expected a folder'),
    (['{x3}', '--data', '{three}'], 'LRbicx3: no such folder'),
])
def test_a_mistake_is_one_line_and_nothing_is_written(words, expected, inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(ELAN(upscale=3, num_feat=15, num_block=2).state_dict(), tmp_path / 'x3.pth')
    values = {'root': inputs, 'three': inputs / 'three', 'a': inputs / 'a.pth', 'b': inputs / 'b.pth', 'x3': 'x3.pth'}
    assert main(['compare', *(word.format(**values) for word in words)]) == 2
    printed = capsys.readouterr().err
    assert expected in printed and printed.count('\n') == 1
    assert not (tmp_path / 'results').exists()


def test_a_checkpoint_of_a_run_is_named_after_the_run(inputs, tmp_path):
    path = tmp_path / 'experiments' / 'my_run' / 'models' / 'net_g_5000.pth'
    path.parent.mkdir(parents=True)
    shutil.copy(inputs / 'a.pth', path)
    found = module.load_contenders([str(path), str(path), str(inputs / 'a.pth')], 'cpu')
    assert [contender.name for contender in found] == ['my_run', 'my_run-2', 'a']


@pytest.mark.slow
def test_the_trained_network_has_its_known_figures_on_set5(shared, tmp_path):
    compare([str(shared / 'trained' / 'light_x4.pt'), 'bicubic'], data=[str(shared / 'data' / 'Set5')],
            out=tmp_path / 'out')
    ours, bicubic = json.loads((tmp_path / 'out' / 'comparison.json').read_text())['means']
    assert (round(ours['psnr_y'], 4), round(ours['ssim_y'], 4)) == (30.5438, 0.8646)
    assert round(bicubic['psnr_y'], 2) == 28.43


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='resident memory is known on Linux only')
def test_peak_memory_on_a_cpu_is_what_a_run_needs():
    class Needs(torch.nn.Module):
        def forward(self, x):
            parts = [torch.ones(2**16) for _ in range(400)]  # 100 MiB of float32
            return x + len(parts)

    for _ in range(2):  # the second run could take what the first one freed
        needed = module._peak_memory(Needs(), torch.zeros(1, 3, 4, 4))
        assert 95 * 2**20 < needed < 130 * 2**20
