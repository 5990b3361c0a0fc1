"""`realsr reference`: a photo restored by a model of the paper's size."""

import argparse
import os

from realsr_r1.files.options import STOPPED, filled, integer, leaf, place, real


def restore(a: argparse.Namespace) -> int:
    if a.window and (not a.sizes or a.batch > 1):  # told before 14 GB are read
        raise ValueError("--window needs --sizes, and one tile at a time: leave --batch out")
    os.environ["HF_HUB_OFFLINE"] = "0" if a.download else "1"
    from realsr_r1.files.writable import check_writable
    from realsr_r1.pipeline import opened
    from realsr_r1.reference import restoring

    most, sizes = round(a.max_megapixels * 1024**2), tuple(a.sizes) if a.sizes else None
    restoring.check_sizes(sizes)
    size = opened(a.photo, most).image.size
    check_writable(a.out, a.trace, tuple(n * restoring.SCALE for n in size))
    options = {"device": a.device} if a.device else {}
    model = restoring.load_reference(a.weights, a.tokenizer, bits=a.bits, batch=a.batch, **options)
    how = {"sizes": sizes, "window": a.window}
    result = restoring.restore_reference(
        a.photo, model, restoring.PURE, a.seed, a.batch, most, **how
    )
    result.save(a.out, a.trace)
    if empty := result.settings["bicubic_tiles"]:
        print(f"{empty} of {len(result.tiles)} tiles are bicubic: the model drew no final image")
    print(a.out)
    return 0 if result.complete else STOPPED


def register(sub) -> None:
    p = leaf(sub, "reference", restore, "restore a photo with a 7B model such as PURE")
    p.add_argument("photo", type=place, help="any picture that Pillow opens")
    p.add_argument("-o", "--out", type=place, required=True, help="the result, e.g. out.png")
    p.add_argument("--trace", type=place, help="write the chains of thought as JSON")
    p.add_argument("--weights", type=filled, default="nonwhy/PURE", help="a folder or a hub id")
    p.add_argument("--tokenizer", type=filled, help="LlamaGen's vq_ds8_c2i.pt; from the hub if not")
    text = "pixels of the chain's images, e.g. 128 256 512; the model chooses if left out"
    p.add_argument("--sizes", type=integer(), nargs="+", help=text)
    p.add_argument("--bits", type=int, choices=(32, 16, 8, 4), default=16, help="of the weights")
    text = "guesses ahead, see reference.jacobi; 0: one token at a time"
    p.add_argument("--window", type=integer(0), default=0, help=text)
    p.add_argument("--batch", type=integer(), default=1, help="tiles at a time")
    p.add_argument("--max-megapixels", type=real(), default=1.0, help="refuse larger photos")
    p.add_argument("--download", action="store_true", help="fetch missing weights from the hub")
    p.add_argument("--device", help="cpu or cuda; the best there is if left out")
    p.add_argument("--seed", type=int, default=0, help="the same seed gives the same picture")
