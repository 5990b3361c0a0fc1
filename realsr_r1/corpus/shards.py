"""Annotated photographs as parquet files: `photographs.load` reads them at once, `datasets` streams
them (`cast_column("image", datasets.Image())` decodes the pictures there).
"""

from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from realsr_r1.common import atomic
from realsr_r1.photographs import Photograph

PATTERN = "annotated-*.parquet"
FIELDS = tuple(f.name for f in fields(Photograph) if f.name != "read")
# The pictures stay plain bytes: typed as datasets.Image they would not be what load expects.
SCHEMA = pa.schema([*((name, pa.string()) for name in FIELDS), ("image", pa.binary())])
ROWS = 100  # a row group, what a stream holds in memory


def _fields(photo: Photograph) -> dict[str, str]:
    row = {name: getattr(photo, name) for name in FIELDS}
    return {k: "+".join(v) if isinstance(v, tuple) else v for k, v in row.items()}


def row_of(photo: Photograph) -> dict:
    """A row of the table, lists joined by +, with the picture's file under "image"."""
    return _fields(photo) | {"image": photo.read()}


def write_shards(photos: list[Photograph], out: str | Path, per_file: int = 1000) -> list[Path]:
    """Write photographs as annotated-00000.parquet and so on; returns the files.

    After a kill the same call goes on: finished files are kept. Raises ValueError if there is
    nothing to write or `out` holds files of other photographs."""
    if not photos or per_file < 1:
        raise ValueError("there is nothing to write: give one photograph or more, also per file")
    out = Path(out)
    parts = [photos[at : at + per_file] for at in range(0, len(photos), per_file)]
    shards = {out / f"annotated-{i:05d}.parquet": part for i, part in enumerate(parts)}
    done = sorted(out.glob(PATTERN))
    for path in done:
        if path not in shards or _rows(path) != [_fields(p) for p in shards[path]]:
            raise ValueError(f"{path} is not of these photographs and sizes: use a new folder")
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(shards.keys() - set(done)):
        table = pa.Table.from_pylist([row_of(p) for p in shards[path]], SCHEMA)
        with atomic(path) as part:
            parquet.write_table(table, part, row_group_size=ROWS)
    return list(shards)


def _rows(path: Path) -> list[dict[str, str]]:
    """The rows of a finished file, without the pictures; columns that it lacks are, too."""
    columns = [name for name in parquet.read_schema(path).names if name in FIELDS]
    return parquet.read_table(path, columns=columns).to_pylist()
