import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors are quickest on one thread, and a forked child must not wait for the parent's others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
