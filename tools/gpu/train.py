"""Two epochs of `fastvae train` as a user runs it: python -m tools.gpu.train --out DIR [--dry-run]

The images are made here, at MNIST's sizes: what counts is that it trains, and the seconds of its second epoch.  A dry
run trains on few and small images on the CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

EPOCHS = 2


def images(count: int, pixels: int) -> np.ndarray:
    """[count, pixels, pixels] binary: disks of random place and size, which a VAE learns quickly."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:pixels, :pixels] / pixels
    centre, radius = rng.uniform(0.3, 0.7, (2, count, 1, 1)), rng.uniform(0.1, 0.3, (count, 1, 1))
    return (np.hypot(x - centre[0], y - centre[1]) < radius).astype(np.float32)


def main(arguments: list[str]) -> int:
    """0 if it trains, and the bound of the second epoch is better than that of the first."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.train", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder for data and run")
    parser.add_argument("--dry-run", action="store_true", help="few and small images, on the CPU")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    count, pixels, components = (200, 8, 10) if options.dry_run else (50_000, 28, 500)
    every = images(count + count // 5, pixels)
    data = options.out / "images.npz"
    np.savez_compressed(data, x_train=every[:count], x_valid=every[count::2], x_test=every[count + 1 :: 2])
    command = [
        *("train", "--data", str(data), "--device", "cpu" if options.dry_run else "cuda", "--prior", "vamp"),
        *("--components", str(components), "--epochs", str(EPOCHS), "--out", str(options.out / "run"), "--overwrite"),
    ]
    code = subprocess.run([sys.executable, "-m", "fastvae.app.cli", *command]).returncode
    data.unlink()  # it can be made again
    if code != 0:
        return code
    results = json.loads((options.out / "run" / "results.json").read_text())
    first, second = (epoch["train"]["bound"] for epoch in results["history"])
    last = results["history"][-1]["seconds"]
    told = f"{last:.2f} s for the second epoch of {count} images"
    print(f"{results['device']}: {told}; bound {first:.2f}, then {second:.2f} nats")
    return 0 if second > first else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
