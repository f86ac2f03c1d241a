"""exercises.checking: run a reader's function beside the project's own, and say what differs.

    Exercise      what is known of one: its file, the right function, small inputs, classic mistakes
    load          the reader's function out of a file
    judge         one line: right, not written yet, or what is wrong; of a mask a drawing, too

A classic mistake is known as a function that makes it. What the reader's function returns is
compared with what each of them returns on the same inputs: the mistake that agrees most, on half
of the wrong ones at least, is called by its name. All else is told by the first thing that differs:
an error, the shape, the first wrong element.
"""
import importlib.util
import math
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch

HERE = Path(__file__).parent
TOLERANCE = 1e-4                    # of the largest right value; mistakes differ by 10 times more


ANY = ...                           # what a known mistake returns where it says nothing


class Misfit(Exception):
    """What was returned cannot be compared with anything; the text says why."""


def called(function, arguments):
    """How a function is run: here once, on the arguments of a case."""
    return function(*arguments)


def returned(result, arguments):
    """What of a call is compared: here what it returns."""
    return result


def unnamed(arguments, name, place):
    """What is said of one element beside its index: here nothing."""
    return ""


def undrawn(found, right, arguments):
    """What is drawn below the line of a wrong case: here nothing."""
    return ""


@dataclass(frozen=True)
class Exercise:
    """One exercise. `cases()` makes the arguments anew, so that no call sees what another wrote."""
    number: int
    file: str                       # in exercises/
    functions: tuple                # names in it
    solution: str                   # where the project's own stands
    real: Callable                  # the project's own, called as the exercise is
    cases: Callable                 # () -> [arguments]
    mistakes: tuple                 # (what is said, function that makes the mistake)
    outputs: tuple                  # a name for each thing that is compared
    collect: Callable = returned    # (what was returned, arguments) -> what is compared
    remark: Callable = str          # () -> a sentence for one whose function is right
    run: Callable = called          # (function, arguments) -> what it returned
    element: Callable = unnamed     # (arguments, output, place) -> words about an element
    drawing: Callable = undrawn     # (outputs, the right ones, arguments) -> lines
    strict: bool = False            # a mistake must explain all failing cases, not half

    @property
    def title(self):
        """"label_mask" of ex04_label_mask.py."""
        return self.file[5:-3]


class Verdict(NamedTuple):
    state: str                      # "right", "not written", "wrong"
    text: str                       # one line
    drawing: str = ""               # lines below it


class Caught:
    """What the reader's code raises, whatever it is: `error` afterwards, None if nothing."""
    error = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, Exception):
            self.error = error
            return True
        return False                # Ctrl-C goes through


def load(exercise, path=None):
    """The reader's function; of several in a file, one that takes the name as first argument."""
    spec = importlib.util.spec_from_file_location("exercise", path or HERE / exercise.file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    missing = [name for name in exercise.functions if not callable(getattr(module, name, None))]
    if missing:
        raise NameError(f"there is no function {missing[0]} in {Path(spec.origin).name}")
    if len(exercise.functions) == 1:
        return getattr(module, exercise.functions[0])
    return lambda name, *arguments: getattr(module, name)(*arguments)


# ------------------------------------------------------------------------------ two results

def as_tensor(value):
    """A tensor of numbers, lists of numbers or tensors; None if it cannot be one."""
    if torch.is_tensor(value):
        return value.detach()
    with Caught() as caught:
        return torch.as_tensor(value)
    return None if caught.error else value


def outputs_of(exercise, result):
    """[(name, tensor or None)] of what a function returned."""
    if len(exercise.outputs) == 1:
        return [(exercise.outputs[0], as_tensor(result))]
    if not isinstance(result, (tuple, list)) or len(result) != len(exercise.outputs):
        return [(name, None) for name in exercise.outputs]
    return [(name, part if part is ANY else as_tensor(part))
            for name, part in zip(exercise.outputs, result)]


def parts_of(function, result, like):
    """What one of several functions returned, if it has the shapes in like, {name: tensor}."""
    names = ", ".join(like)
    if result is None:
        raise Misfit(f"{function} returns None: the last line must be `return {names}`")
    if not isinstance(result, (tuple, list)) or len(result) != len(like):
        raise Misfit(f"{function} must return {names}")
    for (name, right), part in zip(like.items(), result):
        if part is ANY:
            continue
        if not torch.is_tensor(part):
            raise Misfit(f"{function}: {name} must be a tensor, not {type(part).__name__}")
        if part.shape != right.shape:
            line = f"{function}: {name} has shape {tuple(part.shape)}, not {tuple(right.shape)}"
            if part.shape == right.shape[:-1]:
                line += ": keepdim=True of amax and sum keeps the last dimension"
            raise Misfit(line)
    return result


def wrong_elements(found, right):
    """A bool tensor: where two tensors of one shape differ. NaN equals NaN, for mistakes."""
    found, right = found.double(), right.double()
    finite = right[right.isfinite()]
    limit = TOLERANCE * max(float(finite.abs().max()) if len(finite) else 0., 1e-3)
    return ~torch.isclose(found, right, rtol=0, atol=limit, equal_nan=True)


def agree(a, b):
    """Do two lists of outputs say the same? In `a`, a mistake's, ANY agrees with everything."""
    for (_, x), (_, y) in zip(a, b):
        if x is ANY:
            continue
        if x is None or y is None or x.shape != y.shape or wrong_elements(x, y).any():
            return False
    return True


def shown(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def shown_path(path):
    """A path as a person in the project's root would type it."""
    return path.relative_to(HERE.parent) if path.is_relative_to(HERE) else path


def shape_difference(name, found, right):
    """One line about two shapes that differ."""
    line = f"{name} has shape {tuple(found.shape)}, expected {tuple(right.shape)}"
    if found.dim() == right.dim() and sorted(found.shape) == sorted(right.shape):
        return f"{line}: two dimensions are exchanged"
    if found.dim() == right.dim():
        axis = [i for i in range(right.dim()) if found.shape[i] != right.shape[i]][0]
        more = found.shape[axis] - right.shape[axis]
        return f"{line}: {abs(more)} too {'many' if more > 0 else 'few'} in dimension {axis}"
    return line


def difference(found, right, element=lambda name, place: ""):
    """One line: the first thing in which two lists of outputs differ; None where they agree.

    element(name, place): what is said of an element beside its index."""
    for (name, x), (_, y) in zip(found, right):
        if x is None:
            names = ", ".join(name for name, _ in right)
            return f"it must return {names}, as numbers or tensors"
        if x.shape != y.shape:
            return shape_difference(name, x, y)
        wrong = wrong_elements(x, y)
        if wrong.any():
            place = wrong.nonzero()[0].tolist()
            at = name + (str(place) if place else "")
            got, wanted = x[tuple(place)].item(), y[tuple(place)].item()
            at += element(name, place)
            line = (f"{at} is {shown(got)}, expected {shown(wanted)}; {int(wrong.sum()):,} of "
                    f"{wrong.numel():,} are wrong")
            if not math.isfinite(got) and math.isfinite(wanted):
                line += ": an exp or a division has overflowed"
            return line
    return None


# -------------------------------------------------------------------------------- the verdict

def call(exercise, function, arguments):
    """The outputs of one call; None if it returned None."""
    result = exercise.run(function, arguments)
    if result is None:
        return None
    return outputs_of(exercise, exercise.collect(result, arguments))


def error_line(error, path):
    """One line about what the reader's code raised, with the line of the file if it has one."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines = [error.lineno]
    where = f" (line {lines[-1]} of {Path(path).name})" if lines else ""
    first = (str(error).splitlines() or [""])[0]
    line = f"it raises {type(error).__name__}: {first}{where}"
    if "Boolean value of Tensor" in first:
        line += ": `and`, `or`, `not` and `if` do not work on tensors; take & | ~"
    if "must match the size of tensor" in first:
        line += ": amax and sum drop their dimension, if not for keepdim=True"
    return line


def explains(exercise, mistake, cases, failing):
    """How many failing cases a function with a known mistake explains."""
    count = 0
    for i, found in failing:
        # on a case that it was not made for it may fail in any way
        with Caught() as caught:
            same = agree(call(exercise, mistake, cases[i]), found)
        count += caught.error is None and same
    return count


def named_mistake(exercise, failing):
    """The name of the mistake that explains most of the failing cases, at least half; or None.

    failing: [(number of the case, outputs)]. Not all of them: a reader may have thought of an
    empty group where the known mistake has not. All in a strict exercise: where one bit more or
    less is another mask, a name that fits half of the cases misleads."""
    best, most = None, (len(failing) - 1) / 2
    if exercise.strict:
        most = len(failing) - 1
    for name, mistake in exercise.mistakes:
        count = explains(exercise, mistake, exercise.cases(), failing)
        if count > most:
            best, most = name, count
    return best


def refusal(exercise, error, path):
    """The Verdict on a function that raised, or whose result cannot be compared."""
    if isinstance(error, NotImplementedError):
        return Verdict("not written", f"not written yet: write it in {shown_path(path)}")
    if isinstance(error, Misfit):
        return Verdict("wrong", f"wrong: {error}")
    return Verdict("wrong", f"wrong: {error_line(error, path)}")


def judge(exercise, function, path):
    """The Verdict on a reader's function; path: the file it stands in."""
    cases, references, failing, first = exercise.cases(), exercise.cases(), [], None
    for i, arguments in enumerate(cases):
        right = call(exercise, exercise.real, references[i])
        with Caught() as caught:
            found = call(exercise, function, arguments)
        if caught.error:
            return refusal(exercise, caught.error, path)
        if found is None:
            return Verdict("wrong", "wrong: it returns None: the last line must be `return ...`")
        line = difference(found, right, lambda *at: exercise.element(references[i], *at))
        # of several functions in one file the first wrong one is spoken of
        if line and (first is None or spoken_of(arguments) == spoken_of(cases[first[0]])):
            failing.append((i, found))
            first = first or (i, line, exercise.drawing(found, right, arguments))
    if not failing:
        return Verdict("right", f"right on {len(cases)} inputs; the project's own is "
                                f"{exercise.solution}. {exercise.remark()}".strip())
    name = named_mistake(exercise, failing)
    which = spoken_of(cases[first[0]])
    return Verdict("wrong", f"wrong: {which}{f'{name}; ' if name else ''}{first[1]}", first[2])


def spoken_of(arguments):
    """"itg: " for a case of that function of the file; "" where a case is of all."""
    return f"{arguments[0]}: " if isinstance(arguments[0], str) else ""


def check(exercise, path=None) -> Verdict:
    """The Verdict on what stands in the exercise's file, or in another."""
    path = Path(path or HERE / exercise.file)
    with Caught() as caught:
        function: Any = load(exercise, path)
    if caught.error:
        return Verdict("wrong", f"wrong: {error_line(caught.error, path)}")
    return judge(exercise, function, path)
