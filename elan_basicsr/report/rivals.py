"""Programs that run networks from ONNX files, beside which ours are timed: ONNX Runtime and OpenVINO."""
from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from elan_basicsr.errors import UserError
from elan_basicsr.interop.onnx import OnnxNetwork

PACKAGES = ('onnxruntime', 'openvino')
"""What stands before the colon of `openvino:FILE.onnx`."""


def rival(spec: str) -> tuple[str, str] | None:
    """Package and file of `openvino:FILE.onnx`; None for what is none of PACKAGES."""
    name, colon, file = spec.partition(':')
    return (name, file) if colon and name in PACKAGES else None


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def build_rival(name: str, file: str) -> nn.Module:
    """The network of an ONNX file in a program of PACKAGES.

    Raises:
        UserError: The file is missing, damaged, or no network of images.
    """
    return OnnxNetwork(file) if name == 'onnxruntime' else OpenVinoNetwork(file)


class OpenVinoNetwork(nn.Module):
    """An ONNX file in OpenVINO on the CPU, in bf16 under autocast: (B, C, h, w) in 0..1 -> (B, C, h*scale, w*scale)."""

    def __init__(self, file: str):
        super().__init__()
        import openvino
        if not Path(file).is_file():
            raise UserError(f'{file}: no such file; expected an ONNX file')
        self.core, self.file = openvino.Core(), file
        try:
            self.model = self.core.read_model(file)
        except RuntimeError as error:
            raise UserError(f'{file}: OpenVINO cannot read it ({" ".join(str(error).split())[-200:]})') from None
        self.compiled = cache(self._compile)

    def _compile(self, shape: tuple[int, ...], precision: str, threads: int) -> Callable[[np.ndarray], np.ndarray]:
        """For one shape, as OpenVINO is fastest with."""
        try:
            model = self.model.clone()
            model.reshape(list(shape))
            compiled = self.core.compile_model(model, 'CPU', {
                'INFERENCE_PRECISION_HINT': precision, 'INFERENCE_NUM_THREADS': threads, 'PERFORMANCE_HINT': 'LATENCY'})
        except RuntimeError as error:
            raise UserError(f'{self.file}: OpenVINO cannot run it on {shape} '
                            f'({" ".join(str(error).split())[-200:]})') from None
        return lambda image: compiled(image)[0]

    def forward(self, x: Tensor) -> Tensor:
        precision = 'bf16' if torch.is_autocast_enabled('cpu') else 'f32'
        return torch.from_numpy(self.compiled(tuple(x.shape), precision, torch.get_num_threads())(x.numpy()))
