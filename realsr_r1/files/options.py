"""What commands share: their leaves, the options of a model, the types of values."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

STOPPED = 130  # the exit status of what Ctrl-C ended


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each option's default, except where there is none."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def leaf(sub, name: str, run: Callable, text: str) -> argparse.ArgumentParser:
    """Add a command that calls `run(arguments)` and gets its own options."""
    p = sub.add_parser(name, help=text, description=text, formatter_class=Formatter)
    p.set_defaults(run=run)
    return p


def add_model(p: argparse.ArgumentParser, policy: bool = True) -> None:
    """The options of every command that needs a model; `policy`: one of its policies."""
    p.add_argument(
        "--model", type=filled, default="nano", help="a shipped name, a folder, or a hub id"
    )
    if policy:
        text = "policy-grpo (if left out, where there is one), policy-sft (the cold start), or "
        p.add_argument("--policy", type=filled, help=text + "policy-cold (first words only)")
    p.add_argument("--device", help="cpu, cuda or mps; the best there is if left out")
    text = "the same seed gives the same picture"
    p.add_argument("--seed", type=integer(0), default=0, help=text)


def model_of(a: argparse.Namespace):
    """The model that `add_model`'s options name."""
    from transformers.utils import logging

    from realsr_r1.pipeline import RealSR

    logging.disable_progress_bar()  # of reading weights: a moment
    return RealSR.from_pretrained(a.model, a.device, a.policy)


def integer(least: int = 1) -> Callable[[str], int]:
    """The type of an option that counts: whole numbers from `least` to 2^63 - 1."""

    def count(text: str) -> int:
        if not text.strip().lstrip("+-").isdecimal() or not least <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {least} on, not {text!r}"
            )
        return int(text)

    return count


def real(least: float = 0.0, most: float = math.inf, zero: bool = False) -> Callable[[str], float]:
    """The type of an option that measures: numbers between `least` (itself only with `zero`) and
    `most`."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least < value <= most or (zero and value == least)) or math.isinf(value):
            top = "" if math.isinf(most) else f" and at most {most:g}"
            what = f"at least {least:g}" if zero else f"above {least:g}"
            raise argparse.ArgumentTypeError(f"must be a number {what}{top}, not {text!r}")
        return value

    return number


def filled(text: str) -> str:
    """The type of an option that must not be empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: give a value (an unset variable, perhaps)")
    return text


def place(text: str) -> Path:
    """The type of an option that names a file or folder."""
    return Path(filled(text))
