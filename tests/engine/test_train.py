"""Trainings through the command line on a real LMDB: run, killed, resumed, tested."""
import gc
import multiprocessing
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from elan_basicsr.archs.elan_arch import ELAN
from elan_basicsr.cli import main
from elan_basicsr.engine.interrupt import EXIT_STOPPED

BASICSR = [sys.executable, '-m', 'elan_basicsr']


def write(options, name='run.yml', **changes):
    Path(name).write_text(yaml.safe_dump({**options, **changes}))
    return name


def tensors(tree, path=''):
    """Every tensor and number in a nest of dicts and lists, with its path."""
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from tensors(value, f'{path}/{key}')
    else:
        yield path, tree


def assert_same_run(a: Path, b: Path, iteration: int):
    """The weights, EMA, optimizer and scheduler of two runs at an iteration are equal bit for bit."""
    for file in (f'models/net_g_{iteration}.pth', f'training_states/{iteration}.state'):
        one, two = (dict(tensors(torch.load(run / file, weights_only=True))) for run in (a, b))
        assert one.keys() == two.keys()
        for key, value in one.items():
            same = torch.equal(value, two[key]) if isinstance(value, torch.Tensor) else value == two[key]
            assert same, f'{file}: {key}'


def losses(run: Path) -> dict[int, str]:
    """The logged loss of every iteration, from all log files of a run."""
    text = '\n'.join(path.read_text() for path in sorted(run.glob('train_*.log')))
    return {int(number.replace(',', '')): loss
            for number, loss in re.findall(r'iter:\s*([\d,]+),.*l_pix: (\S+)', text)}


def wait_for(path: Path, process, seconds=120):
    end = time.time() + seconds
    while not path.exists():
        assert process.poll() is None and time.time() < end, f'{path} did not appear'
        time.sleep(0.01)


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_as_if_nothing_had_happened(options):
    options['train']['total_iter'] = 40
    options['logger']['print_freq'] = 1
    options['datasets']['train']['num_worker_per_gpu'] = 2
    file = write(options)
    assert main(['train', '-opt', file]) == 0
    Path('experiments/run').rename('calm')
    process = subprocess.Popen([*BASICSR, 'train', '-opt', file], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(Path('experiments/run/training_states/8.state'), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path('experiments/run/models/net_g_latest.pth').exists()
    assert main(['train', '-opt', file, '--auto_resume', '--set', 'datasets.train.num_worker_per_gpu=0']) == 0
    assert_same_run(Path('calm'), Path('experiments/run'), 40)
    assert losses(Path('experiments/run')) == losses(Path('calm'))
    assert list(losses(Path('calm'))) == list(range(1, 41))


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_stops_with_the_code_for_again(options, number):
    options['train']['total_iter'] = 100_000
    options['logger'].update(print_freq=1, save_checkpoint_freq=100_000)
    file = write(options)
    with open('log', 'w') as log:
        process = subprocess.Popen([*BASICSR, 'train', '-opt', file], stdout=log, stderr=log)
        end = time.time() + 120
        while 'iter:       3' not in Path('log').read_text():
            assert process.poll() is None and time.time() < end
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=60) == EXIT_STOPPED
    state = max(Path('experiments/run/training_states').glob('*.state'), key=lambda path: int(path.stem))
    assert f'{number.name}: stopped and saved at iteration {state.stem}' in Path('log').read_text()
    assert main(['train', '-opt', file, '--auto_resume', '--set', f'train.total_iter={int(state.stem) + 1}']) == 0


def test_train_then_test_through_the_command_line(options, capfd):
    file = write(options)
    assert main(['train', '-opt', file]) == 0
    run = Path('experiments/run')
    assert {path.name for path in (run / 'models').iterdir()} == {'net_g_4.pth', 'net_g_8.pth', 'net_g_latest.pth'}
    content = torch.load(run / 'models' / 'net_g_8.pth', weights_only=True)
    assert content.keys() == {'params', 'params_ema'}
    trained = re.findall(r'# (\w+): ([\d.]+)', capfd.readouterr().err)[-2:]
    test = {key: options[key] for key in ('model_type', 'scale', 'num_gpu', 'network_g')}
    test.update(name='check', datasets={'test_1': options['datasets']['val']}, val={**options['val'], 'save_img': True},
                path={'pretrain_network_g': str(run / 'models' / 'net_g_latest.pth'), 'param_key_g': 'params_ema'})
    assert main(['test', '-opt', write(test, 'test.yml')]) == 0
    assert re.findall(r'# (\w+): ([\d.]+)', capfd.readouterr().err) == trained
    assert len(list(Path('results/check/visualization/three').glob('*_check.png'))) == 3


@pytest.mark.parametrize('model_type', ['ELANModel', 'SRModel'])
@pytest.mark.parametrize('deterministic', [False, True])
def test_cudnn_looks_for_its_fastest_kernels_in_training_steps_alone(options, monkeypatch, model_type, deterministic):
    """In validation every image may have a size of its own, and `deterministic` leaves nothing to chance."""
    seen = {True: set(), False: set()}
    forward = ELAN.forward
    monkeypatch.setattr(ELAN, 'forward', lambda net, x: (
        seen[net.training].add(torch.backends.cudnn.benchmark), forward(net, x))[1])
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)
    try:
        assert main(['train', '-opt', write(options, model_type=model_type, deterministic=deterministic), '--set',
                     'train.ema_decay=0', 'train.total_iter=4']) == 0
        assert seen == {True: {not deterministic}, False: {False}}
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.utils.deterministic.fill_uninitialized_memory != deterministic
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


def on_the_gpu(options, folder, **train) -> Path:
    """A training with kernels that repeat themselves, in a process of its own since cuBLAS is told at its start."""
    options['datasets']['train'].update({'num_worker_per_gpu': 1, 'pin_memory': True, **train})
    file = write(options, num_gpu=1, deterministic=True)
    subprocess.run([*BASICSR, 'train', '-opt', file], check=True)
    return Path('experiments/run').rename(folder)


@pytest.mark.gpu
def test_a_run_on_the_gpu_repeats_itself_and_goes_on_where_it_stopped(options):
    """Twice at once and once in two parts: the same bits."""
    calm, again = (on_the_gpu(options, folder) for folder in ('calm', 'again'))
    assert_same_run(calm, again, 8)
    for name in ('models/net_g_8.pth', 'models/net_g_latest.pth', 'training_states/8.state'):
        (again / name).unlink()
    again.rename('experiments/run')
    subprocess.run([*BASICSR, 'train', '-opt', 'run.yml', '--auto_resume'], check=True)
    assert_same_run(calm, Path('experiments/run'), 8)


@pytest.mark.gpu
@pytest.mark.parametrize('kind', ['PairedRawLmdbDataset', 'PairedImageDataset'])
def test_batches_loaded_ahead_are_those_that_are_not(options, kind):
    """`prefetch_mode: cuda` gives the same weights, from bytes and from floats."""
    if kind == 'PairedImageDataset':
        options['datasets']['train'] = {**options['datasets']['train'], **options['datasets']['val'], 'type': kind}
    plain = on_the_gpu(options, 'plain')
    assert_same_run(plain, on_the_gpu(options, 'ahead', prefetch_mode='cuda'), 8)


def test_a_new_run_moves_the_old_one_aside(options):
    options['train']['total_iter'] = 1
    del options['val'], options['datasets']['val']
    file = write(options)
    assert main(['train', '-opt', file]) == 0
    Path('experiments/run/mine').write_text('kept')
    assert main(['train', '-opt', file]) == 0
    assert [path.read_text() for path in Path('experiments').glob('run_archived_*/mine')] == ['kept']


def test_auto_resume_passes_over_what_is_damaged(options, capfd):
    file = write(options)
    assert main(['train', '-opt', file]) == 0
    state = Path('experiments/run/training_states/8.state')
    state.write_bytes(state.read_bytes()[:-100])
    assert main(['train', '-opt', file, '--auto_resume']) == 0
    log = capfd.readouterr().err
    assert '--auto_resume passes over' in log and '8.state: cut off or damaged' in log
    assert 'Start training from epoch: 4, iter: 4' in log


def test_a_state_knows_its_network(options, capfd):
    """A checkpoint of another run, whole but not the one that was saved with the state, is not resumed from."""
    file = write(options)
    assert main(['train', '-opt', file]) == 0
    models = Path('experiments/run/models')
    shutil.copy(models / 'net_g_4.pth', models / 'net_g_8.pth')
    assert main(['train', '-opt', file, '--auto_resume']) == 0
    log = capfd.readouterr().err
    assert '--auto_resume passes over' in log and 'net_g_8.pth: is another file than the one saved with it' in log
    assert 'Start training from epoch: 4, iter: 4' in log
    shutil.copy(models / 'net_g_4.pth', models / 'net_g_8.pth')
    assert main(['train', '-opt', file, '--set', 'path.resume_state=experiments/run/training_states/8.state']) == 2
    assert 'cannot resume' in capfd.readouterr().err


def test_resuming_with_another_batch_goes_on_in_the_stream(options, capfd):
    file = write(options)
    assert main(['train', '-opt', file]) == 0
    assert main(['train', '-opt', file, '--auto_resume', '--set', 'train.total_iter=12',
                 'datasets.train.batch_size_per_gpu=2']) == 0
    state = torch.load('experiments/run/training_states/12.state', weights_only=True)
    assert state['samples'] == 8 * 4 + 4 * 2
    assert 'took 4 samples an iteration so far and takes 2 from here on' in ' '.join(capfd.readouterr().err.split())


def test_old_checkpoints_go_and_the_best_stays(options):
    options['logger'].update(save_checkpoint_freq=1, keep_last=2)
    options['val'].update(val_freq=2, save_best='ssim')
    assert main(['train', '-opt', write(options)]) == 0
    assert {path.stem for path in Path('experiments/run/training_states').iterdir()} == {'7', '8'}
    models = {path.stem for path in Path('experiments/run/models').iterdir()}
    assert models == {'net_g_7', 'net_g_8', 'net_g_latest', 'net_g_best'}
    state = torch.load('experiments/run/training_states/8.state', weights_only=True)
    best = state['best_metric_results']['three']['ssim']
    options.update(path={'pretrain_network_g': 'experiments/run/models/net_g_best.pth', 'param_key_g': 'params_ema'})
    assert main(['test', '-opt', write(options)]) == 0
    log = next(Path('results/run').glob('*.log')).read_text()
    assert f'ssim: {best["val"]:.4f}' in log


def test_the_pair_in_use_is_not_deleted(options):
    options['logger'].update(save_checkpoint_freq=1, keep_last=1)
    file = write(options)
    assert main(['train', '-opt', file, '--set', 'train.total_iter=3']) == 0
    named = 'path.resume_state=experiments/run/training_states/3.state'
    assert main(['train', '-opt', file, '--set', named, 'train.total_iter=6']) == 0
    assert {path.stem for path in Path('experiments/run/training_states').iterdir()} == {'3', '6'}
    assert Path('experiments/run/models/net_g_3.pth').exists()


_ON_A_SMALL_DISK = """
set -e
mount -t tmpfs -o size=3m tmpfs disk
cd disk
{train} train.total_iter=4
sha256sum experiments/run/*/* > before
cat /dev/zero > ballast 2> /dev/null || true
truncate -s -40k ballast
set +e
{train} train.total_iter=8 2> error
test $? = 2 || exit 11
test $(grep -c '^basicsr: error' error) = 1 || exit 12
grep -q 'No space left on device; what was saved before is intact' error || exit 13
grep -q Traceback error && exit 14
sha256sum --quiet -c before || exit 15
rm ballast
{train} train.total_iter=8 || exit 16
cp -r experiments ..
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_loses_nothing(options, tmp_path):
    if subprocess.run(['unshare', '-rm', 'mount', '-t', 'tmpfs', 'tmpfs', '/mnt'], capture_output=True).returncode:
        pytest.skip('needs `unshare -rm` to mount a small disk')
    options['logger']['use_tb_logger'] = False
    (tmp_path / 'disk').mkdir()
    file = tmp_path / write(options)
    train = f'{sys.executable} -m elan_basicsr train -opt {file} --auto_resume --set'
    done = subprocess.run(['unshare', '-rm', 'bash', '-c', _ON_A_SMALL_DISK.replace('{train}', train)], cwd=tmp_path,
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    Path('experiments').rename('disturbed')
    assert main(['train', '-opt', str(file)]) == 0
    assert_same_run(Path('disturbed/run'), Path('experiments/run'), 8)


@pytest.mark.parametrize('workers', [0, 1])
def test_an_image_that_cannot_be_read_is_one_line(options, capfd, workers):
    train = options['datasets']['train']
    photographs = Path(train['dataroot_gt']).parents[1] / 'test'
    for folder in ('GT', 'LR'):
        shutil.copytree(photographs / folder, folder)
    broken = sorted(Path('LR').iterdir())[1]
    broken.write_bytes(broken.read_bytes()[:60])
    train.update(type='PairedImageDataset', dataroot_gt='GT', dataroot_lq='LR', io_backend={'type': 'disk'},
                 num_worker_per_gpu=workers)
    gc.disable()  # which would end the worker by chance
    try:
        assert main(['train', '-opt', write(options)]) == 2
        assert not multiprocessing.active_children()
    finally:
        gc.enable()
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith('basicsr: error')]
    assert len(error) == 1 and f'datasets.train: {broken}: is no readable image' in error[0], error


def test_a_folder_that_cannot_be_written_is_one_line(options, capfd):
    Path('experiments').write_text('in the way')
    assert main(['train', '-opt', write(options)]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith('basicsr: error: ') and 'experiments' in error


def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(options, monkeypatch, capfd):
    import os
    file = write(options)
    real, written = os.fsync, []

    def fsync(descriptor):
        written.append(descriptor)
        if len(written) > 2:
            raise OSError(28, 'No space left on device')
        real(descriptor)

    monkeypatch.setattr(os, 'fsync', fsync)
    assert main(['train', '-opt', file]) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith('basicsr: error:')]
    assert len(error) == 1 and 'No space left' in error[0]
    monkeypatch.undo()


def test_a_loss_whose_weights_cannot_be_fetched_says_which_file_goes_where(options, monkeypatch, capfd, tmp_path):
    """The perceptual loss fetches a VGG; a machine without a network gets it by hand."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'hub'))
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')
    train = {**options['train'], 'perceptual_opt': {'type': 'PerceptualLoss', 'layer_weights': {'relu1_1': 1.}}}
    assert main(['train', '-opt', write(options, train=train)]) == 2
    [error] = [line for line in capfd.readouterr().err.splitlines() if line.startswith('basicsr: error:')]
    assert error.startswith('basicsr: error: https://download.pytorch.org/models/vgg19-dcbb9e9d.pth: cannot be fetched')
    assert error.endswith(f'put it at {tmp_path}/hub/hub/checkpoints/vgg19-dcbb9e9d.pth')


@pytest.mark.slow
@pytest.mark.parametrize('network', [
    {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1, 'upscale': 2},
    {'type': 'MSRResNet', 'num_feat': 8, 'num_block': 1, 'upscale': 2},
    {'type': 'RCAN', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 16, 'num_group': 1, 'num_block': 1, 'upscale': 2},
    {'type': 'SwinIR', 'upscale': 2, 'img_size': 16, 'window_size': 8, 'embed_dim': 12, 'depths': [2], 'num_heads': [2],
     'mlp_ratio': 2, 'upsampler': 'pixelshuffledirect'},
])
def test_the_toolboxs_networks_train_resume_and_test(options, network):
    options.update(network_g=network, model_type='SwinIRModel' if network['type'] == 'SwinIR' else 'SRModel')
    file = write(options)
    assert main(['train', '-opt', file, '--set', 'train.total_iter=4']) == 0
    assert main(['train', '-opt', file, '--auto_resume']) == 0
    Path('experiments/run').rename('resumed')
    assert main(['train', '-opt', file]) == 0
    assert_same_run(Path('resumed'), Path('experiments/run'), 8)
    assert main(['test', '-opt', file, '--set', 'path.pretrain_network_g=resumed/models/net_g_8.pth']) == 0


def test_srgan_trains_its_generator(options):
    options.update(model_type='SRGANModel', network_d={'type': 'VGGStyleDiscriminator', 'num_in_ch': 3, 'num_feat': 4,
                                                       'input_size': 128})
    options['datasets']['train'].update(gt_size=112 + 16, batch_size_per_gpu=1)
    options['train'].update(total_iter=2, optim_d={'type': 'Adam', 'lr': 1e-4}, net_d_iters=1, net_d_init_iters=0,
                            gan_opt={'type': 'GANLoss', 'gan_type': 'vanilla', 'loss_weight': 5e-3})
    shutil.rmtree('experiments', ignore_errors=True)
    assert main(['train', '-opt', write(options)]) == 0
    assert Path('experiments/run/models/net_d_latest.pth').exists()
