"""Waiting policy of torch's OpenMP threads. Imports no torch: the policy is read when torch is loaded."""

import os

SPIN_COUNT = "10000"  # iterations of a waiting loop, about 0.1 ms


def shorten_spinning() -> None:
    """Let idle OpenMP threads sleep after a short spin, unless the user has set a waiting policy.

    CPU operations of torch end in barriers. By default GNU OpenMP (libgomp, shipped with torch on Linux) spins 300,000
    iterations there, several milliseconds, before a thread sleeps. A spinning thread occupies a core that the thread
    it waits for may need: when other processes were busy, a stream took over 100 times as long. Sleeping at once
    (OMP_WAIT_POLICY=passive) solves that, but on free cores small operations become slower, since each one wakes up
    the threads. `benchmarks/neighbours.py` measures both, and the short spin set here. A stream, whose operations are
    the smallest, has one thread by default, which waits for no other.

    Call it before torch is imported: libgomp reads its environment when it is loaded. Other OpenMP runtimes ignore the
    variable.
    """
    if "OMP_WAIT_POLICY" not in os.environ:  # GOMP_SPINCOUNT would take precedence
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
