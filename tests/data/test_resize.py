"""`imresize` is MATLAB's, to the byte."""
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from elan_basicsr.data.images import read_bgr
from elan_basicsr.data.resize import _resize_rows, imresize


def cubic(x):
    x = abs(x)
    return 1.5 * x**3 - 2.5 * x**2 + 1 if x <= 1 else -.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.


def rows_by_the_formula(img, scale):
    """MATLAB's algorithm for one dimension, row by row, before it rounds."""
    size, shrink = img.shape[0], min(float(scale), 1.)
    out = np.empty((-(-size * scale.numerator // scale.denominator), *img.shape[1:]))
    for y in range(len(out)):
        u = (y + 1) / float(scale) + .5 * (1 - 1 / float(scale)) - 1
        taps = range(int(np.floor(u - 2 / shrink)) - 1, int(np.ceil(u + 2 / shrink)) + 2)
        values = np.array([cubic((u - tap) * shrink) for tap in taps])
        mirrored = [min(tap % (2 * size), 2 * size - 1 - tap % (2 * size)) for tap in taps]
        out[y] = np.tensordot(values / values.sum(), img[mirrored].astype(float), axes=1)
    return out


def assert_rounded(result, exact):
    """What lies on a half may be rounded either way by two orders of addition; all else is the nearest integer."""
    nearest = np.clip(np.floor(exact + .5), 0, 255)
    differ = result != nearest
    assert (np.abs(exact - np.floor(exact) - .5)[differ] < 1e-9).all()
    assert (np.abs(result - nearest)[differ] == 1).all()


@settings(max_examples=60, deadline=None)
@given(img=arrays(np.uint8, st.tuples(st.integers(1, 24), st.integers(1, 24), st.sampled_from([1, 3]))),
       scale=st.sampled_from([Fraction(1, n) for n in (2, 3, 4, 8)] + [Fraction(n) for n in (2, 3, 4, 8)]
                             + [Fraction(3, 2), Fraction(2, 3)]))
def test_it_is_the_published_formula_at_any_size(img, scale):
    first = _resize_rows(img, scale)  # which is rounded before the columns follow
    assert_rounded(first, rows_by_the_formula(img, scale))
    result = imresize(img, scale)
    assert_rounded(result.swapaxes(0, 1), rows_by_the_formula(first.swapaxes(0, 1), scale))
    assert result.dtype == np.uint8


@pytest.mark.parametrize('scale', [2, 3, 4])
def test_no_byte_differs_from_matlab_on_set5(shared, scale):
    compared = 0
    for path in sorted((shared / 'data' / 'Set5' / 'HR').glob('*.png')):
        hr = read_bgr(path)
        hr = hr[:hr.shape[0] // scale * scale, :hr.shape[1] // scale * scale]
        expected = read_bgr(shared / 'data' / 'Set5' / f'LRbicx{scale}' / path.name)
        assert np.array_equal(imresize(hr, 1 / scale), expected), path.name
        compared += 1
    assert compared == 5


def test_grey_16_bit_and_scale_one():
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    assert imresize(grey, .5).shape == (3, 4)
    assert np.array_equal(imresize(grey, 1), grey)
    deep = grey.astype(np.uint16) * 257
    assert np.abs(imresize(deep, .5).astype(int) - imresize(grey, .5).astype(int) * 257).max() <= 257
    assert imresize(deep, .5).dtype == np.uint16


@pytest.mark.parametrize('img, scale, error', [
    (np.zeros((4, 4)), .5, TypeError), (np.zeros((4, 0), np.uint8), .5, ValueError),
    (np.zeros(4, np.uint8), .5, ValueError), (np.zeros((4, 4), np.uint8), 0, ValueError),
    (np.zeros((4, 4), np.uint8), float('inf'), ValueError),
])
def test_what_cannot_be_resized_is_refused(img, scale, error):
    with pytest.raises(error, match='^imresize: '):
        imresize(img, scale)
