"""The `basicsr` command: arguments in, one call out; what a command does lives in the module it calls.

Every command is one `_add_NAME` function that describes its arguments and names the function to call. Imports stand
inside the calls, so that `basicsr --help` answers without loading torch.
"""
from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence

from elan_basicsr.errors import RunLost, UserError, outside
from elan_basicsr.version import __version__

EXIT_RUN_LOST = EXIT_SOME_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_PIPE_CLOSED = 141  # 128 + SIGPIPE


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and name the nearest command or option."""

    def parse_args(self, args=None, namespace=None):
        """argparse blames the whole program for what one of its commands does not know; this the command."""
        words = sys.argv[1:] if args is None else list(args)
        found, unknown = self.parse_known_args(words, namespace)
        if unknown:
            _chosen(self, words).error(f'unrecognized arguments: {" ".join(unknown)}')
        return found

    def error(self, message: str):
        sys.stderr.write(f'basicsr: error: {message}{self._suggestion(message)}; see `{self.prog} --help`\n')
        sys.exit(EXIT_USER_ERROR)

    def _suggestion(self, message: str) -> str:
        known = list(_names(self))
        for word in re.findall(r'[\w-]{3,}', message):
            near = difflib.get_close_matches(word, known, n=1)
            if near and near[0] != word:
                return f'; did you mean {near[0]}?'
        return ''


def _chosen(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command that was typed."""
    for word in words:
        for action in parser._actions:
            if isinstance(action.choices, dict) and word in action.choices:
                parser = action.choices[word]
                break
    return parser


def _actions(parser: argparse.ArgumentParser):
    """Every argument of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action.choices, dict):
            for child in action.choices.values():
                yield from _actions(child)


def _names(parser: argparse.ArgumentParser):
    """Every option and choice of a parser and of its commands."""
    for action in _actions(parser):
        yield from action.option_strings
        yield from map(str, action.choices or ())


def _command(commands, name: str, help_: str, example: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=help_, description=help_, epilog=f'example:\n  {example}',
                               formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def _add_import(parser: argparse.ArgumentParser) -> None:
    """For a command to which what other packages register counts; carried out by `main`."""
    parser.add_argument('--import', dest='imports', action='append', default=[], metavar='PACKAGE[.MODULE]',
                        help='import your own or another package, whose networks, models, data sets, losses and '
                             'metrics count from then on; may be given several times')


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What `train` and `test` have in common, named as BasicSR names it."""
    parser.add_argument('-opt', required=True, metavar='FILE', help='the option file (YAML)')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'],
                        help='how the processes were started; read from the environment when not given')
    parser.add_argument('--set', dest='overrides', nargs='+', action='extend', default=[], metavar='KEY.SUB=VALUE',
                        help='override options, such as train.total_iter=1000; the value is read as YAML')
    parser.add_argument('--force_yml', nargs='+', action='extend', default=[], metavar='KEY:SUB=VALUE',
                        help="BasicSR's form of --set, for keys that exist")
    _add_import(parser)
    _add_local_rank(parser)


def _add_local_rank(parser: argparse.ArgumentParser) -> None:
    """What torch.distributed.launch passes, after a script's name or a module's; the environment says it as well."""
    parser.add_argument('--local_rank', '--local-rank', type=int, help=argparse.SUPPRESS)


def _add_train(commands) -> None:
    parser = _command(commands, 'train', 'train a network as an option file says',
                      'basicsr train -opt options/train_ELAN_light_x4.yml --auto_resume')
    _add_run_arguments(parser)
    parser.add_argument('--auto_resume', action='store_true', help='continue from the newest whole checkpoint')
    parser.add_argument('--debug', action='store_true', help="a short run: BasicSR's debug settings")

    def call(args: argparse.Namespace) -> int:
        from elan_basicsr.engine.train import train
        return train(args.opt, overrides=args.overrides, force_yml=args.force_yml, launcher=args.launcher,
                     auto_resume=args.auto_resume, debug=args.debug)

    parser.set_defaults(call=call)


def _add_test(commands) -> None:
    parser = _command(commands, 'test', 'test a network as an option file says',
                      'basicsr test -opt options/test_ELAN_light_x4.yml')
    _add_run_arguments(parser)

    def call(args: argparse.Namespace) -> int:
        from elan_basicsr.engine.test import test
        return test(args.opt, overrides=args.overrides, force_yml=args.force_yml, launcher=args.launcher)

    parser.set_defaults(call=call)


def _add_doctor(commands) -> None:
    parser = _command(commands, 'doctor', 'print versions, devices, repairs and what the registries hold; check it all',
                      'basicsr doctor\n  basicsr doctor --check --json check.json')
    parser.add_argument('--check', action='store_true',
                        help='try everything on the device: one verdict a row')
    parser.add_argument('--device', metavar='NAME', help='with --check: cpu, cuda or cuda:N (default: a GPU if any)')
    parser.add_argument('--quick', action='store_true', help='with --check: smaller networks, nothing compiled')
    parser.add_argument('--json', metavar='FILE', help='with --check: write all it found, to attach to a report')

    def call(args: argparse.Namespace) -> int:
        from elan_basicsr.engine.doctor import doctor
        code = doctor()
        if not args.check:
            return code
        from elan_basicsr.selfcheck.run import check
        return max(code, check(args.device, args.quick, args.json))

    parser.set_defaults(call=call)


def _add_setup(commands) -> None:
    parser = _command(commands, 'setup', 'install what pip cannot: BasicSR on Python 3.13, OpenCV without a desktop',
                      'basicsr setup')

    def call(args: argparse.Namespace) -> int:
        from elan_basicsr.bootstrap import setup
        return setup()

    parser.set_defaults(call=call, light=True)


def _add_convert(commands) -> None:
    parser = _command(commands, 'convert', "convert a checkpoint of ELAN: BasicSR's form, the authors', safetensors",
                      'basicsr convert model_x4_500.pt ELAN_light_x4.safetensors')
    parser.add_argument('source', metavar='IN', help='a checkpoint of any form')
    parser.add_argument('target', metavar='OUT', help='the new file: .pth, .pt or .safetensors')
    parser.add_argument('--to', choices=['basicsr', 'official', 'safetensors'],
                        help="BasicSR's params, or the authors' names for their code (default: by the name of OUT)")
    parser.add_argument('--ema', action='store_true', help='take the average of the weights, params_ema')

    def call(args: argparse.Namespace) -> int:
        from elan_basicsr.interop.convert import convert
        net = convert(args.source, args.target, form=args.to, ema=args.ema)
        print(f'{args.target}: ELAN x{net.upscale}, {sum(p.numel() for p in net.parameters()):,} parameters; '
              'read back, and its results are the same to the bit')
        return 0

    parser.set_defaults(call=call)


def _add_export(commands) -> None:
    parser = _command(commands, 'export', 'write an ELAN as an ONNX file',
                      'basicsr export ELAN_light_x4.pth ELAN_light_x4.onnx --dynamic --check')
    parser.add_argument('source', metavar='IN', help='a checkpoint of any form')
    parser.add_argument('target', metavar='OUT.onnx', help='the new file')
    parser.add_argument('--dynamic', action='store_true', help='for any batch, height and width')
    parser.add_argument('--size', nargs=2, type=int, default=[128, 128], metavar=('HEIGHT', 'WIDTH'),
                        help='of the images, if not dynamic (default: 128 128); smaller ones are padded to it')
    parser.add_argument('--opset', type=int, metavar='N', help="version of ONNX's operators (default: the exporter's)")
    parser.add_argument('--fp16', action='store_true', help='weights and computation in float16')
    parser.add_argument('--check', action='store_true', help='compare with PyTorch in ONNX Runtime')

    def call(args: argparse.Namespace) -> int:
        from elan_basicsr.interop.export import export
        for size, difference in export(args.source, args.target, opset=args.opset, dynamic=args.dynamic,
                                       size=tuple(args.size), fp16=args.fp16, check=args.check):
            print(f'{size}: largest difference to PyTorch {difference:.1e}')
        print(args.target)
        return 0

    parser.set_defaults(call=call)


def _add_options(commands) -> None:
    parser = _command(commands, 'options', 'the option files that come with this package',
                      "basicsr options copy 'train_ELAN_light_*'")
    actions = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)
    for add in (_add_options_list, _add_options_copy, _add_options_schema):
        add(actions)


def _add_options_list(commands) -> None:
    parser = _command(commands, 'list', 'name every option file and say what it is', 'basicsr options list')

    def call(args: argparse.Namespace) -> int:
        from elan_basicsr.config.files import list_options
        for name, title in list_options():
            print(f'{name:<36}{title}')
        return 0

    parser.set_defaults(call=call, light=True)


def _add_options_copy(commands) -> None:
    parser = _command(commands, 'copy', 'copy option files into a folder, to be used and changed',
                      'basicsr options copy train_ELAN_light_x4.yml')
    parser.add_argument('names', nargs='*', metavar='NAME', help='files or patterns (default: all)')
    parser.add_argument('--to', default='options', metavar='DIR', help='the folder (default: options)')

    def call(args: argparse.Namespace) -> int:
        from elan_basicsr.config.files import copy_options
        for path in copy_options(args.names, args.to):
            print(path)
        return 0

    parser.set_defaults(call=call, light=True)


def _add_options_schema(commands) -> None:
    parser = _command(commands, 'schema', 'write the JSON schema with which editors complete and check option files',
                      'basicsr options schema -o options/schema.json')
    parser.add_argument('-o', '--output', metavar='FILE', help='the file to write (default: standard output)')
    _add_import(parser)

    def call(args: argparse.Namespace) -> int:
        from elan_basicsr.config.parts import write_schema
        write_schema(args.output)
        return 0

    parser.set_defaults(call=call)


def _add_completion(commands) -> None:
    parser = _command(commands, 'completion', 'print the completion of this command for a shell',
                      'basicsr completion bash > ~/.local/share/bash-completion/completions/basicsr')
    parser.add_argument('shell', choices=['bash', 'zsh', 'tcsh'])

    def call(args: argparse.Namespace) -> int:
        try:
            import shtab
        except ImportError:
            raise UserError('completion is written by shtab, which is not installed: pip install shtab') from None
        whole = build_parser()
        for action in _actions(whole):
            if action.metavar in _PATHS:
                action.complete = shtab.FILE
        print(shtab.complete(whole, args.shell))
        return 0

    parser.set_defaults(call=call, light=True)


# What stands for a path in the help, and is completed with the names of files and folders.
_PATHS = ('FILE', 'DIR', 'PATH', 'SOURCE', 'IN', 'OUT', 'OUT.onnx', 'INPUT', 'IMAGE')


def _add_data(commands) -> None:
    parser = _command(commands, 'data', 'prepare and check training and test data',
                      'basicsr data build --hr photos --out datasets/photos --scales 4')
    actions = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)
    for add in (_add_data_div2k, _add_data_build, _add_data_benchmark, _add_data_verify):
        add(actions)


def _add_data_build(commands) -> None:
    parser = _command(commands, 'build', 'make LMDBs of HR and LR images from a folder of photographs',
                      'basicsr data build --hr photos --out datasets/photos --scales 2 4')
    parser.add_argument('--hr', required=True, metavar='DIR', help='folder of HR images, searched recursively')
    parser.add_argument('--lr', metavar='DIR', help='folder of LR images (X2, X4, …); made by the bicubic if not given')
    parser.add_argument('--out', required=True, metavar='DIR', help='folder of the LMDBs')
    parser.add_argument('--scales', required=True, nargs='+', type=int, metavar='N', help='scales of the LR images')
    _add_layout(parser)
    _add_blur(parser)

    def call(args: argparse.Namespace) -> int:
        from elan_basicsr.data.prepare import build
        failed: list[str] = []
        for path in build(hr=args.hr, lr=args.lr, out=args.out, scales=args.scales, layout=args.layout,
                          blur=args.blur, failed=failed):
            print(path)
        for line in failed:
            sys.stderr.write(f'basicsr: {line}\n')
        if failed:
            sys.stderr.write(f'basicsr: {len(failed)} images cannot be used and were left out\n')
        return EXIT_SOME_FAILED if failed else 0

    parser.set_defaults(call=call)


def _add_blur(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--blur', type=float, metavar='SIGMA',
                        help='a Gaussian before the bicubic; 1.6 makes the degradation BD')


def _add_layout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--layout', choices=['raw', 'subimages'], default='raw',
                        help="whole undecoded images, or the toolbox's PNG sub-images (default: raw)")


def _add_data_div2k(commands) -> None:
    parser = _command(commands, 'div2k', 'download, check and build DIV2K for the train option files',
                      'basicsr data div2k --download')
    parser.add_argument('--root', default='datasets/DIV2K', metavar='DIR', help='its folder (default: datasets/DIV2K)')
    parser.add_argument('--download', action='store_true', help='fetch the official archives that are not there')
    parser.add_argument('--url', metavar='URL', help='where the archives are, if not at the official host')
    parser.add_argument('--scales', nargs='+', type=int, default=[2, 3, 4], metavar='N', help='default: 2 3 4')
    _add_layout(parser)

    def call(args: argparse.Namespace) -> int:
        from elan_basicsr.data.div2k import URL, prepare_div2k
        url = args.url.rstrip('/') + '/' if args.url else URL
        for path in prepare_div2k(root=args.root, scales=args.scales, layout=args.layout, fetch=args.download, url=url):
            print(path)
        return 0

    parser.set_defaults(call=call)


def _add_data_benchmark(commands) -> None:
    parser = _command(commands, 'benchmark', 'lay out the benchmark sets for the test option files',
                      'basicsr data benchmark benchmark.tar')
    parser.add_argument('sources', nargs='+', metavar='SOURCE', help='folders or archives with Set5/HR, Set14/HR, …')
    parser.add_argument('--root', default='datasets', metavar='DIR', help='folder of the sets (default: datasets)')
    parser.add_argument('--scales', nargs='+', type=int, default=[2, 3, 4], metavar='N', help='default: 2 3 4')
    _add_blur(parser)

    def call(args: argparse.Namespace) -> int:
        from elan_basicsr.data.benchmarks import lay_out_benchmarks
        for name, number in lay_out_benchmarks(args.sources, root=args.root, scales=args.scales,
                                               blur=args.blur).items():
            print(f'{args.root}/{name}: {number} images')
        return 0

    parser.set_defaults(call=call)


def _add_data_verify(commands) -> None:
    parser = _command(commands, 'verify', 'read every image of LMDBs, folders or an option file',
                      'basicsr data verify -opt options/train_ELAN_light_x4.yml\n'
                      '  basicsr data verify photos/HR photos/LR --scale 4')
    parser.add_argument('paths', nargs='*', metavar='PATH', help='LMDBs or folders of images')
    parser.add_argument('--scale', type=_positive, metavar='N',
                        help='the two paths are the HR and the LR images of pairs of this scale')
    parser.add_argument('-opt', metavar='FILE', help='an option file, whose data sets are opened as a training does')
    parser.add_argument('--set', dest='overrides', nargs='+', action='extend', default=[], metavar='KEY.SUB=VALUE',
                        help='override options of the file')
    _add_import(parser)

    def call(args: argparse.Namespace) -> int:
        from elan_basicsr.config.reader import apply_overrides, read_yaml
        from elan_basicsr.config.schema import expand_paths
        from elan_basicsr.data.verify import verify
        if not args.paths and not args.opt:
            raise UserError('data verify: nothing to verify; expected paths, or -opt FILE')
        if not args.opt:
            return verify(args.paths, scale=args.scale)
        opt, source = read_yaml(args.opt)
        apply_overrides(opt, source, args.overrides)
        return verify(args.paths, expand_paths(opt), args.scale)

    parser.set_defaults(call=call)


def _add_compare(commands) -> None:
    parser = _command(commands, 'compare', 'compare networks on the same images: tables, figures, one HTML report',
                      'basicsr compare ELAN=elan.pth EDSR=edsr.yml bicubic --data datasets/Set5 -o results/compare')
    parser.add_argument('files', nargs='+', metavar='FILE',
                        help='checkpoints, option files with their weights, or bicubic; NAME=FILE gives a name')
    parser.add_argument('--data', nargs='+', default=[], metavar='DIR',
                        help='folders as `basicsr data benchmark` makes them, or of HR images alone')
    parser.add_argument('-opt', metavar='FILE', help='an option file, whose test sets are used')
    parser.add_argument('-o', '--out', default='results/compare', metavar='DIR',
                        help='folder of the report (default: results/compare)')
    parser.add_argument('--logs', nargs='+', default=[], metavar='PATH',
                        help='logs or folders of trainings, whose curves are drawn')
    parser.add_argument('--images', nargs='+', default=[], metavar='NAME',
                        help='the images shown (default: the five on which the networks differ most)')
    parser.add_argument('--crop', nargs=3, type=int, metavar=('LEFT', 'TOP', 'EDGE'),
                        help='the square shown, in HR pixels (default: where the networks differ most)')
    parser.add_argument('--tile', type=int, default=0, metavar='N', help='restore in tiles of N LR pixels')
    parser.add_argument('--device', choices=['cpu', 'cuda'], help='default: the GPU if there is one')
    parser.add_argument('--overwrite', action='store_true', help='replace the files of an earlier report')
    _add_import(parser)

    def call(args: argparse.Namespace) -> int:
        from elan_basicsr.report.compare import compare
        return compare(args.files, out=args.out, data=args.data, opt=args.opt, logs=args.logs, images=args.images,
                       crop=args.crop, device=args.device, tile=args.tile, overwrite=args.overwrite)

    parser.set_defaults(call=call)


def _add_upscale(commands) -> None:
    parser = _command(commands, 'upscale', 'enlarge images and videos with a trained network',
                      'basicsr upscale photos -o enlarged')
    parser.add_argument('inputs', nargs='+', metavar='INPUT',
                        help='files, folders (searched for images, recursively) and patterns such as "photos/**/*.png"')
    parser.add_argument('-o', '--out', required=True, metavar='OUT',
                        help='a folder, or a file for a single input; what is there already is left alone')
    parser.add_argument('--weights', metavar='FILE',
                        help='the network: a checkpoint of ELAN, a network that spandrel knows, .onnx, or a name of '
                             '`basicsr weights` (default: of those what fits --scale, fetched on first use)')
    parser.add_argument('--scale', type=float, metavar='N',
                        help="enlargement, at most the network's (the default; 4 without --weights); the rest is taken "
                             'back by the bicubic')
    parser.add_argument('--format', dest='format_', metavar='NAME',
                        help='png, jpg, webp, avif, tif or bmp for all images (default: as the input)')
    parser.add_argument('--quality', metavar='N',
                        help='of JPEG, WebP and AVIF: 1 to 100, or lossless for WebP (default: 95)')
    parser.add_argument('--tile', type=int, metavar='PIXELS',
                        help='edge of tiles in input pixels, 0 for the whole image (default: what the memory allows)')
    parser.add_argument('--tile-overlap', type=int, metavar='PIXELS',
                        help='what a tile sees beyond its edges (default: 16)')
    parser.add_argument('--self-ensemble', action='store_true',
                        help='average over eight flips and rotations: a little better, eight times the time')
    parser.add_argument('--dtype', default='float32', metavar='NAME',
                        help='float32, bfloat16 or float16 (default: float32)')
    parser.add_argument('--device', metavar='NAME', help='cpu, cuda or cuda:N (default: a GPU if there is one)')
    parser.add_argument('--max-pixels', type=int, default=64_000_000, metavar='N',
                        help='refuse larger inputs before memory is taken (default: 64000000)')
    parser.add_argument('--overwrite', action='store_true', help='make outputs anew that are there already')

    def call(args: argparse.Namespace) -> int:
        from elan_basicsr.upscale.run import upscale
        given = {name: value for name, value in vars(args).items() if name != 'call'}
        return upscale(given.pop('inputs'), **given)

    parser.set_defaults(call=call)


def _add_explain(commands) -> None:
    parser = _command(commands, 'explain', 'draw which pixels networks use: attribution maps and receptive fields',
                      'basicsr explain photo.png --weights ELAN=elan.pth EDSR=edsr.yml -o explained.png')
    parser.add_argument('image', metavar='IMAGE', help="the networks' input; of a large one a part is looked at")
    parser.add_argument('--weights', nargs='+', required=True, metavar='FILE',
                        help='checkpoints, or option files with their weights; NAME=FILE gives a name')
    parser.add_argument('--patch', nargs=3, type=int, metavar=('LEFT', 'TOP', 'EDGE'),
                        help='the patch explained, in pixels of IMAGE (default: the most detailed place)')
    parser.add_argument('-o', '--out', default='explained.png', metavar='FILE',
                        help='the figure (default: explained.png)')
    parser.add_argument('--device', choices=['cpu', 'cuda'], help='default: the GPU if there is one')
    parser.add_argument('--overwrite', action='store_true', help='replace the figure if it is there')
    _add_import(parser)

    def call(args: argparse.Namespace) -> int:
        from elan_basicsr.report.attribution import explain
        return explain(args.image, args.weights, out=args.out, patch=args.patch, device=args.device,
                       overwrite=args.overwrite)

    parser.set_defaults(call=call)


def _add_benchmark(commands) -> None:
    parser = _command(commands, 'benchmark', 'measure time, memory and multiply-adds of networks beside each other',
                      'basicsr benchmark ELAN-light SwinIR-light --sizes 320x184 --threads 2 --memory\n'
                      '  basicsr benchmark --table --official ../ELAN')
    parser.add_argument('networks', nargs='*', metavar='NET',
                        help='ELAN, ELAN-light, SwinIR-light, official, official-light, an architecture with arguments '
                             '(SwinIR:embed_dim=60,window_size=8), an option file, a checkpoint, or an ONNX file in '
                             'another program (openvino:FILE.onnx, onnxruntime:FILE.onnx); or LABEL=NET')
    parser.add_argument('--official', metavar='DIR', help="a checkout of the authors' repository, which you have")
    parser.add_argument('--scale', type=int, default=4, metavar='N', help='enlargement (default: 4)')
    parser.add_argument('--sizes', nargs='+', type=_size, default=[(320, 180)], metavar='WxH',
                        help='sizes of the LR image (default: 320x180)')
    parser.add_argument('--dtype', nargs='+', choices=['float32', 'bf16'], default=['float32'], help='by autocast')
    parser.add_argument('--device', nargs='+', default=['cpu'], metavar='NAME', help='cpu, cuda, cuda:1 (default: cpu)')
    parser.add_argument('--threads', nargs='+', type=_positive, metavar='N', help="of the CPU (default: torch's)")
    parser.add_argument('--runs', type=_positive, default=5, metavar='N', help='interleaved runs (default: 5)')
    parser.add_argument('--train', action='store_true', help='measure a training step too')
    parser.add_argument('--batch', type=_positive, default=4, metavar='N', help="the training step's (default: 4)")
    parser.add_argument('--patch', type=_positive, default=64, metavar='N', help='LR patch in training (default: 64)')
    parser.add_argument('--memory', action='store_true', help='measure peak memory too, each in its own process')
    parser.add_argument('--busy', type=_positive, default=0, metavar='N',
                        help='measure again with N busy loops beside, and by how much that slows down')
    parser.add_argument('--psnr', nargs='+', type=_named_value, default=[], metavar='NAME=VALUE',
                        help='PSNR in dB of networks, for the figure')
    parser.add_argument('--json', metavar='FILE', help='write everything that was measured')
    parser.add_argument('--figure', metavar='FILE', help='draw PSNR, if given, against latency')
    parser.add_argument('--axis', choices=['latency', 'macs'], default='latency', help="of the figure")
    parser.add_argument('--table', nargs='*', metavar='ROW',
                        help='instead: ELAN x4 against the official code and SwinIR-light, all rows or those named')
    parser.add_argument('--trained', nargs='+', default=[], metavar='FILE',
                        help='with --table: a trained ELAN-light x4 and LR images, to state the error of bf16')
    _add_import(parser)
    parser.set_defaults(call=_benchmark)


def _benchmark(args: argparse.Namespace) -> int:
    if args.table is not None:
        from elan_basicsr.report.targets import benchmark_table
        return benchmark_table(args.table, official=args.official, runs=args.runs, device=args.device[0],
                               threads=(args.threads or [None])[0], trained=args.trained, json_file=args.json)
    from elan_basicsr.report.benchmark import Settings, benchmark
    from elan_basicsr.report.subjects import Subject
    settings = Settings(sizes=args.sizes, dtypes=args.dtype, devices=args.device, threads=args.threads or [None],
                        runs=args.runs, train=args.train, batch=args.batch, patch=args.patch, memory=args.memory,
                        busy=args.busy)
    return benchmark([Subject.parse(text, args.scale, args.official) for text in args.networks], settings,
                     psnr=dict(args.psnr), json_file=args.json, figure=args.figure, axis=args.axis)


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number from 1')
    return value


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition('x')
    return _positive(width), _positive(height)


def _named_value(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition('=')
    with contextlib.suppress(ValueError):
        if math.isfinite(float(value)):
            return name, float(value)
    raise argparse.ArgumentTypeError(f'{text!r} is not NAME=VALUE such as ELAN-light=32.43')


def _add_weights(commands) -> None:
    parser = _command(commands, 'weights', 'list the trained networks known by name, and what of them is there already',
                      'basicsr weights\n  basicsr weights get ELAN-light-x4 --to models')
    actions = parser.add_subparsers(title='commands', metavar='COMMAND')
    get = _command(actions, 'get', 'fetch a file of weights and print where it is',
                   'basicsr weights get ELAN-light-x4')
    get.add_argument('name', metavar='NAME', help='one that `basicsr weights` lists')
    get.add_argument('--to', metavar='DIR', help="the folder (default: the user's cache, where every command looks)")

    def call(args: argparse.Namespace) -> int:
        from elan_basicsr.dependencies import explained
        with explained():
            from elan_basicsr.interop import weights
        print(weights.get(args.name, args.to) if 'name' in args else '\n'.join(weights.listing()))
        return 0

    parser.set_defaults(call=call, light=True)


ADD_COMMANDS = (_add_train, _add_test, _add_upscale, _add_compare, _add_explain, _add_benchmark, _add_convert,
                _add_export, _add_options, _add_data, _add_doctor, _add_setup, _add_completion, _add_weights)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog='basicsr', allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                     description='Train, test and use ELAN and the other networks of BasicSR.',
                     epilog='example:\n  basicsr train -opt options/train_ELAN_x4.yml')
    parser.add_argument('--version', action='version', version=f'elan-basicsr {__version__}')
    _add_local_rank(parser)  # before the command where that follows `-m elan_basicsr`
    commands = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)
    for add in ADD_COMMANDS:
        add(commands)
    return parser


def main(argv: Sequence[str] | None = None, prepare: Callable[[], None] = lambda: None) -> int:
    """Run the command line and return the exit code: 0, 2 for the user's mistakes, 130 when interrupted.

    `prepare` is called before a command that needs the package to be imported whole. What the disk, the network or
    another package fails with is one line as well; with ELAN_TRACEBACK set its traceback comes before it.
    """
    for stream in (sys.stdout, sys.stderr):  # a name of a file may hold what the terminal's encoding does not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')
    args = build_parser().parse_args(argv)
    vars(args).pop('local_rank', None)
    try:
        if not getattr(args, 'light', False):
            prepare()
        if 'imports' in args:
            from elan_basicsr.interop.plugins import import_plugins
            import_plugins(args.imports)
        code = args.call(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        sys.stderr.write(f'basicsr: error: {error}\n')
        return EXIT_RUN_LOST if isinstance(error, RunLost) else EXIT_USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write('basicsr: interrupted\n')
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # such as of `| head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would fail in its last flush
        return EXIT_PIPE_CLOSED
    except Exception as error:
        line = outside(error) or _out_of_memory(error)
        if line is None:
            raise
        if os.environ.get('ELAN_TRACEBACK'):
            traceback.print_exc()
        sys.stderr.write(f'basicsr: error: {UserError(line)}\n')
        return EXIT_USER_ERROR


def _out_of_memory(error: Exception) -> str | None:
    """The line for torch's error where memory did not suffice."""
    if 'torch' in sys.modules:
        from elan_basicsr.inference import too_large
        if too_large(error):
            return ('there is not enough memory on the device; for less at once: a smaller batch_size_per_gpu or '
                    'gt_size, train.accumulate or network_g.use_checkpoint in training, val.tile or --tile for images, '
                    f'or close other programs ({str(error).splitlines()[0][:160]})')
    return None
