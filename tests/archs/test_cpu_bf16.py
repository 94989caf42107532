"""Kernels that multiply in bfloat16, as they do under autocast where the processor does: only factors are rounded."""
import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from elan_basicsr.archs import elan_arch
from elan_basicsr.archs.cpu import inference, library
from elan_basicsr.archs.elan_arch import ELAN
from elan_basicsr.checkpoint import load_elan
from elan_basicsr.data.images import read_bgr

from .test_cpu import _evaluate, _network, _of_the_modules
from basicsr.metrics import calculate_psnr

pytestmark = pytest.mark.skipif(not library.has_bf16(), reason='this processor does not multiply in bfloat16')


def _halves(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float32).to(torch.bfloat16).to(x.dtype)


class _ByHalves(ELAN):
    """What kernels compute in bfloat16, by the modules: factors are rounded, all else is float64."""

    def _run_body(self, x):
        for block in self.body:
            queries = ()
            for lfe, gmsa in zip(block.lfe, block.gmsa, strict=True):
                hidden = self._conv(lfe.conv0, elan_arch.shift(x)).relu()
                x = x + self._conv(lfe.conv1, elan_arch.shift(hidden))
                attended, queries = self._attend(gmsa, x, queries)
                x = x + self._conv(gmsa.project_out, attended)
        return x

    @staticmethod
    def _conv(conv, x):
        return F.conv2d(_halves(x), _halves(conv.weight), conv.bias)

    def _attend(self, gmsa, x, queries):
        weight, bias = inference.folded(gmsa.project_in, gmsa.norm)
        groups, results, kept = len(self.window_sizes), [], []
        for i, (w, b) in enumerate(zip(weight.chunk(groups), bias.chunk(groups), strict=True)):
            window, own = self.window_sizes[i], len(w) - self.head.out_channels // groups
            q = F.conv2d(x, w[:own, :, None, None], b[:own]) if own else None
            q = queries[i] if q is None else elan_arch.cut_windows(q, window, gmsa.shifted)
            v = F.conv2d(_halves(x), _halves(w[own:, :, None, None]), b[own:])
            logits = q @ q.transpose(1, 2)
            p = (logits - logits.amax(2, keepdim=True)).exp()
            y = _halves(p) @ _halves(elan_arch.cut_windows(v, window, gmsa.shifted)) / p.sum(2, keepdim=True)
            results.append(elan_arch.paste_windows(y, x.shape[2:], window, gmsa.shifted))
            kept.append(q)
        return torch.cat(results, 1), kept


@settings(max_examples=25, deadline=None)
@given(h=st.integers(16, 70), w=st.integers(16, 150), num_share=st.sampled_from([0, 1]), count=st.integers(1, 3),
       windows=st.sampled_from([(4, 8, 16), (8, 12), (16,), (4, 20)]), width=st.integers(1, 3))
def test_in_bfloat16_an_image_is_what_rounded_factors_give(h, w, num_share, count, windows, width):
    """But where a number lies half way between two of bfloat16, and the last bit sends it to the other one: few pixels,
    which count in the norm and not in the median. (Of images of few pixels they would be many.)"""
    net = _network(num_block=2, num_feat=10 * width * len(windows), num_share=num_share, window_sizes=windows)
    x = torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(h * w))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        with torch.autocast('cpu', torch.bfloat16):
            ours = _evaluate(net, x)
    finally:
        torch.set_num_threads(threads)
    rounded = copy.deepcopy(net).double()
    rounded.__class__ = _ByHalves
    expected, exact = _evaluate(rounded, x.double()), _of_the_modules(net, x, _evaluate)
    off, rounding = (ours - expected).abs(), (exact - expected).abs()
    assert off.median() <= 0.02 * rounding.median() and off.norm() <= 0.2 * rounding.norm()


def test_in_bfloat16_the_number_of_threads_changes_no_bit(threads):
    net, x = _network(num_block=8), torch.rand(1, 3, 100, 200)
    with torch.autocast('cpu', torch.bfloat16):
        threads(1)
        alone = _evaluate(net, x)
        for count in (2, 7):
            threads(count)
            assert torch.equal(_evaluate(net, x), alone)


def test_channels_that_are_not_shifted_in_pairs_stay_in_float32():
    net, x = _network(num_feat=45), torch.rand(1, 3, 20, 30)
    with torch.autocast('cpu', torch.bfloat16):
        ours = _evaluate(net, x)
    assert torch.equal(ours, _evaluate(net, x))


def test_in_bfloat16_set5_is_what_it_is_in_float32(shared):
    """To a grey level at 999 of 1,000 pixels, and to 0.01 dB."""
    net, psnr, off = load_elan(shared / 'trained/frl_light_x4.pth').eval(), {True: [], False: []}, []
    for file in sorted((shared / 'data/Set5/LRbicx4').glob('*.png')):
        x = torch.from_numpy(read_bgr(str(file))[..., ::-1].copy()).permute(2, 0, 1)[None] / 255
        gt = read_bgr(str(shared / 'data/Set5/HR' / file.name))
        images = {}
        for on in psnr:
            with torch.autocast('cpu', torch.bfloat16, on):
                images[on] = _evaluate(net, x)[0].clamp(0, 1) * 255
            pixels = images[on].round().permute(1, 2, 0).numpy()[..., ::-1]
            psnr[on].append(calculate_psnr(pixels, gt[:pixels.shape[0], :pixels.shape[1]], 4, test_y_channel=True))
        off.append((images[True] - images[False]).abs().flatten())
    every = torch.cat(off)
    assert 0 < every.kthvalue(round(0.999 * len(every))).values <= 1
    assert len(off) == 5 and abs(sum(psnr[True]) - sum(psnr[False])) / 5 <= 0.01
