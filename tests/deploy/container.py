"""Builds the image without a container daemon, and runs it as an orchestrator would. Needs root, buildah, debootstrap.

    python -m tests.deploy.container build    the base image, where it is missing, and the image of the cpu variant
    python -m tests.deploy.container size     of that image and its largest parts
    python -m tests.deploy.container serve    it until Ctrl-C, read-only and without privileges

The base image stands in for the one of the Dockerfile, which comes from a registry of images: Debian with its Python.
pip and apt see what they see on this machine, by their configuration mounted for the time of the build.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASE = "localhost/cllm-test-base"
IMAGE = "localhost/cllm-test"
PACKAGES = "python3,python3-venv,python-is-python3,ca-certificates"
ENVIRONMENT = {**os.environ, "BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "vfs"}

# What Docker does for `read_only`, `tmpfs`, `cap_drop: ALL`, `no-new-privileges` and a volume at /cache. $1 is the root
# of the container's files, $2 the volume, all behind it the command.
_RUN = """
root=$1 cache=$2
shift 2
mount --bind "$root" "$root"
mount --bind "$cache" "$root/cache"
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/tmp"
mount -o remount,bind,ro "$root"
cd "$root"
exec chroot "$root" setpriv --reuid=10001 --regid=10001 --clear-groups --no-new-privs \\
    --bounding-set=-all --inh-caps=-all env --ignore-environment "$@"
"""


def missing_tools() -> list[str]:
    """What this machine lacks for a build."""
    tools = [tool for tool in ("buildah", "debootstrap", "setpriv", "unshare") if shutil.which(tool) is None]
    return tools + ([] if os.geteuid() == 0 else ["root"])


def buildah(*arguments: str, capture: bool = False) -> str:
    """What buildah prints, where it is captured."""
    done = subprocess.run(
        ["buildah", *arguments], env=ENVIRONMENT, check=True, text=True, stdout=subprocess.PIPE if capture else None
    )
    return (done.stdout or "").strip()


def build_base() -> None:
    """Debian with Python as an image, unless it is there."""
    if BASE in buildah("images", "--format", "{{.Name}}", capture=True).split():
        return
    with tempfile.TemporaryDirectory() as folder:
        mirror = [os.environ["DEBIAN_MIRROR"]] if "DEBIAN_MIRROR" in os.environ else []
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", folder, *mirror]
        subprocess.run(command, check=True)
        subprocess.run(["umount", "--quiet", f"{folder}/proc"], check=False)
        add_base(Path(folder))


def add_base(files: Path) -> None:
    """Make these files the base image."""
    container = buildah("from", "scratch", capture=True)
    subprocess.run(
        ["cp", "--archive", "--one-file-system", f"{files}/.", buildah("mount", container, capture=True)], check=True
    )
    buildah("config", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", container)
    buildah("commit", "--quiet", "--rm", container, BASE)


def build_image() -> None:
    """The cpu variant, with torch from where pip finds it here."""
    build_base()
    with tempfile.TemporaryDirectory() as folder:
        arguments = {"PYTHON_IMAGE": BASE, "VARIANT": "cpu", "TORCH_SOURCE": "pip"}
        buildah(
            "build", "--tag", IMAGE, "--pull-never",
            *(f"--build-arg={name}={value}" for name, value in arguments.items()),
            *(f"--volume={volume}" for volume in build_volumes(Path(folder) / "pip.conf")),
            str(ROOT),
        )  # fmt: skip


def build_volumes(pip_configuration: Path) -> list[str]:
    """Certificates, pip's configuration in one file, and the local files and folders that it names."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True)
    options = dict(line.split("=", 1) for line in listed.stdout.splitlines())
    values = {name.rpartition(".")[2]: shlex.split(value)[0] for name, value in options.items()}
    pip_configuration.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in values.items()))
    words = [word for value in values.values() for word in value.split()]
    # The pages of a local index point at files beside it.
    indices = {Path(word.removeprefix("file://")).parent for word in words if word.startswith("file://")}
    local = indices | {Path(word) for word in words if word.startswith("/") and Path(word).exists()}
    mounted = {Path("/etc/ssl/certs"), *(path for path in local if not path.is_relative_to("/etc/ssl/certs"))}
    return [f"{pip_configuration}:/etc/pip.conf:ro", *(f"{path}:{path}:ro" for path in sorted(mounted))]


@contextmanager
def image_files() -> Iterator[Path]:
    """The image's files, in a container of their own for the time of the block."""
    container = buildah("from", "--pull-never", IMAGE, capture=True)
    try:
        yield Path(buildah("mount", container, capture=True))
    finally:
        buildah("rm", container, capture=True)


def command_of(environment: Mapping[str, str]) -> list[str]:
    """The image's own environment and command, and variables beside those."""
    config = json.loads(buildah("inspect", "--type=image", IMAGE, capture=True))["OCIv1"]["config"]
    added = [f"{name}={value}" for name, value in environment.items()]
    return [*config["Env"], *added, *config["Entrypoint"], *config["Cmd"]]


@contextmanager
def running_image(log: Path, cache: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """The server of the image, its root read-only, its user 10001 without any capability."""
    cache.mkdir(parents=True, exist_ok=True)
    os.chown(cache, 10001, 10001)
    with image_files() as files, log.open("wb") as stderr:
        command = ["unshare", "--mount", "sh", "-euc", _RUN, "sh", str(files), str(cache), *command_of(environment)]
        with subprocess.Popen(command, stderr=stderr) as process:
            try:
                yield process
            finally:
                process.terminate()
                process.wait(timeout=120)


def print_sizes() -> None:
    """Of the whole and of its largest packages, in MiB."""
    with image_files() as files:
        sizes = {"/": mebibytes(files)}
        for path in files.glob("opt/venv/lib/python3*/site-packages/*"):
            sizes[path.name] = mebibytes(path)
        for name, size in sorted(sizes.items(), key=lambda item: -item[1])[:12]:
            sys.stdout.write(f"{size:6} MiB  {name}\n")


def mebibytes(path: Path) -> int:
    """Disk space of a file or folder."""
    command = ["du", "--summarize", "--block-size=1M", "--one-file-system", str(path)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0])


def main() -> None:
    """See the head of this file."""
    if missing := missing_tools():
        sys.exit(f"needed and not here: {', '.join(missing)}")
    match sys.argv[1:]:
        case ["build"]:
            build_image()
        case ["size"]:
            print_sizes()
        case ["serve"]:
            with (
                tempfile.TemporaryDirectory() as cache,
                running_image(Path("/dev/stderr"), Path(cache), {"CLLM_HOST": "127.0.0.1"}) as process,
            ):
                process.wait()
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
