"""Memory that is used again instead of being given back to the system."""

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys, torch
from surgery.runtime.freed_memory import give_memory_back, keep_freed_memory
if sys.argv[1] != "as it is":
    keep_freed_memory()
if sys.argv[1] == "keep, then give back":
    give_memory_back()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    before = faults()
    torch.ones(1 << 24)  # 64 MB
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_used_again():
    faults = {}
    for how in ("keep", "as it is", "keep, then give back"):
        ran = subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True)
        faults[how] = int(ran.stdout)
    assert faults["keep"] < faults["as it is"] / 5, "of the last time that it was taken"
    assert faults["keep, then give back"] > 0.9 * faults["as it is"]
