"""What an option file may hold, described once as a JSON schema: every key with its bounds, default and a sentence.

`jsonschema` checks files against it here. With the arguments of all that is registered (`parts.complete`) it is what
editors complete and check with, `options/schema.json`, and the page `docs/options.md`.
"""
from __future__ import annotations

import fnmatch
import functools
import math
import operator
import re
from collections.abc import Iterable, Iterator
from os import path as osp

from elan_basicsr import dependencies
from elan_basicsr.config.reader import Path_, Source, shown
from elan_basicsr.errors import nearest

with dependencies.explained():
    from jsonschema import Draft7Validator, FormatChecker, ValidationError, validators


def is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# ------------------------------------------------------------------------------------------------- what a value may be

def kind(words: str, **schema) -> dict:
    """A JSON schema and its words; `errorMessage` is what editors show as well."""
    return {**schema, 'errorMessage': f'expected {words}'}


def _one_of(*values) -> dict:
    words = ('null' if value is None else str(value).lower() if isinstance(value, bool) else value for value in values)
    return kind(' or '.join(words), enum=list(values))


def _list_of(words: str, item: dict, **schema) -> dict:
    items = {key: value for key, value in item.items() if key != 'errorMessage'}
    return kind(words, type='array', items=items, **{'minItems': 1, **schema})


def type_of(what: str) -> dict:
    return kind(f'the name of {what}', **_TEXT)


UNKNOWN = {'deprecationMessage': 'unknown key: it is passed over, unless an extension of yours reads it'}
"""A key that is not described: editors warn of it. Here it passes, unless it is nearly one that is described."""
_TEXT = {'type': 'string', 'pattern': r'\S'}
_TEXT_OR_NONE = {**_TEXT, 'type': ['string', 'null']}
TEXT = kind('a text', **_TEXT)
TEXT_OR_NONE = kind('a text, or null for none', **_TEXT_OR_NONE)
NAME = kind('a text without / that can name a folder', type='string', format='file-name',
            pattern=r'^(?=.*\S)(?!\.\.?$)[^/\\\u0000\n]+$(?!\n)')
NO_CODE = kind('nothing, for the Python code in that folder would be run; use PYTHONPATH', type='null')
FILE_SUFFIX = kind('a text without /, or null for none', **_TEXT_OR_NONE, **{'not': {'type': 'string', 'pattern': '/'}})
PATH = kind('a path, or null for none', **_TEXT_OR_NONE)
PATHS = kind('a path, a list of paths, or null for none',
             anyOf=[_TEXT_OR_NONE, {'type': 'array', 'items': _TEXT, 'minItems': 1}])
SWITCH = kind('true or false', type='boolean')
COUNT = kind('an integer from 1', type='integer', minimum=1)
SCALE = kind('an integer from 1 to 64', type='integer', minimum=1, maximum=64)
COUNT_OR_ZERO = kind('an integer from 0', type='integer', minimum=0)
INTEGER = kind('an integer, -1 for none', type='integer')
ITERATIONS = kind('a whole number from 1', type='number', multipleOf=1, minimum=1)
POSITIVE = kind('a number above 0', type='number', exclusiveMinimum=0)
CLIP = kind('a number above 0, or false', anyOf=[{'type': 'number', 'exclusiveMinimum': 0}, {'enum': [False, None]}])
NUMBER = kind('a number', type='number')
NOT_NEGATIVE = kind('a number from 0', type='number', minimum=0)
DECAY = kind('a number from 0 to below 1', type='number', minimum=0, exclusiveMaximum=1)
BETAS = _list_of('two numbers from 0 to below 1, such as [0.9, 0.999]', DECAY, minItems=2, maxItems=2)
NUMBERS = _list_of('a list of numbers', NUMBER)
MILESTONES = _list_of('a list of iterations, such as [250000, 400000]', COUNT)
RESTARTS = _list_of('a list of iterations from 0, such as [0, 250000]', COUNT_OR_ZERO)
TEMPLATE = kind("a text with one {}, such as '{}x4'", type='string', pattern=r'^[^{}]*\{\}[^{}]*$')
SECTION = kind('a section of keys', type='object', minProperties=1)
SECTION_OR_NONE = kind('a section of keys, or null for none', type=['object', 'null'])
SEED = kind('an integer from 0 to 4294967295, or null for a random one', type=['integer', 'null'], minimum=0,
            maximum=2**32 - 1)
GPUS = kind('auto or an integer from 0', anyOf=[{'const': 'auto'}, {'type': 'integer', 'minimum': 0}])
NETWORKS = kind('a list of networks such as [network_d]', type=['array', 'null'], items=_TEXT, minItems=1)
AMP = _one_of('bf16', 'fp16', False, None)
BACKEND = _one_of('nccl', 'gloo', None)

# ------------------------------------------------------------------------------------------------- the keys

# Key: what it may be, what it is, its default. '*' stands for any text. What is left out here is what only certain
# networks, datasets, losses, optimizers, schedulers or metrics know: that is read off their signatures.
KEYS: dict[str, tuple] = {
    'name': (NAME, 'A name for the run and its folder under experiments/ or results/.'),
    'model_type': (type_of('a model such as ELANModel'), 'The model: how the networks are trained and tested.'),
    'scale': (SCALE, 'Enlargement, as the network makes it.'),
    'num_gpu': (GPUS, 'auto: a GPU, if there is one, for each process; several take torchrun; 0: the CPU.', 'auto'),
    'manual_seed': (SEED, 'Seed of weights, samples and augmentations.'),
    'find_unused_parameters': (SWITCH, 'On several processes: look for weights that an iteration did not use.', False),
    'compile': (SWITCH, '`torch.compile` for training: slower to start, faster to run.', False),
    'cuda_graphs': (SWITCH, 'Replay training passes as CUDA graphs: for small batches; no effect on a CPU.', False),
    'sync_bn': (SWITCH, 'BatchNorm statistics over all processes, on GPUs and CPUs.', False),
    'deterministic': (SWITCH, 'Ask torch for kernels that repeat themselves, for some speed.', False),

    'datasets': (SECTION, 'The data sets: train, val for validation, test_1, test_2 and so on for tests.'),
    'datasets.train': (SECTION, 'The training set.'),
    'datasets.val': (SECTION, 'The set that is validated on during training.'),
    'datasets.test_1': (SECTION, 'The first set to test on; `--set datasets.test_1=~` leaves it out.'),
    'datasets.*': (SECTION, 'A data set; the name starts with train, val or test.'),
    'datasets.*.name': (NAME, 'What the log and the folder of its images call it.'),
    'datasets.*.type': (type_of('a dataset such as PairedImageDataset'), 'The class that reads it.'),
    'datasets.*.dataroot_gt': (PATHS, 'Folder or LMDB of the ground truth (HR), or a list of them.'),
    'datasets.*.dataroot_lq': (PATHS, 'Folder or LMDB of the LR images, or a list in the order of dataroot_gt.'),
    'datasets.*.filename_tmpl': (TEMPLATE, "Name of an LR image, with {} for the HR image's, such as '{}_small'; "
                                           'other suffixes and endings such as x4 or _LR are found without it.', '{}'),
    'datasets.*.meta_info_file': (PATHS, 'A file that lists the images; without it all in the folder are taken.'),
    'datasets.*.meta_info': (PATHS, 'The same, for the datasets of Real-ESRGAN.'),
    'datasets.*.io_backend': (SECTION, 'How images are read.'),
    'datasets.*.io_backend.type': (_one_of('disk', 'lmdb', 'memcached'), 'Files in a folder, an LMDB, or memcached.'),
    'datasets.*.io_backend.sys_path': (NO_CODE, 'Refused: a folder of Python code.'),
    'datasets.*.gt_size': (COUNT, 'Edge of the HR patch in pixels, a multiple of scale.'),
    'datasets.*.use_hflip': (SWITCH, 'Flip patches horizontally at random.'),
    'datasets.*.use_rot': (SWITCH, 'Flip vertically and transpose at random: with use_hflip all eight orientations.'),
    'datasets.*.use_shuffle': (SWITCH, 'Shuffle the samples of an epoch.'),
    'datasets.*.num_worker_per_gpu': (COUNT_OR_ZERO, 'Processes that load data, for each process that trains.'),
    'datasets.*.batch_size_per_gpu': (COUNT, 'Samples of an iteration on each process.'),
    'datasets.*.dataset_enlarge_ratio': (ITERATIONS, 'How often an epoch runs through the images.', 1),
    'datasets.*.prefetch_mode': (_one_of('cpu', 'cuda', None), 'Load the next batch ahead; cuda needs pin_memory.',
                                 None),
    'datasets.*.pin_memory': (SWITCH, 'Batches lie in memory that a GPU reads directly.', False),
    'datasets.*.persistent_workers': (SWITCH, 'Loading processes outlive an epoch.', False),
    'datasets.*.num_prefetch_queue': (COUNT, 'Batches that are loaded ahead with prefetch_mode: cpu.', 1),
    'datasets.*.color': (_one_of('y', None), 'y: the Y channel alone.', None),
    'datasets.*.mean': (NUMBERS, 'Subtracted from the images, a number for each channel.'),
    'datasets.*.std': (NUMBERS, 'What the images are divided by, a number for each channel.'),

    'network_g': (SECTION, 'The network that makes images: its type and its arguments.'),
    'network_d': (SECTION, 'The discriminator of an adversarial training.'),
    'network_*': (SECTION, 'A network: its type and its arguments.'),
    'network_*.type': (type_of('an architecture such as ELAN'), 'The architecture.'),

    'path': (SECTION_OR_NONE, 'Weights to start from, and where runs lie.'),
    'path.pretrain_network_g': (PATH, "Weights to start from: a file, or a name of `basicsr weights`.", None),
    'path.pretrain_network_d': (PATH, 'Weights of the discriminator to start from.', None),
    'path.pretrain_network_*': (PATH, 'Weights of that network to start from.', None),
    'path.param_key_g': (TEXT_OR_NONE, 'Which weights of the file: params, or params_ema for the average.', 'params'),
    'path.param_key_d': (TEXT_OR_NONE, "Which weights of the discriminator's file.", 'params'),
    'path.strict_load_g': (SWITCH, 'Every weight must fit; false takes over those that do.', True),
    'path.strict_load_d': (SWITCH, "Every weight of the discriminator's must fit.", True),
    'path.resume_state': (PATH, 'A file of training_states/ to go on from; --auto_resume finds the newest.', None),
    'path.ignore_resume_networks': (NETWORKS, 'Networks that keep their pretrained weights when a run is resumed.'),
    'path.experiments_root': (PATH, 'Where the folders of trainings lie.', 'experiments'),
    'path.results_root': (PATH, 'Where the folders of tests lie.', 'results'),

    'train': (SECTION, 'The training; a file without it is for `basicsr test`.'),
    'train.total_iter': (ITERATIONS, 'Iterations of the whole training.'),
    'train.warmup_iter': (INTEGER, 'Iterations in which the learning rate rises to its value.', -1),
    'train.ema_decay': (DECAY, 'Decay of the average of the weights, saved as params_ema and used in validation.', 0),
    'train.amp': (AMP, 'Mixed precision: bf16, or fp16 on a GPU; attention stays in float32.', False),
    'train.accumulate': (COUNT, "An iteration's batch is worked off in that many equal parts.", 1),
    'train.grad_clip': (CLIP, 'Largest L2 norm of the gradient.', False),
    'train.net_d_iters': (COUNT, 'The generator is updated every so many iterations.', 1),
    'train.net_d_init_iters': (COUNT_OR_ZERO, 'Iterations at the start in which the discriminator learns alone.', 0),
    'train.optim_g': (SECTION, "The generator's optimizer: its type in torch.optim and its arguments."),
    'train.optim_d': (SECTION, "The discriminator's optimizer."),
    'train.optim_*': (SECTION, "A network's optimizer."),
    'train.optim_*.type': (type_of('an optimizer such as Adam'), 'A class of torch.optim.'),
    'train.optim_*.lr': (POSITIVE, 'The learning rate.'),
    'train.optim_*.weight_decay': (NOT_NEGATIVE, 'Weight decay.'),
    'train.optim_*.betas': (BETAS, 'Decay of the averages of the gradient and of its square.'),
    'train.scheduler': (SECTION, 'How the learning rate falls.'),
    'train.restart_scheduler': (SWITCH, 'A resumed run begins its schedule and warm-up anew there, once for each '
                                'schedule.', False),
    'train.scheduler.type': (type_of('a scheduler such as MultiStepLR'),
                             "BasicSR's, or one of torch.optim.lr_scheduler."),
    'train.scheduler.milestones': (MILESTONES, 'Iterations at which the learning rate is multiplied by gamma.'),
    'train.scheduler.gamma': (POSITIVE, 'Factor of the learning rate.'),
    'train.scheduler.periods': (MILESTONES, 'Lengths of the cosine cycles; together at least total_iter.'),
    'train.scheduler.restarts': (RESTARTS, 'Iterations at which the rate starts anew.'),
    'train.scheduler.restart_weights': (NUMBERS, 'Factor of the rate at each restart.'),
    'train.scheduler.eta_min': (NOT_NEGATIVE, 'Learning rate at the end of a cycle.'),
    'train.pixel_opt': (SECTION_OR_NONE, 'The loss between pixels.'),
    'train.perceptual_opt': (SECTION_OR_NONE, 'The loss between features of VGG, whose weights are downloaded.'),
    'train.gan_opt': (SECTION_OR_NONE, 'The adversarial loss.'),
    'train.*_opt': (SECTION_OR_NONE, 'A loss: its type and its arguments.'),
    'train.*_opt.type': (type_of('a loss such as L1Loss'), 'The loss.'),
    'train.*_opt.loss_weight': (NUMBER, 'Factor of the loss.'),

    'val': (SECTION_OR_NONE, 'Validation during training, and what a test does.'),
    'val.val_freq': (ITERATIONS, 'Iterations between two validations.', 5000),
    'val.save_img': (SWITCH, 'Save the restored images.', False),
    'val.pbar': (SWITCH, 'Show a progress bar.', True),
    'val.suffix': (FILE_SUFFIX, "Of the saved images' names; null: the name of the run.", None),
    'val.metrics': (SECTION_OR_NONE, 'What is measured, each under a name of your own.'),
    'val.metrics.*': (SECTION, 'A metric: its type and its arguments.'),
    'val.metrics.*.type': (type_of('a metric such as calculate_psnr'), 'The metric.'),
    'val.metrics.*.crop_border': (COUNT_OR_ZERO, 'Pixels that are cropped at each edge; by custom the scale.'),
    'val.metrics.*.test_y_channel': (SWITCH, 'Measure on the Y channel.', False),
    'val.metrics.*.better': (_one_of('higher', 'lower'), 'Which of two values is the better one.', 'higher'),
    'val.tile': (COUNT_OR_ZERO, 'Restore images in tiles of so many LR pixels; 0: whole.', 0),
    'val.tile_overlap': (COUNT_OR_ZERO, 'How many LR pixels a tile sees beyond its edges.', 16),
    'val.self_ensemble': (SWITCH, 'Average over the eight flips and rotations.', False),
    'val.save_best': (TEXT_OR_NONE, 'A name in val.metrics: the best network of the first set is kept.', None),

    'logger': (SECTION_OR_NONE, 'The log, and what is saved.'),
    'logger.print_freq': (COUNT, 'Iterations between two lines of the log.', 100),
    'logger.save_checkpoint_freq': (ITERATIONS, 'Iterations between two checkpoints.', 5000),
    'logger.use_tb_logger': (SWITCH, 'Write for TensorBoard, under tb_logger/.', False),
    'logger.keep_last': (COUNT, 'How many pairs of checkpoint and training state to keep; all unless given.'),
    'logger.save_degraded': (COUNT, 'So many LR images that RealELANNetModel or RealELANGANModel degraded are saved '
                             'beside their ground truth, in visualization/degraded/.'),
    'logger.wandb': (SECTION_OR_NONE, 'Weights & Biases; needs use_tb_logger.'),
    'logger.wandb.project': (TEXT_OR_NONE, 'A name switches it on.', None),
    'logger.wandb.resume_id': (TEXT_OR_NONE, 'The id of a run to go on with.', None),

    'dist_params': (SECTION_OR_NONE, 'For several processes; read by the launchers.'),
    'dist_params.backend': (BACKEND, 'What they meet by; without it nccl on GPUs and gloo on CPUs.', None),
    'dist_params.port': (COUNT, 'Port of the first process, under SLURM.', 29500),
    'dist_params.timeout': (POSITIVE, 'Seconds that processes wait for each other.', 600),
}

PATH_KEYS = [key for key, (what, *_) in KEYS.items() if what in (PATH, PATHS)]

REQUIRED = ('name', 'model_type', 'datasets', 'network_g')
REQUIRED_TO_TRAIN = ('train', 'train.total_iter', 'train.optim_g', 'train.optim_*.lr', 'train.scheduler',
                     'datasets.train', 'datasets.train.batch_size_per_gpu')
_EXPECTED = {'name': 'a name for the run and its folder', 'model_type': 'the name of a model such as ELANModel',
             'train': 'a section of keys; a file without it is for `basicsr test`', 'lr': 'the learning rate',
             'total_iter': 'a whole number from 1', 'batch_size_per_gpu': 'an integer from 1'}
"""Where they are missing; for all others it is a section of keys."""


def described(what: dict, sentence: str, *default) -> dict:
    """A key with its sentence and its default; null is not said of what has a type, or completion fails in editors."""
    told = default and not (default[0] is None and 'type' in what)
    return {**what, 'description': sentence, **({'default': default[0]} if told else {})}


_TWICE = {
    'resize_prob': 'Probabilities of enlarging, shrinking and keeping the size',
    'resize_range': 'Smallest and largest factor of the size',
    'gaussian_noise_prob': 'Probability of Gaussian noise instead of Poisson noise',
    'noise_range': 'Smallest and largest sigma of Gaussian noise',
    'poisson_scale_range': 'Smallest and largest scale of Poisson noise',
    'gray_noise_prob': 'Probability of grey noise',
    'jpeg_range': 'Lowest and highest JPEG quality',
}
_DEGRADATIONS: dict[str, tuple] = {
    **{f'{key}{number}': (NUMBER if key.endswith('noise_prob') else NUMBERS, f'{sentence}, in the {which} process.')
       for number, which in (('', 'first'), ('2', 'second')) for key, sentence in _TWICE.items()},
    'second_blur_prob': (NUMBER, 'Probability of blur in the second process.'),
    'gt_size': (COUNT, 'Edge of the HR patch in pixels, as in datasets.train.'),
    'high_order_degradation': (SWITCH, 'Degrade while training, rather than read LR images.', True),
    'queue_size': (COUNT, 'Pool in which degradations mix, a multiple of batch_size_per_gpu.', 180),
    **{key: (SWITCH, f'Sharpen the ground truth{of}.') for key, of in (
        ('gt_usm', ''), ('l1_gt_usm', ' of the loss between pixels'), ('percep_gt_usm', ' of the perceptual loss'),
        ('gan_gt_usm', ' of the discriminator'))},
}
DEGRADATIONS = {key: described(*entry) for key, entry in _DEGRADATIONS.items()}
"""What the models of Real-ESRGAN read at the top of a file."""


def at(schema: dict, key: str) -> dict:
    """The schema of a key such as `train.optim_*.lr` inside that of a file, made if it is not there."""
    for part in filter(None, key.split('.')):
        before, star, after = part.partition('*')
        pattern = f'^{before}' if before or not after else f'{after}$'
        schema = schema.setdefault('patternProperties' if star else 'properties', {}).setdefault(
            pattern if star else part, {})
    return schema


def _require(schema: dict, keys: Iterable[str]) -> dict:
    for key in keys:
        section, _, name = key.rpartition('.')
        at(schema, section).setdefault('required', []).append(name)
    return schema


def _whole() -> dict:
    whole: dict = {'type': 'object'}
    for key, entry in KEYS.items():
        at(whole, key.rpartition('.')[0])['additionalProperties'] = UNKNOWN
        at(whole, key).update(described(*entry))
    at(whole, 'datasets')['propertyNames'] = {
        'pattern': '^(train|val|test)(_|$)',
        'errorMessage': 'there is no such kind of dataset; expected val, train or test_1'}
    return _require(whole, REQUIRED)


SCHEMA = _whole()
TO_TRAIN = _require({}, REQUIRED_TO_TRAIN)
"""What a training needs besides."""

# ------------------------------------------------------------------------------------------------- checking


def _unknown(validator, allowed, section, schema) -> Iterator[ValidationError]:
    """`additionalProperties` of JSON schema, as an error for each key, which `mistakes` judges."""
    for key in section if isinstance(section, dict) else ():
        if key not in schema.get('properties', {}) and not any(
                re.search(pattern, key) for pattern in schema.get('patternProperties', {})):
            yield ValidationError('unknown', path=[key])


def _missing(validator, required, section, schema) -> Iterator[ValidationError]:
    for key in required if isinstance(section, dict) else ():
        if key not in section:
            yield ValidationError('missing', path=[key])


_FORMATS = FormatChecker(())
_FORMATS.checks('file-name')(lambda value: not isinstance(value, str) or len(value.encode('utf-8', 'replace')) <= 200)
_TYPES = Draft7Validator.TYPE_CHECKER.redefine_many({
    'integer': lambda checker, value: is_int(value),  # 2.0 is none, and a number is finite
    'number': lambda checker, value: is_int(value) or isinstance(value, float) and math.isfinite(value)})
_Validator = validators.extend(Draft7Validator, {'additionalProperties': _unknown, 'required': _missing}, None, _TYPES)
_LAST = 'required propertyNames'


def mistakes(section: dict, schema: dict, source: Source, above: Path_ = ()) -> list[tuple[str, Path_, str]]:
    """What is wrong in the section at `above`: the keyword of JSON schema, the key, and words for the user.

    In the order of the file; what is missing comes last.
    """
    found = []
    for error in _Validator(schema, format_checker=_FORMATS).iter_errors(section):
        path = tuple(part for part in error.absolute_path if isinstance(part, str))  # a list is shown whole
        key, keyword = (*above, *path), str(error.validator)
        if keyword == 'required':
            expected = f'expected {_EXPECTED.get(path[-1], "a section of keys")}'
            words = f'is missing, {f"which {title} needs" if (title := schema.get("title")) else expected}'
            words, key = (f'{path[-1]} {words}', key[:-1]) if key[1:] else (words, key)
        elif keyword == 'additionalProperties':
            words = _judge_unknown(error, key, source)
        elif 'propertyNames' in error.absolute_schema_path:
            keyword, key, words = 'propertyNames', (*key, error.instance), error.schema['errorMessage']
        else:
            words = f'is {shown(functools.reduce(operator.getitem, path, section))}, {_error_message(error, schema)}'
        if words:
            found.append((keyword, key, words))
    return sorted(found, key=lambda mistake: (_LAST.find(mistake[0]), source.line(mistake[1])))


def _error_message(error: ValidationError, schema) -> str:
    """The words of the innermost schema on the way to the error that has any."""
    words = ''
    for step in error.absolute_schema_path:
        schema = schema[step]
        words = schema.get('errorMessage', words) if isinstance(schema, dict) else words
    return words


def _judge_unknown(error: ValidationError, key: Path_, source: Source) -> str:
    """An unknown key is somebody's extension, unless it is nearly a known one that is not there.

    From the command line it must be known at the top level, and must not be nearly a known one anywhere: there a slip
    would leave the file's own value in force. A section of arguments knows no others.
    """
    if key == ('import',):
        return 'an option file runs no code; expected --import PACKAGE on the command line'
    names, closed, added = list(error.schema['properties']), error.validator_value is False, key in source.added
    absent = [name for name in names if name not in error.instance]
    near = nearest(key[-1], names if added and not closed else absent, cutoff=0.6 if closed else 0.8)
    if closed:
        expected = f'did you mean {near}?' if near else f'expected {", ".join(n for n in names if n != "type")}'
        return f'{error.schema["errorMessage"]}; {expected}'
    if not near and added and len(key) == 1:
        near = ' or '.join([known for known in KEYS if known.split('.')[-1] == key[-1] and '*' not in known])
        near = near or nearest(key[-1], names)
        return f'there is no such key{f"; did you mean {near}?" if near else ""}'
    return f'unknown key; did you mean {near}?' if near else ''


def expand_paths(value, above: str = ''):
    """The options with `~` and `$NAME` filled in wherever a path stands; a variable that is not set stays as it is."""
    if isinstance(value, dict):
        return {key: expand_paths(each, f'{above}.{key}' if above else key) for key, each in value.items()}
    if isinstance(value, list):
        return [expand_paths(each, above) for each in value]
    is_path = isinstance(value, str) and any(fnmatch.fnmatchcase(above, key) for key in PATH_KEYS)
    return osp.expandvars(osp.expanduser(value)) if is_path else value


def check_keys(opt: dict, source: Source, is_train: bool) -> None:
    """Raise a UserError that names the first key that is wrong or missing."""
    for _, key, words in mistakes(opt, {**SCHEMA, 'allOf': [TO_TRAIN]} if is_train else SCHEMA, source):
        raise source.error(key, words)
