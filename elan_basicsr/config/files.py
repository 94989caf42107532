"""`basicsr options`: the option files that come with the package, for those who have no checkout."""
from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from elan_basicsr.errors import UserError

PACKAGE = Path(__file__).parents[1]
# In a wheel they lie inside the package, in a checkout beside it.
SCHEMA = 'schema.json'
"""What every option file names in its first line, for editors."""
FOLDER = next((folder for folder in (PACKAGE / 'options', PACKAGE.parent / 'options') if folder.is_dir()), None)


def shipped() -> dict[str, Path]:
    """The option files by their names, such as `compare/train_RCAN_x4.yml`."""
    if FOLDER is None:
        raise UserError('the option files are not where they were installed; install elan-basicsr again')
    return {path.relative_to(FOLDER).as_posix(): path for path in sorted(FOLDER.rglob('*.yml'))}


def list_options() -> list[tuple[str, str]]:
    """Name and title of every option file: its second line, below the one that names the schema to editors."""
    return [(name, path.read_text(encoding='utf-8').split('\n')[1].lstrip('# ')) for name, path in shipped().items()]


def copy_options(names: Sequence[str] = (), target: str | os.PathLike = 'options') -> list[Path]:
    """Copy option files, all by default, into the folder `target`, where the files' own comments expect them.

    The schema that they name for editors is copied along, unless one is there.

    Args:
        names: File names as `list_options` gives them, or patterns such as `train_ELAN_*`; `.yml` may be left out.
        target: A folder, made if it is not there.

    Raises:
        UserError: No file has such a name, or one is there already; then nothing is copied.
    """
    files = shipped()
    chosen = {}
    for wanted in names or ['*']:
        found = [name for name in files if fnmatch.fnmatch(name, wanted) or fnmatch.fnmatch(name, f'{wanted}.yml')]
        if not found:
            raise UserError(f'{wanted}: no option file has that name; `basicsr options list` shows them')
        chosen.update({name: files[name] for name in found})
    there = [Path(target, name) for name in chosen if Path(target, name).exists()]
    if there:
        raise UserError(f'{there[0]}: is there already and is not overwritten; move it away or choose another --to')
    copies = {Path(target, name): path for name, path in chosen.items()}
    schema = Path(target, SCHEMA)
    for copy, path in [*copies.items(), *([] if schema.exists() or FOLDER is None else [(schema, FOLDER / SCHEMA)])]:
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        except OSError as error:
            raise UserError(f'{copy}: cannot be written ({error.strerror})') from None
    return list(copies)
