"""The blocks of ELAN on a CPU, by kernels compiled for it: the function of `elan_arch`, only faster."""
from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from elan_basicsr.archs.cpu import inference, library, training
from elan_basicsr.archs.stand_in import are_as_made


def stand_in(body: nn.ModuleList, x: Tensor, window_sizes: Sequence[int], plain_types: set[type]) -> ModuleType | None:
    """What computes the blocks `body` of a padded map x (B, C, H, W) in place of the modules themselves.

    Args:
        body: The blocks.
        x: What they are to be given.
        window_sizes: Those of the network.
        plain_types: The classes whose function is known; a module of another one, such as a quantised one, is not.

    Returns:
        `inference`, `training`, or None where only the modules will do: where there are no kernels, for anything but
        float32 and windows of 4, 8, ..., and wherever modules were changed or somebody watches them. Under autocast
        `training` goes on in float32, in half the time of the modules' products in bfloat16, and `inference` too where
        the processor does not multiply in bfloat16.
    """
    if (not are_as_made(body, x, plain_types) or x.device.type != 'cpu' or any(w % 4 for w in window_sizes)
            or library.library() is None):
        return None
    norms = [module for module in body.modules() if isinstance(module, nn.BatchNorm2d)]
    if any(norm.running_mean is None for norm in norms):
        return None
    if all(norm.training and norm.affine and norm.track_running_stats for norm in norms):
        return training if x.shape[3] % library.LINE == 0 else None
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *body.parameters()))
    return None if gradients or any(norm.training for norm in norms) else inference
