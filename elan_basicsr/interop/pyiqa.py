"""pyiqa's metrics in `val.metrics`: those that are reported for photographs without a clean original, and LPIPS."""
from __future__ import annotations

import functools
import logging

import numpy as np
import torch

from elan_basicsr.errors import UserError, nearest

from basicsr.utils.registry import METRIC_REGISTRY


@METRIC_REGISTRY.register()
def calculate_pyiqa(img: np.ndarray, img2: np.ndarray | None = None, *, metric: str, crop_border: int = 0,
                    better: str | None = None) -> float:
    """A metric of pyiqa for a restored image; on the GPU where the training is on one.

    Args:
        img, img2: Restored image and ground truth, (h, w, 3) or (h, w, 1), BGR, uint8; a metric that compares with
            nothing passes the ground truth over.
        metric (str): Its name in pyiqa, such as lpips, dists or musiq.
        crop_border (int): Pixels that are cropped at each edge; by custom the scale.
        better (str): Filled in as pyiqa says; nothing else is taken.

    Raises:
        UserError: See `load`.
    """
    return score(metric, img, img2, 'cuda' if torch.cuda.is_initialized() else 'cpu', crop_border)


def score(metric: str, img: np.ndarray, img2: np.ndarray | None, device: str, border: int = 0) -> float:
    """As `calculate_pyiqa`, on a device."""
    model = load(metric).to(device)
    images = [img] if img2 is None or model.metric_mode == 'NR' else [img, img2]
    with torch.inference_mode():
        return float(model(*(_image(each, border) for each in images)))


def _image(image: np.ndarray, border: int) -> torch.Tensor:
    h, w = image.shape[:2]
    rgb = image[border:h - border, border:w - border, ::-1]
    return torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1)))[None].float().div(255)


@functools.cache
def load(name: str) -> torch.nn.Module:
    """The metric of that name with its weights, which pyiqa fetches once. `metric_mode` and `lower_better` tell of it.

    Raises:
        UserError: pyiqa is not installed or knows no metric of that name for single images, or its weights cannot be
            fetched.
    """
    try:
        import pyiqa
    except ImportError as error:
        raise UserError(f'needs pyiqa, which is not to be imported ({error}): pip install '
                        "'elan-basicsr[metrics]'") from None
    names = [each for each in pyiqa.list_models() if 'fid' not in each and each != 'inception_score']  # of whole sets
    if name not in names:
        near = nearest(str(name), names, count=3)
        raise UserError(f'pyiqa has no metric {str(name)[:60]!r} for an image; '
                        + (f'did you mean {near}?' if near else f'expected a name such as {", ".join(names[:12])}'))
    logging.getLogger('pyiqa').setLevel(logging.WARNING)
    try:
        return pyiqa.create_metric(name, device=torch.device('cpu'))
    except Exception as error:  # what each of a hundred networks and their downloads may raise
        raise UserError(f'pyiqa cannot make {name}: {" ".join(str(error).split())[:200] or type(error).__name__}; its '
                        f'weights are looked for in {torch.hub.get_dir()} and fetched where they are not there'
                        ) from None
