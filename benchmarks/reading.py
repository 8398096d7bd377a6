"""How fast tables are read, and in how much memory: by data/tables.py and by `datasets.load_dataset`.

    python -m benchmarks.reading [--rows 1000000]

Writes a table of texts (median 200 characters, commas and quotes among them) and labels as CSV, JSON Lines and Parquet into
a temporary folder, and reads each with both, alternately, each time in a process of its own: seconds without imports, the
best of three; peak memory of the whole process, of which a part is mapped pages of the file.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import resource
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

FORMATS = {"csv": "csv", "jsonl": "json", "parquet": "parquet"}
READERS = ("datasets", "onecurve")
NUM_TURNS = 3


def build_rows(num_rows: int) -> Iterator[tuple[str, str]]:
    """Texts and labels, the same each time."""
    generator = random.Random(0)
    words = ["".join(generator.choices(string.ascii_lowercase, k=generator.randint(2, 9))) for _ in range(5_000)]
    for number in range(num_rows):
        text = " ".join(generator.choices(words, k=int(generator.lognormvariate(0, 0.5) * 31) + 1))
        if number % 3 == 0:
            text = text.replace(" ", ", ", 2)
        if number % 10 == 0:
            text = text.replace(" ", ' "', 1) + '"'
        yield text, f"star {number % 5}"


def write_tables(folder: Path, num_rows: int) -> None:
    """The same table in each format."""
    import pyarrow as pa
    import pyarrow.parquet

    schema = pa.schema([("text", pa.string()), ("label", pa.string())])
    with (
        (folder / "a.csv").open("w", newline="", encoding="utf-8") as text_file,
        (folder / "a.jsonl").open("w", encoding="utf-8") as json_file,
        pa.parquet.ParquetWriter(folder / "a.parquet", schema) as parquet,
    ):
        writer = csv.writer(text_file, lineterminator="\n")
        writer.writerow(schema.names)
        chunk: list[dict[str, str]] = []
        for row in build_rows(num_rows):
            writer.writerow(row)
            chunk.append(dict(zip(schema.names, row, strict=True)))
            json_file.write(json.dumps(chunk[-1]) + "\n")
            if len(chunk) == 100_000:
                parquet.write_table(pa.Table.from_pylist(chunk, schema))
                chunk = []
        parquet.write_table(pa.Table.from_pylist(chunk, schema))


def read(reader: str, path: Path) -> None:
    """Read once; print rows, seconds and peak memory in MiB."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        if reader == "datasets":
            import datasets

            datasets.disable_progress_bars()
            start = time.perf_counter()
            kind = FORMATS[path.suffix[1:]]
            table = datasets.load_dataset(kind, data_files=[str(path)], split="train", cache_dir=scratch)
        else:
            import pyarrow.csv
            import pyarrow.json
            import pyarrow.parquet  # noqa: F401  # as datasets has imported them

            from onecurve.training.data.tables import read_table

            start = time.perf_counter()
            table = read_table([path], Path(scratch))
        seconds = time.perf_counter() - start
        print(json.dumps([len(table), seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def measure(reader: str, path: Path) -> tuple[int, float, float]:
    """Rows, seconds and peak MiB of a process that reads once."""
    words = [sys.executable, "-m", "benchmarks.reading", "--reader", reader, "--file", str(path)]
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    rows, seconds, memory = json.loads(result.stdout)
    return rows, seconds, memory


def compare(folder: Path) -> None:
    """A line for each format."""
    print(f"{'':8} {'datasets':>24} {'onecurve':>24}   time   memory")
    for suffix in FORMATS:
        path = folder / f"a.{suffix}"
        best = {reader: (0, float("inf"), 0.0) for reader in READERS}
        for _ in range(NUM_TURNS):
            for reader in READERS:
                best[reader] = min(best[reader], measure(reader, path), key=lambda result: result[1])
        assert len({rows for rows, _, _ in best.values()}) == 1, best
        shown = [f"{rows / seconds / 1000:8.0f} k rows/s {memory:5.0f} MiB" for rows, seconds, memory in best.values()]
        time_ratio, memory_ratio = (best["onecurve"][part] / best["datasets"][part] for part in (1, 2))
        print(f"{suffix:8} {shown[0]:>24} {shown[1]:>24} {time_ratio:6.2f} {memory_ratio:8.2f}", flush=True)


def main() -> None:
    """Write and compare; or, as a child, read one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--reader", choices=READERS)
    parser.add_argument("--file", type=Path)
    arguments = parser.parse_args()
    if arguments.reader is not None:
        read(arguments.reader, arguments.file)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_tables(Path(folder), arguments.rows)
        compare(Path(folder))


if __name__ == "__main__":
    main()
