"""tokenizer.json as others shall read it: LLaMA's prefix space, and the text behind a picture.

    every      a space before every stretch between special tokens    normalizer: Prepend
    first      before the text only                                   pre_tokenizer: Metaspace

The library does it in one of these ways, as the file says; transformers follows the file, the
official code the config beside it, and files in the wild disagree with their config. data.Tokenizer
follows the config, so what it saves must say the same in both."""

META = {"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": "first"}
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


def drop_apart(spec, mark: str):
    """Take `apart` out again: data.Tokenizer's callers cut the text at pictures themselves."""
    steps = _steps(spec)
    if apart(mark) in steps:
        _set_steps(spec, [step for step in steps if step != apart(mark)])


def write_prefix(spec, in_file: str, prefix: str, mark: str):
    """Change a pipeline whose prefix rule is `in_file` to the rule `prefix`; what follows the mark
    becomes a text of its own."""
    if prefix and in_file != prefix:
        rest = [step for step in _steps(spec) if step not in (PREPEND, SPACES)]
        _set_steps(spec, rest if prefix == "first" else [PREPEND, *rest, SPACES])
        spec["pre_tokenizer"] = META if prefix == "first" else None
    drop_apart(spec, mark)
    if prefix == "first":
        _set_steps(spec, [apart(mark), *_steps(spec)])
        for token in spec["added_tokens"]:          # looked for behind that step, not before it
            token["normalized"] |= token["content"] == mark
