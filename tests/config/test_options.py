"""Option files: a good one arrives complete, a wrong one is one line with file, line, key and what was expected."""
from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from elan_basicsr import cli
from elan_basicsr.config.options import load_options
from elan_basicsr.config.reader import MAX_BYTES, read_yaml
from elan_basicsr.engine.run import meeting
from elan_basicsr.errors import UserError
from tests.conftest import compiler

TRAIN = """\
name: run
model_type: ELANModel
scale: 2
num_gpu: auto
manual_seed: 0
datasets:
  train:
    name: photographs
    type: PairedImageDataset
    dataroot_gt: data/hr
    dataroot_lq: data/lr
    filename_tmpl: '{}'
    io_backend:
      type: disk
    gt_size: 32
    use_hflip: true
    use_rot: true
    num_worker_per_gpu: 0
    batch_size_per_gpu: 4
    dataset_enlarge_ratio: 10
    prefetch_mode: ~
  val:
    name: held_out
    type: PairedImageDataset
    dataroot_gt: data/hr
    dataroot_lq: data/lr
    io_backend:
      type: disk
network_g:
  type: ELAN
  upscale: 2
  num_feat: 15
  num_block: 2
  num_share: 1
path:
  pretrain_network_g: ~
  strict_load_g: true
  resume_state: ~
train:
  optim_g:
    type: Adam
    lr: !!float 2e-4
    betas: [0.9, 0.999]
  scheduler:
    type: MultiStepLR
    milestones: [10, 20]
    gamma: 0.5
  total_iter: 30
  warmup_iter: -1
  pixel_opt:
    type: L1Loss
    loss_weight: 1.0
    reduction: mean
val:
  val_freq: !!float 1e1
  save_img: false
  metrics:
    psnr:
      type: calculate_psnr
      crop_border: 2
      test_y_channel: true
logger:
  print_freq: 1
  save_checkpoint_freq: !!float 1e1
  use_tb_logger: false
"""

TEST = """\
name: measured
model_type: SRModel
scale: 4
num_gpu: 0
datasets:
  test_1:
    name: Set5
    type: PairedImageDataset
    dataroot_gt: data/hr
    dataroot_lq: data/lr
    io_backend:
      type: disk
network_g:
  type: EDSR
  num_in_ch: 3
  num_out_ch: 3
  upscale: 4
path:
  pretrain_network_g: weights.pth
val:
  save_img: true
  metrics:
    psnr:
      type: calculate_psnr
      crop_border: 4
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory with the data that the files above name."""
    monkeypatch.chdir(tmp_path)
    for name in ('data/hr', 'data/lr', 'data/whole.lmdb', 'data/unfinished.lmdb'):
        Path(name).mkdir(parents=True)
    Path('data/whole.lmdb/data.mdb').touch()
    Path('weights.pth').touch()
    return tmp_path


def write(text: str) -> str:
    Path('options.yml').write_text(text, encoding='utf-8')
    return 'options.yml'


def line_of(text: str, start: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if line.strip().startswith(start))


# ------------------------------------------------------------------------------------------------- good files

def test_a_training_file_arrives_complete(folder):
    opt = load_options(write(TRAIN), is_train=True)
    assert opt['is_train'] is True and opt['auto_resume'] is False and opt['root_path'] == str(folder)
    assert opt['num_gpu'] == min(torch.cuda.device_count(), 1)
    assert opt['datasets']['train']['phase'] == 'train' and opt['datasets']['val']['scale'] == 2
    run = folder / 'experiments' / 'run'
    assert opt['path'] == {'pretrain_network_g': None, 'strict_load_g': True, 'resume_state': None,
                           'experiments_root': str(run), 'models': str(run / 'models'), 'log': str(run),
                           'training_states': str(run / 'training_states'), 'visualization': str(run / 'visualization')}
    assert opt['train']['optim_g']['lr'] == 2e-4 and opt['train']['total_iter'] == 30
    assert opt['val']['val_freq'] == 10 and isinstance(opt['val']['val_freq'], int)
    assert list(opt)[:4] == ['name', 'model_type', 'scale', 'num_gpu']  # the order of the file


def test_a_test_file_needs_no_train_and_no_logger(folder):
    opt = load_options(write(TEST), is_train=False, root='elsewhere')
    assert opt['path']['results_root'] == str(folder / 'elsewhere' / 'results' / 'measured')
    assert opt['path']['visualization'].endswith('results/measured/visualization')
    assert opt['datasets']['test_1']['phase'] == 'test' and opt['val']['suffix'] is None


@pytest.mark.parametrize('count', ['=5000', '~', '[1]'])
def test_what_nobody_reads_may_be_anything(folder, count):
    load_options(write(TRAIN.replace('logger:\n', f'logger:\n  total_iter: {count}\n', 1)), is_train=True)


def test_a_run_can_lie_elsewhere(folder):
    for chosen, found in (('other', folder / 'other' / 'run'), ('~/runs', Path.home() / 'runs' / 'run')):
        opt = load_options(write(TRAIN), is_train=True, overrides=[f'path.experiments_root={chosen}'])
        assert opt['path']['experiments_root'] == str(found)


def test_home_and_variables_are_filled_in_wherever_a_path_stands(folder, monkeypatch):
    """And nowhere else: a name keeps its dollar."""
    monkeypatch.setenv('HOME', str(folder))
    monkeypatch.setenv('DATA', str(folder / 'data'))
    (folder / 'list.txt').write_text('a.png')
    opt = load_options(write(TRAIN), is_train=True, overrides=[
        'datasets.train.dataroot_gt=$HOME/data/hr', 'datasets.train.dataroot_lq=${DATA}/lr', 'name=run_$DATA_$HOME',
        'datasets.val.dataroot_gt=[~/data/hr, $DATA/hr]', 'datasets.val.dataroot_lq=[$DATA/lr, ~/data/lr]',
        'datasets.train.meta_info_file=$HOME/list.txt', 'path.experiments_root=$HOME/runs'])
    hr, lr = (str(folder / 'data' / name) for name in ('hr', 'lr'))
    train, val = opt['datasets']['train'], opt['datasets']['val']
    assert (train['dataroot_gt'], train['dataroot_lq'], val['dataroot_gt'], val['dataroot_lq']) == (
        hr, lr, [hr, hr], [lr, lr])
    assert train['meta_info_file'] == str(folder / 'list.txt') and opt['name'] == 'run_$DATA_$HOME'
    assert opt['path']['experiments_root'] == str(folder / 'runs' / 'run_$DATA_$HOME')
    with pytest.raises(UserError, match=r'path\.resume_state: .*/absent\.state: no such file') as caught:
        load_options(write(TRAIN), is_train=True, overrides=['path.resume_state=$DATA/absent.state'])
    assert str(folder) in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason='speaks about machines without a GPU')
@pytest.mark.parametrize('asked', ['auto', '1', '8'])
def test_without_a_gpu_the_run_is_on_the_cpu_and_says_so(asked):
    opt = load_options(write(TRAIN.replace('num_gpu: auto', f'num_gpu: {asked}')), is_train=True)
    assert opt['num_gpu'] == 0
    assert len(opt['notices']) == 1 and asked in opt['notices'][0] and 'CPU' in opt['notices'][0]


def test_a_process_takes_one_gpu_and_says_how_to_take_all(monkeypatch):
    """No DataParallel: its threads know nothing of autocast's dtype, and it takes more GPUs than it was told to."""
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    opt = load_options(write(TRAIN), is_train=True)
    assert opt['num_gpu'] == 1
    assert opt['notices'] == ['num_gpu: auto takes one of 4 GPUs; for all: torchrun --nproc_per_node 4 '
                              '-m elan_basicsr train -opt options.yml']
    for text, is_train in ((TRAIN.replace('num_gpu: auto', 'num_gpu: 2'), True),
                           (TEST.replace('num_gpu: 0', 'num_gpu: 2'), False)):
        command = f'torchrun --nproc_per_node 2 -m elan_basicsr {"train" if is_train else "test"} -opt options.yml;'
        with pytest.raises(UserError, match=command) as caught:
            load_options(write(text), is_train=is_train)
        assert str(caught.value).startswith(f'options.yml:{line_of(text, "num_gpu")}: num_gpu: is 2')
        assert load_options(write(text), is_train=is_train, launched=True)['num_gpu'] == 2


def test_with_num_gpu_0_no_gpu_is_looked_at(monkeypatch):
    monkeypatch.delattr(torch.cuda, 'device_count')
    assert load_options(write(TRAIN.replace('num_gpu: auto', 'num_gpu: 0')), is_train=True)['num_gpu'] == 0


@pytest.mark.parametrize('gpus', ['0', 'auto'])
def test_files_that_name_nccl_run_without_a_gpu_and_say_so(gpus, monkeypatch):
    """BasicSR's own files all do."""
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    text = TRAIN.replace('num_gpu: auto', f'num_gpu: {gpus}') + 'dist_params:\n  backend: nccl\n'
    opt = load_options(write(text), is_train=True, launched=True)
    assert meeting(opt)['backend'] == 'gloo'
    assert 'dist_params.backend: nccl is for GPUs; the processes meet by gloo.' in opt['notices']


def test_without_a_compiler_nothing_is_to_be_compiled(monkeypatch):
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setenv('PATH', '')
    with pytest.raises(UserError, match='compile: torch.compile needs a C.. compiler; install g'):
        load_options(write(TRAIN), is_train=True, overrides=['compile=true'])


@compiler
def test_an_older_torch_does_not_compile_what_it_would_count_twice(monkeypatch):
    both = ['compile=true', 'network_g.use_checkpoint=true']
    monkeypatch.setattr(torch, '__version__', type(torch.__version__)('2.11.0'))
    assert load_options(write(TRAIN), is_train=True, overrides=both)['compile']
    monkeypatch.setattr(torch, '__version__', type(torch.__version__)('2.6.0+cu124'))
    with pytest.raises(UserError, match='compile: with network_g.use_checkpoint needs torch 2.11 or later'):
        load_options(write(TRAIN), is_train=True, overrides=both)
    for one in both:
        load_options(write(TRAIN), is_train=True, overrides=[one])


def test_a_backend_that_is_none_is_told():
    with pytest.raises(UserError, match="dist_params.backend: is 'mpi', expected nccl or gloo or null"):
        load_options(write(TRAIN + 'dist_params:\n  backend: mpi\n'), is_train=True, launched=True)


def test_debug_renames_the_run_and_shortens_its_periods():
    opt = load_options(write(TRAIN), is_train=True, debug=True)
    assert opt['name'] == 'debug_run' and opt['path']['log'].endswith('experiments/debug_run')
    assert opt['val']['val_freq'] == opt['logger']['save_checkpoint_freq'] == 8 and opt['logger']['print_freq'] == 1


def test_empty_sections_are_none():
    text = TRAIN[:TRAIN.index('logger:')] + 'logger: ~\n'
    opt = load_options(write(re.sub(r'path:\n(  .*\n)+', 'path: ~\n', text)), is_train=True)
    assert opt['logger']['print_freq'] > 0 and opt['path']['resume_state'] is None


@pytest.mark.parametrize('written', ['1e-4', '1E-4', '1.0e-4', '!!float 1e-4', '.0001'])
def test_scientific_notation_is_a_number(written):
    opt = load_options(write(TRAIN.replace('!!float 2e-4', written)), is_train=True)
    assert opt['train']['optim_g']['lr'] == 1e-4


def test_anchors_and_merges_are_read():
    text = TRAIN.replace('  train:\n', '  train: &data\n', 1)
    text = re.sub(r'  val:\n    name: held_out\n(    .*\n)+', '  val:\n    <<: *data\n    name: other\n', text)
    opt = load_options(write(text), is_train=True)
    assert opt['datasets']['val']['name'] == 'other'
    assert opt['datasets']['val']['dataroot_gt'] == opt['datasets']['train']['dataroot_gt']


def test_keys_of_extensions_pass():
    text = TRAIN.replace('manual_seed: 0', 'manual_seed: 0\nmy_laboratory: {probe: 3}')
    assert load_options(write(text), is_train=True)['my_laboratory'] == {'probe': 3}


# ------------------------------------------------------------------------------------------------- overrides

def test_set_changes_adds_and_reads_yaml():
    opt = load_options(write(TRAIN), is_train=True, overrides=[
        'train.total_iter=7', 'train.optim_g.lr=1e-3', 'train.ema_decay=0.9', 'train.scheduler.milestones=[2, 3]',
        'datasets.train.pin_memory=true', 'name=two words', 'val.metrics.psnr.crop_border=4', 'sync_bn=true',
        'train.scheduler.milestones.1=5', 'val.metrics.ssim={type: calculate_ssim, crop_border: 2}'])
    assert opt['train']['total_iter'] == 7 and opt['train']['optim_g']['lr'] == 1e-3
    assert opt['train']['ema_decay'] == 0.9 and opt['train']['scheduler']['milestones'] == [2, 5]
    assert opt['datasets']['train']['pin_memory'] is True and opt['name'] == 'two words' and opt['sync_bn'] is True
    assert opt['val']['metrics']['psnr']['crop_border'] == 4 and list(opt['val']['metrics']) == ['psnr', 'ssim']


def test_a_dataset_set_to_none_is_left_out():
    text = TEST.replace('\nnetwork_g:', '\n  test_2: {name: gone, type: PairedImageDataset}\nnetwork_g:')
    with pytest.raises(UserError, match='datasets.test_2'):
        load_options(write(text), is_train=False)
    opt = load_options(write(text), is_train=False, overrides=['datasets.test_2=~'])
    assert list(opt['datasets']) == ['test_1']


def test_force_yml_changes_what_exists_as_basicsr_reads_it():
    opt = load_options(write(TRAIN), is_train=True, force_yml=[
        'train:total_iter=7', 'datasets:train:prefetch_mode=none', 'train:scheduler:milestones=[1,2]',
        'datasets:train:use_rot=False', 'path:pretrain_network_g=~', 'train:optim_g:lr=!!float 1e-5'])
    assert opt['train']['total_iter'] == 7 and opt['datasets']['train']['prefetch_mode'] is None
    assert opt['train']['scheduler']['milestones'] == [1, 2] and opt['datasets']['train']['use_rot'] is False
    assert opt['train']['optim_g']['lr'] == 1e-5


@pytest.mark.parametrize('overrides, force_yml, said', [
    (['trian.total_iter=3'], [], 'there is no section trian in options.yml; did you mean train?'),
    (['name.first=3'], [], 'name is no section in options.yml'),
    (['total_iter=3'], [], 'total_iter: there is no such key; did you mean train.total_iter?'),
    (['scal=3'], [], 'scal: unknown key; did you mean scale?'),
    (['train.total_iters=3'], [], 'train.total_iters: unknown key; did you mean total_iter?'),
    (['train.total_iter'], [], 'expected key.sub=value'),
    (['=3'], [], 'expected key.sub=value'),
    (['train.total_iter=[1,'], [], '--set train.total_iter=[1,: not valid YAML'),
    (['train.total_iter=none'], [], "--set train.total_iter=none: train.total_iter: is 'none', expected a whole"),
    (['train.scheduler.milestones.9=5'], [], 'is a list of 2; expected an index below that'),
    (['name=!!python/object/apply:os.getcwd []'], [], 'the tag !!python/object/apply:os.getcwd is refused'),
    ([], ['train:ema_decay=0.9'], 'there is no key train.ema_decay in options.yml'),
    ([], ['train.total_iter=3'], 'there is no key train.total_iter'),
    ([], ['x"]=1;import os;opt["name=3'], 'there is no key x"]'),
])
def test_a_wrong_override_is_named(overrides, force_yml, said):
    with pytest.raises(UserError) as caught:
        load_options(write(TRAIN), is_train=True, overrides=overrides, force_yml=force_yml)
    message = str(caught.value)
    assert message.startswith('--set ' if overrides else '--force_yml ') and said in message and '\n' not in message


# ------------------------------------------------------------------------------------------------- wrong files

# what is replaced in TRAIN, by what, the key and what the line says of it
WRONG = [
    ('name: run', 'name: a/b', 'name', "is 'a/b', expected a text without /"),
    ('name: run', 'name: [run]', 'name', "is ['run'], expected a text"),
    ('name: run\n', '', 'name', 'is missing, expected a name'),
    ('model_type: ELANModel', 'model_type: ELANmodle', 'model_type', 'did you mean ELANModel'),
    ('model_type: ELANModel\n', '', 'model_type', 'is missing, expected the name of'),
    ('model_type: ELANModel', 'modle_type: ELANModel', 'modle_type', 'unknown key; did you mean model_type?'),
    ('scale: 2', 'scale: 2.5', 'scale', 'is 2.5, expected an integer from 1'),
    ('scale: 2', 'scale: two', 'scale', "is 'two', expected an integer from 1"),
    ('scale: 2\n', 'scale: 3\n', 'network_g.upscale', 'is 2 but scale is 3'),
    ('scale: 2\n', '', 'scale', 'is missing, expected 2'),
    ('num_gpu: auto', 'num_gpu: -1', 'num_gpu', 'is -1, expected auto or an integer from 0'),
    ('manual_seed: 0', 'manual_seed: zero', 'manual_seed', "is 'zero', expected an integer"),
    ('manual_seed: 0', 'sync_bn: true\ncuda_graphs: true', 'cuda_graphs',
     'cannot be combined with sync_bn; leave out one of them'),
    ('num_share: 1', 'num_share: 1\n  use_checkpoint: true\ncuda_graphs: true', 'cuda_graphs',
     'cannot be combined with network_g.use_checkpoint; leave out one of them'),
    ('manual_seed: 0', 'compile: yes please', 'compile', 'expected true or false'),
    ('  train:\n', '  trian:\n', 'datasets', 'train is missing'),
    ('type: PairedImageDataset', 'type: PairedImagesDataset', 'datasets.train.type', 'did you mean PairedImageDataset'),
    ('    type: PairedImageDataset\n', '', 'datasets.train', 'type is missing, expected the name of a dataset'),
    ('dataroot_gt: data/hr', 'dataroot_gt: data/none', 'datasets.train.dataroot_gt',
     'data/none: no such folder; make it from your images with `basicsr data build`'),
    ('dataroot_gt: data/hr', 'dataroot_gt: datasets/DIV2K/DIV2K_train_HR', 'datasets.train.dataroot_gt',
     'make it with `basicsr data div2k --download`'),
    ('dataroot_lq: data/lr', 'dataroot_lq: datasets/Set5/LRbicx2', 'datasets.train.dataroot_lq',
     'lay it out with `basicsr data benchmark`'),
    ('dataroot_gt: data/hr', 'dataroot_gt: weights.pth', 'datasets.train.dataroot_gt', 'is a file, expected a folder'),
    ('dataroot_gt: data/hr', 'dataroot_gt: [data/hr, data/none]', 'datasets.train', 'dataroot_gt has 2 and dataroot_lq '
     'has 1; expected lists of the same length'),
    ('dataroot_gt: data/hr\n    dataroot_lq: data/lr', 'dataroot_gt: [data/hr, data/none]\n    dataroot_lq: [data/lr, '
     'data/lr]', 'datasets.train.dataroot_gt', 'data/none: no such folder'),
    ('dataroot_gt: data/hr', 'dataroot_gt: []', 'datasets.train.dataroot_gt', 'is [], expected a path, a list of'),
    ('dataroot_gt: data/hr', 'dataroot_gt: [1]', 'datasets.train.dataroot_gt', 'is [1], expected a path, a list of'),
    ('dataroot_gt: data/hr', 'dataroot_gt: $HOMES/hr', 'datasets.train.dataroot_gt', '$HOMES/hr: no such folder'),
    ('dataroot_gt: data/hr\n', 'dataroot_hr: data/hr\n', 'datasets.train.dataroot_hr', 'did you mean dataroot_gt?'),
    ('      type: disk', '      type: lmdb', 'datasets.train.dataroot_gt', 'data/hr: expected an LMDB'),
    ('data/hr\n    dataroot_lq: data/lr\n    filename_tmpl: \'{}\'\n    io_backend:\n      type: disk',
     'data/unfinished.lmdb\n    dataroot_lq: data/whole.lmdb\n    io_backend:\n      type: lmdb',
     'datasets.train.dataroot_gt', 'holds no data.mdb, so it is no finished LMDB'),
    ('data/hr', 'data/whole.lmdb', 'datasets.train.dataroot_gt', 'is an LMDB; set io_backend: {type: lmdb}'),
    ('data/hr\n    dataroot_lq: data/lr\n    filename_tmpl: \'{}\'\n    io_backend:\n      type: disk',
     'data/hr_raw.lmdb\n    dataroot_lq: data/lr_raw.lmdb\n    io_backend:\n      type: lmdb',
     'datasets.train.dataroot_gt', 'by its name a raw LMDB; set type: PairedRawLmdbDataset'),
    ('      type: disk', '      type: disc', 'datasets.train.io_backend.type', "is 'disc', expected disk or lmdb"),
    ("filename_tmpl: '{}'", "filename_tmpl: 'x4'", 'datasets.train.filename_tmpl', 'expected a text with one {}'),
    ('gt_size: 32', 'gt_size: 33', 'datasets.train.gt_size', 'is 33, expected a multiple of scale, 2'),
    ('gt_size: 32', 'gt_size: 0', 'datasets.train.gt_size', 'is 0, expected an integer from 1'),
    ('    gt_size: 32\n', '', 'datasets.train', 'gt_size is missing, which PairedImageDataset needs'),
    ('    use_rot: true\n', '', 'datasets.train', 'use_rot is missing, which PairedImageDataset needs'),
    ('use_hflip: true', 'use_hflip: 1', 'datasets.train.use_hflip', 'is 1, expected true or false'),
    ('batch_size_per_gpu: 4', 'batch_size_per_gpu: 0', 'datasets.train.batch_size_per_gpu', 'is 0, expected an'),
    ('    batch_size_per_gpu: 4\n', '', 'datasets.train', 'batch_size_per_gpu is missing, expected an integer from 1'),
    ('batch_size_per_gpu: 4', 'batch_size_pre_gpu: 4', 'datasets.train.batch_size_pre_gpu',
     'did you mean batch_size_per_gpu?'),
    ('num_worker_per_gpu: 0', 'num_worker_per_gpu: -2', 'datasets.train.num_worker_per_gpu', 'is -2, expected'),
    ('prefetch_mode: ~', 'prefetch_mode: cuda', 'datasets.train.prefetch_mode', 'needs pin_memory: true'),
    ('  val:\n    name', '  valid:\n    name', 'datasets.valid', 'expected val'),
    ('type: ELAN\n', 'type: ELAAN\n', 'network_g.type', "there is no architecture 'ELAAN'; did you mean ELAN"),
    ('  type: ELAN\n', '', 'network_g', 'type is missing'),
    ('num_feat: 15', 'num_feats: 15', 'network_g.num_feats', 'ELAN has no such argument; did you mean num_feat?'),
    ('num_feat: 15', 'num_feat: 16', 'network_g.num_feat', 'a multiple of the number of window_sizes'),
    ('num_block: 2', 'num_block: many', 'network_g.num_block', "'many'; it must be an integer from 1"),
    ('num_block: 2', 'num_block: 100000', 'network_g', 'cannot be built: more than 10,000 tensors'),
    ('num_feat: 15', 'num_feat: 99999999999', 'network_g.num_feat', 'expected integers up to'),
    ('type: ELAN\n  upscale: 2\n  num_feat: 15\n  num_block: 2\n  num_share: 1',
     'type: EDSR\n  num_in_ch: 3\n  num_out_ch: three\n  upscale: 2', 'network_g.num_out_ch',
     "is 'three', expected a number"),
    ('  type: ELAN\n  upscale: 2\n  num_feat: 15\n  num_block: 2\n  num_share: 1', '  type: RCAN\n  num_in_ch: 3',
     'network_g', 'num_out_ch is missing, which RCAN needs'),
    ('type: ELAN\n  upscale: 2\n  num_feat: 15\n  num_block: 2\n  num_share: 1',
     'type: SwinIR\n  upscale: 2\n  embed_dim: 7\n  num_heads: [2, 2, 2, 2]', 'network_g', 'SwinIR cannot be built: '),
    ('network_g:', 'network:', 'network', 'did you mean network_g?'),
    ('pretrain_network_g: ~', 'pretrain_network_g: gone.pth', 'path.pretrain_network_g', 'gone.pth: no such file'),
    ('resume_state: ~', 'resume_state: data', 'path.resume_state', 'is a folder, expected a training state'),
    ('strict_load_g: true', 'strict_load: true', 'path.strict_load', 'did you mean strict_load_g?'),
    ('type: Adam', 'type: Adm', 'train.optim_g.type', 'did you mean Adam'),
    ('type: Adam', 'type: LBFGS', 'train.optim_g.type', "no optimizer to train with in torch.optim 'LBFGS'"),
    ('lr: !!float 2e-4', 'lr: fast', 'train.optim_g.lr', "is 'fast', expected a number above 0"),
    ('    lr: !!float 2e-4\n', '', 'train.optim_g', 'lr is missing, expected the learning rate'),
    ('lr: !!float 2e-4', 'lr: !!float fast', '', "'fast' is no float"),
    ('betas: [0.9, 0.999]', 'betas: [0.9, 1.5]', 'train.optim_g.betas', 'expected two numbers from 0 to below 1'),
    ('betas: [0.9, 0.999]', 'beta: [0.9, 0.999]', 'train.optim_g.beta', 'did you mean betas?'),
    ('type: MultiStepLR', 'type: MultStepLR', 'train.scheduler.type', "no scheduler 'MultStepLR'; did you mean Multi"),
    ('type: MultiStepLR', 'type: ReduceLROnPlateau', 'train.scheduler.type', "no scheduler 'ReduceLROnPlateau'"),
    ('type: MultiStepLR', 'type: StepLR', 'train.scheduler.milestones', 'StepLR has no such argument'),
    ('type: MultiStepLR\n    milestones: [10, 20]\n    gamma: 0.5',
     'type: OneCycleLR\n    max_lr: 0.1\n    total_steps: 20', 'train.scheduler',
     'is over after 20 iterations, expected at least train.total_iter, 30'),
    ('milestones: [10, 20]', 'milestones: 10', 'train.scheduler.milestones', 'is 10, expected a list of iterations'),
    ('    milestones: [10, 20]\n', '', 'train.scheduler', 'milestones is missing, which MultiStepLR needs'),
    ('type: MultiStepLR\n    milestones: [10, 20]\n    gamma: 0.5', 'type: CosineAnnealingRestartLR\n    periods: [20]',
     'train.scheduler.periods', 'add up to 20, expected at least train.total_iter, 30'),
    ('type: MultiStepLR\n    milestones: [10, 20]\n    gamma: 0.5',
     'type: CosineAnnealingRestartLR\n    periods: [20, 20]', 'train.scheduler', 'should have the same length'),
    ('total_iter: 30', 'total_iter: -3', 'train.total_iter', 'is -3, expected a whole number from 1'),
    ('total_iter: 30', 'total_iters: 30', 'train.total_iters', 'did you mean total_iter?'),
    ('type: L1Loss', 'type: L1', 'train.pixel_opt.type', "there is no loss 'L1'"),
    ('reduction: mean', 'reduction: median', 'train.pixel_opt', 'Unsupported reduction mode: median'),
    ('reduction: mean', 'weight: 3', 'train.pixel_opt.weight', 'L1Loss has no such argument; expected loss_weight'),
    ('  pixel_opt:\n    type: L1Loss\n    loss_weight: 1.0\n    reduction: mean\n', '', 'train', 'there is no loss'),
    ('warmup_iter: -1', 'amp: half', 'train.amp', "is 'half', expected bf16 or fp16 or false"),
    ('warmup_iter: -1', 'accumulate: 3', 'train.accumulate', 'expected a divisor of batch_size_per_gpu, 4'),
    ('warmup_iter: -1', 'grad_clip: -1', 'train.grad_clip', 'is -1, expected a number above 0'),
    ('warmup_iter: -1', 'ema_decay: 1.2', 'train.ema_decay', 'is 1.2, expected a number from 0 to below 1'),
    ('val_freq: !!float 1e1', 'val_freq: 0', 'val.val_freq', 'is 0, expected a whole number from 1'),
    ('val_freq: !!float 1e1', 'tile: -8', 'val.tile', 'is -8, expected an integer from 0'),
    ('val_freq: !!float 1e1', 'save_best: lpips', 'val.save_best', "'lpips'; expected one of psnr"),
    ('type: calculate_psnr', 'type: calculate_pnsr', 'val.metrics.psnr.type', 'did you mean calculate_psnr'),
    ('      crop_border: 2\n', '', 'val.metrics.psnr', 'crop_border is missing, which calculate_psnr needs'),
    ('print_freq: 1', 'print_freq: often', 'logger.print_freq', "is 'often', expected an integer from 1"),
    ('use_tb_logger: false', 'use_tb_logger: false\n  wandb: {project: elan}', 'logger.wandb.project',
     'needs use_tb_logger: true'),
    pytest.param('use_tb_logger: false', 'use_tb_logger: true\n  wandb: {project: elan}', 'logger.wandb.project',
                 'needs wandb, which is not installed: pip install wandb', marks=pytest.mark.skipif(
                     importlib.util.find_spec('wandb') is not None, reason='wandb is installed')),
    ('name: run', 'name: run\nname: again', 'name', 'the key is there twice, first in line 1'),
    ('name: run', 'name: !!python/object/apply:os.system ["touch run_by_yaml"]', '',
     'the tag !!python/object/apply:os.system is refused'),
    ('name: run', 'name: !!python/name:os.system', '', 'is refused'),
    ('name: run', 'name: run: again', '', 'a value with a colon is written in quotes'),
    ('name: run', r'name: "C:\Users\me"', '', r"write a path in single quotes ('C:\Users') or with /"),
    ('name: run', r'name: "C:\data\run"', '', r"write a path in single quotes ('C:\Users') or with /"),
    ('name: run', r'name: "C:\new\train"', '', r'"C:\new\train" holds a control character'),
    ('name: run', 'name: *.png', '', 'a value that begins with one of @ ` % * & ! is written in quotes'),
    ('name: run', 'name: @home', '', 'a value that begins with one of @ ` % * & ! is written in quotes'),
    ('name: run', 'name: *run', '', 'a value that begins with * is written in quotes'),
    ('name: run', 'name: [run', '', 'a bracket or brace is not closed'),
    ('name: run', 'name: "run', '', 'a quotation mark is not closed'),
    ('name: run', "name: 'it's'", '', 'keys of one section stand one below the other'),
    ('  optim_g:', '\toptim_g:', '', 'YAML is indented with spaces, not tabs'),
    ('name: run', '? [name]\n: run', '', 'a key is a list or a section, expected a name'),
    ('name: run', 'name: &a [*a]', '', 'an alias of itself'),
    ('scale: 2', f'scale: 0x{"f" * 5000}', '', 'a number of 5002 characters'),
]


@pytest.mark.parametrize('old, new, key, said', WRONG,
                         ids=[f'{i}-{getattr(case, "values", case)[2]}' for i, case in enumerate(WRONG)])
def test_a_wrong_file_is_one_line_and_exit_code_2(old, new, key, said, capsys):
    assert old in TRAIN
    text = TRAIN.replace(old, new, 1)
    assert cli.main(['train', '-opt', write(text)]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and captured.out == '', captured
    assert lines[0].startswith('basicsr: error: options.yml') and said in lines[0]
    assert f': {key}: ' in lines[0] or not key
    assert not Path('run_by_yaml').exists() and not Path('experiments').exists()


@compiler
def test_graphs_of_what_is_compiled_are_refused():
    with pytest.raises(UserError, match='cuda_graphs: cannot be combined with compile; leave out one of them'):
        load_options(write(TRAIN), is_train=True, overrides=['cuda_graphs=true', 'compile=true'])


def test_tensorboard_that_is_not_installed_is_told_before_the_run(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *rest: None if name == 'tensorboard' else
                        real(name, *rest))
    text = TRAIN.replace('use_tb_logger: false', 'use_tb_logger: true')
    with pytest.raises(UserError, match='logger.use_tb_logger: needs tensorboard, which is not installed: pip install'):
        load_options(write(text), is_train=True)


@pytest.mark.skipif(getattr(importlib.util.find_spec('wandb'), 'origin', None) is not None, reason='wandb is installed')
def test_a_folder_that_wandb_left_is_not_taken_for_the_package(monkeypatch):
    Path('wandb').mkdir()
    monkeypatch.syspath_prepend('.')
    text = TRAIN.replace('use_tb_logger: false', 'use_tb_logger: true\n  wandb: {project: elan}')
    with pytest.raises(UserError, match='logger.wandb.project: needs wandb, which is not installed'):
        load_options(write(text), is_train=True)


def test_a_path_of_windows_in_single_quotes_is_read():
    assert read_yaml(write("a: 'C:\\new\\Users'\nb: C:\\new\n"))[0] == {'a': r'C:\new\Users', 'b': r'C:\new'}


def test_the_line_number_is_that_of_the_key():
    text = TRAIN.replace('gamma: 0.5', 'gamma: half')
    with pytest.raises(UserError, match=f'^options.yml:{line_of(text, "gamma")}: train.scheduler.gamma: '):
        load_options(write(text), is_train=True)


@pytest.mark.parametrize('old, new, said', [
    ('test_1', 'train', 'options.yml:5: datasets: there is no test set, expected a section test_1'),
    ('weights.pth', 'gone.pth', 'options.yml:19: path.pretrain_network_g: gone.pth: no such file, expected a'),
    ('save_img: true', 'tile: 64', 'options.yml:21: val.tile: SRModel does not know it'),
    ('type: PairedImageDataset\n    dataroot_gt: data/hr', 'type: SingleImageDataset',
     'options.yml:22: val.metrics.psnr: calculate_psnr compares with a ground truth, which SingleImageDataset'),
    ('    io_backend:\n      type: disk\n', '', 'options.yml:6: datasets.test_1: io_backend is missing'),
    ('  num_in_ch: 3\n', '', 'options.yml:13: network_g: num_in_ch is missing, which EDSR needs'),
])
def test_a_wrong_test_file_is_named(old, new, said):
    with pytest.raises(UserError) as caught:
        load_options(write(TEST.replace(old, new, 1)), is_train=False)
    assert str(caught.value).startswith(said)


def test_a_test_file_given_to_train_is_recognised(capsys):
    assert cli.main(['train', '-opt', write(TEST)]) == 2
    assert 'options.yml: train: is missing, ' in (said := capsys.readouterr().err) and '`basicsr test`' in said


def test_adversarial_models_need_their_discriminator():
    text = TRAIN.replace('ELANModel', 'SRGANModel')
    with pytest.raises(UserError, match='network_d is missing, which SRGANModel needs'):
        load_options(write(text), is_train=True)


def test_models_of_the_toolbox_do_not_take_what_they_would_pass_over():
    text = TRAIN.replace('ELANModel', 'SRModel')
    with pytest.raises(UserError, match='train.amp: SRModel does not know it'):
        load_options(write(text), is_train=True, overrides=['train.amp=bf16'])
    with pytest.raises(UserError, match='cuda_graphs: SRModel does not know it'):
        load_options(write(text), is_train=True, overrides=['cuda_graphs=true'])
    with pytest.raises(UserError, match='train.scheduler.type: SRModel of BasicSR 1.4.2 does not know StepLR; use'):
        load_options(write(text), is_train=True, overrides=['train.scheduler={type: StepLR, step_size: 9}'])
    with pytest.raises(UserError, match='train.optim_g.type: SRModel of BasicSR 1.4.2 trains with Adam only'):
        load_options(write(text.replace('type: Adam', 'type: AdamW')), is_train=True)
    assert load_options(write(TRAIN.replace('type: Adam', 'type: AdamW')), is_train=True)


@pytest.mark.parametrize('content, said', [
    (b'', 'found nothing'), (b'- a\n- b\n', 'found list'), (b'just words\n', 'found str'),
    (b'\xff\xfe\x00a', 'text file'),
    (b'name: \x00', 'not valid YAML'), (b'#' * (MAX_BYTES + 1), 'larger than 1 MiB'),
    (b'a: b\n---\nc: d\n', 'single document'),
    (b'- ' * 500_000 + b'a', 'too deeply nested'), (b'[' * 500_000, 'too deeply nested'),
    (b'{a: ' * 200_000, 'too deeply nested'),
    (b'a0: &a0 [x, x]\n' + b''.join(b'a%d: &a%d [*a%d, *a%d]\n' % (i, i, i - 1, i - 1) for i in range(1, 29)),
     'too many'),
    (b'a: ' + b'1:' * 300_000 + b'1', 'a number of 600001 characters'),
])
def test_a_file_that_is_no_option_file_is_refused_quickly(content, said):
    Path('options.yml').write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_yaml('options.yml')
    assert said in str(caught.value) and str(caught.value).startswith('options.yml')


def test_a_missing_file_is_named(capsys):
    assert cli.main(['test', '-opt', 'nowhere.yml']) == 2
    assert capsys.readouterr().err == 'basicsr: error: nowhere.yml: no such option file\n'
    assert cli.main(['test', '-opt', 'data']) == 2
    assert 'is a folder' in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- BasicSR's own style

NETWORKS_OF_BASICSR = {
    'MSRResNet': ('SRModel', '{type: MSRResNet, num_in_ch: 3, num_out_ch: 3, num_feat: 64, num_block: 16, upscale: 2}'),
    'EDSR': ('SRModel', '{type: EDSR, num_in_ch: 3, num_out_ch: 3, num_feat: 64, num_block: 16, upscale: 2, '
                        'res_scale: 1, img_range: 255., rgb_mean: [0.4488, 0.4371, 0.4040]}'),
    'RCAN': ('SRModel', '{type: RCAN, num_in_ch: 3, num_out_ch: 3, num_feat: 64, num_group: 10, num_block: 20, '
                        'squeeze_factor: 16, upscale: 2, res_scale: 1}'),
    'SwinIR': ('SwinIRModel', '{type: SwinIR, upscale: 2, in_chans: 3, img_size: 48, window_size: 8, img_range: 1., '
                              'depths: [6, 6], embed_dim: 60, num_heads: [6, 6], mlp_ratio: 2, '
                              "upsampler: 'pixelshuffle', resi_connection: '1conv'}"),
    'RRDBNet': ('ESRGANModel', '{type: RRDBNet, num_in_ch: 3, num_out_ch: 3, num_feat: 64, num_block: 23}'),
    'SRGAN': ('SRGANModel', '{type: MSRResNet, num_in_ch: 3, num_out_ch: 3, num_feat: 64, num_block: 16, upscale: 2}'),
    'ECBSR': ('SRModel', '{type: ECBSR, num_in_ch: 3, num_out_ch: 3, num_block: 4, num_channel: 16, '
                         'with_idt: false, act_type: prelu, scale: 2}'),
}
ADVERSARIAL = """\
  optim_d: {type: Adam, lr: !!float 1e-4, weight_decay: 0, betas: [0.9, 0.99]}
  perceptual_opt:
    type: PerceptualLoss
    layer_weights: {'conv5_4': 1}
    vgg_type: vgg19
    use_input_norm: true
    range_norm: false
    perceptual_weight: 1.0
    style_weight: 0
    criterion: l1
  gan_opt: {type: GANLoss, gan_type: vanilla, real_label_val: 1.0, fake_label_val: 0.0, loss_weight: !!float 5e-3}
  net_d_iters: 1
  net_d_init_iters: 0
"""


@pytest.mark.parametrize('name', NETWORKS_OF_BASICSR)
def test_files_in_the_style_of_basicsr_pass(name):
    model, network = NETWORKS_OF_BASICSR[name]
    text = re.sub(r'network_g:\n(  .*\n)+', f'network_g: {network}\n', TRAIN).replace('ELANModel', model)
    text = text.replace('print_freq: 1', 'wandb: {project: ~, resume_id: ~}\n  print_freq: 1')
    text += 'dist_params:\n  backend: nccl\n  port: 29500\n'
    if 'GAN' in model:
        text = text.replace('val:\n  val', f'{ADVERSARIAL}val:\n  val')
        text = text.replace('path:', 'network_d: {type: VGGStyleDiscriminator, num_in_ch: 3, num_feat: 64}\npath:')
    assert load_options(write(text), is_train=True)['network_g']['type'] in network
