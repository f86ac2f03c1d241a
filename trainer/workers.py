"""trainer/workers.py: the first act of a process that reads samples ahead (trainer/loader.py)."""

import os
import signal
import sys


def worker_init(worker):
    """Ctrl-C, and what a scheduler sends to the whole group, is for the process that trains: it
    saves, and ends its workers. Where it is gone, a worker ends without a word."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    sys.excepthook = say_nothing_of_a_lost_process


def say_nothing_of_a_lost_process(kind, error, trace):
    """In the place of sys.excepthook, which Python's thread that hands tensors over calls by
    itself: a process that was killed while it asked for one is no fault of the worker's."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)
