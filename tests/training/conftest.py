import sys
from pathlib import Path

import pytest
import torch

# The room's helpers (fakes, small, reference) are imported by name; tests/ is no package.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors are quickest on one thread, and a forked child must not wait for the parent's others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
