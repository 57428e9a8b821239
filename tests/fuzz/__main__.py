"""`make fuzz`: atheris on one target after the other, each in a process of its own.

    python -m tests.fuzz [--seconds 60] [TARGET ...]

Bytes that break a law are left in build/fuzz/TARGET, as is the corpus that has been found; exit code 1.
"""

import argparse
import subprocess
import sys
from pathlib import Path

NAMES = ("request_body", "tool_calls", "output_text", "detokenizer", "wire_messages")
"""Of tests.fuzz.targets, which is not imported before it is to be instrumented."""

INSTRUMENTED = ["cllm_core", "server", "tests.fuzz"]
FOLDER = Path("build") / "fuzz"


def fuzz_here(name: str, seconds: int) -> None:
    """Fuzz one target in this process, which ends with it."""
    import atheris  # noqa: PLC0415  # not among the developers' tools: `make fuzz` installs it

    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz.targets import TARGETS, seeds  # noqa: PLC0415

    corpus = FOLDER / name / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds()[name]):
        (corpus / f"seed-{number}").write_bytes(data)
    options = [
        f"-max_total_time={seconds}",
        f"-artifact_prefix={FOLDER / name}/",
        "-max_len=600",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], TARGETS[name])
    atheris.Fuzz()


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"one of {', '.join(NAMES)}; left out: all")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        fuzz_here(options.targets[0], options.seconds)
        return 0
    failed = []
    for name in options.targets or NAMES:
        command = [sys.executable, "-m", "tests.fuzz", "--here", "--seconds", str(options.seconds), name]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        executed = [line.split()[-1] for line in done.stderr.splitlines() if "number_of_executed_units" in line]
        sys.stdout.write(f"{name}: {executed[0] if executed else '?'} executions, exit code {done.returncode}\n")
        if done.returncode:
            failed.append(name)
            sys.stdout.write(done.stderr[-3000:] + "\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
