import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from threads, and the workers share the cores

import pytest
import torch
from hypothesis import HealthCheck, settings

# The same examples in every run: a test that fails does so for everybody. A busy machine is no failure.
settings.register_profile("steady", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")
torch.set_num_threads(1)


@pytest.fixture
def ids() -> torch.Tensor:
    """64 sequences of 32 token ids for the tiny models of `tests/tiny.py`."""
    return torch.randint(3, 96, (64, 32), generator=torch.Generator().manual_seed(3))
