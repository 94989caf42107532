"""Networks in ONNX files, run by ONNX Runtime as a module."""
from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from elan_basicsr.errors import UserError
from elan_basicsr.inference import too_large
from elan_basicsr.interop.padding import extend


class OnnxNetwork(nn.Module):
    """A session of ONNX Runtime as a module without parameters. (B, C, h, w) in 0..1 -> (B, C', h*scale, w*scale).

    A file whose height and width are fixed takes images up to that size, which are extended to it and cropped. Results
    come back on the device of the input.

    Attributes:
        scale: Enlargement, from the file's metadata or by trying.
        channels: Of input and output.
        window, name: As in `Network`, from the metadata that `basicsr export` writes; else 1 and 'ONNX'.

    Raises:
        UserError: ONNX Runtime is not installed, or the file is missing, damaged, or no network of images.
        torch.OutOfMemoryError: From `forward`, where an input is too large for the device.
    """

    def __init__(self, path: str | os.PathLike, device: str | torch.device = 'cpu'):
        super().__init__()
        path = Path(path)
        runtime = _runtime(path)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        providers = [name for name in ('CUDAExecutionProvider', 'CPUExecutionProvider')
                     if name in runtime.get_available_providers()
                     and (name == 'CPUExecutionProvider' or torch.device(device).type == 'cuda')]
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # its exceptions share no class of their own
            raise UserError(f'{path}: ONNX Runtime {runtime.__version__} cannot load it '
                            f'({" ".join(str(error).split())[:200]}); it may be damaged, or newer than that: export it '
                            'again, or pip install -U onnxruntime') from None
        self.path = path
        [self.input], [self.output] = self._images(self.session.get_inputs()), self._images(self.session.get_outputs())
        self.dtype = torch.float16 if self.input.type == 'tensor(float16)' else torch.float32
        self.fixed = tuple(size if isinstance(size, int) else None for size in self.input.shape[2:])
        self.metadata = dict(self.session.get_modelmeta().custom_metadata_map)
        self.channels = _channels(self.input), _channels(self.output)
        self.window = self._number('window') or 1
        self.name = self.metadata.get('architecture', 'ONNX')
        self.scale = self._number('scale') or self._measured_scale()

    def _images(self, tensors: list) -> list:
        if len(tensors) != 1 or len(tensors[0].shape) != 4:
            raise UserError(f'{self.path}: has {len(tensors)} inputs or outputs, or none of (batch, channels, height, '
                            'width); expected one image in and one image out')
        return tensors

    def _number(self, key: str) -> int | None:
        value = self.metadata.get(key, '')
        return int(value) if value.isdecimal() else None

    def _measured_scale(self) -> int:
        h, w = (size or 64 for size in self.fixed)
        return self._run(torch.zeros(1, self.channels[0], h, w)).shape[2] // h

    def _run(self, x: Tensor) -> Tensor:
        image = np.ascontiguousarray(x.detach().to('cpu', self.dtype).numpy())
        try:
            [result] = self.session.run(None, {self.input.name: image})
        except Exception as error:
            if too_large(error):
                raise torch.OutOfMemoryError(str(error)) from None
            raise UserError(f'{self.path}: ONNX Runtime cannot run it on {tuple(x.shape)} '
                            f'({" ".join(str(error).split())[:200]})') from None
        return torch.from_numpy(result).to(x.device, x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        height, width = (fixed or size for fixed, size in zip(self.fixed, (h, w), strict=True))
        if h > height or w > width:
            raise UserError(f'{self.path}: is made for images of {width}x{height}, not {w}x{h}; use tiles of that '
                            'size, or export with --dynamic')
        return self._run(extend(x, height, width))[..., :h * self.scale, :w * self.scale]


def _channels(side) -> int:
    return side.shape[1] if isinstance(side.shape[1], int) else 3


def _runtime(path: Path):
    if not path.is_file():
        raise UserError(f'{path}: no such file; expected an ONNX file')
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f'{path}: is run by ONNX Runtime, which is not installed: pip install onnxruntime') from None
    return onnxruntime
