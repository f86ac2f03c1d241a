"""What can be foreseen to go wrong: one line on stderr and an exit status.

Every message says what is wrong, why, and what to do that works, in one line."""
import errno
import os
import sys

import torch


class Failure(Exception):
    """A foreseen failure; `code` is the exit status."""
    code = 3


class BadImage(Failure): """A picture that cannot be used."""
class BadModel(Failure): """A model folder that cannot be used."""
class BadData(Failure): """Training text that cannot be used."""
class NothingToLearn(BadData): """A sample without a word to learn: left out, and counted."""
class Offline(Failure): code = 4            # something that would have to be downloaded
class Usage(Failure): code = 2              # a command line that makes no sense
class TrainingFailed(Failure): code = 1     # NaN, divergence, out of memory, disk full


def guarded(main, debug: bool = False) -> int:
    """Run `main()` and return an exit status; foreseen trouble is one line on stderr.

    debug: let the traceback through instead. SystemExit (argparse) passes untouched."""
    try:
        return int(main() or 0)
    except (Failure, OSError, MemoryError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        if debug:
            raise
        line, code = " ".join(str(error).split()), getattr(error, "code", None)
        if isinstance(error, KeyboardInterrupt):
            return 130
        if isinstance(error, BrokenPipeError):      # `| head` has seen enough; flush into nothing
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 0
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            line, code = f"out of memory ({line or 'host'}): lower the batch or picture size", 1
        elif isinstance(error, OSError):
            code = 1 if error.errno == errno.ENOSPC else 3
            where = error.filename or "disk"
            line = f"{where}: {error.strerror}: free space or choose another folder"
        print("error:", line, file=sys.stderr)
        return code
