"""What can be foreseen to go wrong: one line on stderr and an exit status.

Every message says what is wrong, why, and what to do that works, in one line."""
import errno
import os
import sys
import time

from tqdm import tqdm

LONGEST_LINE = 1500             # characters; a file may put whatever it likes into a message


class UserError(Exception):
    """A foreseen failure; `code` is the exit status."""
    code = 3


class BadImage(UserError): """A picture that cannot be used."""
class BadModel(UserError): """A model folder that cannot be used."""
class BadData(UserError): """Training text that cannot be used."""
class NothingToLearn(BadData): """A sample in which no token has loss: left out, and counted."""
class Offline(UserError): code = 4              # something that would have to be downloaded
class UsageError(UserError): code = 2           # a command line that makes no sense
class TrainingFailed(UserError): code = 1       # NaN, divergence, out of memory, disk full


def exit_status(main, debug: bool = False) -> int:
    """Run `main()` and return an exit status; foreseen trouble is one line on stderr.

    debug: let the traceback through instead. SystemExit (argparse) passes untouched."""
    try:
        return int(main() or 0)
    except BaseException as error:
        # torch may not be loaded yet, and has an error of its own for a GPU's memory
        full = (MemoryError, getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError))
        if not isinstance(error, (UserError, OSError, *full, KeyboardInterrupt)):
            raise
        if debug:
            raise
        line, code = one_line(error), getattr(error, "code", None)
        if isinstance(error, KeyboardInterrupt):
            return 130
        if isinstance(error, BrokenPipeError):      # `| head` has ended: flush into nothing
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 0
        if isinstance(error, full):
            line, code = f"out of memory ({line or 'host'}): lower the batch or picture size", 1
        elif isinstance(error, OSError):
            code = 1 if error.errno == errno.ENOSPC else 3
            where = error.filename or "disk"
            line = one_line(f"{where}: {error.strerror}: free space or choose another folder")
        print(one_line(f"error: {line}"), file=sys.stderr)
        return code


def progress(things, what, total=None, step=1):
    """The things. On a terminal a bar, elsewhere every ten seconds a line, says how far it is.

    what: their name; total: how many there will be; step: how many of them a batch has, where the
    things are batches (the last may have fewer)."""
    n, most = 0, total or float("inf")
    if sys.stderr.isatty():
        with tqdm(total=total, unit=f" {what}") as bar:
            for thing in things:
                yield thing
                bar.update(min(step, most - bar.n))
        return
    start = last = time.monotonic()
    for thing in things:
        yield thing
        n = min(n + step, most)
        now = time.monotonic()
        if now - last > 10:
            of_all = f" of {total:,}" if total else ""
            print(f"{n:,}{of_all} {what}, {n / (now - start):,.0f} a second", file=sys.stderr)
            last = now


def printable(text: str) -> str:
    """Text on one line; what could command a terminal is spelled out."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in " ".join(text.split()))


def one_line(error) -> str:
    """What an error says, printable; of a long text the middle is left out."""
    line = printable(str(error))
    if len(line) > LONGEST_LINE:
        line = f"{line[:LONGEST_LINE - 500]} ... {line[-480:]}"
    return line


def note(line):
    """One line for the person, not for the pipe."""
    tqdm.write(line, file=sys.stderr)


def bounded(kind, low, high):
    """A type for argparse: an int or float between two bounds."""
    def value(text):
        if not low <= kind(text) <= high:
            raise ValueError
        return kind(text)
    value.__name__ = f"{kind.__name__} ({low} to {high})"
    return value
