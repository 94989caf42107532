"""Maps are right where the answer is known: networks whose reach is known, and integrals that are."""
import math

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from elan_basicsr import ELAN
from elan_basicsr.cli import main
from elan_basicsr.errors import UserError
from elan_basicsr.report.attribution import (
    Attribution,
    blur,
    detect_edges,
    diffusion_index,
    gini,
    local_attribution,
    most_detailed,
    reach,
    receptive_field,
)


class Local(nn.Module):
    """3x3 convolutions, then each pixel enlarged to scale x scale ones: its reach is the convolutions'."""

    def __init__(self, layers=1, scale=2):
        super().__init__()
        torch.manual_seed(4)
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(layers))
        self.scale = scale
        self.batches = []

    def forward(self, x):
        self.batches.append(len(x))
        for conv in self.convs:
            x = torch.tanh(conv(x))
        return F.interpolate(x, scale_factor=self.scale)


@pytest.fixture
def image():
    torch.manual_seed(5)
    return torch.rand(1, 3, 40, 44, dtype=torch.float64)


@pytest.mark.parametrize('layers', [1, 2])
def test_attribution_of_local_networks_is_zero_outside_their_reach_and_nowhere_zero_inside(layers, image):
    left, top, edge = 12, 9, 4
    strength = local_attribution(Local(layers).double(), image, (left, top, edge), 2).strength
    inside = torch.zeros_like(strength, dtype=torch.bool)
    inside[top - layers:top + edge + layers, left - layers:left + edge + layers] = True
    assert (strength[~inside] == 0).all() and (strength[inside] > 0).all()


def test_attributions_add_up_to_the_difference_of_the_detector(image):
    net, box = Local(2).double(), (10, 8, 6)

    def response(x):
        return detect_edges(net(x)[..., 16:28, 20:32]).item()

    found = local_attribution(net, image, box, 2)
    assert found.difference == pytest.approx(response(image) - response(blur(image, 1.2)))
    errors = [abs(local_attribution(net, image, box, 2, steps=steps).values.sum().item() / found.difference - 1)
              for steps in (12, 50, 200)]
    assert errors[1] < 2e-3 and errors[0] > errors[1] > errors[2]


def test_a_linear_detector_of_a_linear_network_is_attributed_exactly(image):
    weight = torch.rand(3, 3, 3, 3, dtype=torch.float64)

    def net(x):
        return F.conv2d(x, weight, padding=1)

    found = local_attribution(net, image, (5, 6, 2), 1, steps=3, detector=lambda patch: patch.flatten(1).sum(1))
    x = image.clone().requires_grad_()
    gradient, = torch.autograd.grad(net(x)[..., 6:8, 5:7].sum(), x)
    assert torch.allclose(found.values, (gradient * (image - blur(image, 1.2)))[0])


def test_the_map_is_the_same_in_parts_and_no_part_is_larger_than_asked(image):
    whole = Local().double()
    parts = Local().double()
    one = local_attribution(whole, image, (8, 8, 4), 2, steps=10, chunk=10).values
    other = local_attribution(parts, image, (8, 8, 4), 2, steps=10, chunk=3).values
    assert torch.allclose(one, other)
    assert max(parts.batches) == 3 and max(whole.batches) == 10
    field = receptive_field(parts, image, 2, chunk=5)
    assert torch.allclose(field, receptive_field(whole, image, 2, chunk=16)) and max(parts.batches) == 5


def test_a_network_with_attention_uses_more_pixels_than_a_convolution(image):
    torch.manual_seed(0)
    elan = ELAN(upscale=2, num_feat=15, num_block=2, window_sizes=(4, 8, 16), img_range=1.).eval().double()
    box = (14, 14, 4)
    far, near = (local_attribution(net, image, box, 2, steps=5) for net in (elan, Local().double()))
    assert diffusion_index(far) > 3 * diffusion_index(near)
    # Two modules in 16x16 windows, the second half a window further: beyond any convolution here.
    assert reach(receptive_field(elan, image, 2), 1.) > 17


@pytest.mark.parametrize('layers', [0, 1, 2, 3])
def test_the_receptive_field_of_convolutions_is_their_reach(layers, image):
    field = receptive_field(Local(layers).double(), image, 2)
    assert field.shape[0] == field.shape[1] and field.shape[0] % 2 == 1 and field.shape[0] > 2 * layers + 1
    middle = field.shape[0] // 2
    assert reach(field, 1.) == 2 * layers + 1
    assert (field[middle - layers:middle + layers + 1, middle - layers:middle + layers + 1] > 0).all()


def test_the_receptive_field_of_a_linear_network_is_its_kernel(image):
    kernel = torch.rand(1, 1, 3, 3, dtype=torch.float64)

    def net(x):
        return F.conv2d(x.mean(1, keepdim=True), kernel, padding=1)

    field = receptive_field(net, image, 1)
    middle = field.shape[0] // 2
    assert torch.allclose(field[middle - 1:middle + 2, middle - 1:middle + 2], kernel[0, 0])


def test_gini_is_zero_for_equal_values_and_as_defined_for_others():
    assert gini(torch.full((5, 7), 3.)) == pytest.approx(0)
    assert gini(torch.tensor([0., 0, 0, 8])) == pytest.approx(0.75)  # one of n holds all: 1 - 1/n
    values = torch.rand(50)
    mean_difference = (values[:, None] - values[None]).abs().double().mean()
    assert gini(values) == pytest.approx(mean_difference / (2 * values.double().mean()))
    assert gini(torch.zeros(4)) == 0
    assert diffusion_index(Attribution(torch.ones(3, 4, 4), 48.)) == pytest.approx(100)


def test_blur_keeps_the_mean_and_has_the_width_asked_for():
    point = torch.zeros(1, 1, 41, 41, dtype=torch.float64)
    point[..., 20, 20] = 1
    spread = blur(point, 2.)[0, 0]
    at = torch.arange(41) - 20
    assert spread.sum() == pytest.approx(1) and math.sqrt((spread.sum(0) * at**2).sum()) == pytest.approx(2, rel=0.01)
    assert torch.equal(blur(point, 0), point)


def test_a_figure_of_no_kind_is_refused_before_anything_is_computed(tmp_path, capsys):
    pytest.importorskip('matplotlib')
    assert main(['explain', 'absent.png', '--weights', 'absent.pth', '-o', str(tmp_path / 'e.txt')]) == 2
    assert 'e.txt: no figure has such a name; expected one that ends with .png, .pdf or .svg' in capsys.readouterr().err


def test_an_image_too_small_is_named():
    with pytest.raises(UserError, match=r'a\.png: has 5x4 pixels, expected 6x6 or more'):
        most_detailed(np.zeros((4, 5, 3), np.float32), 6, 'a.png')


def test_the_patch_chosen_is_the_most_detailed_one():
    rgb = np.full((50, 60, 3), 0.5, np.float32)
    rgb[20:24, 30:34] = np.random.default_rng(0).random((4, 4, 3))
    left, top, edge = most_detailed(rgb, 6)
    assert edge == 6 and left <= 30 and left + 6 >= 34 and top <= 20 and top + 6 >= 24


@pytest.fixture
def files(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate('ab'):
        torch.manual_seed(seed)
        torch.save(ELAN(upscale=2, num_feat=15, num_block=2).state_dict(), f'{name}.pth')
    return str(data / 'test' / 'LR' / 'retina.png')


def test_networks_are_drawn_side_by_side(files, capsys):
    pytest.importorskip('matplotlib')
    assert main(['explain', files, '--weights', 'a.pth', 'second=b.pth', '-o', 'new/figure.png']) == 0
    printed = capsys.readouterr().out
    assert 'second' in printed and 'diffusion' in printed
    assert cv2.imread('new/figure.png').std() > 10
    assert main(['explain', files, '--weights', 'a.pth', '-o', 'new/figure.png']) == 2
    assert 'nothing is overwritten unasked' in capsys.readouterr().err


@pytest.mark.parametrize('words, expected', [
    (['absent.png', '--weights', 'a.pth'], 'absent.png: no such file'),
    (['{image}', '--weights', 'bicubic'], 'bicubic has no weights'),
    (['{image}', '--weights', 'absent.pth'], 'absent.pth: no such file'),
    (['{image}', '--weights', 'a.pth', '--patch', '0', '0', '99'], '--patch 0 0 99: is not inside'),
    (['{image}', '--weights', 'a.pth', '--patch', '3', '3', '1'], '--patch 3 3 1: is not inside'),
    (['{image}', '--weights', 'a.pth', '--patch', '-1', '0', '4'], '--patch -1 0 4: is not inside'),
])
def test_a_mistake_is_one_line(words, expected, files, capsys):
    assert main(['explain', *(word.format(image=files) for word in words)]) == 2
    printed = capsys.readouterr().err
    assert expected in printed and printed.count('\n') == 1
