"""ELAN as an architecture of spandrel, the model loader of chaiNNer, ComfyUI and others.

Importing this file imports spandrel; `interop/on_import.py` has it imported when a program imports spandrel, whichever
of the two packages comes first.
"""
from __future__ import annotations

from spandrel import (
    MAIN_REGISTRY,
    Architecture,
    ArchRegistry,
    ArchSupport,
    ImageModelDescriptor,
    SizeRequirements,
    StateDict,
)

from elan_basicsr.archs.elan_arch import ELAN
from elan_basicsr.contents import choose_network, find_networks
from elan_basicsr.forms import elan_hyperparameters, is_elan, to_native


class ELANArch(Architecture[ELAN]):
    """Detects and loads ELAN in any of `forms.FORMS`, under any keys and prefixes."""

    def __init__(self) -> None:
        super().__init__(id='ELAN', detect=lambda state_dict: bool(find_networks(state_dict, is_elan)))

    def load(self, state_dict: StateDict) -> ImageModelDescriptor[ELAN]:
        """Every hyper-parameter is read off the shapes but the window sizes, which leave no trace: they are 4, 8, 16,
        as in every published network."""
        state_dict = choose_network(find_networks(state_dict, is_elan), None, 'ELAN')
        found = elan_hyperparameters(state_dict)
        scale = found['upscale']
        return ImageModelDescriptor(
            ELAN(**found),
            to_native(state_dict),
            architecture=self,
            purpose='Restoration' if scale == 1 else 'SR',
            tags=[
                'light' if found['num_feat'] <= 60 else 'large',
                f'{found["num_feat"]}nf',
                f'{found["num_block"]}nb',
                f'{found["num_share"]}ns',
            ],
            # A trained ELAN-light x4 stays within 0.3 grey levels of float32 in fp16, and within 2.2 in bf16.
            supports_half=True,
            supports_bfloat16=True,
            scale=scale,
            input_channels=found['num_in_ch'],
            output_channels=found['num_out_ch'],
            size_requirements=SizeRequirements(),  # the network pads any size to its windows, and cuts the rest off
        )


def install(registry: ArchRegistry = MAIN_REGISTRY) -> None:
    """Add ELAN to a registry; nothing happens where an architecture of that name is in it already."""
    registry.add(ArchSupport.from_architecture(ELANArch()), ignore_duplicates=True)
