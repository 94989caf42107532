"""The blocks of ELAN on a CPU in float32, by kernels compiled for it: the function of `elan_arch`, only faster."""
from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as of_all
from torch.utils._python_dispatch import _get_current_dispatch_mode

from elan_basicsr.archs.cpu import inference, library, training


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
        kernels go on in float32: they take half the time of products in bfloat16, and round nothing.
    """
    if (_watched() or type(x) is not Tensor or any(w % 4 for w in window_sizes) or library.library() is None
            or not all(_is_plain(module, plain_types) for module in body.modules())
            or not all(t.dtype == torch.float32 and t.device.type == 'cpu' and type(t) in (Tensor, nn.Parameter)
                       for t in (x, *body.parameters()))):
        return None
    norms = [module for module in body.modules() if isinstance(module, nn.BatchNorm2d)]
    if any(norm.running_mean is None for norm in norms):
        return None
    if all(norm.training and norm.affine and norm.track_running_stats for norm in norms):
        return training if x.shape[3] % library.LINE == 0 else None
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *body.parameters()))
    return None if gradients or any(norm.training for norm in norms) else inference


def _watched() -> bool:
    """Whether somebody sees single operations or modules: compilers, exporters, functorch, counters, hooks on all."""
    return (torch.compiler.is_compiling() or torch.jit.is_tracing() or _get_current_dispatch_mode() is not None
            or torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0
            or any((of_all._global_forward_hooks, of_all._global_forward_pre_hooks, of_all._global_backward_hooks,
                    of_all._global_backward_pre_hooks)))


def _is_plain(module: nn.Module, plain_types: set[type]) -> bool:
    """Whether a module is as it was made: of a class that is known, called as that is, without hooks."""
    return (type(module) in plain_types and 'forward' not in vars(module) and module._compiled_call_impl is None
            and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                     or module._backward_pre_hooks))
