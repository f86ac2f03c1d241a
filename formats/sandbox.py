"""The process in which other people's chat templates run: python -I formats/sandbox.py

A chat template is a program in Jinja. Jinja's sandbox keeps it from files and from Python's inside,
but not from looping for an hour or filling the memory with 'a' * 10**12. So it runs in a process of
its own: this one bounds its own memory, and formats/jinja_process.py ends it when it takes too
long.

    stdin     {"source": the template, "variables": {"messages": [...], "bos_token": "<s>" ...}}
    stdout    {"text": what it wrote}  or  {"fault": why it did not}         one line each

A template may use what transformers offers it (utils/chat_template_utils.py): raise_exception,
strftime_now, tojson, namespace, dict, break and continue, and {% generation %}, which only marks.
Nothing of ours is imported, so that the process starts in a tenth of a second."""
import functools
import json
import signal
import sys
from datetime import datetime

from jinja2 import ext, nodes, TemplateError
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MEMORY = 1 << 29                # bytes of address space: Python and Jinja take a tenth of it
COMPUTING = .5                  # seconds for one prompt; a template of the hub takes a millisecond
LONGEST = 4_000_000             # characters of a prompt
# What a template can make Python raise. Anything else ends this process, which is noticed.
FAULTS = (TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError,
          TypeError, ValueError)


class SafeNamespace(Namespace):
    """{% set ns = namespace(found=false) %}. Names that begin with _ lead into Python's inside."""

    def __init__(*args, **names):               # self is in args, so that a name may be "self"
        self, args = args[0], args[1:]
        values = dict(*args, **names)
        for name in values:
            SafeNamespace._check(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name, value):
        SafeNamespace._check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name):
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")


class Generation(ext.Extension):
    """{% generation %} ... {% endgeneration %}: what is inside, as it is."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        inner = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.Scope(inner).set_lineno(line)


def raise_exception(message):
    raise TemplateError(message)


def strftime_now(form):
    return datetime.now().strftime(form)


def new_dict(*args, **names):
    """A function in place of the class, which has attributes."""
    return dict(*args, **names)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Jinja's own writes < and > as \\u003c and \\u003e."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


@functools.lru_cache
def compiled(source):
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now,
                               dict=new_dict, namespace=SafeNamespace)
    return environment.from_string(source)


def answer(line: str) -> dict:
    """The reply to one line of stdin."""
    request = json.loads(line)
    try:
        text = compiled(request["source"]).render(**request["variables"])
    except FAULTS as error:
        return {"fault": f"{type(error).__name__}: {error}"[:200]}
    if len(text) > LONGEST:
        return {"fault": f"it writes {len(text):,} characters"}
    return {"text": text}


def limit_computing(seconds):
    """End this process after so many seconds of computing; 0: never. However busy the machine is,
    a template gets as much."""
    if hasattr(signal, "setitimer"):            # not on Windows
        signal.setitimer(signal.ITIMER_PROF, seconds)


def main():
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):      # Windows, macOS: only the time is bounded
        pass
    print("ready", flush=True)                      # Jinja is imported: from now on time counts
    for line in sys.stdin:
        limit_computing(COMPUTING)
        reply = json.dumps(answer(line))
        limit_computing(0)
        sys.stdout.write(reply + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
