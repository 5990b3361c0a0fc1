"""The command line: `realsr …`, the same as `python -m realsr_r1 …`. A subpackage registers its own
leaves (its `commands` module), and nothing heavy is imported before a leaf runs."""

import argparse
import importlib
import os
import signal
import sys

from realsr_r1.files.options import STOPPED
from realsr_r1.version import __version__

GROUPS = "files pretraining evaluation ablations corpus planning reference course".split()


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="realsr", description="RealSR-R1, the course.")
    p.add_argument("--version", action="version", version=f"realsr {__version__}")
    sub = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in GROUPS:
        importlib.import_module(f"realsr_r1.{group}.commands").register(sub)
    return p


def one_sentence(e: Exception) -> str:
    """What is raised here is one sentence already; what torch and the system raise is not."""
    if isinstance(e, RuntimeError | MemoryError):
        from realsr_r1.common import out_of_memory

        if isinstance(e, MemoryError) or out_of_memory(e):
            return "too little memory: take smaller photos, a lower --batch or another --device"
    if str(e).startswith("Caught "):  # a loader's worker sends its whole traceback
        return str(e).strip().splitlines()[-1].split(": ", 1)[-1]
    if not isinstance(e, OSError) or (isinstance(e, FileNotFoundError) and e.errno is None):
        return str(e)
    where = f"{e.filename} cannot be used" if e.filename else "the system refused"
    return f"{where}, {e.strerror}" if e.strerror else " ".join(str(e).split())


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 if it went well, 2 after an error, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that lacks a sign must not end a run
            stream.reconfigure(errors="replace")
    try:
        a = parser().parse_args(argv)
        return a.run(a) or 0
    except BrokenPipeError:  # `realsr … | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, RuntimeError, MemoryError, ModuleNotFoundError) as e:
        print(f"error: {one_sentence(e)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not show a traceback
        print("stopped", file=sys.stderr)
        return STOPPED
