"""Tiles and self-ensemble give the image a network would give, at its exact size."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from elan_basicsr import inference
from elan_basicsr.checkpoint import load_elan
from elan_basicsr.data.images import read_bgr


def local(x):
    """A network that sees three pixels around each, twice enlarged."""
    kernel = torch.arange(1., 10.).reshape(1, 1, 3, 3).repeat(3, 1, 1, 1) / 45
    return F.interpolate(F.conv2d(x, kernel, padding=1, groups=3), scale_factor=2)


@settings(max_examples=60, deadline=None)
@given(h=st.integers(1, 90), w=st.integers(1, 90), tile=st.integers(1, 70), overlap=st.integers(1, 40))
def test_tiles_of_a_local_network_join_without_a_seam(h, w, tile, overlap):
    x = torch.rand(1, 3, h, w)
    assert torch.allclose(inference.forward(local, x, scale=2, tile=tile, tile_overlap=overlap), local(x), atol=1e-6)


def test_self_ensemble_is_the_average_over_the_eight_turns():
    x = torch.rand(2, 3, 7, 5)

    def enlarge(image):  # does the same whichever way the image is turned
        return F.interpolate(image, scale_factor=2)

    assert torch.allclose(inference.forward(enlarge, x, scale=2, self_ensemble=True), enlarge(x), atol=1e-6)
    turned = inference.forward(local, x, scale=2, self_ensemble=True)
    assert torch.allclose(turned, inference.forward(local, x.flip(3), scale=2, self_ensemble=True).flip(3), atol=1e-6)
    assert not torch.allclose(turned, local(x))


@pytest.mark.slow
def test_tiles_of_a_trained_network_agree_with_the_whole_image(shared):
    net = load_elan(shared / 'trained' / 'light_x4.pt')
    img = read_bgr(shared / 'data' / 'Set5' / 'LRbicx4' / 'woman.png')[..., ::-1].copy()
    x = torch.from_numpy(img).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        whole, tiled = net(x), inference.forward(net, x, scale=4, tile=32, tile_overlap=16)
    assert -10 * torch.log10((whole - tiled).square().mean()) > 55
