"""Checks for the labs: each takes the student's function, tries it, and says which mistake it sees.

    checks.degradation.noise_level(my_function)   →   ✓ …   or   ✗ and one sentence

A check never raises and never blocks the notebook; it prints its verdict and returns True or False.
"""

import contextlib
import functools
import io
from collections.abc import Callable


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


def check(body: Callable[[Callable], None]) -> Callable[[Callable], Verdict]:
    """Make a check of a body that takes the student's function and raises `Mistake` where it is
    wrong."""

    @functools.wraps(body)
    def run(student: Callable) -> Verdict:
        try:
            body(student)
        except NotImplementedError:
            verdict = "not written yet: fill in the function above, run it, and run this cell again"
        except Mistake as e:
            verdict = str(e)
        except Exception as e:  # whatever a student's code may do
            verdict = f"your function stopped with {type(e).__name__}: {e}"
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
