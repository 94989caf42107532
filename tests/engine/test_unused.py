"""What is given and not used is told at the start, and what is used is not."""
import re
from pathlib import Path

import pytest
import yaml

from elan_basicsr.cli import main
from elan_basicsr.config.options import load_options
from elan_basicsr.engine.unused import unused
from tests.config.test_option_files import prepare
from tests.conftest import ROOT
from tests.engine.test_train import write


def told(options, is_train=True) -> list[str]:
    return unused(load_options(write(options), is_train=is_train))


def test_a_usual_file_is_passed_over_in_silence(options):
    assert told(options) == []


@pytest.mark.parametrize('file', sorted((ROOT / 'options').rglob('*.yml')), ids=lambda file: file.stem)
def test_a_shipped_file_gives_nothing_that_is_not_used(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opt = yaml.safe_load(file.read_text())
    prepare(opt)
    lines = unused(load_options(file, is_train='train' in opt))
    assert [line for line in lines if 'there is no validation' not in line] == []
    assert bool(lines) == ('val' not in opt)


def test_a_validation_that_is_switched_off_by_its_place_is_told(options):
    """Below train it would be a key that nobody reads."""
    options['train']['val'] = options.pop('val')
    assert told(options) == [
        'datasets.val is given, but there is no validation, which needs a section val at the top of the file',
        'train.val is given and not used: ELANModel does not read it; did you mean val?']


@pytest.mark.parametrize('gone, line', [
    ({'set'}, 'val is given, but there is no validation, which needs a set datasets.val'),
    ({'section', 'set'}, 'there is no validation, which needs a section val at the top of the file and a set '
                         'datasets.val'),
    ({'metrics'}, 'val: neither val.metrics nor val.save_img is given: nothing is measured and nothing saved'),
])
def test_a_training_without_figures_says_so(options, gone, line):
    if 'set' in gone:
        del options['datasets']['val']
    if 'section' in gone:
        del options['val']
    if 'metrics' in gone:
        del options['val']['metrics']
    assert told(options) == [line]


@pytest.mark.parametrize('section, key, value, line', [
    ('', 'ema_decay', 0.9, 'ema_decay is given and not used: ELANModel does not read it; did you mean '
                           'train.ema_decay?'),
    ('', 'queue_size', 180, 'queue_size is given and not used: ELANModel does not read it'),
    ('', 'network_d', {'type': 'UNetDiscriminatorSN', 'num_in_ch': 3},
     'network_d is given and not used: ELANModel does not read it'),
    ('train', 'gan_opt', {'type': 'GANLoss', 'gan_type': 'vanilla'},
     'train.gan_opt is given and not used: ELANModel does not read it'),
    ('train', 'val_freq', 100, 'train.val_freq is given and not used: ELANModel does not read it; did you mean '
                               'val.val_freq?'),
    ('logger', 'save_degraded', 4, 'logger.save_degraded is given and not used: ELANModel does not read it'),
    ('path', 'pretrain_network_d', None, None),
    ('datasets.train', 'use_shuffle', False, 'datasets.train.use_shuffle: false is not used: samples are shuffled, '
                                             'anew in each pass'),
    ('datasets.train', 'prefetch_mode', 'cpu', 'datasets.train.prefetch_mode: cpu is not used: the loader workers load '
                                               'ahead'),
    ('datasets.train', 'batch_sampler', 'balanced', 'datasets.train.batch_sampler is given and not used: '
                                                    'PairedRawLmdbDataset does not read it'),
    ('train.scheduler', 'milestones', [6, 9], 'train.scheduler.milestones: 9 will not be reached in train.total_iter, '
                                              '8'),
])
def test_what_is_not_used_is_told_with_where_it_belongs(options, section, key, value, line):
    place = options
    for part in section.split('.') if section else ():
        place = place[part]
    place[key] = value
    assert told(options) == ([line] if line else [])


def test_a_test_that_measures_nothing_says_so(options):
    options['datasets'] = {'test_1': options['datasets']['val']}
    assert told(options, is_train=False) == []
    options['metrics'] = options['val'].pop('metrics')
    assert told(options, is_train=False) == [
        'val: neither val.metrics nor val.save_img is given: nothing is measured and nothing saved']


def test_it_is_in_the_log_once(options):
    options['train']['val'] = options.pop('val')
    assert main(['train', '-opt', write(options), '--set', 'train.total_iter=1']) == 0
    log = next(Path('experiments/run').glob('*.log')).read_text()
    assert len(re.findall('INFO: .*there is no validation, which needs a section val', log)) == 1
