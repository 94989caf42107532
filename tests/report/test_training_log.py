"""The logs of BasicSR and of this package become curves."""
import pytest

from elan_basicsr.errors import UserError
from elan_basicsr.report.figures import training_curves
from elan_basicsr.report.training_log import read_run

LOG = '''2026-01-01 00:00:00,000 INFO: name: run
  l_pix: 3 is no loss here
2026-01-01 00:00:01,000 INFO: [run..][epoch:  0, iter:     500, lr:(1.000e-03,)] [eta: 0:01:00, time (data): 0.1 (0.0)] l_pix: 5.0000e-02 l_g: 1.0e+00
2026-01-01 00:00:02,000 INFO: [run..][epoch:  0, iter:   1,000, lr:(1.000e-03,1.000e-04,)] l_pix: 4.0000e-02
2026-01-01 00:00:03,000 INFO: Validation Set5
\t # psnr: 28.1000\tBest: 28.1000 @ 1000 iter
\t # ssim: 0.8100\tBest: 0.8200 @ 500 iter

2026-01-01 00:00:04,000 INFO: [run..][epoch:  1, iter:   1,500, lr:(1.000e-03,)] l_pix: nan
2026-01-01 00:00:04,000 INFO: Validation Set14
\t # psnr: 26.0000\tBest: 26.0000 @ 1600 iter
'''  # noqa: E501


def test_losses_and_metrics_stand_at_their_iterations(tmp_path):
    (tmp_path / 'train_run_20260101_000000.log').write_text(LOG)
    curves = read_run(tmp_path)
    assert curves['l_pix'].pop(1500) != curves['l_pix']  # nan
    assert curves == {'l_pix': {500: 0.05, 1000: 0.04}, 'l_g': {500: 1.}, 'Set5 psnr': {1000: 28.1},
                      'Set5 ssim': {1000: 0.81}, 'Set14 psnr': {1600: 26.}}
    assert read_run(tmp_path / 'train_run_20260101_000000.log').keys() == curves.keys()


def test_a_resumed_run_is_one_curve(tmp_path):
    (tmp_path / 'train_run_20260102_000000.log').write_text(
        '2026 INFO: [run..][epoch:  1, iter:   1,000, lr:(1.000e-03,)] l_pix: 3.0000e-02\n'
        '2026 INFO: [run..][epoch:  1, iter:   2,000, lr:(1.000e-03,)] l_pix: 2.0000e-02\n')
    (tmp_path / 'train_run_20260101_000000.log').write_text(LOG.replace('nan', '4.0e-02'))
    assert read_run(tmp_path)['l_pix'] == {500: 0.05, 1000: 0.03, 1500: 0.04, 2000: 0.02}


def test_a_training_s_own_log_is_read_and_drawn(options, tmp_path):
    import yaml

    from elan_basicsr.engine.train import train
    (tmp_path / 'run.yml').write_text(yaml.safe_dump(options))
    train(str(tmp_path / 'run.yml'))
    curves = read_run(tmp_path / 'experiments' / 'run')
    assert list(curves['l_pix']) == [2, 4, 6, 8] and list(curves['three psnr']) == [4, 8]
    training_curves({'run': curves, 'again': curves}, tmp_path / 'curves.png')
    assert (tmp_path / 'curves.png').stat().st_size > 10_000


def test_what_is_no_log_is_said(tmp_path):
    with pytest.raises(UserError, match='holds no train_'):
        read_run(tmp_path)
    with pytest.raises(UserError, match='absent.log: cannot be read'):
        read_run(tmp_path / 'absent.log')
    (tmp_path / 'notes.txt').write_text('nothing')
    with pytest.raises(UserError, match='tells of no iteration'):
        read_run(tmp_path / 'notes.txt')
