"""A LoRA adapter whose share is multiplied by a factor: below 1 it is nearer to its base, and slower.

usage: python recipes/scale_adapter.py ADAPTER FACTOR OUTPUT
"""

import shutil
import sys
from pathlib import Path

import msgspec
from safetensors.torch import load_file, save_file

from cllm_core.training.card import FACTS_FILE, TrainingFacts, write_facts

WEIGHTS = "adapter_model.safetensors"


def main(adapter: Path, factor: float, output: Path) -> None:
    """Copy the folder without its checkpoints; every B matrix is multiplied, and the card says so."""
    shutil.copytree(adapter, output, ignore=shutil.ignore_patterns("checkpoints"), dirs_exist_ok=True)
    weights = load_file(adapter / WEIGHTS)
    scaled = {
        name: (factor * value.float()).to(value.dtype) if "lora_B" in name else value for name, value in weights.items()
    }
    save_file(scaled, output / WEIGHTS, metadata={"format": "pt"})
    facts = msgspec.json.decode((adapter / FACTS_FILE).read_bytes(), type=TrainingFacts)
    scale = factor * facts.adapter_scale
    write_facts(output, msgspec.structs.replace(facts, title=output.resolve().name, adapter_scale=scale))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3]))
