"""How fast all threads together read memory."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np


def measure_memory(n_threads: int, cache_bytes: int, room: int, seconds: float = 1.0) -> float:
    """Bytes per second that n_threads get by reading a buffer larger than the cache (numpy's sums, which read as
    fast as the memory gives). room: what may be taken for it. What a tenth of many passes exceed."""
    size = min(max(4 * cache_bytes, 64 << 20), 512 << 20, max(room // 4, 16 << 20))
    parts = np.array_split(np.ones(size // 8, np.uint64), n_threads)
    rates: list[float] = []
    with ThreadPoolExecutor(n_threads) as pool:
        begin = time.perf_counter()
        while len(rates) < 5 or time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            list(pool.map(np.add.reduce, parts))
            rates.append(size / (time.perf_counter() - start))
    return float(np.quantile(rates, 0.9))
