"""Checks for the labs: each takes the student's function, tries it, and says which mistake it sees.

    checks.degradation.noise_level(my_function)   →   ✓ …   or   ✗ and one sentence

A check never raises and never blocks the notebook; it prints its verdict and returns True or False.
"""

import contextlib
import functools
import io
import math
import numbers
from collections.abc import Callable

import numpy as np
from torch import Tensor

UNWRITTEN = "not written yet: fill in the function above, run it, and run this cell again"


class Mistake(Exception):
    """What a check's body raises, with one sentence to the student."""


class Verdict(int):
    """True or False, which a notebook does not show again below the printed sentence."""

    def _ipython_display_(self) -> None:
        pass

    def __repr__(self) -> str:
        return str(bool(self))


def expect(condition: bool, sentence: str) -> None:
    """Raise `Mistake(sentence)` unless the condition holds."""
    if not condition:
        raise Mistake(sentence)


def expect_shape(out, like: tuple[int, ...], what: str) -> None:
    """Raise `Mistake` unless the answer is a tensor of this shape."""
    expect(isinstance(out, Tensor), f"return a tensor, not {type(out).__name__}")
    expect(tuple(out.shape) == like, f"{what}: expected the shape {like}, got {tuple(out.shape)}")


def number(out, what: str) -> float:
    """The student's answer as a float; any kind of number will do, numpy's and one-element tensors
    included."""
    expect(out is not None, "your function returns nothing: end it with return")
    if isinstance(out, Tensor | np.ndarray) and math.prod(out.shape) == 1:
        out = out.item()
    known = isinstance(out, numbers.Real | np.number) and not isinstance(out, bool)
    expect(known, f"return one number ({what}), not {type(out).__name__}")
    return float(out)


def is_whole(out) -> bool:
    """Whether the answer is an integer of any kind."""
    if isinstance(out, Tensor):
        return out.numel() == 1 and not out.is_floating_point()
    return isinstance(out, numbers.Integral) and not isinstance(out, bool)


def check(body: Callable[[Callable], None]) -> Callable[[Callable], Verdict]:
    """Make a check of a body that takes the student's function and raises `Mistake` where it is
    wrong."""

    @functools.wraps(body)
    def run(student: Callable) -> Verdict:
        try:
            body(student)
        except Mistake as e:
            verdict = str(e)
        except Exception as e:  # whatever a student's code may do
            verdict = f"your function stopped with {type(e).__name__}: {e}"
            if isinstance(e, NotImplementedError) and not e.args:  # the stub's; torch gives reasons
                verdict = UNWRITTEN
        else:
            print(f"✓ {body.__name__}: right")
            return Verdict(True)
        print(f"✗ {body.__name__}: {verdict}")
        return Verdict(False)

    return run


def use(passed: Callable[[Callable], Verdict], student: Callable, fallback: Callable) -> Callable:
    """The student's function if it passes its check, else `fallback`, so that a lesson goes on
    either way. Prints which it is."""
    with contextlib.redirect_stdout(io.StringIO()):
        right = passed(student)
    print(f"{passed.__name__}: {'your function' if right else 'the package stands in'}")
    return student if right else fallback
