"""Memory of the host: temporaries that come again, and objects that never go."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
KEPT_BYTES = 256 * 2**20
"""Free memory at the end of the heap that is not given back to the system."""
LARGEST_KEPT = 32 * 2**20
"""Allocations above this are mapped and unmapped each time; glibc allows no more."""


def keep_freed_pages() -> None:
    """Make glibc keep up to KEPT_BYTES of what is freed; other C libraries stay as they are.

    By default it returns temporaries of some 100 KB to the system at once, and each page faults
    when the next layer asks for it: a fifth of a decode step of 8 sequences, and most of the
    system's time while a model is quantized.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT)


def forget_startup() -> None:
    """Take what was made so far out of garbage collection, which would walk it again and again.

    Modules and models are hundreds of thousands of objects that live until the end; every full
    collection would hold up all requests for them.
    """
    gc.collect()
    gc.freeze()


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect no garbage inside; afterwards collection is as it was before.

    Garbage may hold a CUDA graph or a loaded kernel. CUDA forbids destroying either while a stream
    captures, and ends the capture with an error.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
