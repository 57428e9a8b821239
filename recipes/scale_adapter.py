"""A LoRA adapter whose share is multiplied by a factor: below 1 it is nearer to its base, and slower.

usage: python recipes/scale_adapter.py ADAPTER FACTOR OUTPUT
"""

import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"


def main(adapter: Path, factor: float, output: Path) -> None:
    """Copy the folder without its checkpoints; every B matrix is multiplied."""
    shutil.copytree(adapter, output, ignore=shutil.ignore_patterns("checkpoints"), dirs_exist_ok=True)
    weights = load_file(adapter / WEIGHTS)
    scaled = {
        name: (factor * value.float()).to(value.dtype) if "lora_B" in name else value for name, value in weights.items()
    }
    save_file(scaled, output / WEIGHTS, metadata={"format": "pt"})


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3]))
