"""What a `type` in an option file can name: all that is registered, and the arguments it takes, as JSON schemas."""
from __future__ import annotations

import ast
import contextlib
import copy
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from elan_basicsr.config.reader import Path_, Source
from elan_basicsr.config.schema import DEGRADATIONS, KEYS, SCHEMA, TO_TRAIN, UNKNOWN, at, described, kind
from elan_basicsr.errors import UserError, nearest

from basicsr.models import lr_scheduler
from basicsr.utils import registry

# LBFGS evaluates the loss several times a step, SparseAdam takes sparse gradients: no training loop here does either.
UNUSABLE_OPTIMIZERS = ('Optimizer', 'LBFGS', 'SparseAdam')
# What is no schedule by itself, or takes functions, other schedulers or a value that is measured.
UNUSABLE_SCHEDULERS = ('LRScheduler', '_LRScheduler', 'LambdaLR', 'MultiplicativeLR', 'SequentialLR',
                       'ChainedScheduler', 'ReduceLROnPlateau')

DATASET_KEYS = {
    'PairedImageDataset': ('dataroot_gt', 'dataroot_lq', 'io_backend'),
    'PairedRawLmdbDataset': ('dataroot_gt', 'dataroot_lq'),
    'SingleImageDataset': ('dataroot_lq', 'io_backend'),
    'RealESRGANDataset': (
        'dataroot_gt', 'io_backend', 'use_hflip', 'use_rot', 'final_sinc_prob',
        *(f'{key}{process}' for process in ('', '2')
          for key in ('blur_kernel_size', 'kernel_list', 'kernel_prob', 'blur_sigma', 'betag_range', 'betap_range',
                      'sinc_prob'))),
}
"""What these datasets read without asking whether it is there."""
PATCH_KEYS = ('gt_size', 'use_hflip', 'use_rot')
"""What the paired ones read besides when they cut training patches."""


class Part(NamedTuple):
    """A kind of thing that is named: in words, where in the file, and the arguments that are not the file's to give."""
    what: str
    example: str
    registered: Callable[[], dict[str, Any]]
    key: str
    by_caller: tuple[str, ...] = ()


def _in(entries: registry.Registry) -> Callable[[], dict[str, Callable]]:
    """What is in a registry by the names it is found by: the toolbox files some of its own with `_basicsr` added."""
    return lambda: {**{name.removesuffix('_basicsr'): value for name, value in entries}, **dict(iter(entries))}


def _optimizers() -> dict[str, Callable]:
    return {name: value for name, value in vars(torch.optim).items() if isinstance(value, type)
            and issubclass(value, torch.optim.Optimizer) and name not in UNUSABLE_OPTIMIZERS}


def _schedulers() -> dict[str, Callable]:
    steps, cosine = lr_scheduler.MultiStepRestartLR, lr_scheduler.CosineAnnealingRestartLR
    torchs = {name: value for name, value in vars(torch.optim.lr_scheduler).items() if isinstance(value, type)
              and issubclass(value, torch.optim.lr_scheduler.LRScheduler) and name not in UNUSABLE_SCHEDULERS}
    return {**torchs, 'MultiStepLR': steps, 'MultiStepRestartLR': steps, 'CosineAnnealingRestartLR': cosine}


MODEL = Part('model', 'a model such as ELANModel', _in(registry.MODEL_REGISTRY), 'model_type')
DATASET = Part('dataset', 'a dataset such as PairedImageDataset', _in(registry.DATASET_REGISTRY), 'datasets.*')
ARCHITECTURE = Part('architecture', 'an architecture such as ELAN', _in(registry.ARCH_REGISTRY), 'network_*')
OPTIMIZER = Part('optimizer to train with in torch.optim', 'an optimizer such as Adam', _optimizers, 'train.optim_*',
                 ('params',))
SCHEDULER = Part('scheduler', 'a scheduler such as MultiStepLR', _schedulers, 'train.scheduler', ('optimizer',))
LOSS = Part('loss', 'a loss such as L1Loss', _in(registry.LOSS_REGISTRY), 'train.*_opt')
METRIC = Part('metric', 'a metric such as calculate_psnr', _in(registry.METRIC_REGISTRY), 'val.metrics.*',
              ('img', 'img2'))


def find(name: str, part: Part, source: Source, key: Path_) -> Any:
    """What is registered under `name`, or an error with the nearest names; `key` is where the name stands."""
    registered = part.registered()
    also = '' if part in (OPTIMIZER, SCHEDULER) else '; what another package registers needs --import PACKAGE'
    check_choice(name, registered, part.what, source, key, also)
    return registered[name]


def find_type(section: dict, part: Part, source: Source, key: Path_) -> Any:
    """What the `type` of the section at `key` names."""
    if 'type' not in section:
        raise source.error(key, f'type is missing, expected the name of {part.example}')
    return find(section['type'], part, source, (*key, 'type'))


def check_choice(name, names: Iterable[str], what: str, source: Source, key: Path_, also: str = '') -> None:
    names = sorted(names)
    if name not in names:
        near = nearest(str(name), names, count=2, cutoff=0.5)
        expected = f'did you mean {near}?' if near else f'expected one of {", ".join(names[:12])}'
        raise source.error(key, f'there is no {what} {str(name)[:60]!r}; {expected}{also}')


# In a docstring: `num_feat (int): Channels. Default: 64.`, and as we write it `num_in_ch, num_out_ch: Channels.`
_TOLD = re.compile(r'^( *)(\w+(?:, \w+)*) ?(?:\((.*?)\))?: *(\S.*(?:\n\1 +(?!\w+ \(.*\): )\S.*)*)', re.M)
_AFTER = re.compile(r'[.,;]? (?:Defaults?\b|\(default)|(?<=[\w)\'\]])\. ')
# In a dataset: `opt['gt_size']`, `opt.get('color', None)  # a comment`
_READ = re.compile(r"\bopt(?:\['(\w+)'\]|\.get\('(\w+)'(?:, ([^()]+?))?\))(?:.*?  # (.*))?")
_TYPES = {'int': 'number', 'float': 'number', 'bool': 'boolean', 'str': 'string', 'list': 'array', 'tuple': 'array'}
_WORDS = {'number': 'a number', 'boolean': 'true or false', 'string': 'a text', 'array': 'a list'}


def arguments(part: Part, name: str) -> dict:
    """The arguments of what is registered, as the JSON schema of a section, read off its signature and docstring."""
    target = part.registered()[name]
    told, required, takes_any = _told(target), [], False
    properties: dict[str, dict | bool] = {'type': True}
    for each in inspect.signature(target).parameters.values():
        takes_any |= each.kind == each.VAR_KEYWORD
        if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL) and each.name not in part.by_caller:
            said, sentence = told.get(each.name, ('', f'Argument of {name}'))
            said = said or type(each.default).__name__
            type_ = None if '|' in said else _TYPES.get(re.split(r'\W', said)[0])
            may_be = kind(_WORDS[type_], type=[type_, 'null']) if type_ else {}
            properties[each.name] = described(may_be, _sentence(part, each.name, sentence), *_plain(each.default))
            required += [each.name] if each.default is each.empty else []
    return {'title': name, 'errorMessage': f'{name} has no such argument', 'properties': properties,
            'required': required, 'additionalProperties': UNKNOWN if takes_any else False}


def _told(target: Callable) -> dict[str, tuple[str, str]]:
    """Type and text of what the docstring tells of each argument."""
    texts = [inspect.getdoc(target) or '', inspect.getdoc(target.__init__) or '' if inspect.isclass(target) else '']
    return {name: (type_, text) for _, names, type_, text in _TOLD.findall('\n'.join(texts))
            for name in names.split(', ')}


def _sentence(part: Part, name: str, text: str) -> str:
    """The first sentence of a text, or our own where the key is described here."""
    if described_here := KEYS.get(f'{part.key}.{name}'):
        return described_here[1]
    text = _AFTER.split(' '.join(text.split()))[0].rstrip('.:')
    return f'{text[:1].upper()}{text[1:]}.'


def _plain(default) -> list:
    """A default in a list, where it is something that JSON can say."""
    with contextlib.suppress(TypeError, ValueError):
        return [json.loads(json.dumps(default, allow_nan=False))]
    return []


def _keys_read(name: str) -> dict:
    """The keys that a dataset's source reads, as the JSON schema of a section."""
    dataset, properties = DATASET.registered()[name], dict[str, dict]()
    told = _told(dataset)
    with contextlib.suppress(OSError, TypeError):  # where there is no source
        for base in inspect.getmro(dataset)[:-1]:
            for key, asked, default, comment in _READ.findall(inspect.getsource(base)):
                key, values = key or asked, []
                with contextlib.suppress(ValueError, SyntaxError):
                    values = _plain(ast.literal_eval(default))
                _, text = told.get(key, ('', comment or f'Read by {name}'))
                if key not in ('phase', 'scale'):  # which are filled in
                    properties.setdefault(key, described({}, _sentence(DATASET, key, text), *values))
    return {'properties': properties, 'required': [*DATASET_KEYS.get(name, ())], 'additionalProperties': UNKNOWN}


def complete() -> dict:
    """The JSON schema of option files for an editor: with all that is registered, and the arguments of it.

    Editors hold a key that `properties` describes against no pattern, so what a section is stands in `definitions`, to
    which keys and patterns refer.
    """
    whole = copy.deepcopy(SCHEMA)
    whole['properties'].update(DEGRADATIONS)
    whole.update({'if': {'required': ['train']}, 'then': TO_TRAIN, 'definitions': {}})
    at(whole, MODEL.key)['enum'] = _names(MODEL)
    for part in (DATASET, ARCHITECTURE, OPTIMIZER, SCHEDULER, LOSS, METRIC):
        section, name = at(whole, part.key), part.what.split()[0]
        definition = {key: section.pop(key) for key in [*section] if key not in ('description', 'errorMessage')}
        del definition['additionalProperties']  # the type says which keys there are
        definition['required'] = ['type']
        definition['properties']['type']['enum'] = _names(part)
        definition['allOf'] = [{'if': {'required': ['type'], 'properties': {'type': {'const': each}}},
                                'then': _of_type(part, each, definition['properties'])} for each in _names(part)]
        whole['definitions'][name] = definition
        above = at(whole, part.key.rpartition('.')[0])
        for pattern in above.get('patternProperties', {}):
            if above['patternProperties'][pattern] is section:
                for key in filter(re.compile(pattern).search, above.get('properties', {})):
                    above['properties'][key]['allOf'] = [{'$ref': f'#/definitions/{name}'}]
        section['allOf'] = [{'$ref': f'#/definitions/{name}'}]
    return {'$schema': 'http://json-schema.org/draft-07/schema#',
            '$comment': f'by `basicsr options schema`, torch {".".join(torch.__version__.split(".")[:2])}', **whole}


def _of_type(part: Part, name: str, known: dict) -> dict:
    """What a section of this type may hold; beside the `known` keys, where it takes any."""
    schema = _keys_read(name) if part is DATASET else arguments(part, name)
    if schema['additionalProperties']:
        schema['properties'] = {**dict.fromkeys(known, True), **schema['properties']}
    return schema


def _names(part: Part) -> list[str]:
    return sorted(name for name in part.registered() if not name.endswith('_basicsr'))


def write_schema(file: str | None = None) -> None:
    """Write the complete schema to a file, or to standard output.

    Raises:
        UserError: The file cannot be written.
    """
    text = json.dumps(complete(), indent=1) + '\n'
    if not file:
        sys.stdout.write(text)
        return
    try:
        Path(file).write_text(text, encoding='utf-8')
    except OSError as error:
        raise UserError(f'{file}: cannot be written ({error.strerror})') from None
