"""Figures show what they are given: their labels, axes and areas."""
import cv2
import pytest

from elan_basicsr.errors import UserError
from elan_basicsr.report import figures

pytest.importorskip('matplotlib')

ROWS = [
    {'name': 'ELAN-light', 'parameters': 601_488, 'macs': 43.2e9, 'latency': 0.91, 'psnr': 30.54},
    {'name': 'EDSR', 'parameters': 1_517_571, 'macs': 114e9, 'latency': 4.1, 'psnr': 30.2},
    {'name': 'bicubic', 'parameters': 0, 'psnr': 28.42},
]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, to be asked what is in them."""
    saved = []
    save = figures.save
    monkeypatch.setattr(figures, 'save', lambda figure, path: (saved.append(figure), save(figure, path)))
    return saved


def test_a_bubble_stands_at_its_cost_and_psnr_with_an_area_as_its_parameters(drawn, tmp_path):
    figures.bubble_chart(ROWS, 'latency', tmp_path / 'new' / 'chart.png')
    assert cv2.imread(str(tmp_path / 'new' / 'chart.png')).std() > 5
    axes = drawn[0].axes[0]
    large, small = axes.collections
    assert large.get_offsets().tolist() == [[4.1, 30.2]] and small.get_offsets().tolist() == [[0.91, 30.54]]
    assert large.get_sizes()[0] / small.get_sizes()[0] == pytest.approx(1_517_571 / 601_488)
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale()) == ('latency in seconds', 'PSNR in dB', 'log')
    assert {text.get_text() for text in axes.texts} == {
        'bicubic', 'ELAN-light\n601K parameters', 'EDSR\n1.52M parameters'}
    assert axes.lines[0].get_ydata()[0] == 28.42  # no cost: a line at its PSNR


def test_labels_of_bubbles_on_one_spot_do_not_cover_each_other(drawn, tmp_path):
    figures.bubble_chart([dict(ROWS[0], name=name) for name in 'abc'], 'macs', tmp_path / 'chart.png')
    boxes = [text.get_window_extent() for text in drawn[0].axes[0].texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_without_psnr_latency_and_macs_are_drawn_against_each_other(drawn, tmp_path):
    rows = [{key: row[key] for key in row if key != 'psnr'} for row in ROWS]
    figures.bubble_chart(rows, 'macs', tmp_path / 'chart.png')
    axes = drawn[0].axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ('multiply-adds (MACs) in G', 'latency in seconds')
    assert len(axes.collections) == 2
    with pytest.raises(UserError, match='nothing to draw'):
        figures.bubble_chart(rows[2:], 'macs', tmp_path / 'none.png')


def test_a_figure_that_cannot_be_written_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match='chart.xyz: the figure cannot be written'):
        figures.bubble_chart(ROWS, 'macs', tmp_path / 'chart.xyz')


@pytest.mark.parametrize('value, text', [(601_488, '601K'), (43.2e9, '43.2G'), (999_900, '1M'), (12, '12'), (0, '0')])
def test_counts_have_three_digits_and_a_prefix(value, text):
    assert figures.si(value) == text
