"""Figures are those of the toolbox, and differences come with an interval."""
import numpy as np
import pytest
import skimage.data

from elan_basicsr.report.measure import all_differences, mean, measure, paired_difference, perceptual_metrics

from basicsr.metrics import calculate_niqe, calculate_psnr, calculate_ssim


@pytest.fixture(scope='module')
def hr():
    return np.ascontiguousarray(skimage.data.astronaut()[100:308, 100:310, ::-1])


def noisy(img, sigma):
    noise = np.random.default_rng(0).normal(0, sigma, img.shape)
    return (img + noise).clip(0, 255).round().astype(np.uint8)


def test_psnr_ssim_and_niqe_are_the_toolboxs(hr):
    image = noisy(hr, 5)
    assert measure(image, hr, border=4) == {
        'psnr_y': calculate_psnr(image, hr, 4, test_y_channel=True), 'psnr_rgb': calculate_psnr(image, hr, 4),
        'ssim_y': calculate_ssim(image, hr, 4, test_y_channel=True), 'ssim_rgb': calculate_ssim(image, hr, 4),
        'niqe': float(np.squeeze(calculate_niqe(image, 4)))}


def test_what_has_no_value_is_none(hr):
    values = measure(hr, hr, border=4)
    assert values['psnr_y'] is None and values['psnr_rgb'] is None and values['ssim_y'] == 1
    assert measure(hr[:150, :150], hr[:150, :150], border=4)['niqe'] is None  # one block
    grey = np.full_like(hr, 128)
    assert measure(grey, hr, border=4)['niqe'] is None
    assert set(measure(grey[:8, :50], hr[:8, :50], border=4).values()) == {None}  # the border takes everything
    values = measure(grey[:18], hr[:18], border=4)
    assert values['ssim_y'] is values['ssim_rgb'] is None and values['psnr_y'] == calculate_psnr(
        grey[:18], hr[:18], 4, test_y_channel=True)


def test_perceptual_metrics_without_pyiqa_are_left_out_with_a_note():
    try:
        import pyiqa  # noqa: F401
    except ImportError:
        found, notes = perceptual_metrics('cpu')
        assert found == {} and notes == ['LPIPS and DISTS left out: needs pyiqa, which is not to be imported '
                                         "(No module named 'pyiqa'): pip install 'elan-basicsr[metrics]'"]
    else:
        pytest.skip('pyiqa is installed')


def test_the_interval_of_paired_differences_holds_the_mean_and_narrows_with_the_number_of_images():
    rng = np.random.default_rng(3)
    hard = rng.normal(30, 4, 200)  # images differ by far more than networks do
    better = hard + rng.normal(0.3, 0.2, 200)
    many, few = (paired_difference(list(better[:n]), list(hard[:n])) for n in (200, 8))
    assert many['low'] < 0.3 < many['high'] and many['low'] > 0
    expected = 1.96 * np.std(better - hard, ddof=1) / np.sqrt(200)  # the normal approximation's half width
    assert (many['high'] - many['low']) / 2 == pytest.approx(expected, rel=0.1)
    assert few['high'] - few['low'] > 2 * (many['high'] - many['low'])
    assert (many['images'], few['images']) == (200, 8) and 0 < many['larger'] <= 200
    assert paired_difference(list(better), list(hard)) == many  # the same figures every time


def test_differences_leave_out_images_without_a_value():
    difference = paired_difference([2., None, 5.], [1., 7., None])
    assert difference == {'mean': 1., 'low': None, 'high': None, 'images': 1, 'larger': 1}
    assert paired_difference([None], [1.]) is None
    assert mean([1., None, 3.]) == 2 and mean([None]) is None
    assert paired_difference([2., 3.], [1., 2.]) == {'mean': 1., 'low': 1., 'high': 1., 'images': 2, 'larger': 2}


def test_every_two_networks_are_compared_on_every_set():
    rows = [{'dataset': dataset, 'image': image, 'network': network, 'psnr_y': float(value)}
            for dataset, image, network, value in (
                ('A', 'x', 'p', 3), ('A', 'x', 'q', 1), ('A', 'x', 'r', 0), ('A', 'y', 'p', 5), ('A', 'y', 'q', 2),
                ('A', 'y', 'r', 0), ('B', 'z', 'p', 1), ('B', 'z', 'q', 2), ('B', 'z', 'r', 3))]
    found = {(d['dataset'], d['first'], d['second']): d['mean'] for d in all_differences(rows, 'pqr', ['psnr_y'])}
    assert found == {('A', 'p', 'q'): 2.5, ('A', 'p', 'r'): 4, ('A', 'q', 'r'): 1.5,
                     ('B', 'p', 'q'): -1, ('B', 'p', 'r'): -2, ('B', 'q', 'r'): -1}
