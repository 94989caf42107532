"""Option files are data from strangers: whatever they hold, loading ends in options or in one UserError of one line.

Mutations follow the structure of the shipped files. `ELAN_FUZZ_EXAMPLES=10000 pytest tests/config/test_options_fuzz.py`
tries that many of them.
"""
from __future__ import annotations

import copy
import math
import os
import resource
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import elan_basicsr  # noqa: F401 - basicsr does not import without it
from elan_basicsr.config.options import load_options
from elan_basicsr.config.reader import read_yaml
from elan_basicsr.errors import UserError

OPTIONS = Path(__file__).parents[2] / 'options'
FILES = [OPTIONS / f'{name}.yml' for name in (
    'train_ELAN_light_x4', 'test_ELAN_light_x4', 'demo_ELAN_light_x2', 'compare/train_EDSR_M_x4',
    'compare/train_MSRResNet_x4')]
EXAMPLES = int(os.environ.get('ELAN_FUZZ_EXAMPLES', 120))
MEMORY = 1 << 29
"""What one example may add to the size of the process, in bytes."""

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.integers(-10**25, 10**25), st.floats(),
    st.sampled_from([
        '', ' ', '~', 'none', 'auto', 'ELAN', 'EDSR', 'SwinIR', 'Adam', 'L1Loss', 'cuda', '../..', '/', '\0', 'a\nb',
        '\x1b[31m', '\u2028', '\ud83d', '${HOME}', '{}', '{0.__class__}', '%s', '1e-4', '-1', 'x' * 5000, '__class__',
        'os.system', 'file:///etc/passwd', 'é', '2001-01-01', '0x10', '1:30']),
    st.text(max_size=12))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner,
                                                                                          max_size=3), max_leaves=6)
CODE = 'touch code_was_run'
FRAGMENTS = st.sampled_from([
    f'!!python/object/apply:os.system ["{CODE}"]', f'!!python/object/apply:subprocess.getoutput ["{CODE}"]',
    f'!!python/object/new:os.system ["{CODE}"]', '!!python/name:os.system', '!!python/module:os',
    f'!!python/object/new:type {{args: [z, !!python/tuple [], {{extend: !!python/name:exec }}], listitems: "{CODE}"}}',
    '!!python/tuple [1, 2]', '!!binary aGk=', '!!set {a}', '!!omap [a: 1]', '!!timestamp 2001-01-01', '!!int x',
    '!!float y', '!!bool z', '!!null n', '!!int', '!!float', '!!bool', '! a', '!local b', '!<tag:yaml.org,2002:int> 3',
    '&a [*a]', '*nothing', '&a {<<: *a}', '&x x', '*x', '<<: [1, 2]', '<<: {name: x}', '=', '%YAML 9.9', '---', '...',
    '|', '>', '"', "'", '[', '{', '}', ']', '? ', ': ', '- ', '\t', '\0', '\ufeff', '@', '`', '"\\ud800"', '"\\x00"',
    '0o7', '0b', '.inf', '-.inf', '.nan', '1_000', '9' * 200, '60:60', '- ' * 3000, '[' * 3000, '{a: ' * 3000, '# ',
    '\n', '\r', '\x85', 'name: again\n'])


@pytest.fixture(scope='module', autouse=True)
def folder(tmp_path_factory):
    """A working directory where everything the files name is there, so that every check is reached."""
    folder, before = tmp_path_factory.mktemp('fuzz'), Path.cwd()
    os.chdir(folder)
    for file in FILES:
        opt, _ = read_yaml(file)
        for dataset in opt['datasets'].values():
            for key in ('dataroot_gt', 'dataroot_lq'):
                Path(dataset[key]).mkdir(parents=True, exist_ok=True)
                Path(dataset[key], 'data.mdb').touch()
        if opt['path'].get('pretrain_network_g'):
            Path(opt['path']['pretrain_network_g']).parent.mkdir(parents=True, exist_ok=True)
            Path(opt['path']['pretrain_network_g']).touch()
    for file in FILES:
        load_options(file, is_train='train' in read_yaml(file)[0])
    yield folder
    os.chdir(before)


def is_plain(value) -> bool:
    if type(value) is dict:
        return all(type(key) is str and is_plain(item) for key, item in value.items())
    if type(value) is list:
        return all(map(is_plain, value))
    return value is None or type(value) in (str, int, float, bool)


def load(content: bytes, is_train: bool, **arguments) -> None:
    """Load `content` as an option file, and fail on anything but plain options or one line."""
    Path('options.yml').write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    try:
        opt = load_options('options.yml', is_train=is_train, **arguments)
        assert is_plain(opt)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and str(error).isprintable() and len(str(error)) < 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < before + MEMORY
    assert not Path('code_was_run').exists()


def sections_of(value):
    """Every dict and list inside `value`, itself included."""
    if isinstance(value, (dict, list)):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from sections_of(item)


@st.composite
def mutated_options(draw):
    """A shipped file with one to three keys deleted, renamed, doubled, moved, or given another value."""
    file = draw(st.sampled_from(FILES))
    options = copy.deepcopy(read_yaml(file)[0])
    for _ in range(draw(st.integers(1, 3))):
        section = draw(st.sampled_from([each for each in sections_of(options) if each] or [{'': None}]))
        key = draw(st.sampled_from(list(section) if isinstance(section, dict) else range(len(section))))
        how = draw(st.sampled_from(['value', 'value', 'delete', 'rename', 'wrap', 'graft', 'number']))
        if how == 'value':
            section[key] = draw(VALUES)
        elif how == 'number' and isinstance(section[key], (int, float)):
            number = section[key]
            section[key] = draw(st.sampled_from([-number, number + 1, float(number), number * 10**6, str(number),
                                                 [number], math.inf, math.nan]))
        elif how == 'wrap':
            section[key] = [section[key]] if draw(st.booleans()) else {draw(st.text(max_size=5)): section[key]}
        elif how == 'graft':
            section[key] = copy.deepcopy(draw(st.sampled_from(list(sections_of(options)))))
        else:
            value = section.pop(key)
            if how == 'rename' and isinstance(section, dict):
                place = draw(st.integers(0, max(len(key) - 1, 0)))
                section[key[:place] + draw(st.sampled_from(['', 's', '_', '\n', 'é'])) + key[place + 1:]] = value
    text = yaml.safe_dump(options, sort_keys=False, allow_unicode=draw(st.booleans()),
                          default_flow_style=draw(st.sampled_from([None, True, False])))
    return text.encode('utf-8', 'surrogatepass'), 'train' in file.stem or 'demo' in file.stem


@st.composite
def mutated_texts(draw):
    """A shipped file with one to four fragments of YAML put into its text, or pieces cut out of it."""
    file = draw(st.sampled_from(FILES))
    text = file.read_text(encoding='utf-8')
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):  # in the place of a value
            places = [number for number, character in enumerate(text) if text[number:number + 2] == ': ']
            start = draw(st.sampled_from(places or [0])) + 2
            end = draw(st.sampled_from([start, max(text.find('\n', start), start)]))
        else:
            start = draw(st.integers(0, len(text)))
            end = start + draw(st.sampled_from([0, 0, 1, 5, 100]))
        text = text[:start] + draw(FRAGMENTS) + text[end:]
    content = text.encode('utf-8', 'surrogatepass')
    if draw(st.integers(0, 9)) == 0:
        place = draw(st.integers(0, len(content)))
        content = content[:place] + draw(st.binary(max_size=8)) + content[place:]
    return content, 'train' in file.stem or 'demo' in file.stem


FUZZ = settings(max_examples=max(EXAMPLES // 2, 1), deadline=20_000, database=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much])


@FUZZ
@given(mutated_options())
def test_a_file_with_other_keys_and_values_is_read_or_refused(case):
    load(*case)


@FUZZ
@given(mutated_texts())
def test_a_file_with_other_yaml_is_read_or_refused(case):
    load(*case)


KEYS = st.sampled_from(['name', 'train.total_iter', 'train.scheduler.milestones.0', 'datasets.val', 'a.b',
                        'val.metrics', 'network_g.num_feat', 'train:total_iter', 'path:pretrain_network_g',
                        'datasets.train.io_backend.type'])
OVERRIDES = st.lists(max_size=3, elements=st.text(max_size=30) | st.builds(
    '{}={}'.format, KEYS, FRAGMENTS | st.text(max_size=10)))


@settings(FUZZ, max_examples=max(EXAMPLES // 6, 1))
@given(OVERRIDES, st.booleans())
def test_any_override_is_carried_out_or_refused(texts, forced):
    load(FILES[0].read_bytes(), True, **{'force_yml' if forced else 'overrides': texts})
