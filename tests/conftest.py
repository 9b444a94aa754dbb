"""Triton reads this when it is first imported, which some test may do long before a kernel runs.

On a GPU, benches/gpu.py sets it to 0 for tests/gpu.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
