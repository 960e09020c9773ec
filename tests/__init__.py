"""Imported before anything else of the tests."""

import os

# before numpy is loaded, and for every process that tests start: OpenBLAS threads wait for each other in a busy loop,
# which made a product of small matrices take 20 ms instead of 0.2 beside whatever else runs on the machine
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
