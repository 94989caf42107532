import pytest
import torch
from torch import nn

import elan_basicsr  # noqa: F401
from elan_basicsr import ELAN
from elan_basicsr.report.complexity import count

from basicsr.archs.edsr_arch import EDSR


@pytest.mark.parametrize('upscale, published', [(2, 168.4), (3, 75.7), (4, 43.2)])
def test_the_papers_macs(upscale, published):
    found = count(ELAN(upscale=upscale), 3, 720 // upscale, -(-1280 // upscale))
    assert round(found.paper_macs / 1e9, 1) == published


def test_the_papers_attention_of_a_block():
    light = ELAN(upscale=4)
    deeper = ELAN(upscale=4, num_block=26)
    convolutions = sum(m.weight.numel() for m in deeper.body[-1].modules() if isinstance(m, nn.Conv2d))
    assert count(deeper, 3, 1, 1).paper_macs - count(light, 3, 1, 1).paper_macs == convolutions + 13440


def test_a_convolution():
    net = nn.Conv2d(3, 7, 3, padding=1)
    found = count(net, 3, 10, 20)
    assert (found.parameters, found.macs, found.paper_macs) == (7 * 28, 3 * 7 * 9 * 200, None)


@pytest.mark.parametrize('training', [False, True])
def test_elan_by_hand(training):
    net = ELAN(upscale=2, num_feat=15, num_block=2, num_share=1).train(training)
    weights = sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Conv2d))
    attention = 2 * 2 * 5 * (16 + 64 + 256)  # each of two modules: two products in three groups of five channels
    assert count(net, 3, 20, 30).macs == (weights + attention) * 32 * 32


def test_counting_computes_nothing_and_changes_nothing():
    net = ELAN(upscale=2, num_feat=15, num_block=2).train()
    net.head.eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert count(net, 3, 16_000, 16_000).macs > 1e12
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net.training and net.body[0].training and not net.head.training


def test_another_architecture():
    net = EDSR(num_in_ch=3, num_out_ch=3, num_feat=8, num_block=1, upscale=2)
    weights = sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Conv2d))
    last = net.conv_last.weight.numel()
    found = count(net, 3, 10, 10)
    assert found.macs == (weights + 3 * last) * 100 and found.paper_macs is None


def test_a_network_that_needs_its_values():
    class Data(nn.Module):
        def forward(self, x):
            return x if x.sum().item() > 0 else -x

    assert count(Data(), 3, 4, 4).macs is None
