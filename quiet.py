"""Imported before all else by the scripts: no word of kernels for 4-bit arithmetic on a CPU that nobody asked for."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
