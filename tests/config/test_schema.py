"""The description of the options is what editors and readers get: current, complete, and true of the shipped files."""
from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import jsonschema
import pytest
import torch

from elan_basicsr.cli import main
from elan_basicsr.config.files import copy_options, shipped
from elan_basicsr.config.parts import complete
from elan_basicsr.config.reader import read_yaml

from ..conftest import ROOT, with_checkout
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY

SCHEMA = json.loads((ROOT / 'options/schema.json').read_text(encoding='utf-8'))
MARK = '# yaml-language-server: $schema='


def test_the_schema_and_the_page_are_what_the_description_makes(tmp_path):
    for folder in ('options', 'docs'):
        (tmp_path / folder).mkdir()
    done = subprocess.run([sys.executable, ROOT / 'tools/describe_options.py', tmp_path], capture_output=True,
                          text=True, env={**os.environ, 'PYTHONPATH': with_checkout()}, timeout=240)
    assert done.returncode == 0, done.stderr
    made, committed = json.loads((tmp_path / 'options/schema.json').read_text(encoding='utf-8')), copy.deepcopy(SCHEMA)
    page = (ROOT / 'docs/options.md').read_text(encoding='utf-8')
    assert (tmp_path / 'docs/options.md').read_text(encoding='utf-8') == page, 'run tools/describe_options.py'
    if made['$comment'] != committed['$comment']:  # another torch, whose optimizers take other arguments
        for schema in (made, committed):
            schema.pop('$comment')
            assert 'Adam' in schema['definitions'].pop('optimizer')['properties']['type']['enum']
    assert made == committed, 'run tools/describe_options.py'


@pytest.mark.parametrize('name', shipped())
def test_a_shipped_file_names_the_schema_and_is_valid(name):
    path = shipped()[name]
    first = path.read_text(encoding='utf-8').split('\n')[0]
    assert first.startswith(MARK)
    assert (path.parent / first.removeprefix(MARK)).resolve() == (ROOT / 'options/schema.json').resolve()
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    errors = [error.message for error in jsonschema.Draft7Validator(SCHEMA).iter_errors(read_yaml(path)[0])]
    assert not errors
    # Nor would an editor warn of a key in it.
    warn = jsonschema.validators.extend(jsonschema.Draft7Validator, {'deprecationMessage': lambda _, text, value, s: [
        jsonschema.ValidationError(text)]})
    assert not [list(error.path) for error in warn(SCHEMA).iter_errors(read_yaml(path)[0])]


def properties(schema):
    """Every key in a schema with what is said of it; where that is only `true`, it is described elsewhere."""
    for word in ('properties', 'patternProperties'):
        for key, value in schema.get(word, {}).items():
            if value is not True:
                yield key, value
                yield from properties(value)


def test_every_key_is_described():
    found = list(properties(SCHEMA))
    for definition in SCHEMA['definitions'].values():
        found += properties(definition)
        for each in definition['allOf']:
            found += properties(each['then'])
    assert len(found) > 400
    assert not [key for key, value in found if len(value.get('description', '')) < 8]


# what is replaced in a shipped file, by what, and the key that an editor marks
@pytest.mark.parametrize('old, new, key', [
    ('num_feat: 60', 'num_feats: 60', 'network_g'), ('num_feat: 60', 'num_feat: many', 'network_g.num_feat'),
    ('type: ELAN\n', 'type: ELEN\n', 'network_g.type'), ('total_iter: 500000', 'total_iter: -1', 'train.total_iter'),
    ('type: L1Loss', 'type: L1Los', 'train.pixel_opt.type'), ('weight_decay: 0', 'weigth_decay: 0', 'train.optim_g'),
    ('type: Adam ', 'type: Adm ', 'train.optim_g.type'), ('gamma: 0.5', 'gamma: half', 'train.scheduler.gamma'),
    ('type: calculate_psnr', 'type: psnr', 'val.metrics.psnr.type'), ('  val:\n', '  valid:\n', 'datasets'),
    ('gt_size: 256', 'gt_size: 0', 'datasets.train.gt_size'),
    ('type: lmdb', 'type: lmbd', 'datasets.train.io_backend.type'),
    ('  total_iter: 500000\n', '', 'train'), ('  type: ELAN\n', '', 'network_g'), ('scale: 4', 'scale: 65', 'scale'),
])
def test_an_editor_marks_what_is_wrong(old, new, key, tmp_path):
    text = shipped()['train_ELAN_light_x4.yml'].read_text(encoding='utf-8')
    assert old in text
    (tmp_path / 'x.yml').write_text(text.replace(old, new, 1), encoding='utf-8')
    errors = jsonschema.Draft7Validator(SCHEMA).iter_errors(read_yaml(tmp_path / 'x.yml')[0])
    assert {'.'.join(map(str, error.absolute_path)) for error in errors} == {key}


def test_keys_of_extensions_are_valid(tmp_path):
    text = shipped()['train_ELAN_light_x4.yml'].read_text(encoding='utf-8')
    text = text.replace('\ntrain:\n', '\nmy_laboratory: {probe: 3}\ntrain:\n  my_rate: 2\n')
    (tmp_path / 'x.yml').write_text(text, encoding='utf-8')
    jsonschema.Draft7Validator(SCHEMA).validate(read_yaml(tmp_path / 'x.yml')[0])


class OwnNetwork(torch.nn.Module):
    """Somebody's.

    Args:
        width (int): Channels inside. Default: 8.
    """

    def __init__(self, depth, width=8, name='deep', norm=torch.nn.BatchNorm2d):
        super().__init__()


class OwnDataset(torch.utils.data.Dataset):
    def __init__(self, opt):
        self.root = opt['my_root']
        self.crops = opt.get('crops', 4)  # patches of an image


def test_what_a_user_registers_is_in_it(monkeypatch):
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'OwnNetwork', OwnNetwork)
    monkeypatch.setitem(DATASET_REGISTRY._obj_map, 'OwnDataset', OwnDataset)
    schema = complete()
    network = {'type': 'OwnNetwork', 'depth': 3, 'width': 16}
    validator = jsonschema.Draft7Validator({**schema['definitions']['architecture'], 'definitions': {}})
    assert not list(validator.iter_errors(network))
    assert 'widht' in next(validator.iter_errors({**network, 'widht': 3})).message
    assert 'depth' in next(validator.iter_errors({'type': 'OwnNetwork'})).message
    own = {each['if']['properties']['type']['const']: each['then'] for what in ('architecture', 'dataset')
           for each in schema['definitions'][what]['allOf']}
    arguments = own['OwnNetwork']['properties']
    assert arguments['width']['default'] == 8 and arguments['width']['description'] == 'Channels inside.'
    assert 'default' not in arguments['depth'] and 'default' not in arguments['norm']
    read = own['OwnDataset']['properties']
    assert 'my_root' in read and read['crops'] == {'description': 'Patches of an image.', 'default': 4}


def test_the_command_writes_it(tmp_path, capsys):
    assert main(['options', 'schema']) == 0
    printed = json.loads(capsys.readouterr().out)
    assert main(['options', 'schema', '-o', str(tmp_path / 'schema.json')]) == 0
    assert json.loads((tmp_path / 'schema.json').read_text(encoding='utf-8')) == printed
    assert printed['properties'] == SCHEMA['properties']
    assert main(['options', 'schema', '-o', str(tmp_path / 'none' / 'schema.json')]) == 2
    assert capsys.readouterr().err.count('\n') == 1


def test_without_jsonschema_it_says_in_one_line_what_to_type(tmp_path):
    code = ("import sys; sys.modules['jsonschema'] = None; from elan_basicsr.cli import main; "
            "sys.exit(main(['options', 'schema']))")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, 'PYTHONPATH': with_checkout()}, timeout=240)
    assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
    assert 'jsonschema is not installed' in done.stderr and 'pip install jsonschema' in done.stderr


def test_copies_come_with_the_schema_and_nobodys_is_overwritten(tmp_path):
    copy_options(['train_ELAN_x4', 'compare/*'], tmp_path / 'new')
    assert (tmp_path / 'new/schema.json').read_bytes() == (ROOT / 'options/schema.json').read_bytes()
    (tmp_path / 'schema.json').write_text('mine')
    copies = copy_options(['train_ELAN_x4'], tmp_path)
    assert [path.name for path in copies] == ['train_ELAN_x4.yml']
    assert (tmp_path / 'schema.json').read_text() == 'mine'
