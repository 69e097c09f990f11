"""What a run gives back: at most eight files of at most 16 MiB, which is what a lent machine may return."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

from fastvae._files import whole_file

# The file in --out: where the stages wrote it.  The records of peers have a folder each, because each is a cuda.json.
KEPT = {
    "gpu.json": "gpu.json",
    "gpu.md": "gpu.md",
    "measure.json": "measure.json",
    "tests.json": "tests.json",
    "cuda.json": "cuda.json",
    "keops.json": "keops/cuda.json",
    "flash-gmm.json": "flash-gmm/cuda.json",
}
REST = "rest.tar.gz"
LARGEST = 2 << 20  # bytes of a file in the rest; of one that is larger, a log, the last ones
MOST = 15 << 20  # bytes of the rest before it is packed


def deliver(work: Path, out: Path) -> None:
    """Copy what is kept into `out`, and pack the rest; each file is whole or not there."""
    out.mkdir(parents=True, exist_ok=True)
    for name, source in KEPT.items():
        (out / name).unlink(missing_ok=True)  # of an earlier run
        if (work / source).is_file():
            shutil.copyfile(work / source, out / name)
    kept = {work / source for source in KEPT.values()}
    rest = [file for file in work.rglob("*") if file.is_file() and not file.is_symlink() and file not in kept]
    with whole_file(out / REST) as file:
        file.write(packed(rest, work))


def packed(files: list[Path], root: Path) -> bytes:
    """A tar of files, the small ones first; what would make it too large is left out, and LEFT_OUT says so."""
    buffer, total, left_out = io.BytesIO(), 0, []
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for file in sorted(files, key=lambda file: file.stat().st_size):
            content, name = file.read_bytes()[-LARGEST:], str(file.relative_to(root))
            if total + len(content) > MOST:
                left_out.append(name)
                continue
            total += len(content)
            _add(tar, name, content)
        if left_out:
            _add(tar, "LEFT_OUT", "\n".join(left_out).encode())
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
