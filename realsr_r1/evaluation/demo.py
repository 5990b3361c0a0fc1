"""The shipped real photos restored: what the front page shows."""

from pathlib import Path

from realsr_r1 import images
from realsr_r1.evaluation import sheets
from realsr_r1.photographs import ASSETS
from realsr_r1.pipeline import RealSR
from realsr_r1.tokenizer import bicubic
from realsr_r1.vlcot import IMAGE_TAGS

CUT = 64  # LR pixels a side


def draw(model: RealSR, out: str | Path, seed: int = 0) -> None:
    """A square of each shipped real photo: bicubic, the three images of its reading, restored."""
    rows = []
    for path in sorted((ASSETS / "real_lr").glob("*.webp")):
        photo = images.open_photo(path)
        x, y = ((n - CUT) // 2 for n in photo.size)
        result = model(photo.crop((x, y, x + CUT, y + CUT)), seed, progress=False)
        lr = images.to_tensor(photo)[None, :, y : y + CUT, x : x + CUT]
        large = bicubic(lr)
        steps = [model.decode(getattr(result.reading, t)[None])[0].cpu() for t in IMAGE_TAGS]
        rows.append([large[0].clamp(0, 1), *steps, images.to_tensor(result.image)])
        print(f"{path.name}: {result.reading.final_understand}", flush=True)
    heads = ["LR, bicubic", "rough image", "middle image", "final image", "restored"]
    images.write(images.Photo(sheets.grid(rows, heads, side=4 * CUT)), out)
