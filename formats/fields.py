"""formats/fields.py: the fields of a row of an official JSON file, checked before they are used.

    require("problems.json: 7", row, question="text", image="text or null") -> the row, or BadData

Kinds: text, a whole number, null, texts, objects, numbers; several with " or " between them.
"""

from formats.errors import BadData
from formats.strict_json import is_broken_text


def has_kind(value, kind):
    """Is a value of a JSON file what its field must hold?"""
    if kind == "text":
        return isinstance(value, str) and not is_broken_text(value)
    if kind == "a whole number":
        return type(value) is int               # True is an int, too, and no number
    if kind == "null":
        return value is None
    if not isinstance(value, list):
        return False
    if kind == "texts":
        return all(has_kind(x, "text") for x in value)
    if kind == "objects":
        return all(isinstance(x, dict) for x in value)
    return all(type(x) in (int, float) for x in value)          # "numbers"


def holds_broken_text(value):
    """Is the value text that no UTF-8 can hold, or a list with some?"""
    values = value if isinstance(value, list) else [value]
    return any(isinstance(x, str) and is_broken_text(x) for x in values)


def require(where, row, **kinds):
    """The row and its place, if every field is of its kind, as "text or null"; one that may be null
    may be missing, too, and is None then. Raises BadData."""
    for name, kind in kinds.items():
        value = row.get(name) if isinstance(row, dict) else None
        if not any(has_kind(value, k) for k in kind.split(" or ")):
            also = ", in valid UTF-8" if "text" in kind and holds_broken_text(value) else ""
            raise BadData(f"{where}.{name}: must be {kind}{also}: correct the row")
    return {**dict.fromkeys(kinds), **row, "where": where}
