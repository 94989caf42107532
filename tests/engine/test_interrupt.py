"""A signal asks for a stop; what is sent to all processes of a run arrives more than once."""
import os
import signal
import subprocess
import sys

import pytest

from ..conftest import with_checkout

CODE = """
import os, signal, time
from elan_basicsr.engine.interrupt import StopRequest
stop = StopRequest({several})
with stop:
    {asked}
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.cause
os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize('several, asked, code', [
    (True, 'pass', 0), (True, 'stop.cause = "a signal to another process"', 0), (False, 'pass', -signal.SIGTERM)])
def test_a_signal_that_arrives_again_ends_no_process_of_several(several, asked, code):
    done = subprocess.run([sys.executable, '-c', CODE.format(several=several, asked=asked)], capture_output=True,
                          text=True, env={**os.environ, 'PYTHONPATH': with_checkout()})
    assert done.returncode == code, done.stderr
