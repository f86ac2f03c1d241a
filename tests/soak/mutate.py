"""Inputs changed at random: bytes, JSON by its structure, safetensors by their header, text.

Every function takes (rng, content: bytes) and returns bytes. `change(rng, form, content)` chooses.
A third of all inputs are changed as bytes whatever their form: what is no JSON must be said, too.
"""

import json

NUMBERS = (0, 1, -1, 2, 3, 7, 255, 256, 65535, 65536, 2 ** 31 - 1, 2 ** 31, 2 ** 32, 2 ** 53,
           2 ** 63 - 1, 2 ** 63, 2 ** 64, 10 ** 12, 10 ** 30, -2 ** 63, .5, -.5, 1e-9, 1e9, 1e38,
           1e300, float("inf"), float("nan"))
TEXTS = ("", " ", "\0", "a", "<image>", "</s>", "<s>", "\ud800", "é", "\u202e", "\x1b[2J", "../..",
         "/etc/passwd", "a" * 5000, "null", "[]", "NaN", "{{", "{% for i in range(99) %}", "🦙",
         "http://127.0.0.1/x.png", "data:image/png;base64,AAAA", "C:\\x", "1", "-1", "1e999",
         "float8", "bfloat16", "gelu", "__class__", "\n", "image.png", "model.safetensors")
PIECES = (b"\0", b"\xff" * 4, b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\x80", b"{", b"}", b"[", b"]",
          b'"', b",", b":", b"\n", b"\r\n", b"\\", b"\\u0000", b"\\ud800", b"\xef\xbb\xbf",
          b"1e999", b"NaN", b"-", b"null", b"true", b"%", b"{{", b"{%", b"\xf0\x9f")
JINJA = (b"{{ messages }}", b"{% for m in messages %}", b"{% endfor %}", b"{% endif %}",
         b"{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
         b"{{ 'a' * 100000000 }}", b"{{ raise_exception('no') }}", b"{{ ''.__class__ }}",
         b"{{ messages[99]['content'] }}", b"{{ 1/0 }}", b"{% set x = namespace(a=1) %}",
         b"{{ 2**99999999 }}", b"{{ bos_token }}", b"<image>", b"</s>", b"{% if true %}",
         b"{{ messages | tojson }}", b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
         b"{{ range(99999)|list|string|length }}", b"{#", b"#}", b"{% generation %}")
HTTP = (b"HTTP/1.1 500 x\r\n", b"HTTP/1.1 429 x\r\nRetry-After: 1e999\r\n", b"HTTP/9.9 abc\r\n",
        b"Transfer-Encoding: chunked\r\n", b"Content-Length: -1\r\n", b"Content-Length: 1e9\r\n",
        b"Content-Encoding: gzip\r\n", b"Location: file:///etc/passwd\r\n", b"HTTP/1.1 302 x\r\n",
        b"Content-Length: 99999999999999999999\r\n", b"X: " + b"a" * 70000 + b"\r\n", b"\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n", b"Retry-After: Fri, 99 Xxx 0000 99:99:99 GMT\r\n",
        b"Connection: close\r\n", b"ffffffff\r\n", b"\r\n", b"HTTP/1.1 401 x\r\n")
TEXT = (b"===", b"\n===\n", b"Question: ", b"Answer: ", b"```", b"<think>", b"</think>", b"8 9\n",
        b"inf nan\n", b"1e5 2\n", b"**Question 1:** ", b"A.", b"(B)", b"I am sorry", b"[0.1, 0.2",
        b"\xed\xa0\x80", b"\n" * 500, b"a " * 3000, b"####", b"_" * 400, b"Q: ", b" " * 2000)


def change_bytes(rng, content, pieces=PIECES, head=False):
    """One to four changes. head: most of them near the beginning, where the sizes stand."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        end = len(content)
        if head and rng.random() < .7:
            end = min(end, 80)
        at = rng.randrange(end + 1)
        size = min(len(content) - at, rng.choice((1, 1, 2, 4, 8, 40, 400)))
        how = rng.randrange(8)
        if how == 0 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif how == 1 and at < len(content):
            content[at] = rng.randrange(256)
        elif how == 2:
            del content[at:at + size]
        elif how == 3:
            content[at:at] = content[at:at + size] * rng.choice((1, 2, 9))
        elif how == 4:
            del content[at:]
        elif how == 5:
            content[at:at + size] = rng.randbytes(size)
        else:
            content[at:at + rng.choice((0, 1, 4))] = rng.choice(pieces)
    return bytes(content[:200_000])


def nodes_of(value, found, depth=0):
    """[(container, key)] of all values inside `value`."""
    if isinstance(value, dict):
        inside = list(value)
    elif isinstance(value, list):
        inside = range(len(value))
    else:
        return
    for key in inside:
        found.append((value, key))
        if depth < 30:
            nodes_of(value[key], found, depth + 1)


def a_value(rng):
    """Something that nobody expects in a JSON file."""
    how = rng.randrange(7)
    if how < 2:
        return rng.choice(NUMBERS)
    if how < 4:
        return rng.choice(TEXTS)
    return rng.choice((None, True, False, [], {}, [[]], [None], {"": None}, [0] * 50, ["a", 1],
                       {"a": {"b": []}}, {"content": 1}))


def change_node(rng, nodes):
    """One change of a JSON value, in place."""
    container, key = rng.choice(nodes)
    if isinstance(container, dict) and key not in container:
        return                              # gone by an earlier change
    if isinstance(container, list) and key >= len(container):
        return
    how = rng.randrange(9)
    if how < 4:
        container[key] = a_value(rng)
    elif how == 4:
        del container[key]
    elif how == 5:
        container[key] = [container[key]]
    elif how == 6 and isinstance(container, dict):
        container[rng.choice((*TEXTS, key + "s", key.upper()))] = container.pop(key)
    elif how == 7 and isinstance(container, list):
        container += [container[key]] * rng.choice((1, 2, 40))
    elif isinstance(container[key], (int, float)) and not isinstance(container[key], bool):
        container[key] = container[key] * rng.choice((-1, 2, 3, .5, 1000)) + rng.choice((0, 1, -1))
    else:
        other, name = rng.choice(nodes)
        try:
            container[key] = json.loads(json.dumps(other[name]))
        except (LookupError, ValueError, RecursionError):
            pass


def change_json(rng, content):
    """Changes of the structure; NaN, Infinity and half surrogates may come out, as in files."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return change_bytes(rng, content)
    box, nodes = [value], []
    nodes_of(box, nodes)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change_node(rng, nodes)
    if not box:
        return b""
    text = json.dumps(box[0], ensure_ascii=rng.random() < .7)
    if rng.random() < .03:
        text = "[" * rng.choice((500, 100_000)) + text
    return text.encode("utf-8", "surrogatepass")


def change_lines(rng, content):
    """JSON lines: one line is changed, dropped, doubled or joined to the next."""
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    how = rng.randrange(6)
    if how < 3:
        lines[at] = change_json(rng, lines[at])
    elif how == 3:
        lines[at:at + 1] = lines[at:at + 1] * rng.choice((0, 2, 9))
    elif how == 4:
        lines[at:at + 2] = [b"".join(lines[at:at + 2])]
    else:
        lines[at] = change_bytes(rng, lines[at])
    return b"\n".join(lines)


def change_safetensors(rng, content):
    """Changes of the header, its length set right most of the time."""
    size = int.from_bytes(content[:8], "little")
    if not 0 < size < len(content):
        return change_bytes(rng, content, head=True)
    header = change_json(rng, content[8:8 + size])
    if rng.random() < .9:
        size = len(header)
    return size.to_bytes(8, "little") + header + content[8 + len(content[8:8 + size]):]


def change(rng, form, content):
    """Changed content. form: bytes | json | lines | safetensors | jinja | text | http."""
    if form in ("json", "lines", "safetensors") and rng.random() < .67:
        by_structure = {"json": change_json, "lines": change_lines,
                        "safetensors": change_safetensors}
        return by_structure[form](rng, content)
    if form == "lines" and rng.random() < .5:
        return change_json(rng, content)
    pieces = {"jinja": PIECES + JINJA * 2, "text": PIECES + TEXT * 2, "http": PIECES + HTTP * 2}
    return change_bytes(rng, content, pieces.get(form, PIECES), form in ("bytes", "safetensors"))
