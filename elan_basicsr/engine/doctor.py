"""`basicsr doctor`: what a bug report needs, and whether everything stands."""
from __future__ import annotations

import platform

import torch

from elan_basicsr import compat
from elan_basicsr.archs import gpu
from elan_basicsr.archs.cpu.library import has_bf16, library
from elan_basicsr.bootstrap import OPENCV, version
from elan_basicsr.interop import plugins

from basicsr.utils import registry

# Of a row of names any serves; the first is named where none is installed.
PACKAGES = (('elan-basicsr',), ('basicsr',), ('torch',), ('torchvision',), ('numpy',), ('scipy',), OPENCV,
            ('mmengine',), ('lmdb',), ('safetensors',), ('tb-nightly', 'tensorboard'))
EXPECTED = {
    'ARCH_REGISTRY': ('ELAN', 'EDSR', 'MSRResNet', 'RCAN', 'SwinIR', 'RRDBNet'),
    'MODEL_REGISTRY': ('ELANModel', 'RealELANNetModel', 'RealELANGANModel', 'SRModel', 'SRGANModel', 'SwinIRModel'),
    'DATASET_REGISTRY': ('PairedRawLmdbDataset', 'PairedImageDataset', 'RealESRGANDataset'),
    'LOSS_REGISTRY': ('L1Loss', 'GANLoss', 'PerceptualLoss'),
    'METRIC_REGISTRY': ('calculate_psnr', 'calculate_ssim', 'calculate_niqe'),
}


def doctor() -> int:
    """Print versions, devices, repairs and registries; return 0 when all is there that should be, else 1."""
    print(f'Python {platform.python_version()} on {platform.system()} {platform.release()} ({platform.machine()})')
    print('\nversions')
    for names in PACKAGES:
        for name in [name for name in names if version(name)] or names[:1]:
            print(f'  {name:<24}{version(name) or "not installed"}')
    print('\ndevices')
    print(f'  CPU                     {torch.get_num_threads()} threads')
    print(f'  CPU kernels             {_kernels()}')
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        print(f'  cuda:{index}                  {properties.name}, {properties.total_memory / 2**30:.1f} GiB')
        print(f'  cuda:{index} kernels          {_gpu_kernels(torch.device("cuda", index))}')
    if not torch.cuda.is_available():
        print('  no GPU                  training and testing run on the CPU')
    print('\nrepairs to basicsr')
    for repair in compat.REPAIRS:
        reason = ' '.join((repair.__doc__ or '').split('\n\n')[0].split())
        print(f'  {"applied" if compat.applied[repair.__name__] else "not needed":<12}{repair.__name__}: {reason}')
    broken = _print_plugins()
    print('\nregistries')
    absent = {name: [entry for entry in entries if not _registered(getattr(registry, name), entry)]
              for name, entries in EXPECTED.items()}
    for name, missing in absent.items():
        state = f'MISSING {", ".join(missing)}' if missing else 'complete'
        print(f'  {name:<18}{len(list(getattr(registry, name).keys())):>3} entries, {state}')
    return 1 if broken or any(absent.values()) else 0


def _print_plugins() -> bool:
    """Import and list the installed packages that register with the toolbox; tell whether one of them is broken."""
    print(f'\nplugins (entry points {plugins.GROUP})')
    found = list(plugins.import_installed())
    for entry_point, wrong in found:
        name = f'{entry_point.dist.name} {entry_point.dist.version}' if entry_point.dist else entry_point.name
        print(f'  {name:<24}{f"BROKEN {wrong}" if wrong else plugins.told(entry_point.module)}')
    if not found:
        print('  none installed          `--import PACKAGE` takes any other')
    return any(wrong for _, wrong in found)


def _kernels() -> str:
    kernels = library()
    if kernels:
        return {4: 'NEON', 8: 'AVX2', 16: 'AVX-512'}[kernels.elan_lanes()] + (', bfloat16' if has_bf16() else '')
    return ('none, and ELAN runs more slowly: they need Linux, x86-64 with AVX2 or aarch64, and a C++ '
            'compiler when the package is installed')


def _gpu_kernels(device: torch.device) -> str:
    if gpu.usable(device):
        return f'Triton {gpu.triton_version()}'
    return ('none, and ELAN runs more slowly: those in Triton are taken on GPUs and with versions on which they were '
            'measured; ELAN_KERNELS=triton asks for them, and `basicsr doctor --check` tells whether they are right')


def _registered(entries: registry.Registry, name: str) -> bool:
    return name in entries or f'{name}_basicsr' in entries
