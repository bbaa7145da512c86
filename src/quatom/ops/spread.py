"""Launches of few CTAs, spread evenly over a GPU.

A kernel that is launched before its predecessor ends gets the multiprocessors that are free first.
Its CTAs then crowd there, and most of the GPU has none. Shared memory that they ask for without
using it keeps them apart.
"""

_SHARED_BYTES = 228 * 1024
"""Shared memory of a Hopper multiprocessor; each CTA takes a KiB besides what it asks for."""


def crowd(ctas: int, processors: int, most: int) -> int:
    """CTAs that each multiprocessor has where they are spread evenly; 0 where there are too many.

    Args:
        ctas: CTAs of the launch.
        processors: multiprocessors of the GPU.
        most: CTAs of a multiprocessor up to which a launch is spread.
    """
    evenly = -(-ctas // processors)
    return evenly if evenly <= most else 0


def padded_bytes(needed: int, crowd: int) -> int:
    """Shared memory to ask for so that `crowd` CTAs, if not 0, fill a multiprocessor.

    Args:
        needed: bytes that a CTA uses.
        crowd: of the function of this name.
    """
    return max(needed, _SHARED_BYTES // (crowd + 1)) if crowd else needed
