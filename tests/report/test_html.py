"""The report in a browser: it fetches nothing, its tables sort, and its slider shows two networks on one image."""
import contextlib
import shutil

import pytest

from tests.report.test_compare import NAMES, inputs, report, small_cost  # noqa: F401, fixtures

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)


@pytest.fixture(scope='module')
def browser():
    playwright = pytest.importorskip('playwright.sync_api', reason='needs playwright, which is not installed')
    with contextlib.ExitStack() as stack:
        try:
            running = stack.enter_context(playwright.sync_playwright())
            found = running.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        except Exception as error:  # of playwright's, or of its driver, which a minimal system may not run
            pytest.skip(f'needs Chromium, and there is none ({str(error).splitlines()[0]})')
        yield found
        found.close()


@pytest.fixture
def page(browser, report, tmp_path):  # noqa: F811
    """The report, opened from another folder so that nothing lies beside it; errors and requests are kept."""
    shutil.copy(report / 'report.html', tmp_path / 'alone.html')
    page = browser.new_page(viewport={'width': 1200, 'height': 900})
    page.set_default_timeout(120_000)  # a machine may be busy
    page.troubles, page.requests = [], []
    page.on('pageerror', lambda error: page.troubles.append(str(error)))
    page.on('console', lambda message: page.troubles.append(message.text) if message.type == 'error' else None)
    page.on('request', lambda request: page.requests.append(request.url))
    page.goto((tmp_path / 'alone.html').as_uri())
    yield page
    assert page.troubles == []
    page.close()


def column(page, table, index):
    return page.eval_on_selector_all(f'#{table} tbody tr', f'rows => rows.map(row => row.cells[{index}].innerText)')


def test_it_needs_nothing_beside_itself(page):
    assert [url for url in page.requests if not url.startswith('data:')] == [page.url]
    broken = page.eval_on_selector_all('img', 'images => images.filter(image => !image.naturalWidth).length')
    assert page.locator('figure img').count() >= 3 and broken == 0
    assert page.locator('h1').inner_text() == 'Comparison of first, <b> & second, EDSR, bicubic'


def test_tables_sort_by_number_and_by_name_both_ways(page):
    head = page.locator('#images th button', has_text='PSNR Y')
    before = column(page, 'images', 3)
    head.click()
    values = [float(text) for text in column(page, 'images', 3)]
    assert values == sorted(values) and sorted(before) == sorted(column(page, 'images', 3))
    head.click()
    values = [float(text) for text in column(page, 'images', 3)]
    assert values == sorted(values, reverse=True)
    assert page.locator('#images th').nth(3).get_attribute('aria-sort') == 'descending'
    page.locator('#images th button', has_text='network').click()
    names = column(page, 'images', 2)
    assert [name for i, name in enumerate(names) if names[i - 1:i] != [name]] == ['<b> & second', 'bicubic', 'EDSR',
                                                                                 'first']


def pixel(page, x_share):
    """The colour at a share of the stage's width, as it is seen."""
    import cv2
    import numpy as np
    picture = cv2.imdecode(np.frombuffer(page.locator('#stage').screenshot(), np.uint8), cv2.IMREAD_COLOR)
    return picture[picture.shape[0] // 2, int(x_share * (picture.shape[1] - 1))].tolist()


def test_the_slider_shows_the_left_network_left_of_it(page):
    assert page.eval_on_selector_all('#left-name option', 'all => all.map(each => each.value)') == ['HR', *NAMES]
    page.select_option('#left-name', 'bicubic')
    page.select_option('#right-name', 'first')  # noise: it has not been trained
    at = {}
    for value in ('0', '50', '100'):
        page.locator('#position').fill(value)
        at[value] = [pixel(page, 0.25), pixel(page, 0.75)]
    assert at['50'][0] == at['100'][0] != at['0'][0]
    assert at['50'][1] == at['0'][1] != at['100'][1]


def test_another_image_and_zoom_can_be_chosen(page):
    def width():
        return page.eval_on_selector('#left', 'image => image.decode().then(() => [image.src, image.width])')
    page.select_option('#zoom', '1')
    source, one = width()
    page.select_option('#zoom', '4')
    assert width() == [source, 4 * one]
    page.select_option('#image', 'three: retina')
    assert width()[0] != source
