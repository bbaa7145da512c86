"""Engines that are never there. Their process imports little."""

import os
import signal

from quatom.errors import EngineError


def refuse_to_start(message):
    """What a model that cannot be loaded does."""
    raise EngineError(message)


def vanish():
    """What the kernel does to a process when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)
