"""Compiles the C kernels when the package is built, so that its users need no compiler. All else of the build is in
pyproject.toml. Without a compiler here the package is built without them; they are compiled at first use then.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).parent
KERNELS = Path("cllm_core/backends/cpu")


def load_compilation() -> ModuleType:
    """The module that compiles the kernels, without the package around it, whose dependencies a build does not have."""
    spec = importlib.util.spec_from_file_location("compilation", ROOT / KERNELS / "compilation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compilation = load_compilation()


class BuildKernels(Command):
    """Step of `build` (see setuptools' SubCommand)."""

    description = "compile the C kernels, where there is a compiler"
    user_options = [("build-lib=", None, "folder to build in")]
    editable_mode = False

    def initialize_options(self) -> None:
        """See Command."""
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        """See Command."""
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        """Leave the library of these sources, and no older one, in the package's folder."""
        library = self._library()
        for old in library.parent.glob("kernels-*.so"):
            if old != library:
                old.unlink()
        if library.exists():
            return
        try:
            compilation.compile_library(library.parent)
        except compilation.CompilationFailed as error:
            self.warn(f"the C kernels are left out, and will be compiled at first use: {error}")

    def get_source_files(self) -> list[str]:
        """See SubCommand; package data lists them."""
        return []

    def get_outputs(self) -> list[str]:
        """See SubCommand."""
        return [str(self._library())] if self._library().exists() else []

    def get_output_mapping(self) -> dict[str, str]:
        """See SubCommand."""
        return {}

    def _library(self) -> Path:
        folder = ROOT if self.editable_mode else Path(str(self.build_lib))
        return folder / KERNELS / compilation.library_name()


class KernelsDistribution(Distribution):
    """Belongs to a platform if the kernels are compiled for it."""

    def has_ext_modules(self) -> bool:
        """See Distribution."""
        return compilation.find_compiler() is not None and bool(compilation.machine_isas())


class PlatformWheel(bdist_wheel):
    """A wheel for any version of Python: ctypes loads the kernels."""

    def get_tag(self) -> tuple[str, str, str]:
        """See bdist_wheel."""
        tag: tuple[str, str, str] = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


build.sub_commands = [*build.sub_commands, ("build_kernels", None)]
setup(
    distclass=KernelsDistribution,
    cmdclass={"build_kernels": BuildKernels, "bdist_wheel": PlatformWheel},
    packages=[
        *find_packages(include=["cllm_core*"]),
        "cllm_server",
        *(f"cllm_server.{name}" for name in find_packages("server")),
    ],
)
