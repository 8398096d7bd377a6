"""How fast tables are read, and in how much memory: by data/tables.py and by `datasets.load_dataset`.

    python -m benchmarks.reading [--rows 1000000]

Writes a table of texts (median 200 characters, commas and quotes among them) and labels as CSV, JSON Lines and Parquet into
a temporary folder, and reads each with both, alternately, each time in a process of its own that has imported what training
imports: rows a second and seconds of processor time, the best of five each; peak memory of the whole process. Ratios below
1 are in favour of onecurve. Needs Linux, and two idle cores for the rows a second.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

FORMATS = {"csv": "csv", "jsonl": "json", "parquet": "parquet"}
READERS = ("datasets", "onecurve")
NUM_TURNS = 5


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
    """Read once; print rows, seconds, seconds of processor time, and peak memory in MiB."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        import datasets  # Training has imported it, and pandas with it, whoever reads.
        import pyarrow.csv
        import pyarrow.json
        import pyarrow.parquet  # noqa: F401

        from onecurve.training.data.tables import read_table

        datasets.disable_progress_bars()
        start, start_busy = time.perf_counter(), time.process_time()
        if reader == "datasets":
            kind = FORMATS[path.suffix[1:]]
            table = datasets.load_dataset(kind, data_files=[str(path)], split="train", cache_dir=scratch)
        else:
            table = read_table([path], Path(scratch))
        seconds, busy = time.perf_counter() - start, time.process_time() - start_busy
    # getrusage's peak would be at least what the parent had when it started this process.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    print(json.dumps([len(table), seconds, busy, int(status["VmHWM"].split()[0]) / 1024]))


def measure(reader: str, path: Path) -> tuple[int, float, float, float]:
    """Rows, seconds, seconds of processor time and peak MiB of a process that reads once."""
    words = [sys.executable, "-m", "benchmarks.reading", "--reader", reader, "--file", str(path)]
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    rows, seconds, busy, memory = json.loads(result.stdout)
    return rows, seconds, busy, memory


def compare(folder: Path) -> None:
    """A line for each format."""
    print(f"{'':8} {'datasets':>34} {'onecurve':>34}   time    cpu memory")
    for suffix in FORMATS:
        path = folder / f"a.{suffix}"
        results: dict[str, list[tuple[int, float, float, float]]] = {reader: [] for reader in READERS}
        for _ in range(NUM_TURNS):
            for reader in READERS:
                results[reader].append(measure(reader, path))
        best = {reader: [min(parts) for parts in zip(*found, strict=True)] for reader, found in results.items()}
        assert len({rows for found in results.values() for rows, *_ in found}) == 1, results
        shown = [
            f"{rows / seconds / 1000:6.0f} k rows/s {busy:5.2f} s {memory:5.0f} MiB"
            for rows, seconds, busy, memory in best.values()
        ]
        ratios = [f"{best['onecurve'][part] / best['datasets'][part]:6.2f}" for part in (1, 2, 3)]
        print(f"{suffix:8} {shown[0]:>34} {shown[1]:>34} {' '.join(ratios)}", flush=True)


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
