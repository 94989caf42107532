"""PairedRawLmdbDataset gives what PairedImageDataset gives, from any process, or says what is wrong."""
import itertools
import multiprocessing
import pickle
import random
import shutil
import signal
import time

import cv2
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, _utils

from elan_basicsr.data.images import read_bgr
from elan_basicsr.data.loader import PatchLoader, to_float
from elan_basicsr.data.prepare import build
from elan_basicsr.data.raw_lmdb_dataset import PairedRawLmdbDataset
from elan_basicsr.data.sampling import SeededDataset, StreamSampler
from elan_basicsr.errors import UserError

from basicsr.data.paired_image_dataset import PairedImageDataset


@pytest.fixture
def opt(data):
    return {'dataroot_gt': str(data / 'train' / 'HR_raw.lmdb'), 'scale': 2, 'phase': 'train', 'gt_size': 32,
            'dataroot_lq': str(data / 'train' / 'LR_bicubic_X2_raw.lmdb'), 'use_hflip': True, 'use_rot': True}


@pytest.mark.parametrize('changes', [{}, {'use_rot': False}, {'color': 'y'}, {'phase': 'val'},
                                     {'mean': [.5] * 3, 'std': [.2] * 3}])
def test_samples_are_those_of_paired_image_dataset(data, opt, changes, tmp_path):
    opt.update(changes)
    folders = {f'dataroot_{kind}': str(tmp_path / kind) for kind in ('gt', 'lq')}
    (tmp_path / 'gt').mkdir()
    (tmp_path / 'lq').mkdir()
    raw_val = PairedRawLmdbDataset({**opt, 'phase': 'val', 'color': None, 'mean': None, 'std': None})
    for i, key in enumerate(raw_val.keys):
        for kind in ('gt', 'lq'):
            img = (raw_val[i][kind] * 255).round().byte().permute(1, 2, 0).numpy()[..., ::-1]
            cv2.imwrite(str(tmp_path / kind / f'{key}.png'), img)
    ours = PairedRawLmdbDataset(opt)
    theirs = PairedImageDataset({**opt, **folders, 'io_backend': {'type': 'disk'}})
    theirs.paths.sort(key=lambda row: row['gt_path'])  # the toolbox lists a folder in any order
    for index in list(range(len(ours))) * 4:
        samples = []
        for dataset in (ours, theirs):
            random.seed(index)
            samples.append(dataset[index])
        for kind in ('lq', 'gt'):
            assert torch.allclose(samples[0][kind], samples[1][kind], atol=1e-7, rtol=0), changes
            assert samples[0][kind].dtype == torch.float32


@pytest.mark.parametrize('context', ['fork', 'spawn'])
def test_workers_forked_or_spawned_read_the_same(opt, context):
    dataset = PairedRawLmdbDataset({**opt, 'phase': 'val', 'gt_size': None})
    expected = [dataset[i]['gt'] for i in range(2)]  # opened here before the workers start
    loader = DataLoader(dataset, num_workers=2, multiprocessing_context=context, sampler=[0, 1])
    assert all(torch.equal(batch['gt'][0], gt) for batch, gt in zip(loader, expected, strict=True))
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[1]['gt'], expected[1])


@pytest.mark.parametrize('workers, context', [(0, None), (2, 'fork'), (3, 'fork'), (2, 'spawn')])
@pytest.mark.parametrize('color', [None, 'y'])  # as bytes through shared memory, and as tensors
def test_batches_are_their_samples_with_any_number_of_workers(opt, workers, context, color):
    dataset = PairedRawLmdbDataset({**opt, 'color': color})
    sampler = StreamSampler(len(dataset), batch_size=3, seed=1)
    keys = itertools.islice(sampler, 3 * 14)  # more than the slots of the workers
    expected = [SeededDataset(dataset)[key] for key in keys]
    random.seed(5)
    drawn = random.random()
    random.seed(5)
    batches = iter(PatchLoader(dataset, sampler, workers, context=context))
    for step, batch in enumerate(map(to_float, itertools.islice(batches, 14))):
        samples = expected[3 * step:3 * step + 3]
        for name in ('lq', 'gt'):
            assert torch.equal(batch[name], torch.stack([sample[name] for sample in samples])), (step, name)
        assert batch['lq_path'] == [sample['lq_path'] for sample in samples]
    assert random.random() == drawn  # loading draws nothing from the run's generator


class Stuck(Dataset):
    opt = {'name': 'stuck'}

    def __init__(self):
        self.reached = multiprocessing.get_context('fork').Semaphore(0)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        self.reached.release()
        time.sleep(600)


def test_a_worker_that_hangs_ends_with_the_others(monkeypatch):
    """On SIGTERM alone it would go on for minutes, and the run that has ended would wait for it."""
    monkeypatch.setattr(_utils, 'MP_STATUS_CHECK_INTERVAL', 0.2)
    dataset = Stuck()
    loader = PatchLoader(dataset, StreamSampler(4, batch_size=2, seed=1), workers=2)
    workers = iter(loader)._workers
    assert all(dataset.reached.acquire(timeout=60) for _ in workers)
    loader.close()
    for worker in workers:
        worker.join(10)
        assert worker.exitcode == -signal.SIGKILL


def test_key_lists_that_differ_are_named(data, opt, tmp_path):
    shutil.copytree(data / 'photographs', tmp_path / 'few')
    (tmp_path / 'few' / 'rocket.png').unlink()
    build(hr=tmp_path / 'few', out=tmp_path / 'lmdb', scales=[2])
    with pytest.raises(UserError, match=r'LR_bicubic_X2_raw\.lmdb: rocket: is missing, the GT image is there'):
        PairedRawLmdbDataset({**opt, 'dataroot_lq': str(tmp_path / 'lmdb' / 'LR_bicubic_X2_raw.lmdb')})


def test_images_smaller_than_a_patch_are_named(opt):
    opt['gt_size'] = 400
    with pytest.raises(UserError, match='smaller than gt_size 400'):
        PairedRawLmdbDataset(opt)[0]


def test_a_scale_that_does_not_fit_is_named(opt):
    with pytest.raises(UserError, match='4 times its LQ image'):
        PairedRawLmdbDataset({**opt, 'scale': 4})[0]


def test_an_lmdb_that_is_none_is_named(opt, tmp_path):
    with pytest.raises(UserError, match='no LMDB there'):
        PairedRawLmdbDataset({**opt, 'dataroot_gt': str(tmp_path)})


def test_what_went_in_comes_out(data, opt):
    dataset = PairedRawLmdbDataset({**opt, 'phase': 'val'})
    hr = read_bgr(data / 'photographs' / f'{dataset.keys[1]}.png')
    expected = torch.from_numpy(hr[..., ::-1].copy()).permute(2, 0, 1) / 255
    assert torch.equal(dataset[1]['gt'], expected)
