import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from threads, and the workers share the cores

import pytest
import torch
from hypothesis import HealthCheck, settings

from surgery.errors import CheckpointError
from surgery.models import loading
from surgery.saving import reload

# The same examples in every run: a test that fails does so for everybody. A busy machine is no failure.
settings.register_profile("steady", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")
torch.set_num_threads(1)


def pytest_configure(config):
    """A cache of this run's own: nothing of earlier ones is found, and nothing is left for later ones."""
    place = tempfile.TemporaryDirectory(prefix="surgery-tests-")
    os.environ["XDG_CACHE_HOME"] = place.name
    config.add_cleanup(place.cleanup)


def verified_here(folder, probe, expected, dtype, form, on_disk=False):
    """What :func:`surgery.saving.reload.verified` does, without a fresh process."""
    model = loading.loaded(str(folder)).model
    with torch.no_grad():
        found = reload.main_output(model(**probe)).float()
    difference = float((found - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))
    if not difference <= reload.TOLERANCE[dtype]:
        raise CheckpointError(f"the saved twin differs from the one in memory by {difference}", where=str(folder))
    return {"verified": True, "form": form, "missing": [], "unexpected": [], "difference": difference}


VERIFIED = reload.verified
reload.verified = verified_here


@pytest.fixture(autouse=True)
def _fresh_process(request, monkeypatch):
    """A saved twin is read back in a fresh process only where a test asks for that: `@pytest.mark.fresh_process`."""
    if request.node.get_closest_marker("fresh_process"):
        monkeypatch.setattr(reload, "verified", VERIFIED)


@pytest.fixture
def ids() -> torch.Tensor:
    """64 sequences of 32 token ids for the tiny models of `tests/tiny.py`."""
    return torch.randint(3, 96, (64, 32), generator=torch.Generator().manual_seed(3))
