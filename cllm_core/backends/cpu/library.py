"""Finds the library of the C kernels and chooses the instruction set that they use on this processor.

The library is compiled when the package is built (setup.py), and at first use where that did not happen.
"""

import ctypes
import logging
from pathlib import Path

from cllm_core.backends.cpu.compilation import (
    SOURCE_FOLDER,
    CompilationFailed,
    compile_library,
    library_name,
    machine_isas,
)
from cllm_core.backends.cpu.kernels import Kernels
from cllm_core.config import CpuIsaName
from cllm_core.errors import ConfigError

logger = logging.getLogger(__name__)

_COST = "Steps will take several times as long, and texts in bfloat16 may change with the other requests of a step."
_REMEDY = "Install a C compiler (gcc and libc6-dev, or clang) and start again."


class KernelLibrary:
    """The compiled kernels.

    Args:
        path: the shared library.

    Attributes:
        library: as ctypes loads it.
        isas: the instruction sets that this processor has and the library was compiled for, the best first.

    Raises:
        OSError: the library cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.isas = tuple(
            isa
            for isa in machine_isas()
            if self.library.cllm_supports(isa.encode()) and hasattr(self.library, f"cllm_{isa}_decode")
        )

    def kernels(self, isa: CpuIsaName = "auto") -> Kernels:
        """The kernels for an instruction set; auto: the best.

        Raises:
            ConfigError: the processor does not have it, or the library was not compiled for it.
        """
        chosen = self.isas[0] if isa == "auto" else isa
        if chosen not in self.isas:
            raise ConfigError(
                f"cpu_isa={isa!r}: the C kernels can use {', '.join(self.isas)} on this processor; "
                "give one of these, or auto"
            )
        return Kernels(self.library, chosen)


def load_library(cache_folder: Path) -> KernelLibrary | None:
    """The library that came with the package, or else of `cache_folder`, where it is compiled if it is not there.

    None where there is none for this processor, with a warning.
    """
    try:
        library = _built(SOURCE_FOLDER) or _built(cache_folder) or KernelLibrary(compile_library(cache_folder))
    except (CompilationFailed, OSError) as error:
        logger.warning("There are no C kernels: %s. %s %s", error, _COST, _REMEDY)
        return None
    if not library.isas:
        logger.warning("There are no C kernels: this processor has none of %s. %s", ", ".join(machine_isas()), _COST)
        return None
    return library


def load_kernels(cache_folder: Path, isa: CpuIsaName = "auto") -> Kernels | None:
    """The kernels of `load_library` for an instruction set.

    Raises:
        ConfigError: as KernelLibrary.kernels.
    """
    library = load_library(cache_folder)
    return None if library is None else library.kernels(isa)


def _built(folder: Path) -> KernelLibrary | None:
    """The library that this folder holds for these sources and this kind of machine."""
    path = folder / library_name()
    if not path.exists():
        return None
    try:
        return KernelLibrary(path)
    except OSError as error:
        logger.warning("%s cannot be loaded: %s", path, error)
        return None
