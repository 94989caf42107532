"""Write what is made from the description of the option keys: options/schema.json and docs/options.md.

    python tools/describe_options.py

A test fails while they are not what this writes.
"""
from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import elan_basicsr  # noqa: F401 - registers what there is
from elan_basicsr.config.parts import ARCHITECTURE, DATASET, LOSS, METRIC, SCHEDULER, complete, write_schema
from elan_basicsr.config.schema import DEGRADATIONS, KEYS, REQUIRED, REQUIRED_TO_TRAIN

HEAD = """\
# Option keys

Every key that an option file may hold, as `basicsr train` and `basicsr test` check it; `*` stands for any text. Keys
that are not described are passed over, for an extension may read them, unless they are nearly one of these.

The first line of every shipped option file names [schema.json](../options/schema.json) to editors that speak to
`yaml-language-server` (VS Code, Neovim and others), which then complete keys, show this page's sentences and mark what
is wrong. `basicsr options copy` copies the schema along. `basicsr options schema -o options/schema.json` writes it with
what is registered: called by a program that registers networks of your own, it knows them too.

This page and the schema are written by `python tools/describe_options.py`.
"""
TYPES = """\

## What a `type` can name, and its arguments

Arguments as signatures have them: those without a default are required. The keys of a dataset are those that its source
reads. Optimizers are those of the installed `torch.optim`, of which `schema.json` tells the arguments.
"""


def page() -> str:
    """docs/options.md."""
    lines, section = [HEAD], None
    for key, (may_be, sentence, *default) in KEYS.items():
        first = key.partition('.')[0]
        if first in ('datasets', 'network_g', 'path', 'train', 'val', 'logger', 'dist_params', 'name') and (
                first != section):
            section = first
            title = {'name': 'General', 'network_g': 'Networks'}.get(first, f'`{first}`')
            lines += [f'\n## {title}\n', *_table_head()]
        lines.append(_row(key, may_be, sentence, default))
    lines += ['\n## For the models of Real-ESRGAN\n', *_table_head()]
    for key, schema in DEGRADATIONS.items():
        lines.append(_row(key, schema, schema['description'], [schema['default']] if 'default' in schema else []))
    definitions = complete()['definitions']
    lines.append(TYPES)
    for part in (ARCHITECTURE, DATASET, LOSS, SCHEDULER, METRIC):
        lines += [f'\n### `{part.key}`\n', *_types(definitions[part.what])]
    return '\n'.join(lines) + '\n'


def _table_head() -> list[str]:
    return ['| key | may be | default | |', '| --- | --- | --- | --- |']


def _row(key: str, may_be: dict, sentence: str, default: list) -> str:
    shown = f'`{json.dumps(default[0])}`' if default else 'required' if key in REQUIRED else (
        'required to train' if key in REQUIRED_TO_TRAIN else '')
    return f'| `{key}` | {may_be["errorMessage"].removeprefix("expected ")} | {shown} | {sentence} |'


def _types(definition: dict) -> Iterator[str]:
    for each in definition['allOf']:
        name, schema = each['if']['properties']['type']['const'], each['then']
        arguments = [f'`{key}{_default(key, told, schema)}`' for key, told in schema['properties'].items()
                     if told is not True]
        yield f'- **{name}**: {", ".join(arguments)}'


def _default(key: str, told: dict, schema: dict) -> str:
    if 'title' not in schema or key in schema['required']:  # without a title: a dataset, which has no signature
        return ''
    return f'={json.dumps(told["default"])}' if 'default' in told else '=null' if 'type' in told else '=…'


if __name__ == '__main__':
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]
    write_schema(str(root / 'options' / 'schema.json'))
    (root / 'docs' / 'options.md').write_text(page(), encoding='utf-8')
