"""Any trained network behind one interface: ELAN's own files, what spandrel knows, ONNX, and BasicSR's option files."""
from __future__ import annotations

import inspect
import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from elan_basicsr.archs.elan_arch import ELAN, reflect_pad_to_multiple
from elan_basicsr.checkpoint import build_elan, load_into, read_checkpoint, read_state_dict
from elan_basicsr.contents import Known, Needs, described
from elan_basicsr.errors import UserError
from elan_basicsr.forms import is_elan, needs_of_elan
from elan_basicsr.interop.onnx import OnnxNetwork
from elan_basicsr.interop.padding import extend
from elan_basicsr.interop.weights import local_file
from elan_basicsr.safe_read import bounded_building

from basicsr.utils.registry import ARCH_REGISTRY


@dataclass
class Network:
    """A network ready to run.

    Attributes:
        net: In eval mode, on the device asked for: RGB (or grey) in 0..1, (B, C, h, w) of any size, to
            (B, C', h * scale, w * scale), unclipped. Networks that do not pad by themselves are padded inside.
        scale: Enlargement, an integer from 1.
        channels: Of input and output.
        multiple: What height and width are padded to inside for a network that does not pad by itself, else 1.
        window: What positions of tiles should be a multiple of, so that windows of attention lie where they lie in the
            whole image; 1 for a network without windows, or where nothing is known of them.
        name: Of the architecture, such as 'ELAN' or 'SwinIR'.
    """
    net: nn.Module
    scale: int
    channels: tuple[int, int]
    multiple: int
    window: int
    name: str


def load_network(path: str | os.PathLike, device: str | torch.device = 'cpu') -> Network:
    """The network in a file: an ELAN's of any form, any other architecture that spandrel knows, or ONNX.

    Args:
        path: `.pth`, `.pt`, `.ckpt`, `.safetensors`, or `.onnx`; or a name of the known weights.
        device: Where it is to run.

    Raises:
        UserError: The file cannot be read, holds no known network, or a package for it is not installed.
    """
    path = local_file(path)
    if path.suffix.lower() == '.onnx':
        net = OnnxNetwork(path, device).eval()
        return Network(net, net.scale, net.channels, 1, net.window, net.name)
    state, noted = read_checkpoint(path)
    if is_elan(state):
        return _of_elan(build_elan(state, noted, path).to(device))
    return _load_with_spandrel(path, device)


def _of_elan(net: ELAN) -> Network:
    channels = net.head.in_channels, net.tail.out_channels // net.upscale**2
    return Network(net, net.upscale, channels, 1, math.lcm(*net.window_sizes), 'ELAN')


# ------------------------------------------------------------------------------------------------------ with spandrel

class _Described(nn.Module):
    """A network of spandrel's with the padding that its descriptor asks for; unclipped, and differentiable."""

    def __init__(self, descriptor):
        super().__init__()
        self.model = descriptor.model
        self.requirements = descriptor.size_requirements
        self.scale = descriptor.scale
        self.call = descriptor._call_fn  # some models answer with a tuple; the descriptor's own call clips to 0..1

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        pad_w, pad_h = self.requirements.get_padding(w, h)
        return self.call(self.model, extend(x, h + pad_h, w + pad_w))[..., :h * self.scale, :w * self.scale]


def _load_with_spandrel(path: Path, device) -> Network:
    """spandrel gets weights that are read already: its own reading of files bounds no sizes, and loads programs."""
    try:
        import spandrel
    except ImportError:
        found = described(read_state_dict(path), needs_of_elan())
        raise UserError(f'{path}: is no ELAN: {found}; other networks are read through spandrel, which is not '
                        'installed: pip install spandrel') from None
    built, failed = {}, []

    def loads(state: dict[str, Tensor]) -> bool:
        """A part of a foreign network can look like another one; then its weights do not fit that."""
        support = next((support for support in spandrel.MAIN_REGISTRY.architectures('detection')
                        if _detects(support.detect, state)), None)
        if support is None:
            return False
        try:
            with bounded_building(4 * len(state) + 1000, 4 * sum(value.numel() for value in state.values()) + 10**7):
                built[frozenset(state.items())] = support.architecture.load(state)
        except Exception as error:  # loaders and constructors fail in every way on damaged or foreign files
            failed.append(f'{support.architecture.name} ({" ".join(str(error).split())[:200]})')
            return False
        return True

    state = read_state_dict(path, known=loads)
    descriptor = built.get(frozenset(state.items()))
    if descriptor is None:
        if failed:
            raise UserError(f'{path}: holds {len(state)} tensors and cannot be loaded as {failed[0]}')
        found = described(state, [*needs_of_elan(), *_needs_of_spandrel(spandrel.MAIN_REGISTRY)])
        raise UserError(f'{path}: is of no architecture that is known here, neither ELAN nor one of the '
                        f'{len(spandrel.MAIN_REGISTRY)} of spandrel {spandrel.__version__}: {found}; a network of '
                        "BasicSR's is loaded by its option file")
    if not isinstance(descriptor, spandrel.ImageModelDescriptor):
        raise UserError(f'{path}: is a network for {descriptor.purpose.lower()} with a mask; expected one that makes '
                        'an image from an image')
    net = _Described(descriptor).to(device).eval()
    return Network(net, descriptor.scale, (descriptor.input_channels, descriptor.output_channels),
                   descriptor.size_requirements.multiple_of, _window_of(descriptor.model), descriptor.architecture.name)


def _detects(detect: Known, state: dict[str, Tensor]) -> bool:
    try:
        return detect(state)
    except Exception:  # those that look at shapes expect certain ones
        return False


def _needs_of_spandrel(registry) -> list[tuple[str, Needs]]:
    """For `contents.described`, of the architectures that are detected by names."""
    from spandrel.util import KeyCondition

    def missing(condition: KeyCondition | str, there: Collection[str]) -> tuple[list[str], int]:
        if isinstance(condition, str):
            return [condition] * (condition not in there), 1
        parts = [missing(part, there) for part in condition._keys]
        if condition._kind == 'any':
            return min(parts, key=lambda part: len(part[0]) / part[1])
        return [name for names, _ in parts for name in names], sum(number for _, number in parts)

    conditions = ((support.architecture.name, getattr(support.architecture, '_detect', None)) for support in registry)
    return [(name, partial(missing, condition)) for name, condition in conditions
            if isinstance(condition, KeyCondition)]


def _window_of(model: nn.Module) -> int:
    """The edge of a network's windows, where it says so as most do."""
    window = getattr(model, 'window_size', 1)
    return window if isinstance(window, int) and window > 1 else 1


# --------------------------------------------------------------------------------------------------- of option files

class _Padded(nn.Module):
    """A network of the toolbox's with the reflection that the toolbox's SwinIRModel pads with."""

    def __init__(self, model: nn.Module, multiple: int, scale: int):
        super().__init__()
        self.model, self.multiple, self.scale = model, multiple, scale

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        return self.model(reflect_pad_to_multiple(x, self.multiple))[..., :h * self.scale, :w * self.scale]


def load_option_file(path: str | os.PathLike, device: str | torch.device = 'cpu') -> Network:
    """The network of a BasicSR option file: `network_g` with the weights of `path.pretrain_network_g`.

    Any architecture of the toolbox's registry. `path.param_key_g` and `path.strict_load_g` count as in a test run; a
    relative path of the weights is taken from the current directory, as there.

    Raises:
        UserError: The file or the weights cannot be read, or do not fit each other.
    """
    from elan_basicsr.config.reader import read_yaml
    from elan_basicsr.config.schema import expand_paths
    from elan_basicsr.config.trials import try_network
    opt, source = read_yaml(path)
    opt = expand_paths(opt)
    if not isinstance(opt.get('network_g'), dict):
        raise source.error('network_g', 'is missing, expected the network: type: ELAN and its arguments')
    try_network(opt['network_g'], ('network_g',), source)
    paths = section if isinstance(section := opt.get('path'), dict) else {}
    weights = paths.get('pretrain_network_g')
    if not isinstance(weights, str):
        raise source.error('path.pretrain_network_g', 'is not set, expected the file of the trained weights')
    weights = str(local_file(weights))
    arguments = dict(opt['network_g'])
    name = arguments.pop('type')
    arch = ARCH_REGISTRY.get(name)
    net = arch(**arguments)
    param_key, strict = paths.get('param_key_g', 'params'), paths.get('strict_load_g', True)
    load_into(net, weights, strict=strict, param_key=param_key)
    if isinstance(net, ELAN):
        return _of_elan(net.to(device).eval())
    defaults = {key: value.default for key, value in inspect.signature(arch).parameters.items()}
    arguments = {**defaults, **arguments}
    scale = opt.get('scale') or arguments.get('upscale') or arguments.get('scale') or 1

    def number(keys: tuple[str, ...], otherwise: int) -> int:
        return next((arguments[key] for key in keys if isinstance(arguments.get(key), int)), otherwise)

    channels = number(('num_in_ch', 'in_chans'), 3), number(('num_out_ch', 'num_in_ch', 'in_chans'), 3)
    window = number(('window_size',), 1)
    return Network(_Padded(net, window, scale).to(device).eval(), scale, channels, window, window, name)
