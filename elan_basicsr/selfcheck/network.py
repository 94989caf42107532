"""The network on a device against itself in float64 on the CPU: output, loss, every gradient, BatchNorm's statistics.

What is allowed is not guessed. The deviation that a precision causes anyway is measured on the CPU, with the same
numbers rounded to the same bits, and `MARGIN` times as much is allowed: another device adds up in another order. A
wrong gradient or window is off by a good part of the result.
"""
from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from elan_basicsr.archs import gpu
from elan_basicsr.archs.cpu.library import library
from elan_basicsr.archs.elan_arch import ELAN
from elan_basicsr.config.checks import COMPILES_CHECKPOINTS, has_compiler
from elan_basicsr.selfcheck.checks import Check, Machine, Outcome, tf32, within

MARGIN = 4
SMALL = 1e-3
"""Of the norm of all gradients. A gradient may be zero but for rounding, such as that of a bias before BatchNorm, so
its own norm alone is no measure."""
LEAST = 1e-12  # a count of batches is the same everywhere
TF32_BITS = 11  # of the significand, the leading one included
SIZES: dict[str, dict[str, Any]] = {
    'ELAN-light': {'num_feat': 60, 'num_block': 24, 'num_share': 1},
    'ELAN': {'num_feat': 180, 'num_block': 36, 'num_share': 0},
}
QUICK_BLOCKS = 2  # a plain and a shifted one
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Way:
    """A way to compute the network.

    Attributes:
        name: What the table says.
        rounding: By which the deviation is measured that is allowed: `float32`, `TF32` or `bf16`. That of fp16, which
            keeps three bits more than bf16, must be below bf16's.
        dtype: Of autocast.
        modules: Whether the modules compute where kernels would stand in.
    """
    name: str
    rounding: str = 'float32'
    dtype: torch.dtype | None = None
    tf32: bool = False
    modules: bool = False
    channels_last: bool = False
    use_checkpoint: bool = False
    compiled: bool = False


MODULES = Way('modules', modules=True)


def ways(on_gpu: bool, training: bool) -> Iterator[Way]:
    """Those that a device has."""
    yield Way('float32')
    if on_gpu:
        yield Way('float32 with TF32', 'TF32', tf32=True)
        yield Way('fp16 with scaler' if training else 'fp16', 'bf16', torch.float16)
        kernels = torch.cuda.is_available() and gpu.usable(torch.device('cuda'))
        if kernels:
            yield Way('bf16', 'bf16', torch.bfloat16)
            yield Way('modules with TF32', 'TF32', tf32=True, modules=True)
    else:
        kernels = library() is not None
    if kernels:
        yield MODULES
    yield Way('modules in bf16', 'bf16', torch.bfloat16, modules=True)
    yield Way('channels-last', modules=True, channels_last=True)
    if training:
        yield Way('use_checkpoint', use_checkpoint=True)
        yield Way('compile', compiled=True)
        yield Way('compile, use_checkpoint', compiled=True, use_checkpoint=True)


def checks(machine: Machine) -> Iterator[Check]:
    """Both networks in every way; compiled ones, which take longest, with two blocks, and not if it is to be quick."""
    for name, arguments in SIZES.items():
        small = Case(machine, shallow(arguments), edge=32)
        whole = small if machine.quick else Case(machine, arguments, edge=48)
        for training in (False, True):
            for way in ways(machine.on_gpu, training):
                case = small if way.compiled else whole
                if way.compiled and machine.quick:
                    continue
                yield Check('network', f'{name}, {"train" if training else "eval"}, {way.name}',
                            partial(case.compare, way, training))


def shallow(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same network with few blocks."""
    return arguments | {'num_block': QUICK_BLOCKS * (1 + arguments['num_share'])}


class Case:
    """A network of random weights that are always the same, a batch of two, and what comes out in float64."""

    def __init__(self, machine: Machine, arguments: dict, edge: int):
        self.machine, self.arguments = machine, {**arguments, 'upscale': 2}
        generator = torch.Generator().manual_seed(0)
        self.lq, self.gt = (torch.rand(2, 3, size, size, generator=generator, dtype=torch.float64)
                            for size in (edge, 2 * edge))
        self.deviations: dict[tuple[str, bool], dict[str, float]] = {}

    @cached_property
    def network(self) -> ELAN:
        """In float64, with BatchNorm statistics that nearly fit the images: others make the softmax chaotic.

        Were they those of the images themselves, a step that does not update them would go unnoticed.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = ELAN(**self.arguments).double()
        norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.
        with torch.no_grad():
            net(0.9 * self.lq)
        for norm in norms:
            norm.momentum = 0.1
        return net

    @cached_property
    def exact(self) -> dict[bool, Results]:
        """What is right, by whether it is training."""
        return {training: self.run(MODULES, training, 'cpu', torch.float64) for training in (False, True)}

    def compare(self, way: Way, training: bool) -> Outcome:
        """The worst deviation of any result, in multiples of what is allowed."""
        if way.compiled and not has_compiler():
            return Outcome(None, note='torch.compile needs a C++ compiler')
        if way.compiled and way.use_checkpoint and torch.__version__ < COMPILES_CHECKPOINTS:
            return Outcome(None, note=f'needs torch {COMPILES_CHECKPOINTS}')
        found = self.run(way, training, self.machine.device)
        allowed = self.allowed(way.rounding, training)
        worst = max(((name, value, MARGIN * max(allowed[_kind(name)], LEAST))
                     for name, value in relative_deviations(found, self.exact[training]).items()),
                    key=lambda row: row[1] / row[2])
        return within(*worst[1:], note=worst[0])

    def allowed(self, rounding: str, training: bool) -> dict[str, float]:
        """The largest deviation by kind of result that a rounding causes on the CPU."""
        if (rounding, training) not in self.deviations:
            way = Way('', modules=True, dtype=torch.bfloat16 if rounding == 'bf16' else None)
            with RoundedConvolutions() if rounding == 'TF32' else nullcontext():
                found = relative_deviations(self.run(way, training, 'cpu'), self.exact[training])
            largest: dict[str, float] = {}
            for name, value in found.items():
                largest[_kind(name)] = max(largest.get(_kind(name), 0.), value)
            self.deviations[rounding, training] = largest
        return self.deviations[rounding, training]

    def run(self, way: Way, training: bool, device: torch.device | str, dtype: torch.dtype = torch.float32,
            loss_scale: float | None = None) -> Results:
        """Output, and in training loss, gradients and statistics, by name and in float64 on the CPU."""
        net = copy.deepcopy(self.network).to(device, dtype).train(training)
        net.use_checkpoint = way.use_checkpoint
        loss_scale = loss_scale or (2.**16 if way.dtype == torch.float16 else 1.)
        lq, gt = self.lq.to(device, dtype), self.gt.to(device, dtype)
        if way.channels_last:
            net, lq = net.to(memory_format=torch.channels_last), lq.contiguous(memory_format=torch.channels_last)
        if way.modules:
            leave_to_modules(net)
        call = torch.compile(net) if way.compiled else net
        autocast = torch.autocast(lq.device.type, way.dtype) if way.dtype else nullcontext()
        with tf32(way.tf32):
            if not training:
                with torch.no_grad(), autocast:
                    return _on_cpu({'output': call(lq)})
            with autocast:
                output = call(lq)
            loss = F.mse_loss(output.to(dtype), gt)
            (loss * loss_scale).backward()
        gradients = {f'gradient of {name}': p.grad / loss_scale for name, p in net.named_parameters()
                     if p.grad is not None}
        if loss_scale > 1 and not all(bool(gradient.isfinite().all()) for gradient in gradients.values()):
            return self.run(way, training, device, dtype, loss_scale / 2)  # as torch.amp.GradScaler does
        statistics = {f'statistic {name}': buffer for name, buffer in net.named_buffers()
                      if name.endswith(('running_mean', 'running_var', 'num_batches_tracked'))}
        return _on_cpu({'output': output, 'loss': loss, **gradients, **statistics})


def leave_to_modules(net: ELAN) -> None:
    """No kernels stand in for what somebody watches."""
    net.body[0].register_forward_hook(lambda *_: None)


def _on_cpu(results: Results) -> Results:
    return {name: value.detach().to('cpu', torch.float64) for name, value in results.items()}


def _kind(name: str) -> str:
    """What is measured alike. The loss alone may be right by chance; it is as exact as the output it is of."""
    return {'loss': 'output'}.get(name, name.split()[0])


def relative_deviations(found: Results, exact: Results) -> dict[str, float]:
    """Norm of the difference by norm of what is right, by name; 1 for what is missing or not finite."""
    everything = torch.stack([value.norm() for name, value in exact.items() if _kind(name) == 'gradient']
                             or [torch.zeros((), dtype=torch.float64)]).norm()
    deviations = {}
    for name, right in exact.items():
        norm = right.norm() + (SMALL * everything if _kind(name) == 'gradient' else 0)
        deviation = (found[name] - right).norm() / norm if name in found else torch.ones(())
        deviations[name] = float(deviation.nan_to_num(1., 1.))
    return deviations


class RoundedConvolutions(TorchFunctionMode):
    """Convolutions whose factors are rounded to TF32, forward and backward, as the tensor cores of a GPU round them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not torch.conv2d:
            return function(*args, **(kwargs or {}))
        x, weight, *others = args
        return _RoundedGradient.apply(function(_RoundedFactor.apply(x), _RoundedFactor.apply(weight), *others))


class _RoundedFactor(torch.autograd.Function):
    """Rounded on the way in; its gradient passes."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _rounded(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class _RoundedGradient(torch.autograd.Function):
    """Passes; its gradient, a factor of the products in the backward pass, is rounded."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _rounded(gradient)


def _rounded(x: Tensor) -> Tensor:
    """A float32 to the nearest of TF32_BITS bits (Veltkamp's splitting, Dekker 1971)."""
    shifted = x * (2**(24 - TF32_BITS) + 1)
    return shifted - (shifted - x)
