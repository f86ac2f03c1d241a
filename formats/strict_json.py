"""JSON as the standard says it: no NaN, no infinity, and for each fault where it stands.

A model's small files are read whole or not at all; a data file is read row by row, so that a bad
row does not hide those behind it."""
import itertools
import json
import math
import os
import re
from pathlib import Path

from formats.errors import BadData, BadModel
from formats.files import read_text, text_of


def bounded_number(kind):
    """A parser of JSON's numbers that refuses infinite ones, and longer ones than are in use."""
    def parse(text):
        if len(text) > 400:
            raise ValueError(f"a number of {len(text):,} digits")
        if kind is float and not math.isfinite(kind(text)):     # Python reads 1e999 as infinity
            raise ValueError(f"{text} is not JSON")
        return kind(text)
    return parse


_STRICT = dict(parse_int=bounded_number(int), parse_float=bounded_number(float),
               parse_constant=bounded_number(float))        # constants are NaN and Infinity
_JSON = json.JSONDecoder(**_STRICT)


def loads(text: str, **options):
    """json.loads without the NaN and Infinity that Python adds. ValueError or RecursionError."""
    return json.loads(text, **_STRICT, **options)


def read_model_json(path, limit: int):
    """Parse one JSON file of a model folder, of at most `limit` bytes."""
    try:
        if (size := os.stat(path).st_size) > limit:
            raise ValueError(f"{size:,} bytes where at most {limit:,} are expected")
        return loads(text_of(path, BadModel))
    except FileNotFoundError:
        raise BadModel(f"{path}: no such file: check the folder, or download it again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadModel(f"{path}: unreadable JSON ({error}): replace the file") from None


def read_config(folder, name: str = "config.json", missing_ok: bool = False) -> dict:
    """A small JSON object of a model folder, at most 1 MB. Raises BadModel naming the file."""
    path = Path(folder) / name
    if missing_ok and not path.exists():
        return {}
    config = read_model_json(path, 1_000_000)
    if not isinstance(config, dict):
        raise BadModel(f"{path}: must hold a JSON object: replace the file")
    return config


_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[][{},:]|[^][{},:"\s]+', re.S)


def token_is_valid(token: str) -> bool:
    """Can this token of JSON be read? A number may be too long or infinite, bytes be no UTF-8."""
    try:
        token.encode()
        return token[0] in '"[]{},:' or bool(_JSON.raw_decode(token))
    except ValueError:
        return False


def field_name(path) -> str:
    """"conversations[3].value: " of the keys and indices that lead to a value; at most three."""
    name = ""
    for step in path[:3]:
        if type(step) is int:
            name += f"[{step}]"
        elif step:
            name += f".{step[:40]}"
    name = name.removeprefix(".")
    return f"{name}: " if name else ""


def locate_error(text: str, start: int, error) -> tuple[str, int | None]:
    """Where the JSON value at `start` goes wrong: ("image: ", where the value ends).

    The end is None if nobody can tell: from there on the text is no JSON."""
    stop, path, key, field = getattr(error, "pos", None), [], "", None
    for found in _TOKEN.finditer(text, start, start + 10_000_000):      # seconds, not minutes
        token = found.group()
        if stop is not None and found.end() > stop:
            break
        if stop is None and field is None and (len(path) > 100 or not token_is_valid(token)):
            field = field_name(path)
        if token in "[{":
            path.append(0 if token == "[" else "")
        elif token in "]}" and path:
            path.pop()
        elif token == "," and path and type(path[-1]) is int:
            path[-1] += 1
        elif token == ":" and path:
            path[-1] = key
        elif token[0] == '"':
            key = token[1:-1]
        if not path and stop is None:
            return field or "", found.end()
    return field_name(path) if field is None else field, None


def decode_value(text: str, at: int = 0):
    """(value or BadData, where it ends) of the JSON value that starts at `at`; end as above."""
    try:
        value, end = _JSON.raw_decode(text, at)
        text[at:end].encode()                       # fails where the file's bytes were no UTF-8
        return value, end
    except (ValueError, RecursionError) as error:
        field, end = locate_error(text, at, error)
        why = "bytes that are no UTF-8" if isinstance(error, UnicodeError) else error
        return BadData(f"{field}cannot be read as JSON ({why}): correct it"), end


def read_json(path, limit: int = 2_000_000_000):
    """A whole JSON file of at most `limit` bytes; its numbers are finite. Raises BadData."""
    text = ""
    try:
        text = read_text(path, limit)
        return loads(text)
    except (OSError, ValueError, RecursionError) as error:
        field, _ = locate_error(text, 0, error)
        raise BadData(f"{path}: {field}unreadable JSON ({error}): replace the file") from None


def iter_lines(text: str):
    """`iter_rows` of JSON lines; empty lines are passed over."""
    row = 0
    for number, found in enumerate(re.finditer(r"[^\n]*\n?", text), 1):
        line = found.group().strip()
        if not line:
            continue
        row += 1
        value, end = decode_value(line)
        if end not in (None, len(line)):
            value = BadData("cannot be read as JSON (more than one value): one row a line")
        yield row, f"line {number}, row {row}", value


def iter_rows(text: str):
    """Yield (row, "row 3", value or BadData) of a JSON list, of cc_sbu_align's {"annotations":
    list}, or of JSON lines. A row that cannot be read does not hide those behind it."""
    head = re.match(r'\s*(\{\s*"annotations"\s*:\s*)?\[\s*', text)
    if not head:
        yield from iter_lines(text)
        return
    close = re.compile(r"\s*\]\s*\}\s*\Z" if head[1] else r"\s*\]\s*\Z")
    comma, at = re.compile(r"\s*,\s*"), head.end()
    if close.match(text, at):                       # an empty list
        return
    for row in itertools.count(1):
        value, end = decode_value(text, at)
        if end is None:
            value = BadData(f"{value}; what follows was not read")
        yield row, f"row {row}", value
        if end is None or close.match(text, end):
            return
        if not (found := comma.match(text, end)):
            yield row, f"row {row}", BadData("cannot be read as JSON (no comma or end of the list "
                                             "behind it): correct it; what follows was not read")
            return
        at = found.end()


BROKEN = re.compile("[\0\ud800-\udfff]")


def is_broken_text(text):
    """Does it hold half a surrogate pair, or a NUL?"""
    return bool(BROKEN.search(text))
