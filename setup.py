"""Packaging of elan-basicsr: `pip install .`, then `basicsr setup` for what pip alone does not get right."""
import hashlib
import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

HERE = Path(__file__).parent
VERSION = {}
exec((HERE / 'elan_basicsr' / 'version.py').read_text(encoding='utf-8'), VERSION)

SPANDREL = ['spandrel>=0.4']  # networks of other architectures
REPORT = ['matplotlib>=3.8']
ONNX = ['onnx>=1.17', 'onnxruntime>=1.20', 'onnxscript>=0.7']  # onnxscript is what torch.onnx exports with
# The option files lie at the top of a checkout, and inside the installed package.
OPTIONS = {'elan_basicsr.options': 'options', 'elan_basicsr.options.compare': 'options/compare'}

# Kernels for a CPU, called through ctypes. Where they cannot be compiled the package does without them, more slowly;
# ELAN_KERNELS=0 leaves them out, for a wheel without them.
KERNELS = []
if sys.platform == 'linux' and platform.machine() in ('x86_64', 'aarch64') and os.environ.get('ELAN_KERNELS') != '0':
    headers = sorted(str(path.relative_to(HERE)) for path in (HERE / 'elan_basicsr/archs/cpu/kernels').glob('*.h'))
    sources = ['elan_basicsr/archs/cpu/kernels/kernels.cpp', *headers]
    # By this sum library.py tells kernels that were compiled from other sources than lie beside it.
    digest = hashlib.sha256(b''.join((HERE / name).read_bytes() for name in sources)).hexdigest()
    KERNELS = [Extension('elan_basicsr.archs.cpu._kernels', sources[:1], depends=headers, language='c++', optional=True,
                         py_limited_api=True,  # it knows nothing of Python, so that one wheel serves every version
                         define_macros=[('SOURCES', f'"{digest}"')],
                         extra_compile_args=['-O3', '-std=c++17', '-fopenmp'], extra_link_args=['-fopenmp'])]

setup(
    name='elan-basicsr',
    version=VERSION['__version__'],
    description='ELAN, the Efficient Long-Range Attention Network for image super-resolution, as a plugin for BasicSR',
    long_description=(HERE / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    keywords='super-resolution, image restoration, ELAN, BasicSR, PyTorch',
    packages=[*find_packages(include=['elan_basicsr', 'elan_basicsr.*']), *OPTIONS],
    package_dir=OPTIONS,
    package_data={'': ['*.yml', '*.json', '*.jinja']},
    ext_modules=KERNELS,
    options={'bdist_wheel': {'py_limited_api': 'cp310'}} if KERNELS else {},
    py_modules=['elan_basicsr_command'],
    python_requires='>=3.10',
    install_requires=[
        'torch>=2.6',
        'torchvision>=0.21',
        # Its setup fails from Python 3.13 on, where `basicsr setup` installs it without its requirements: they stand
        # here too. tb-nightly is its TensorBoard; tensorboard beside it would overwrite its files.
        'basicsr==1.4.2; python_version < "3.13"',
        'future>=1.0', 'requests>=2.31', 'scikit-image>=0.24', 'tb-nightly>=2.15.0a0', 'tqdm>=4.66', 'yapf>=0.40',
        # basicsr imports distutils, which Python 3.12 dropped; TensorBoard and mmengine pkg_resources, dropped by 82.
        'setuptools>=77,<82',
        'mmengine>=0.10.7',
        'lmdb>=1.4',
        'opencv-python>=4.8',
        'addict>=2.4',
        'scipy>=1.10',
        'numpy>=1.26',
        'pyyaml>=6.0',
        'jsonschema>=4.18',  # checks option files
        'rich>=14.3',  # mmengine's own dependency; draws the progress line
        'safetensors>=0.4',
        'jinja2>=3.1',  # torch brings it
        'pillow>=11.3',
        'tifffile>=2024.8.10',  # 16-bit TIFF
        'pooch>=1.7',  # fetches known weights
    ],
    extras_require={
        'spandrel': SPANDREL,
        'onnx': ['torch>=2.11', *ONNX],  # older exporters give up on ELAN
        'report': REPORT,
        'metrics': ['pyiqa>=0.1.16'],
        'completion': ['shtab>=1.7'],
        'test': ['pytest>=8', 'pytest-timeout>=2.3', 'hypothesis>=6.100', 'ruff>=0.8', 'mypy>=2.4',
                 'shtab>=1.7', 'build>=1.2', *SPANDREL, *ONNX, *REPORT, 'playwright>=1.45'],
    },
    entry_points={'console_scripts': ['basicsr=elan_basicsr_command:main', 'elan-basicsr=elan_basicsr_command:main']},
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Programming Language :: Python :: 3.14',
        'Topic :: Scientific/Engineering :: Image Processing',
    ],
)
