"""keep_freed_memory: freed memory stays with the process."""

import platform
import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from reclingua.utils.memory import keep_freed_memory
keep_freed_memory()
bytearray(2**28)  # freed at once
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    bytearray(b"x" * 2**26)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc returns freed memory in this way")
def test_freed_memory_is_not_returned_to_the_system(monkeypatch):
    """Ten blocks of 64 MB take no new page; returned to the system, each would take its 16,384 pages anew."""
    pages = 2**26 // resource.getpagesize()
    faults = [int(subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout)]
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")  # of the user, who decides
    faults += [int(subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout)]
    assert faults[0] < pages < 5 * pages < faults[1]
