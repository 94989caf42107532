"""Upscaling on a GPU: the same bytes whatever ran before, tiles that shrink, and the CPU's figures."""
import contextlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from elan_basicsr.interop.networks import load_network
from elan_basicsr.upscale.enlarge import Enlarger
from elan_basicsr.upscale.replay import KEPT, Replayed
from tests.upscale.conftest import WEIGHTS
from tests.upscale.test_run import enlarger, random_pixels

pytestmark = pytest.mark.gpu
GPU = torch.device('cuda', 0)


def on_gpu(**options):
    return Enlarger(load_network(WEIGHTS, GPU), device=GPU, **options)


def difference(a, b):
    return np.abs(a.astype(int) - b.astype(int))


@contextlib.contextmanager
def room_for(size):
    """Torch gets so many bytes beyond those it holds."""
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved(GPU) + size
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.mem_get_info(GPU)[1], GPU)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1., GPU)
        torch.cuda.empty_cache()


def test_equal_images_and_equal_frames_give_equal_bytes():
    """Three frames in a row, and an image before and after a larger one."""
    one, frame = on_gpu(), random_pixels(180, 320)
    results = [one.pixels(frame, np.uint8) for _ in range(3)]
    one.pixels(random_pixels(700, 900), np.uint8)
    results.append(one.pixels(frame, np.uint8))
    assert all((result == results[0]).all() for result in results)


@pytest.mark.parametrize('kernels', ['', '0'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('self_ensemble', [False, True])
@pytest.mark.parametrize('sizes', [[(90, 160)] * 5, [(90, 160), (70, 50)] * 3])
def test_graphs_give_the_bytes_of_the_network(sizes, self_ensemble, dtype, kernels, monkeypatch):
    """Frames of one size, and of two in turn; later ones come after others have been freed and recorded."""
    monkeypatch.setenv('ELAN_KERNELS', kernels)
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    graphed, plain = (on_gpu(self_ensemble=self_ensemble, dtype=dtype) for _ in range(2))
    plain.replayed = None
    for seed, (height, width) in enumerate(sizes):
        frame = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        assert (graphed.pixels(frame, np.uint16) == plain.pixels(frame, np.uint16)).all(), seed
    assert len(graphed.replayed.recordings) == min(len(set(sizes)) * (1 + self_ensemble), KEPT)


def test_large_pieces_make_no_graph():
    one, image = on_gpu(tile=0), random_pixels(513, 512)
    assert all((one.pixels(image, np.uint8) == one.pixels(image, np.uint8)).all() for _ in range(2))
    assert one.replayed.records and not one.replayed.recordings


def test_graphs_leave_their_memory_to_a_piece_that_needs_it():
    """An image that passed by itself passes whole behind small ones."""
    one, small, large = on_gpu(tile=0), random_pixels(500, 500), random_pixels(800, 800)
    for _ in range(3):
        expected = one.pixels(small, np.uint8)
    assert one.replayed.recordings
    one.replayed.net.register_forward_pre_hook(lambda net, inputs: _fail_with(one.replayed.recordings))
    one.pixels(large, np.uint8)
    assert one.too_many_pixels == float('inf') and not one.replayed.recordings
    assert (one.pixels(small, np.uint8) == expected).all()


def _fail_with(recordings):
    if recordings:
        raise torch.OutOfMemoryError('out of memory')


def test_a_recording_that_fails_leaves_the_result_right():
    """In a process of its own, as it may leave traces."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
        assert pool.submit(_record_what_waits).result() == (4, True, False, torch.cuda.default_stream().stream_id)


class Waiting(torch.nn.Module):
    """A network that asks for a number that the GPU has yet to compute."""

    def forward(self, x):
        return F.interpolate(x, scale_factor=2) * float(x.sum())


def _record_what_waits() -> tuple:
    replayed = Replayed(Waiting())
    with torch.inference_mode():
        xs = [torch.full((1, 3, 8, 8), float(value), device=GPU) for value in range(4)]
        right = sum(torch.equal(replayed(x), replayed.net(x)) for x in xs)
    return right, not replayed.recordings, replayed.records, torch.cuda.current_stream().stream_id


def test_what_torch_keeps_in_reserve_counts_as_free():
    """A run that starts with half of the memory in torch's cache takes the tiles of one that starts with none."""
    torch.cuda.empty_cache()
    first = on_gpu()
    torch.empty(torch.cuda.mem_get_info(GPU)[0] // 2, dtype=torch.uint8, device=GPU)  # freed into the cache
    assert on_gpu().pixels_at_once > 0.9 * first.pixels_at_once
    torch.cuda.empty_cache()


def test_an_allocation_that_fails_leads_to_smaller_tiles_and_the_right_result():
    """The tile that was taken in the end gives what it gives where memory suffices; the small image stays whole."""
    small, lines, image, tiny = on_gpu(tile=0), [], random_pixels(1024, 1024), random_pixels(64, 64)
    small.say = lines.append
    before = small.pixels(tiny, np.uint8)  # which also loads what the libraries hold for good
    with room_for(160 * 2**20):
        result = small.pixels(image, np.uint8)
        after = small.pixels(tiny, np.uint8)
    tile = small._tiles_to_try(*image.shape)[0]
    assert lines and 0 < tile < 1024 and (before == after).all()
    assert difference(result, on_gpu(tile=tile).pixels(image, np.uint8)).max() <= 1


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('channels', [1, 3])
def test_8_and_16_bits_are_the_cpus_to_one_step(dtype, channels, monkeypatch):
    """With convolutions in float32: those in TF32 differ by more than a step of 16 bits."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    pixels = random_pixels(70, 50, channels, dtype)
    assert difference(on_gpu().pixels(pixels, dtype), enlarger().pixels(pixels, dtype)).max() <= 1


def test_an_image_of_65536_windows_passes_whole(monkeypatch):
    """1024x1024 pixels in windows of 4x4; far from the edges a part of it comes out as on the CPU."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    whole, image = on_gpu(tile=0), random_pixels(1024, 1024)
    result = whole.pixels(image, np.uint8)
    part = enlarger(tile=0).pixels(image[256:512, 256:512], np.uint8)
    assert whole.too_many_pixels == float('inf')
    assert difference(result[704:832, 704:832], part[192:320, 192:320]).max() <= 1


def test_bfloat16_is_near_float32():
    """Within a grey level on average, and nowhere more than a few off."""
    pixels = random_pixels(128, 128)
    off = difference(on_gpu(dtype='bfloat16').pixels(pixels, np.uint8), on_gpu().pixels(pixels, np.uint8))
    assert off.mean() < 1 and off.max() <= 4 and off.any()


def test_a_device_that_is_lost_is_told_from_a_fault_of_the_file():
    """A failed assertion on the device ends every later use of it, so it happens in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
        assert pool.submit(_lose_the_device).result() == 'RunLost'


def _lose_the_device() -> str:
    broken = on_gpu()

    def net(x):
        torch._assert_async(torch.zeros(1, dtype=torch.bool, device=x.device))  # as torch.compile does
        return F.interpolate(x, scale_factor=2)

    broken.network.net, broken.replayed = net, None
    try:
        broken.pixels(random_pixels(20, 20), np.uint8)
    except Exception as error:
        return type(error).__name__
    return 'nothing'
