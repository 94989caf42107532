"""The networks of a benchmark: what a name, an option file or a checkpoint stands for, built on demand."""
from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from elan_basicsr.archs.elan_arch import ELAN
from elan_basicsr.config.parts import ARCHITECTURE, find_type
from elan_basicsr.config.reader import Source, read_yaml
from elan_basicsr.config.trials import try_network
from elan_basicsr.errors import UserError
from elan_basicsr.interop.networks import load_network
from elan_basicsr.interop.weights import is_known
from elan_basicsr.report.complexity import Complexity, count, count_macs, count_paper_macs
from elan_basicsr.report.official import VALUE_RANGE, build_official
from elan_basicsr.report.rivals import build_rival, rival

PRESETS: dict[str, tuple[str, dict]] = {
    'ELAN-light': ('ELAN', {'num_feat': 60, 'num_block': 24, 'num_share': 1}),
    'ELAN': ('ELAN', {'num_feat': 180, 'num_block': 36, 'num_share': 0}),
    'SwinIR-light': ('SwinIR', {'img_size': 64, 'window_size': 8, 'depths': [6] * 4, 'embed_dim': 60,
                                'num_heads': [6] * 4, 'mlp_ratio': 2, 'upsampler': 'pixelshuffledirect'}),
}
OFFICIAL = {'official-light': 'ELAN-light', 'official': 'ELAN'}
"""The authors' network in the size of a preset."""
COLOURS = 3
SEED = 0


@dataclass(frozen=True)
class Subject:
    """A network to be measured; `build` makes it, here or in another process.

    Attributes:
        spec: `ELAN-light`, `ELAN`, `SwinIR-light`, `official-light`, `official`, an architecture of the registry, each
            with arguments after a colon (`ELAN-light:use_checkpoint=true`), an option file, a checkpoint, a name of the
            known weights, or an ONNX file in another program (`openvino:FILE.onnx`).
        scale: Enlargement.
        checkout: The authors' repository, for `official` and `official-light`.
        label: What to call it, if not by its spec.
    """
    spec: str
    scale: int
    checkout: str | None = None
    label: str | None = None

    @classmethod
    def parse(cls, text: str, scale: int, checkout: str | None = None) -> Subject:
        """A subject from `SPEC` or `LABEL=SPEC`."""
        label, equals, spec = text.partition('=')
        if not equals or ':' in label or Path(text).is_file():
            return cls(text, scale, checkout)
        return cls(spec, scale, checkout, label)

    @property
    def name(self) -> str:
        return self.label or (Path(self.spec).stem if Path(self.spec).is_file() else self.spec)

    @property
    def value_range(self) -> float:
        """What stands for white in the network's images."""
        return VALUE_RANGE if self.spec in OFFICIAL else 1.

    def build(self) -> nn.Module:
        """The network on the CPU, with the checkpoint's weights or random ones.

        Raises:
            UserError: There is no such network, its arguments are wrong, or it enlarges by another factor.
        """
        torch.manual_seed(SEED)
        if self.spec in OFFICIAL:
            if not self.checkout:
                raise UserError(f"{self.spec}: is the authors' code; expected --official DIR, a checkout of it")
            return build_official(self.checkout, upscale=self.scale, **PRESETS[OFFICIAL[self.spec]][1])
        if found := rival(self.spec):
            return build_rival(*found)
        path = Path(self.spec)
        if is_known(self.spec) or path.is_file() and path.suffix.lower() not in ('.yml', '.yaml'):
            network = load_network(path)
            self._check_scale(network.scale, network.channels)
            return network.net
        return self._from_options(*(self._read_options() if path.is_file() else self._parse()))

    def complexity(self, height: int, width: int) -> Complexity:
        """Parameters and MACs of an LR image of that size. The authors' network counts as ours in the paper's way.

        Raises:
            UserError: The network cannot be built, or gives an image of another size.
        """
        net = self.build()
        net.register_forward_hook(self._check_size)
        if self.spec not in OFFICIAL:
            return count(net, COLOURS, height, width)
        ours = ELAN(upscale=self.scale, **PRESETS[OFFICIAL[self.spec]][1])
        return Complexity(sum(p.numel() for p in net.parameters() if p.requires_grad),
                          count_macs(net, COLOURS, height, width), count_paper_macs(ours, height, width))

    def _read_options(self) -> tuple[dict, Source]:
        options, source = read_yaml(self.spec)
        section = options.get('network_g')
        if not isinstance(section, dict):
            raise source.error('network_g', 'is missing, expected the network: type: ELAN and its arguments')
        return section, source

    def _parse(self) -> tuple[dict, Source]:
        """`ARCH:key=value,…` as the section `network_g` of an option file."""
        name, _, text = self.spec.partition(':')
        try:
            given = yaml.safe_load('{' + re.sub(r'(\w+)\s*=\s*', r'\1: ', text) + '}')
        except yaml.YAMLError:
            raise UserError(f'{self.spec}: cannot be read; expected ARCH:key=value,key=value such as '
                            'ELAN-light:use_checkpoint=true') from None
        arch, preset = PRESETS.get(name, (name, {}))
        if ARCHITECTURE.registered().get(arch) is None:
            near = ', '.join([*PRESETS, *OFFICIAL])
            raise UserError(f'{self.spec}: is no file and no network; expected {near}, an architecture of the registry '
                            'such as SwinIR:embed_dim=60, an option file, a checkpoint or a name of `basicsr weights`')
        return {'type': arch, **preset, **given}, Source(self.spec)

    def _from_options(self, section: dict, source: Source) -> nn.Module:
        if arch := ARCHITECTURE.registered().get(section.get('type', '')):
            parameters = inspect.signature(arch).parameters
            factor = next((name for name in ('upscale', 'scale') if name in parameters), None)
            colours = {name: COLOURS for name in ('num_in_ch', 'num_out_ch')
                       if name in parameters and parameters[name].default is inspect.Parameter.empty}
            section = {**colours, **({factor: self.scale} if factor else {}), **section}
            if factor:
                self._check_scale(section[factor], (COLOURS, COLOURS))
        try_network(section, ('network_g',), source)
        arch = find_type(section, ARCHITECTURE, source, ('network_g',))
        return arch(**{name: value for name, value in section.items() if name != 'type'})

    def _check_size(self, net: nn.Module, given: tuple[Tensor], result: Tensor) -> None:
        (h, w), found = given[0].shape[-2:], tuple(result.shape[-2:])
        if found != (h * self.scale, w * self.scale):
            raise UserError(f'{self.spec}: makes {found[1]}x{found[0]} pixels of {w}x{h}; expected '
                            f'{w * self.scale}x{h * self.scale}, as --scale says; give its arguments as '
                            'ARCH:key=value or in an option file')

    def _check_scale(self, scale: int, channels: tuple[int, int]) -> None:
        if scale != self.scale:
            raise UserError(f'{self.spec}: enlarges by {scale}; expected {self.scale}, as --scale says')
        if channels != (COLOURS, COLOURS):
            raise UserError(f'{self.spec}: has {channels[0]} channels in and {channels[1]} out; expected a network for '
                            'colour images')
