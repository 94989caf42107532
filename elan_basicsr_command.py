"""The console script `basicsr`: help and mistyped words are answered before torch is loaded.

`import elan_basicsr` loads torch and BasicSR to register with them, which takes seconds. So the package is entered here
without running its `__init__`, which is made up for as soon as there is a command to carry out.
"""
from __future__ import annotations

import importlib.util
import sys


def main() -> int:
    """Run the command line; see `elan_basicsr.cli.main`."""
    spec = importlib.util.find_spec('elan_basicsr')
    package = sys.modules['elan_basicsr'] = importlib.util.module_from_spec(spec)
    from elan_basicsr import cli
    return cli.main(prepare=lambda: spec.loader.exec_module(package))
