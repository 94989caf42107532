"""BatchNorm over all processes, on a CPU as well: torch's SyncBatchNorm takes GPU tensors only."""
from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


def synchronise(net: nn.Module, device: torch.device) -> nn.Module:
    """Replace every BatchNorm of `net`; names, weights and statistics stay as they are."""
    if device.type == 'cuda':
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for module in net.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = CPUSyncBatchNorm
    return net


class CPUSyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose statistics in training are those of the maps of all processes. (B, C, H, W) -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        y, mean, var, count = _Normalise.apply(x, self.eps)
        self._track(mean, var, count)
        return y * self.weight[:, None, None] + self.bias[:, None, None] if self.affine else y

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Move the running statistics, the variance without bias, as BatchNorm does."""
        if not self.track_running_stats:
            return
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_((var * count / (count - 1)).to(self.running_var), momentum)


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) over the batches of all processes; also the mean, variance and number of values."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        count = x.new_tensor([x.numel() / x.shape[1]])
        sums = torch.cat([x.sum((0, 2, 3)), count])
        dist.all_reduce(sums)
        count, mean = sums[-1], sums[:-1] / sums[-1]
        centred = x - mean[:, None, None]
        # From the mean of all: a difference of sums of squares would lose the digits of a small variance.
        var = centred.square().sum((0, 2, 3))
        dist.all_reduce(var)
        var /= count
        scale = (var + eps).rsqrt()
        y = centred.mul_(scale[:, None, None])
        ctx.save_for_backward(y, scale, count)
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        y, scale, count = ctx.saved_tensors
        sums = torch.stack([grad.sum((0, 2, 3)), (grad * y).sum((0, 2, 3))])
        dist.all_reduce(sums)
        of_mean, of_scale = (sums / count)[:, :, None, None]
        return (grad - of_mean - y * of_scale) * scale[:, None, None], None
