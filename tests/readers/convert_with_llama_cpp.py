"""Runs llama.cpp's converter. Arguments: convert_hf_to_gguf.py, and FOLDER=FILE for each model to convert to float32.

The converter knows how a byte-level tokenizer splits texts by a hash of its ids for one text. The tiny ones are not
among those, so it is told: as GPT-2 does, except that transformers lets every tokenizer of a Qwen 2 model split as
Qwen's own. SentencePiece models are read as they lie in the folder.
"""

import runpy
import sys
from pathlib import Path


def main(converter: str, *tasks: str) -> None:
    """Convert one model after the other, in one process: most of the time goes into imports."""
    home = Path(converter).parent
    sys.path[:0] = [str(home), str(home / "gguf-py")]
    from conversion.base import TextModel  # type: ignore[import-not-found]  # noqa: PLC0415 - found only now

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2" if self.model_arch.name == "QWEN2" else "gpt-2"
    for task in tasks:
        folder, file = task.split("=")
        sys.argv = [converter, folder, "--outfile", file, "--outtype", "f32"]
        runpy.run_path(converter, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
