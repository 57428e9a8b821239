"""Compares GGUF files of every model of tests.gguf_models with its folder and with llama.cpp, and writes the table of
docs/reference/models.md. `make gguf`; it takes some minutes, and llama.cpp's programs (tests/readers/llama_cpp.py).
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cllm_core.errors import ModelLoadError
from cllm_core.export.config import ExportConfig
from cllm_core.export.run import export_model
from cllm_core.models.gguf.architectures import architecture_written_as
from tests.gguf_models import CONFIGS
from tests.readers.llama_cpp import CONVERTER, SERVER, compare, convert, write_for_converter

PAGE: Final = Path(__file__).parent.parent / "docs" / "reference" / "models.md"
BEGIN: Final = "<!-- gguf: written by `make gguf` -->\n"
END: Final = "<!-- end of gguf -->\n"
HEAD: Final = (
    "| model | architecture | converter's file: folder | llama.cpp | our export: folder | llama.cpp |",
    "| --- | --- | --- | --- | --- | --- |",
)


def table() -> str:
    """Markdown; prints each of its lines."""
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        for line in (*HEAD, *_rows(Path(scratch))):
            sys.stderr.write(f"{line}\n")
            lines.append(f"{line}\n")
    return "".join(lines)


def _rows(root: Path) -> Iterator[str]:
    # not named after the model: what is called phi-3 must have Phi 3's special tokens for llama.cpp
    folders = {name: write_for_converter(root / name / "folder", name) for name in CONFIGS}
    converted = {name: root / f"{name}.converted.gguf" for name in CONFIGS}
    convert({folders[name]: file for name, file in converted.items()})
    for name, folder in folders.items():
        architecture = architecture_written_as(CONFIGS[name])
        assert architecture is not None
        exported = ExportConfig(model=str(folder), output=root / f"{name}.exported.gguf", format="gguf")
        files = converted[name], export_model(exported, lambda stage, fraction: None)
        cells = [cell for file in files for cell in _cells(folder, file)]
        yield f"| {name} | `{architecture.name}` | {' | '.join(cells)} |"


def _cells(folder: Path, file: Path) -> tuple[str, str]:
    try:
        found = compare(folder, file)
    except ModelLoadError:
        return "refused", ""
    return f"{found.to_folder:.1g}", f"{found.to_llama_cpp:.1g}"


def main() -> None:
    """Compare and write the page."""
    if SERVER is None or CONVERTER is None:
        sys.exit("make gguf needs LLAMA_SERVER and LLAMA_CONVERTER, the paths of llama.cpp's programs")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
