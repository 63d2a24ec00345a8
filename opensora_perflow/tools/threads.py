"""How many threads a small network is evaluated with."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def few_threads(evaluate: Callable[[], object]) -> Iterator[None]:
    """One thread, unless torch's own number is twice as fast: threads of a small network wait for each other.

    Two threads cannot be, and are not tried: on a busy machine the trial alone takes seconds.

    Args:
        evaluate: What is timed, twice with each number.
    """
    several, seconds = torch.get_num_threads(), {}
    try:
        for count in (several, 1) if several > 2 else ():
            torch.set_num_threads(count)
            evaluate()
            began = time.perf_counter()
            evaluate()
            seconds[count] = time.perf_counter() - began
        torch.set_num_threads(several if seconds and 2 * seconds[several] < seconds[1] else 1)
        yield
    finally:
        torch.set_num_threads(several)
