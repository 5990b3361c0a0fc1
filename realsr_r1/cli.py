"""The command line: `realsr …`, the same as `python -m realsr_r1 …`.

Thin on purpose: a subpackage registers its own leaves (its `commands` module), and nothing heavy is
imported before a leaf runs.
"""

import argparse
import importlib
import sys
from collections.abc import Callable

from realsr_r1.version import __version__

GROUPS = ("pretraining", "evaluation", "ablations", "corpus", "course")


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each option's default, except where there is none."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def leaf(sub, name: str, run: Callable, text: str) -> argparse.ArgumentParser:
    """Add a command that calls `run(arguments)` and gets its own options."""
    p = sub.add_parser(name, help=text, description=text, formatter_class=Formatter)
    p.set_defaults(run=run)
    return p


def add_model(p: argparse.ArgumentParser) -> None:
    """The options of every command that needs a model."""
    p.add_argument("--model", default="nano", help="a shipped name, a folder, or a hub id")
    p.add_argument("--policy", default="policy-sft", help="which of the model's policies")
    p.add_argument("--device", help="cpu, cuda or mps; the best there is if left out")
    p.add_argument("--seed", type=int, default=0, help="the same seed gives the same picture")


def model_of(a: argparse.Namespace):
    """The model that `add_model`'s options name."""
    from realsr_r1.pipeline import RealSR

    return RealSR.from_pretrained(a.model, a.device, a.policy)


def restore(a: argparse.Namespace) -> None:
    from realsr_r1.images import open_photo
    from realsr_r1.pipeline import check_writable
    from realsr_r1.sampling import Sampling

    check_writable(a.out, a.trace)
    photo = open_photo(a.photo)
    sampling = Sampling(image_temperature=a.temperature, guidance=a.guidance)
    result = model_of(a)(
        photo, a.seed, sampling, batch=a.batch, max_pixels=round(a.max_megapixels * 1e6)
    )
    result.save(a.out, a.trace)
    print(f"{result.reading.final_understand}: {a.out}")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="realsr", description="RealSR-R1, the course.")
    p.add_argument("--version", action="version", version=f"realsr {__version__}")
    sub = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    r = leaf(sub, "restore", restore, "restore a photo, four times larger")
    r.add_argument("photo", help="any picture that Pillow opens")
    r.add_argument("-o", "--out", required=True, help="where the result goes, e.g. out.png")
    r.add_argument("--trace", help="write the chains of thought as JSON")
    r.add_argument("--temperature", type=float, default=0.8, help="of the images' tokens")
    r.add_argument("--guidance", type=float, default=1.0, help="1: off; see sampling.guided_logits")
    r.add_argument("--batch", type=int, default=48, help="tiles at a time")
    r.add_argument("--max-megapixels", type=float, default=1.0, help="refuse larger photos")
    add_model(r)
    for group in GROUPS:
        importlib.import_module(f"realsr_r1.{group}.commands").register(sub)
    return p


def one_sentence(e: Exception) -> str:
    """What is raised here is one sentence already; what the system raises is not."""
    if not isinstance(e, OSError) or isinstance(e, FileNotFoundError):
        return str(e)
    where = f"{e.filename} cannot be used" if e.filename else "the system refused"
    return f"{where}, {e.strerror}" if e.strerror else " ".join(str(e).split())


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 if it went well, 2 after an error, 130 after Ctrl-C."""
    a = parser().parse_args(argv)
    try:
        a.run(a)
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as e:
        memory = "out of memory" in str(e).lower()
        text = (
            "too little memory: lower --batch, or take another --device"
            if memory
            else one_sentence(e)
        )
        print(f"error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0
