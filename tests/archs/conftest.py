"""What the tests of kernels share."""
import pytest
import torch


@pytest.fixture
def threads():
    """Sets the number of threads, for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
