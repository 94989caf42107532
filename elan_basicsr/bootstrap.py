"""`basicsr setup`: what pip alone does not get right. Run by `make` as a file, before anything else is installed.

- BasicSR 1.4.2. Its setup fails from Python 3.13 on, and before that asks for a copy of torch that it does not use.
- OpenCV on a machine without the desktop's libraries, where opencv-python does not load: opencv-python-headless is the
  same library without windows.

Only the standard library is imported here. Nothing installed is edited: pip builds, installs and uninstalls. What fails
ends the program with one line.
"""
from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

BASICSR = '1.4.2'
OPENCV = ('opencv-python', 'opencv-contrib-python', 'opencv-python-headless', 'opencv-contrib-python-headless')

# BasicSR's setup reads its version as `exec(…); return locals()['__version__']`. Since Python 3.13 (PEP 667) exec
# without a namespace writes into a copy of the caller's variables; this gives it the caller's again for that setup.
EXEC = '''\
import builtins
import sys

plain = builtins.exec


def exec(code, globals=None, locals=None, /, **options):
    if globals is None:
        caller = sys._getframe(1)
        globals, locals = caller.f_globals, caller.f_locals
    return plain(code, globals, locals, **options)


builtins.exec = exec
'''


def setup() -> int:
    """Do what is to be done here and say what it was; return 0."""
    done = [*install_basicsr(), *replace_opencv()]
    print('\n'.join(done) if done else 'BasicSR and OpenCV are installed as they should be')
    return 0


def version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def install_basicsr() -> list[str]:
    """Install BasicSR itself, without its requirements, which are this package's too."""
    installed = version('basicsr')
    if installed and installed.partition('+')[0] == BASICSR:
        return []
    with tempfile.TemporaryDirectory() as folder:
        # A setuptools for this build alone: environments from Python 3.12 on have none, others often one too old.
        _pip('install', '--target', folder, 'setuptools>=77')
        Path(folder, 'sitecustomize.py').write_text(EXEC, encoding='utf-8')
        _pip('install', '--use-pep517', '--no-build-isolation', '--no-deps', f'basicsr=={BASICSR}', PYTHONPATH=folder)
    return [f'installed basicsr {BASICSR}' + (f' in the place of {installed}' if installed else '')]


def replace_opencv() -> list[str]:
    """Put opencv-python-headless in the place of an opencv-python that does not load."""
    loading = subprocess.run([sys.executable, '-c', 'import cv2; cv2.imread'], capture_output=True, text=True)
    # All of them share the folder cv2, where uninstalling one damages the others.
    installed = [name for name in OPENCV if version(name)]
    if loading.returncode == 0 or not installed:
        return []
    headless = OPENCV[-1] if any('contrib' in name for name in installed) else OPENCV[-2]
    _pip('uninstall', '--yes', *installed)
    _pip('install', f'{headless}>=4.8')
    return [f'installed {headless} in the place of {" and ".join(installed)}, which did not load: '
            + loading.stderr.strip().rpartition('\n')[2]]


def _pip(*arguments: str, **environment: str) -> None:
    command = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check', *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True)
    if 'No module named pip' in done.stdout:
        sys.exit(f'basicsr: error: this environment has no pip; type: {sys.executable} -m ensurepip')
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if 'error' in line.lower()] or ['without a message']
        sys.exit(f'basicsr: error: `pip {" ".join(arguments)}` failed: {lines[-1].strip()}')


if __name__ == '__main__':
    sys.exit(setup())
