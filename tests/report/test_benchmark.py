import json
import os
import signal
import sys
import time
from pathlib import Path

import cv2
import pytest
import skimage.data
import torch

from elan_basicsr.archs import cpu
from elan_basicsr.archs.elan_arch import ELAN
from elan_basicsr.checkpoint import save_atomic
from elan_basicsr.cli import main
from elan_basicsr.forms import NOTE
from elan_basicsr.interop.export import export
from elan_basicsr.report import targets
from elan_basicsr.report.subjects import Subject
from elan_basicsr.report.targets import TARGETS, Target, grey_level_error
from elan_basicsr.report.timing import BusyLoops

TINY = 'tiny=ELAN:num_feat=15,num_block=1,window_sizes=[4]'
EDSR = 'edsr=EDSR:num_feat=8,num_block=1'


def test_tables_json_and_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    assert main(['benchmark', TINY, EDSR, '--scale', '2', '--sizes', '16x12', '20x8', '--dtype', 'float32', 'bf16',
                 '--threads', '1', '--runs', '3', '--train', '--batch', '2', '--patch', '8', '--psnr', 'tiny=30.5',
                 'edsr=30.25', '--json', 'out.json', '--figure', 'out.png']) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert '3 runs, GEMM in float32' in shown
    assert '16x12 LR' in shown and 'training step, 2 x 8x8, cpu, 1 threads, 3 runs' in shown
    found = json.loads((tmp_path / 'out.json').read_text())
    assert [(n['name'], n['size'], n['psnr']) for n in found['networks'][:2]] == [
        ('tiny', '16x12', 30.5), ('edsr', '16x12', 30.25)]
    assert found['networks'][0]['paper_macs'] > 0 and found['networks'][1]['paper_macs'] is None
    rows = found['rows']
    assert len(rows) == 3 * 2 * 2 and rows[0]['ratio'] == 1
    assert all(len(row['seconds']) == 3 and row['min'] <= row['median'] <= row['max'] for row in rows)
    assert all(row['ratio'] == row['median'] / rows[4]['median'] for row in rows[4:8])
    assert all((row['gemm_share'] is None) == (row['work'] == 'training step') for row in rows)
    assert {row['gemm_dtype'] for row in rows} == {'float32'}
    assert found['machine']['torch'] == torch.__version__
    assert cv2.imread(str(tmp_path / 'out.png')).shape[0] > 100
    assert torch.get_num_threads() == threads


def test_a_long_name_stays_readable(capsys):
    assert main(['benchmark', f'SRVGGNetCompact={EDSR.partition("=")[2]}', '--scale', '2', '--sizes', '16x12',
                 '--runs', '1']) == 0
    shown = capsys.readouterr().out
    assert shown.count('SRVGGNetCompact') == 2 and max(map(len, shown.splitlines())) <= 80


def test_busy_loops_run_beside_each_network_and_are_gone_afterwards(tmp_path, capsys):
    out = tmp_path / 'out.json'
    assert main(['benchmark', TINY, EDSR, '--scale', '2', '--sizes', '16x12', '--runs', '2', '--busy', '1',
                 '--json', str(out)]) == 0
    assert 'busy loops beside: 1' in capsys.readouterr().out
    rows = json.loads(out.read_text())['rows']
    assert [(row['network'], row['busy']) for row in rows] == [('tiny', 0), ('edsr', 0), ('tiny', 1), ('edsr', 1)]
    slower = [rows[i + 2]['median'] / rows[i]['median'] for i in (0, 1)]
    assert [row['slowdown'] for row in rows] == [None, None, *slower]
    assert rows[3]['ratio'] == rows[3]['median'] / rows[2]['median']


def test_a_busy_loop_runs_only_beside_its_call():
    def share() -> float:
        """Of a core, that the loop takes."""
        before, start = seconds_taken(), time.perf_counter()
        time.sleep(0.5)
        return (seconds_taken() - before) / (time.perf_counter() - start)

    def seconds_taken() -> float:
        fields = Path(f'/proc/{loop.pid}/stat').read_text().rpartition(')')[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')

    with BusyLoops(1) as loops:
        loop, = loops.loops
        assert share() == 0
        shares = []
        loops.beside(lambda: shares.append(share()))()
        assert shares[0] > 0.1 and share() == 0
    assert loop.returncode == -signal.SIGKILL


@pytest.fixture(scope='module')
def onnx_file(tmp_path_factory) -> str:
    pytest.importorskip('onnxscript')
    folder = tmp_path_factory.mktemp('onnx')
    torch.manual_seed(0)
    net = ELAN(upscale=2, num_feat=15, num_block=2, window_sizes=[4])
    save_atomic({'params': net.state_dict(), NOTE: {'window_sizes': [4]}}, folder / 'tiny.pth')
    export(folder / 'tiny.pth', folder / 'tiny.onnx', dynamic=True)
    return str(folder / 'tiny')


@pytest.mark.parametrize('program', ['onnxruntime', 'openvino'])
def test_a_file_in_another_program_gives_the_same_image(program, onnx_file):
    pytest.importorskip(program)
    net = Subject(f'{program}:{onnx_file}.onnx', 2).build()
    x = torch.rand(1, 3, 12, 16)
    with torch.inference_mode():
        assert torch.allclose(net(x), Subject(f'{onnx_file}.pth', 2).build().eval()(x), atol=1e-4)
    assert main(['benchmark', f'{onnx_file}.pth', f'{program}:{onnx_file}.onnx', '--scale', '2', '--sizes', '16x12',
                 '--runs', '1', '--dtype', 'float32', 'bf16']) == 0


def test_a_program_that_is_not_installed_is_left_out_with_a_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'openvino', None)
    assert main(['benchmark', TINY, 'ov=openvino:tiny.onnx', '--scale', '2', '--sizes', '16x12', '--runs', '1']) == 0
    shown = capsys.readouterr()
    assert shown.err == 'basicsr: ov is left out: pip install openvino\n' and 'ov' not in shown.out


def test_memory_is_measured_in_processes_of_their_own(tmp_path):
    out = tmp_path / 'out.json'
    assert main(['benchmark', TINY, '--scale', '2', '--sizes', '640x640', '--threads', '1', '--runs', '1',
                 '--memory', '--json', str(out)]) == 0
    row, = json.loads(out.read_text())['rows']
    assert row['memory'] > 3 * 4 * (640 * 640 * 5)  # three channels in, three of four times the pixels out
    assert row['memory_ratio'] == 1


@pytest.mark.parametrize('arguments, message', [
    ([], 'no network'), (['ELAN-light', 'ELAN-light'], 'is given twice'), (['nothing'], 'is no file and no network'),
    (['ELAN-light', '--psnr', 'ELAN=30'], '--psnr ELAN: is none of the networks'),
    (['ELAN-light', '--device', 'nowhere'], '--device nowhere: cannot be used'),
    (['ELAN-light', '--json', 'out.txt'], 'ends with .json'),
    (['ELAN-light', '--json', 'nowhere/out.json'], 'is no folder'),
    (['official'], 'expected --official DIR'), (['--table', 'nothing'], 'is no row; expected some of light, swinir'),
    (['--table', 'light'], 'expected --official DIR'), (['--table', 'swinir', '--trained', 'x.pth'], 'has no images')])
def test_mistakes_are_told_before_anything_is_measured(arguments, message, capsys):
    assert main(['benchmark', *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith('basicsr: error: ') and message in error and error.count('\n') == 1


@pytest.mark.parametrize('arguments', [['--sizes', '320'], ['--runs', '0'], ['--psnr', 'a'], ['--dtype', 'int8']])
def test_arguments_that_cannot_be_read(arguments):
    with pytest.raises(SystemExit) as stop:
        main(['benchmark', 'ELAN-light', *arguments])
    assert stop.value.code == 2


def test_the_rows_of_the_table():
    assert [(target.key, target.limit) for target in TARGETS] == [
        ('light', 0.2), ('swinir', 0.22), ('bf16', 0.085), ('classic', 0.2), ('step-light', 0.42),
        ('step-classic', 0.5), ('memory-light', 0.5), ('memory-classic', 0.5), ('memory-light-checkpoint', 0.25),
        ('memory-classic-checkpoint', 0.25), ('memory-image', 0.4)]
    assert {target.key: target.narrow for target in TARGETS if target.narrow} == {
        'light': 0.28, 'classic': 0.28, 'step-light': 0.55, 'step-classic': 0.65}


@pytest.mark.parametrize('lanes, limit', [(16, 0.2), (8, 0.28), (0, 0.28)])
def test_a_row_has_another_limit_where_vectors_are_narrower(monkeypatch, lanes, limit):
    monkeypatch.setattr(targets, 'vector_lanes', lambda: lanes)
    assert TARGETS[0].limit_here() == limit and TARGETS[-1].limit_here() == 0.4


def test_the_table(tmp_path, capsys, monkeypatch):
    tiny, edsr = (text.partition('=')[2] for text in (TINY, EDSR))
    monkeypatch.setattr(targets, 'TARGETS', [
        Target('time', 'tiny / edsr', tiny, edsr, 0.5, (1, 12, 16), dtype='bf16'),
        Target('step', 'tiny / edsr', tiny, edsr, 0.5, (2, 8, 8), 'training step'),
        Target('other', 'tiny / official', tiny, 'official', 0.5)])
    before = torch.get_num_threads()
    out = tmp_path / 'out.json'
    assert main(['benchmark', '--table', '--runs', '2', '--threads', str(before), '--json', str(out)]) == 0
    shown = capsys.readouterr().out
    assert '| tiny / edsr' in shown and 'official' not in shown
    for row in json.loads(out.read_text())['table']:
        assert row['spread'][0] <= row['ratio'] <= row['spread'][1] and row['ratio'] == row['ours'] / row['theirs']


@pytest.mark.parametrize('compiled', [False, True])
def test_the_error_of_bf16_in_grey_levels(shared, tmp_path, monkeypatch, compiled):
    """Kernels compute in float32 what autocast would have in bf16, where the processor does not multiply in it."""
    if not compiled:
        monkeypatch.setattr(cpu, 'stand_in', lambda *_: None)
    elif cpu.library.library() is None:
        pytest.skip('no kernels were compiled for this processor')
    image = tmp_path / 'lr.png'
    cv2.imwrite(str(image), skimage.data.astronaut()[100:148, 100:164, ::-1])
    error = grey_level_error(str(shared / 'trained' / 'light_x4.pt'), [str(image)])
    assert error == 0 if compiled and not cpu.library.has_bf16() else 0.01 < error < 20
