"""Repairs that make basicsr 1.4.2 import and work on today's torch, torchvision, scipy and opencv, also without a GPU.

Nothing installed is edited. Each repair is one function: it looks whether upstream is broken here, mends it in memory
if so, and otherwise does nothing. `apply()` runs them in order and remembers what was done, which `basicsr doctor`
prints. This file imports nothing of ours, so that it can run before everything else.
"""
from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import os
import re
import sys
import types


def functional_tensor() -> bool:
    """`basicsr.data.degradations` imports `torchvision.transforms.functional_tensor`, removed in torchvision 0.17.

    Upstream: https://github.com/XPixelGroup/BasicSR/issues/663. The one function it needs lives in `functional`.
    """
    name = 'torchvision.transforms.functional_tensor'
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return False
    from torchvision.transforms import functional
    sys.modules[name] = functional
    return True


def ndimage_filters() -> bool:
    """`basicsr.metrics.niqe` imports `scipy.ndimage.filters`, deprecated and announced to go in SciPy 2.

    No upstream report. `scipy.ndimage` itself holds the same functions; the alias also silences the warning.
    """
    name = 'scipy.ndimage.filters'
    if name in sys.modules:
        return False
    import scipy.ndimage
    sys.modules[name] = scipy.ndimage
    return True


def jpeg_quality() -> bool:
    """`add_jpg_compression` hands OpenCV a float quality, which it refuses since 4.5.4.

    Upstream: https://github.com/XPixelGroup/BasicSR/issues/578. The fraction is dropped, as older versions did.
    """
    import numpy as np

    from basicsr.data import degradations
    upstream = degradations.add_jpg_compression
    import cv2
    try:
        upstream(np.zeros((8, 8, 3), np.float32), quality=90.5)
        return False
    except cv2.error:
        pass

    @functools.wraps(upstream)
    def add_jpg_compression(img, quality=90):
        return upstream(img, int(quality))

    degradations.add_jpg_compression = add_jpg_compression
    return True


def filter2d_layout() -> bool:
    """`filter2D` views its padded input as another shape, which fails where padding keeps a channels-last layout.

    No upstream report. DiffJPEG gives images in that layout; the replacement hands them over contiguous.
    """
    import torch

    from basicsr.models import realesrgan_model, realesrnet_model
    from basicsr.utils import img_process_util
    upstream = img_process_util.filter2D
    channels_last = torch.zeros(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    try:
        upstream(channels_last, torch.ones(2, 3, 3))
        return False
    except RuntimeError:
        pass

    @functools.wraps(upstream)
    def filter2D(img, kernel):
        return upstream(img.contiguous(), kernel)

    for module in (img_process_util, realesrnet_model, realesrgan_model):
        module.filter2D = filter2D
    return True


def safe_yaml() -> bool:
    """`parse_options` reads option files with PyYAML's full `CLoader`, which runs code that a python tag names.

    No upstream report. The replacement reads the same mappings with the safe loader; a python tag is an error.
    """
    from collections import OrderedDict

    import yaml

    from basicsr.utils import options

    def ordered_yaml():
        class Loader(getattr(yaml, 'CSafeLoader', yaml.SafeLoader)):
            pass

        class Dumper(getattr(yaml, 'CSafeDumper', yaml.SafeDumper)):
            pass

        tag = yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG
        Loader.add_constructor(tag, lambda loader, node: OrderedDict(loader.construct_pairs(node)))
        Dumper.add_representer(OrderedDict, lambda dumper, data: dumper.represent_dict(data.items()))
        return Loader, Dumper

    options.ordered_yaml = ordered_yaml
    return True


def force_yml() -> bool:
    """`--force_yml` is carried out with `exec` on the key and `eval` on lists.

    No upstream report. Values are read as literals, and a key that is more than names joined by colons is refused
    before upstream's parser sees it.
    """
    import basicsr.test
    import basicsr.train
    from basicsr.utils import options
    upstream_value, upstream_parse = options._postprocess_yml_value, options.parse_options

    @functools.wraps(upstream_value)
    def postprocess_value(value):
        return ast.literal_eval(value) if value.startswith('[') else upstream_value(value)

    @functools.wraps(upstream_parse)
    def parse_options(*args, **kwargs):
        if '--force_yml' in sys.argv:
            for entry in sys.argv[sys.argv.index('--force_yml') + 1:]:
                if entry.startswith('-'):
                    break
                if not re.fullmatch(r'\s*[\w-]+(:[\w-]+)*\s*=.*', entry):
                    raise SystemExit(f'--force_yml {entry}: expected key:sub=value, with letters, digits and _ in keys')
        return upstream_parse(*args, **kwargs)

    options._postprocess_yml_value = postprocess_value
    for module in (options, basicsr.train, basicsr.test):
        module.parse_options = parse_options
    return True


def resume_without_gpu() -> bool:
    """`load_resume_state` asks CUDA for its current device, and looks for `--auto_resume` states under the working
    directory while the run writes them under `root_path`.

    Upstream on training without a GPU: https://github.com/XPixelGroup/BasicSR/issues/107. The replacement reads to the
    CPU on every machine; what takes the state over moves it.
    """
    import basicsr.train
    upstream = basicsr.train.load_resume_state

    @functools.wraps(upstream)
    def load_resume_state(opt):
        states = opt['path'].get('training_states')
        if opt.get('auto_resume') and states and os.path.isdir(states):
            iters = [int(name[:-len('.state')]) for name in os.listdir(states) if re.fullmatch(r'\d+\.state', name)]
            if iters:
                opt['path']['resume_state'] = os.path.join(states, f'{max(iters)}.state')
        if not opt['path'].get('resume_state'):
            return None
        state = basicsr.train.torch.load(opt['path']['resume_state'], map_location='cpu')
        basicsr.train.check_resume(opt, state['iter'])
        return state

    basicsr.train.load_resume_state = load_resume_state
    return True


def ddp_without_gpu() -> bool:
    """`BaseModel.model_to_device` gives DistributedDataParallel a CUDA device on every machine.

    Upstream on training without a GPU: https://github.com/XPixelGroup/BasicSR/issues/107.
    """
    import torch

    from basicsr.models.base_model import BaseModel
    upstream = BaseModel.model_to_device

    @functools.wraps(upstream)
    def model_to_device(self, net):
        if not self.opt['dist'] or self.device.type == 'cuda':
            return upstream(self, net)
        unused = self.opt.get('find_unused_parameters', False)
        return torch.nn.parallel.DistributedDataParallel(net.to(self.device), find_unused_parameters=unused)

    BaseModel.model_to_device = model_to_device
    return True


def process_group_without_gpu() -> bool:
    """`init_dist` sets a CUDA device by `rank % number of GPUs` and asks for NCCL on every machine.

    Upstream on training without a GPU: https://github.com/XPixelGroup/BasicSR/issues/107. Without a GPU the group
    starts with gloo from the variables torchrun sets, or from SLURM's with MASTER_ADDR. With one it is not known yet
    here whether the run uses it (`num_gpu: 0`): so tensors on a CPU go by gloo, and those on a GPU by NCCL.
    """
    import torch

    from basicsr.utils import dist_util, options
    upstream = dist_util.init_dist

    @functools.wraps(upstream)
    def init_dist(launcher, backend='nccl', **kwargs):
        if torch.cuda.is_available():
            return upstream(launcher, 'cpu:gloo,cuda:nccl' if backend == 'nccl' else backend, **kwargs)
        if launcher == 'slurm':
            for ours, theirs in (('RANK', 'SLURM_PROCID'), ('WORLD_SIZE', 'SLURM_NTASKS')):
                os.environ.setdefault(ours, os.environ[theirs])
            os.environ.setdefault('MASTER_PORT', str(kwargs.get('port', 29500)))
        torch.distributed.init_process_group('gloo')

    dist_util.init_dist = options.init_dist = init_dist
    return True


def image_size_limit() -> bool:
    """OpenCV decodes whatever up to 2^30 pixels an image claims, in the toolbox's datasets and in ours.

    No upstream report. OPENCV_IO_MAX_IMAGE_PIXELS, which OpenCV reads once, when it is imported, is set to 2^28 unless
    it is set already.
    """
    if 'cv2' in sys.modules or 'OPENCV_IO_MAX_IMAGE_PIXELS' in os.environ:
        return False
    os.environ['OPENCV_IO_MAX_IMAGE_PIXELS'] = str(1 << 28)
    return True


def image_errors() -> bool:
    """`imfrombytes` fails with a TypeError on what is no image, and with OpenCV's own text on what is too large.

    No upstream report. Both become a ValueError of one line.
    """
    import cv2

    import basicsr.data  # noqa: F401 - the datasets hold the function by its name
    from basicsr.utils import img_util
    upstream = img_util.imfrombytes

    @functools.wraps(upstream)
    def imfrombytes(content, flag='color', float32=False):
        try:
            return upstream(content, flag, float32)
        except (cv2.error, AttributeError, TypeError) as error:
            if 'MAX_IMAGE' in str(error):
                limit = os.environ.get('OPENCV_IO_MAX_IMAGE_PIXELS', 1 << 30)
                raise ValueError(f'an image of more than {limit} pixels; raise OPENCV_IO_MAX_IMAGE_PIXELS if there is '
                                 'memory for it') from None
            raise ValueError(f'an image of {len(content)} bytes cannot be decoded, it may be damaged') from None

    replace_everywhere('imfrombytes', upstream, imfrombytes)
    return True


def replace_everywhere(name: str, upstream, ours) -> None:
    """Put `ours` in the place of the toolbox's function in every module that holds it by its name."""
    for module in [value for key, value in sys.modules.items() if key.startswith('basicsr.')]:
        if getattr(module, name, None) is upstream:
            vars(module)[name] = ours


def safe_torch_load() -> bool:
    """Networks, states and losses are read with a plain `torch.load`, which bounds no size and, where the environment
    asks for it, unpickles anything.

    No upstream report. The modules that call it get a `torch` whose `load` reads as `elan_basicsr.checkpoint` does.
    """
    import torch

    class Torch(types.ModuleType):
        def __getattr__(self, name):
            return getattr(torch, name)

        @staticmethod
        def load(path, map_location=None, **options):
            from elan_basicsr.safe_read import read_torch  # ours, when everything is there
            return read_torch(path, map_location)

    for name in ('train', 'models.base_model', 'archs.inception', 'archs.spynet_arch', 'archs.dfdnet_arch',
                 'archs.basicvsr_arch', 'archs.vgg_arch', 'archs.tof_arch'):
        vars(importlib.import_module(f'basicsr.{name}'))['torch'] = Torch('torch')
    return True


def memcached_path() -> bool:
    """`io_backend: {type: memcached, sys_path: …}` lets an option file name a folder whose Python code is imported.

    No upstream report. The argument is refused; PYTHONPATH does the same for one's own code.
    """
    from basicsr.utils import file_client
    upstream = file_client.MemcachedBackend.__init__

    @functools.wraps(upstream)
    def __init__(self, server_list_cfg, client_cfg, sys_path=None):
        if sys_path is not None:
            raise ValueError('io_backend.sys_path would run the code of a folder; use PYTHONPATH instead')
        upstream(self, server_list_cfg, client_cfg)

    file_client.MemcachedBackend.__init__ = __init__
    return True


def pairing() -> bool:
    """The toolbox pairs whatever lies in two folders, by suffixes that have to agree, and says of a failure how many
    files there are; a list of images is cut at blanks, and what it lists is looked for when it is its turn.

    No upstream report. Ours (`elan_basicsr.data.pairing`) takes images only, and names what has no partner.
    """
    from basicsr.data import data_util, paired_image_dataset, realesrgan_paired_dataset, single_image_dataset

    def paired_paths_from_folder(folders, keys, filename_tmpl):
        from elan_basicsr.data.pairing import pair_folders  # ours, when everything is there
        return pair_folders(folders, keys, filename_tmpl)

    def paired_paths_from_meta_info_file(folders, keys, meta_info_file, filename_tmpl):
        from elan_basicsr.data.pairing import pair_listed
        return pair_listed(folders, keys, meta_info_file, filename_tmpl)

    def paired_paths_from_lmdb(folders, keys):
        from elan_basicsr.data.pairing import pair_lmdbs
        for folder in folders:
            if not folder.endswith('.lmdb'):
                raise ValueError(f'{folder}: expected an LMDB, whose folder ends with .lmdb')
        return pair_lmdbs(folders, keys)

    def scandir(folder, full_path):
        from elan_basicsr.data.pairing import images_of
        return [os.path.join(folder, name) for name in images_of(folder)]

    for function in (paired_paths_from_folder, paired_paths_from_meta_info_file, paired_paths_from_lmdb):
        for module in (data_util, paired_image_dataset, realesrgan_paired_dataset):
            if hasattr(module, function.__name__):
                setattr(module, function.__name__, function)
    vars(single_image_dataset)['scandir'] = scandir
    return True


def lmdb_keys() -> bool:
    """`LmdbBackend.get` takes ASCII keys only, and gives None for one that is not there, on which decoding fails.

    No upstream report. Keys are UTF-8, as LMDBs made of other names have them, and a missing one is a ValueError.
    """
    from basicsr.utils.file_client import LmdbBackend

    def get(self, filepath, client_key):
        with self._client[client_key].begin(write=False) as transaction:
            record = transaction.get(str(filepath).encode())
        if record is None:
            path = dict(zip(self._client, self.db_paths, strict=True))[client_key]
            raise ValueError(f'{path}: {filepath}: is listed in meta_info.txt but not there')
        return record

    LmdbBackend.get = get
    return True


def real_esrgan_folder() -> bool:
    """`RealESRGANDataset` takes images of a folder only by a list, `meta_info`; of one that is missing it takes others
    at random, and fails after three.

    No upstream report. Without `meta_info` all images of the folder are taken; what is missing is named at the start.
    """
    from basicsr.data.realesrgan_dataset import RealESRGANDataset
    upstream = RealESRGANDataset.__init__

    @functools.wraps(upstream)
    def __init__(self, opt):
        if opt['io_backend']['type'] == 'lmdb':
            upstream(self, opt)
            return
        from elan_basicsr.data.pairing import Unpaired, images_of, listed
        folder, list_file = opt['dataroot_gt'], opt.get('meta_info')
        upstream(self, {**opt, 'meta_info': os.devnull})
        names = listed(list_file, folder) if list_file else images_of(folder)
        self.paths = [os.path.join(folder, name) for name in names]
        missing = [path for path in self.paths if not os.path.isfile(path)]
        if missing:
            raise Unpaired([], [f'{path}: is not there' for path in missing])

    RealESRGANDataset.__init__ = __init__
    return True


# Module of basicsr 1.3.4.9 -> those of 1.4.2 that hold its functions and classes.
MOVED = {
    'utils.matlab_functions': ('utils.color_util',),
    'losses': ('losses.basic_loss', 'losses.gan_loss'),
    'losses.losses': ('losses.basic_loss', 'losses.gan_loss'),
}


def moved_names() -> bool:
    """Projects for BasicSR 1.3.x import what 1.4 moved, such as `rgb2ycbcr` of `basicsr.utils.matlab_functions`.

    No upstream report. The old places get what they lack. `GANFeatLoss` and `basicsr.utils.face_util`, which 1.4
    dropped, stay gone.
    """
    repaired = False
    for old, new in MOVED.items():
        name = f'basicsr.{old}'
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name, 'Names of basicsr 1.3.x.')
            parent, _, child = name.rpartition('.')
            setattr(sys.modules[parent], child, sys.modules[name])
        module = importlib.import_module(name)
        for source in (importlib.import_module(f'basicsr.{each}') for each in new):
            for key, value in vars(source).items():
                if getattr(value, '__module__', None) == source.__name__ and not hasattr(module, key):
                    setattr(module, key, value)
                    repaired = True
    return repaired


REPAIRS = (image_size_limit, functional_tensor, ndimage_filters, jpeg_quality, filter2d_layout, image_errors, safe_yaml,
           force_yml, safe_torch_load, memcached_path, resume_without_gpu, ddp_without_gpu, process_group_without_gpu,
           pairing, lmdb_keys, real_esrgan_folder, moved_names)
applied: dict[str, bool] = {}


def apply() -> None:
    """Run every repair once, in order; safe to call again."""
    for repair in REPAIRS:
        if repair.__name__ not in applied:
            applied[repair.__name__] = repair()
