"""`basicsr test`: restore the images of every test set with a trained network, and measure them."""
from __future__ import annotations

from elan_basicsr.config.options import load_options
from elan_basicsr.data.sampling import seed_all
from elan_basicsr.engine.launch import Processes, launched, process_group
from elan_basicsr.engine.run import (
    build_validation_loaders,
    disk_errors_named,
    join_run,
    meeting,
    open_log,
    set_backends,
)
from elan_basicsr.engine.unused import unused

from basicsr.models import build_model
from basicsr.utils import make_exp_dirs


def test(opt_path: str, *, overrides=(), force_yml=(), launcher: str | None = None, root: str | None = None) -> int:
    """Test as the option file at `opt_path` says; results go to `results/NAME` under `root` (the current directory).

    Raises:
        UserError: An option, a dataset or a checkpoint is wrong.
    """
    opt = load_options(opt_path, is_train=False, overrides=overrides, force_yml=force_yml, root=root,
                       launched=launched(launcher))
    with process_group(launcher, **meeting(opt)) as processes, disk_errors_named():
        _test(opt, processes)
    return 0


def _test(opt: dict, processes: Processes) -> None:
    join_run(opt, processes)
    set_backends(opt)
    seed_all(opt['manual_seed'])
    make_exp_dirs(opt)
    if opt['dist']:
        import torch.distributed as dist
        dist.barrier()  # the folders stand before anyone writes into them
    opt['notices'] += unused(opt)
    logger = open_log(opt, 'test')
    loaders = build_validation_loaders(opt, ('test', 'val'))
    model = build_model(opt)
    for phase, loader in loaders.items():
        logger.info(f'Testing {opt["datasets"][phase]["name"]}...')
        model.validation(loader, opt['name'], tb_logger=None, save_img=opt['val'].get('save_img', False))
