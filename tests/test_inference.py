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


TOO_LARGE = ['CUDA error: out of memory', 'CUDA error: invalid configuration argument',
             'CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`',
             'cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED',
             'cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.',
             'Expected canUse32BitIndexMath(input) && canUse32BitIndexMath(output) to be true, but got false.']


@pytest.mark.parametrize('words', TOO_LARGE)
def test_what_the_device_cannot_take_at_once_goes_through_in_smaller_tiles(words):
    x, sizes = torch.rand(1, 3, 70, 50), []

    def limited(image):
        sizes.append(image.shape[2:])
        if image.shape[2] * image.shape[3] > 60 * 50:
            raise RuntimeError(words)
        return local(image)

    for self_ensemble in (False, True):
        with pytest.warns(UserWarning, match='50x70 pixels .* tiles of (48|32)'):
            y = inference.forward(limited, x, scale=2, self_ensemble=self_ensemble)
        assert torch.equal(y, inference.forward(local, x, scale=2, tile=32, self_ensemble=self_ensemble))
    assert sizes[0] == (70, 50)  # whole at first


@pytest.mark.parametrize('words', ['CUDA error: an illegal memory access was encountered', 'size mismatch',
                                   'CUDA error: device-side assert triggered'])
def test_an_error_that_is_none_of_size_is_not_tried_again(words):
    calls = []

    def broken(image):
        calls.append(image)
        raise RuntimeError(words)

    with pytest.raises(RuntimeError, match=words):
        inference.forward(broken, torch.rand(1, 3, 70, 50), scale=2)
    assert len(calls) == 1


def test_main_memory_that_runs_out_is_told_as_such_and_a_tile_of_a_window_is_the_last_try():
    sizes = []

    def greedy(image):
        sizes.append(image.shape[2])
        return torch.empty(2**58, dtype=torch.uint8)

    with pytest.raises(RuntimeError) as raised, pytest.warns(UserWarning):
        inference.forward(greedy, torch.rand(1, 3, 64, 64), scale=2, tile_overlap=0)
    assert inference.too_large(raised.value) and sizes == [64, 32, 16]


@pytest.mark.slow
def test_tiles_of_a_trained_network_agree_with_the_whole_image(shared):
    net = load_elan(shared / 'trained' / 'light_x4.pt')
    img = read_bgr(shared / 'data' / 'Set5' / 'LRbicx4' / 'woman.png')[..., ::-1].copy()
    x = torch.from_numpy(img).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        whole, tiled = net(x), inference.forward(net, x, scale=4, tile=32, tile_overlap=16)
    assert -10 * torch.log10((whole - tiled).square().mean()) > 55
