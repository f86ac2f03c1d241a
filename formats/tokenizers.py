"""tokenizer.json: where LLaMA's prefix space stands in the pipeline, and how others are told of it.

    every      a space before every stretch between special tokens    normalizer: Prepend
    first      before the text only                                   pre_tokenizer: Metaspace

The library does it in one of these ways, as the file says; transformers follows the file, the
official code the config beside it, and files in the wild disagree with their config."""

META = {"type": "Metaspace", "replacement": "▁", "split": False}
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Prepend", "prepend": "▁"}


def apart(mark: str) -> dict:
    """The step that begins a text behind each picture, as the official code does: with a space."""
    return {"type": "Replace", "content": f"{mark} ",
            "pattern": {"Regex": rf"{mark}(?!{mark})(?=[\s\S])"}}


def _steps(spec) -> list:
    """The normalizer's steps."""
    whole = spec.get("normalizer") or {"type": "Sequence", "normalizers": []}
    return whole["normalizers"] if whole["type"] == "Sequence" else [whole]


def _set_steps(spec, steps):
    spec["normalizer"] = {"type": "Sequence", "normalizers": steps} if steps else None


def take_prefix(spec) -> str:
    """Remove the ▁ prefix from the pipeline; say where it stood: every | first | (nowhere)."""
    found, steps = "", _steps(spec)
    if any(step["type"] == "Prepend" for step in steps):
        _set_steps(spec, [step for step in steps if step["type"] != "Prepend"])
        found = "every"
    splitter = spec.get("pre_tokenizer")
    if splitter and splitter["type"] == "Metaspace":
        scheme = splitter.get("prepend_scheme", "always")
        found = {"always": "every", "first": "first"}.get(scheme, "")
        splitter["prepend_scheme"] = "never"
        splitter.pop("add_prefix_space", None)
    return found


def drop_apart(spec, mark: str):
    """Take out what `write_prefix` put in for others: data.Tokenizer's callers do it themselves."""
    steps = _steps(spec)
    if apart(mark) in steps:
        _set_steps(spec, [step for step in steps if step != apart(mark)])


def write_prefix(spec, prefix: str, mark: str | None):
    """Make the pipeline do what data.Tokenizer does: the prefix space as its rule `prefix` says,
    and, with a mark, what follows a picture as a text of its own."""
    if mark is not None:
        drop_apart(spec, mark)
    copy = {"normalizer": {"type": "Sequence", "normalizers": list(_steps(spec))},
            "pre_tokenizer": dict(spec.get("pre_tokenizer") or {"type": ""})}
    if prefix and take_prefix(copy) != prefix:
        rest = [step for step in _steps(spec) if step not in (PREPEND, SPACES)]
        first = prefix == "first"
        _set_steps(spec, rest if first else [PREPEND, *rest, SPACES])
        spec["pre_tokenizer"] = {**META, "prepend_scheme": "first"} if first else None
    if mark is not None and prefix == "first":
        _set_steps(spec, [apart(mark), *_steps(spec)])
        for token in spec["added_tokens"]:          # looked for behind that step, not before it
            token["normalized"] |= token["content"] == mark
