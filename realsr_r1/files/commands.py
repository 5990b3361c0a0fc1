"""`realsr restore`: photos from files to files."""

import argparse
import os
from dataclasses import replace
from pathlib import Path

from realsr_r1.files.options import STOPPED, add_model, integer, leaf, model_of, place, real


def outputs(photos: list[Path], out: Path, trace: Path | None) -> dict[Path, Path]:
    """Where each photo's result goes: to `out`, or into the folder `out`. Raises ValueError where
    two results would have one name, or one that of a photo."""
    if len(photos) == 1 and not out.is_dir():
        places = {photos[0]: out}
    elif trace:
        raise ValueError("--trace is for one photo whose -o is a file: leave it out")
    elif not out.is_dir():
        raise ValueError(f"{len(photos)} photos need a folder that exists for -o, not {out}")
    else:
        places = {p: out / f"{p.stem}.png" for p in dict.fromkeys(photos)}
    names = [str(p).casefold() for p in places.values()]  # A.png and a.png are one on some disks
    if twice := [p.name for p, n in zip(places, names, strict=True) if names.count(n) > 1]:
        raise ValueError(f"{' and '.join(twice)} would get one name in {out}: rename one of them")
    for result in filter(None, (*places.values(), trace)):
        if result.exists() and any(p.exists() and os.path.samefile(p, result) for p in photos):
            raise ValueError(f"the result would replace the photo {result}: choose another name")
    for photo, result in places.items() if out.is_dir() else ():
        if result.exists() and os.path.samefile(photo.parent, out):  # perhaps a photo, too
            what = f"{result} exists beside {photo.name} and would be replaced"
            raise ValueError(f"{what}: remove it, or choose another folder for -o")
    return places


def restore(a: argparse.Namespace) -> int:
    """Inputs and outputs are looked at before any work; of several photos those that cannot be
    read or are too large are left out, said at the end, and make the exit status 2."""
    from realsr_r1 import images
    from realsr_r1.files.writable import check_writable
    from realsr_r1.pipeline import opened
    from realsr_r1.sampling import Sampling
    from realsr_r1.tokenizer import SCALE

    places, left_out = outputs(a.photos, a.out, a.trace), []
    most = round(a.max_megapixels * 1024**2)
    for photo, out in list(places.items()):
        try:
            size = opened(photo, most).image.size
        except ValueError as e:
            if len(a.photos) == 1:
                raise
            left_out.append(str(e) if photo.name in str(e) else f"{photo.name}, {e}")
            del places[photo]
            continue
        check_writable(out, a.trace, tuple(n * SCALE for n in size))
    sampling = Sampling(image_temperature=a.temperature, guidance=a.guidance)
    model = model_of(a) if places else None
    for path, out in places.items():
        photo = images.read(path)
        photo = replace(photo, alpha=None) if a.flatten else photo
        result = model(photo, a.seed, sampling, batch=a.batch, max_pixels=most)
        result.save(out, a.trace, a.keep_gps)
        print(f"{result.reading.final_understand}: {out}")
        if not result.complete:
            return STOPPED
    print(*(f"left out: {said}" for said in left_out), sep="\n", end="\n" * bool(left_out))
    return 2 if left_out else 0


def register(sub) -> None:
    r = leaf(sub, "restore", restore, "restore photos, four times larger")
    r.add_argument("photos", type=place, nargs="+", help="any pictures that Pillow opens")
    text = "the result, e.g. out.png, or a folder"
    r.add_argument("-o", "--out", type=place, required=True, help=text)
    r.add_argument("--trace", type=place, help="write the chains of thought as JSON")
    r.add_argument("--temperature", type=real(), default=0.65, help="of the images' tokens")
    text = "1: off; see sampling.guided_logits"
    r.add_argument("--guidance", type=real(zero=True), default=1.0, help=text)
    r.add_argument("--batch", type=integer(), default=96, help="tiles at a time")
    text = "refuse larger photos; the result has 16 times as many pixels"
    r.add_argument("--max-megapixels", type=real(), default=1.0, help=text)
    text = "put a see-through photo on white instead of keeping its alpha"
    r.add_argument("--flatten", action="store_true", help=text)
    r.add_argument("--keep-gps", action="store_true", help="keep where the photo was taken")
    add_model(r)
