"""`basicsr upscale`: equal pictures give equal files, a clip too, and what does not fit goes in smaller tiles."""
from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import cv2
import numpy as np
import torch

from elan_basicsr.errors import UserError
from elan_basicsr.interop.networks import load_network
from elan_basicsr.selfcheck.checks import Check, Machine, Outcome
from elan_basicsr.selfcheck.network import SIZES, Case, shallow
from elan_basicsr.selfcheck.training import quiet
from elan_basicsr.upscale.enlarge import Enlarger
from elan_basicsr.upscale.run import upscale

CLIP_FRAMES = 5


def checks(machine: Machine) -> Iterator[Check]:
    """Images, a clip, memory that does not suffice."""
    case = Upscaling(machine)
    yield Check('upscale', 'three equal images', case.images)
    yield Check('upscale', 'a clip, twice', case.clip)
    yield Check('upscale', 'an allocation that fails', case.failing_allocation)


class Upscaling:
    """ELAN-light with random weights, in a file, and a picture of noise."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.folder = machine.folder / 'upscale'
        edge = 96 if machine.quick else 320
        self.pixels = np.random.default_rng(0).integers(0, 256, (edge, edge, 3), np.uint8)

    def weights(self) -> str:
        """The file of the network."""
        file = self.folder / 'net.pth'
        if not file.exists():
            self.folder.mkdir(exist_ok=True)
            arguments = SIZES['ELAN-light']
            net = Case(self.machine, shallow(arguments) if self.machine.quick else arguments, edge=32).network
            torch.save({'params': net.float().state_dict()}, file)
        return str(file)

    def enlarge(self, names: list[str], out: str) -> list[bytes]:
        """What the command makes of files; peak memory is counted anew."""
        if self.machine.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.machine.device)
        with quiet():
            code = upscale([str(self.folder / name) for name in names], out=str(self.folder / out),
                           weights=self.weights(), device=str(self.machine.device))
        if code:
            raise UserError(f'basicsr upscale ended with exit code {code}')
        return [file.read_bytes() for file in sorted((self.folder / out).iterdir())]

    def images(self) -> Outcome:
        """The files of three equal images are equal."""
        names = [f'{number}.png' for number in range(3)]
        self.weights()
        for name in names:
            cv2.imwrite(str(self.folder / name), self.pixels)
        return self.all_equal(self.enlarge(names, 'images'))

    def clip(self) -> Outcome:
        """The file of a clip is the same when it is made again."""
        if not shutil.which('ffmpeg'):
            return Outcome(None, note='ffmpeg is not installed')
        self.weights()
        clip = self.folder / 'clip.mp4'  # Matroska files hold a number that is another each time
        subprocess.run(['ffmpeg', '-v', 'error', '-f', 'lavfi', '-i', 'testsrc=size=96x64:rate=25', '-frames:v',
                        str(CLIP_FRAMES), str(clip)], check=True, stdin=subprocess.DEVNULL)
        return self.all_equal([self.enlarge([clip.name], out)[0] for out in ('once', 'again')])

    def all_equal(self, files: list[bytes]) -> Outcome:
        """The verdict on files, with the peak memory of a GPU."""
        found = 'identical'
        if self.machine.on_gpu:
            found += f', {torch.cuda.max_memory_allocated(self.machine.device) / 2**20:,.0f} MiB'
        return Outcome(len(set(files)) == 1, found, note=f'{len(set(files))} of {len(files)} differ')

    def failing_allocation(self) -> Outcome:
        """A network that asks for more memory than there is, unless its input is small, is given smaller ones."""
        network = load_network(self.weights(), self.machine.device)
        most = self.pixels.size // 6  # half of the picture
        seen: list[int] = []

        def take_memory(net, inputs) -> None:
            seen.append(inputs[0].shape[2] * inputs[0].shape[3])
            if seen[-1] > most:
                torch.empty(2**50, device=self.machine.device)

        network.net.register_forward_pre_hook(take_memory)
        result = Enlarger(network, device=self.machine.device).pixels(self.pixels, np.uint8)
        height, width = (edge * network.scale for edge in self.pixels.shape[:2])
        return Outcome(result.shape == (height, width, 3) and max(seen) > most >= seen[-1],
                       f'{seen[0]:,} → {seen[-1]:,} px', note='the image did not go through in smaller tiles')
