"""What `make` needs of this machine, looked at before anything is downloaded: `python3 tools/check_machine.py VENV`.

What is missing ends it with one line that says what to type; what is only slower, or takes room, is a note. Runs on
Pythons too old for the rest, from 3.6 on, and on those that a system has cut down.
"""
import os
import platform
import shutil
import sys

OLDEST, NEWEST = (3, 10), (3, 14)
DISK = 7  # GB: PyTorch for CUDA with its libraries, and the rest
PACKAGES = {  # what to install, by package manager
    'apt-get': {'install': 'apt install', 'python': 'python3 python3-venv', 'venv': 'python3-venv', 'compiler': 'g++'},
    'dnf': {'install': 'dnf install', 'python': 'python3', 'venv': 'python3-libs', 'compiler': 'gcc-c++'},
}


def install(what):
    """The line to type here to install it."""
    for manager, names in PACKAGES.items():
        if shutil.which(manager):
            return f'{"" if os.geteuid() == 0 else "sudo "}{names["install"]} {names[what]}'
    return f'what installs {PACKAGES["apt-get"][what]} on this system'


def missing():
    """What stops the installation: one line, or None."""
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        names = [f'python3.{minor}' for minor in range(NEWEST[1], OLDEST[1] - 1, -1)]
        found = next((name for name in names if os.system(f'{name} -c "" 2>/dev/null') == 0), None)
        return (f'Python 3.10 to 3.14 is needed, {sys.executable} is {platform.python_version()}; type: '
                + (f'make PYTHON={found}' if found else f'{install("python")}, or make PYTHON=/path/to/python'))
    if sys.platform != 'linux' or platform.libc_ver()[0] != 'glibc':
        return f'Linux with the GNU C library is needed, PyTorch comes for no other; this is {platform.platform()}'
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        return f'this Python cannot make a virtual environment ({error}); type: {install("venv")}'
    return None


def notes(folder):
    """What goes without, or may not fit: lines."""
    if platform.machine() == 'x86_64' and not any(map(shutil.which, ('c++', 'g++', os.environ.get('CXX', '')))):
        yield (f'without a C++ compiler ELAN takes two to three times as long on a CPU; a GPU needs none. To have it, '
               f'type {install("compiler")} first')
    while not os.path.isdir(folder):
        folder = os.path.dirname(os.path.abspath(folder))
    free = shutil.disk_usage(folder).free / 1e9
    if free < DISK:
        yield f'{free:.1f} GB are free in {folder}; an environment takes about {DISK}'


if __name__ == '__main__':
    problem = missing()
    if problem:
        sys.exit(f'make: {problem}')
    for note in notes(sys.argv[1]):
        print(f'make: {note}')
    print('make: installing PyTorch and the rest, some 3 GB to download: minutes')
