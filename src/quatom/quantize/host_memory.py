"""Give freed memory back: blocks of a model come and go one after the other."""

import ctypes


def return_free_memory() -> None:
    """Give freed heap pages back to the system, where the C library can.

    glibc keeps tensors of up to 32 MB on its heap once some were freed; without this, fragments of
    one block after the other add up to more than a block.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
