"""`basicsr train`: from an option file to a trained network, in the order things happen.

The parts are the toolbox's (registries, builders, message logger, TensorBoard); the loop is ours because the toolbox's
counts past its end, repeats the random numbers of its loader workers every epoch, and cannot resume without a GPU.
"""
from __future__ import annotations

import datetime
import math
import time
from collections.abc import Iterator
from os import path as osp
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from elan_basicsr.checkpoint import UNFINISHED
from elan_basicsr.config.options import load_options
from elan_basicsr.data.loader import PatchLoader, dead_workers_named, prefetched, to_float
from elan_basicsr.data.sampling import StreamSampler, mix_seed, seed_all
from elan_basicsr.engine.continuing import changes_named, go_on, note
from elan_basicsr.engine.interrupt import EXIT_STOPPED, StopRequest
from elan_basicsr.engine.launch import Processes, is_loss, launched, process_group
from elan_basicsr.engine.preflight import look_ahead
from elan_basicsr.engine.resume import find_resume_state, saved_states
from elan_basicsr.engine.run import (
    build_checked_dataset,
    build_validation_loaders,
    disk_errors_named,
    join_run,
    keep_freed_memory,
    meeting,
    on_terminal,
    one_size,
    open_log,
    set_backends,
)
from elan_basicsr.engine.unused import unused
from elan_basicsr.errors import RunLost, UserError
from elan_basicsr.interop import plugins
from elan_basicsr.models.saving import save_whole_files
from elan_basicsr.models.validation import Interrupted, gather

from basicsr.models import build_model
from basicsr.train import init_tb_loggers
from basicsr.utils import AvgTimer, MessageLogger, make_exp_dirs, mkdir_and_rename
from basicsr.utils.options import copy_opt_file


def train(opt_path: str, *, overrides=(), force_yml=(), launcher: str | None = None, auto_resume: bool = False,
          debug: bool = False, root: str | None = None) -> int:
    """Train as the option file at `opt_path` says; the run's folders are made under `root` (the current directory).

    Returns:
        The exit code: 0 when all iterations are done, `interrupt.EXIT_STOPPED` when a signal stopped the run after
        saving it.

    Raises:
        UserError: An option, a dataset or a checkpoint is wrong, or the loss is no longer finite.
    """
    opt = load_options(opt_path, is_train=True, overrides=overrides, force_yml=force_yml, debug=debug,
                       auto_resume=auto_resume, root=root, launched=launched(launcher))
    with (process_group(launcher, **meeting(opt)) as processes, disk_errors_named(),
          StopRequest(processes.distributed) as stop):
        finished = _train(opt, opt_path, processes, stop)
    return 0 if finished else EXIT_STOPPED


def _train(opt: dict, opt_path: str, processes: Processes, stop: StopRequest) -> bool:
    """Train as one of `processes`; tell whether the last iteration was reached."""
    join_run(opt, processes)
    set_backends(opt)
    if opt['num_gpu'] == 0:
        keep_freed_memory()
    resume_state = open_run(opt, opt_path)
    opt['notices'] += unused(opt)
    options = note(opt)
    logger = open_log(opt, 'train')
    tb_logger = init_tb_loggers(opt)
    train_set = build_checked_dataset(opt, 'train')
    validation = build_validation_loaders(opt, ('val',)) if opt.get('val') else {}
    seed_all(opt['manual_seed'])  # the same initial weights on every process
    with changes_named(resume_state, options):
        model = build_model(opt)
    save_whole_files(model)
    schedule_start = go_on(model, resume_state, opt, options, logger) if resume_state else 0
    look_ahead(opt, model, validation, logger)
    run = Training(opt, model, train_set, validation, tb_logger, logger, resume_state,
                   {'options': options, 'schedule_start': schedule_start})
    try:
        with dead_workers_named():
            finished = run.loop(stop)
    finally:
        run.loader.close()
    if tb_logger:
        tb_logger.close()
    return finished


def open_run(opt: dict, opt_path: str) -> dict | None:
    """Make the run's folders (a finished run of the same name is moved aside) or find the state to resume from."""
    resume_state = find_resume_state(opt, opt.setdefault('notices', []))
    if resume_state and opt['rank'] == 0:
        remove_unfinished_files(opt)
    if resume_state is None:
        make_exp_dirs(opt)
        if opt['logger'].get('use_tb_logger') and 'debug' not in opt['name'] and opt['rank'] == 0:
            mkdir_and_rename(osp.join(opt['root_path'], 'tb_logger', opt['name']))
    copy_opt_file(opt_path, opt['path']['experiments_root'])
    if opt['dist']:
        import torch.distributed as dist
        dist.barrier()  # the folders stand before anyone logs into them
    return resume_state


def remove_unfinished_files(opt: dict) -> None:
    """What a run that was killed while saving has left of it."""
    for folder in (opt['path']['models'], opt['path']['training_states']):
        for path in Path(folder).glob(f'.*{UNFINISHED}'):
            path.unlink(missing_ok=True)


def delete_old_checkpoints(opt: dict, keep: int) -> None:
    """Leave the newest `keep` pairs of training state and networks; `latest`, `best` and what the options name stay."""
    named = {osp.realpath(value) for value in opt['path'].values() if isinstance(value, str)}
    for state in saved_states(opt)[:-keep]:
        networks = list(Path(opt['path']['models']).glob(f'net_*_{state.stem}.pth'))
        if named.isdisjoint(map(osp.realpath, (state, *networks))):
            # The state goes first, so that none is left without its networks.
            for path in (state, *state.parent.glob(f'{state.stem}.rank*.state'), *networks):
                path.unlink(missing_ok=True)


class Training:
    """The loop over iterations, and what happens around one: logging, saving, validation."""

    def __init__(self, opt, model, train_set, validation, tb_logger, logger, resume_state, kept):
        self.opt, self.model, self.validation = opt, model, validation
        self.tb_logger, self.logger = tb_logger, logger
        self.kept = {**kept, 'images': len(train_set)}  # in every training state
        self.iteration = resume_state['iter'] if resume_state else 0
        self.total = int(opt['train']['total_iter'])
        self.data_opt = opt['datasets']['train']
        self.batch_size = self.data_opt['batch_size_per_gpu']
        self.step_size = self.batch_size * opt['world_size']
        self.samples = resume_state.get('samples', self.iteration * self.step_size) if resume_state else 0
        self.validation_due = bool(resume_state and resume_state.get('validation_due') and validation)
        self.epoch_size = len(train_set) * self.data_opt.get('dataset_enlarge_ratio', 1)
        self.pin_memory = bool(self.data_opt.get('pin_memory')) and model.device.type == 'cuda'
        self.loader = self._build_loader(train_set)
        self.messages = MessageLogger(opt, self.iteration + 1, tb_logger)
        self.messages.max_iters = self.total + 1  # upstream's ETA is one iteration short, "-1 day" at the last
        images = (resume_state or {}).get('images', len(train_set))
        if images != len(train_set):
            logger.info(f'The training set held {images} images so far and holds {len(train_set)}: it goes on in '
                        'another stream of samples')
        before = (resume_state or {}).get('step_size', self.step_size)
        if before != self.step_size:
            logger.info(f'The run took {before} samples an iteration so far and takes {self.step_size} from here on: '
                        'it goes on in the same stream of samples, with other iterations than it would have had')
        steps = math.ceil(self.epoch_size / self.step_size)
        logger.info(f'{len(train_set)} training images, {self.step_size} patches an iteration, {steps} iterations an '
                    f'epoch, {self.total} iterations in all')

    def _build_loader(self, train_set) -> PatchLoader:
        opt = self.opt
        sampler = StreamSampler(len(train_set), self.batch_size, opt['manual_seed'], opt['rank'], opt['world_size'],
                                start=self.samples)
        return PatchLoader(train_set, sampler, self.data_opt.get('num_worker_per_gpu', 0), self.pin_memory)

    def _batches(self) -> Iterator[dict]:
        device = self.model.device
        if self.data_opt.get('prefetch_mode') == 'cuda' and device.type == 'cuda':
            return prefetched(self.loader, device, self.pin_memory)
        return (to_float(batch, device, self.pin_memory) for batch in self.loader)

    @property
    def epoch(self) -> int:
        return self.samples // self.epoch_size

    def loop(self, stop: StopRequest) -> bool:
        """Train to the last iteration, or until `stop`; tell whether the last one was reached."""
        self.logger.info(f'Start training from epoch: {self.epoch}, iter: {self.iteration}')
        begin = time.time()
        saved = None
        self.model.interrupted = lambda: stop.cause is not None
        # A signal came before or during the last one.
        if self.validation_due and not self.validate():
            return self._stopped(stop, validation_due=True)
        show = on_terminal() and self.opt['rank'] == 0
        with logging_redirect_tqdm([self.logger]), tqdm(total=self.total, initial=self.iteration, unit='it',
                                                        dynamic_ncols=True, disable=not show) as bar:
            for _ in self._iterations():
                bar.update()
                bar.set_postfix_str(self._live_figures(), refresh=False)
                due = bool(self.validation) and self.iteration % self.opt['val']['val_freq'] == 0
                # Validation comes before saving, so that the state holds the best values so far.
                if stop.requested() or due and not self.validate():
                    return self._stopped(stop, validation_due=due)
                if self.iteration % self.opt['logger']['save_checkpoint_freq'] == 0:
                    self.save()
                    saved = self.iteration
        self.logger.info(f'End of training. Time consumed: {datetime.timedelta(seconds=int(time.time() - begin))}')
        if self.validation and self.iteration % self.opt['val']['val_freq'] != 0 and not self.validate():
            return self._stopped(stop, validation_due=True)
        if saved != self.iteration:
            self.save()
        self.model.save(epoch=-1, current_iter=-1)  # -1 stands for the latest
        return True

    def _stopped(self, stop: StopRequest, validation_due: bool) -> bool:
        """Save, at the request of a signal; False, for a run that has not reached its end."""
        stop.requested()  # tells every process the cause
        self.save(validation_due)
        self.logger.info(f'{stop.cause}: stopped and saved at iteration {self.iteration}; go on with --auto_resume')
        return False

    def _iterations(self) -> Iterator[None]:
        """Carry out one iteration after the other."""
        data_timer, iter_timer = AvgTimer(), AvgTimer()
        batches = self._batches()
        while self.iteration < self.total:
            data_timer.start()
            data = next(batches)
            data_timer.record()
            iter_timer.start()
            self.iteration += 1
            # What the model itself draws (degradations on the device, dropout) also depends on the iteration alone.
            seed_all(mix_seed(self.opt['manual_seed'], -1, self.iteration, self.opt['rank']))
            self.model.update_learning_rate(self.iteration - self.kept['schedule_start'],
                                            warmup_iter=self.opt['train'].get('warmup_iter', -1))
            self.model.feed_data(data)
            with one_size(self.opt):
                self.model.optimize_parameters(self.iteration)
            self.samples += self.step_size
            iter_timer.record()
            self.times = {'time': iter_timer.get_avg_time(), 'data_time': data_timer.get_avg_time()}
            if self.iteration % self.opt['logger']['print_freq'] == 0:
                self.messages({'epoch': self.epoch, 'iter': self.iteration, **self.times,
                               'lrs': self.model.get_current_learning_rate(), **self.model.get_current_log()})
            yield

    def _live_figures(self) -> str:
        losses = ', '.join(f'{name} {value:.4f}' for name, value in list(self.model.get_current_log().items())[:2])
        return f'{losses}, lr {self.model.get_current_learning_rate()[0]:.1e}, data {self.times["data_time"]:.3f}s'

    def save(self, validation_due: bool = False) -> None:
        self.logger.info('Saving models and training states.')
        self.model.progress = {'samples': self.samples, 'step_size': self.step_size, 'validation_due': validation_due,
                               'imports': plugins.imported(), **self.kept}
        self.model.save(self.epoch, self.iteration)
        if self.opt['logger'].get('keep_last') and self.opt['rank'] == 0:
            delete_old_checkpoints(self.opt, keep=self.opt['logger']['keep_last'])

    def validate(self) -> bool:
        """Measure on every validation set; tell whether no signal came in between.

        Raises:
            UserError: It failed on some process; the training is saved up to here.
        """
        failure = None
        try:
            for loader in self.validation.values():
                self.model.validation(loader, self.iteration, self.tb_logger, self.opt['val'].get('save_img', False))
        except Interrupted:
            return False
        except Exception as error:
            if isinstance(error, RunLost) or is_loss(error):
                raise
            failure = error
        # The models of the toolbox's own validate on the first process alone.
        told = gather(failure and (str(failure) if isinstance(failure, UserError) else repr(failure)))
        if wrong := next(filter(None, told), None):
            self.save(validation_due=True)
            raise UserError(f'the validation at iteration {self.iteration} failed: {wrong}; the training is saved up '
                            'to here: mend it and go on with --auto_resume') from failure
        return True
