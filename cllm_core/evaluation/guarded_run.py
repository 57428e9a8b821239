"""The process in which `humaneval` runs generated code: sets limits, runs the file, and says so if it got to the end.

Started as a script, in Python's isolated mode: `guarded_run.py PROGRAM SECONDS`, with a token on standard input that
is written to standard output at the end. What the program itself prints is thrown away.
"""

import os
import resource
import runpy
import sys

_MEMORY_BYTES = 2 << 30
_FILE_BYTES = 1 << 20
_OPEN_FILES = 64


def limit_resources(seconds: int) -> None:
    """Bound what this process may use from here on."""
    for kind, limit in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, _MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        bound = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (bound, bound))


def main(program: str, seconds: int) -> None:
    """Run the file `program`, then write the token."""
    token = sys.stdin.readline()
    answer = os.dup(1)
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    limit_resources(seconds)
    runpy.run_path(program, run_name="program")  # not __main__: an answer's unittest.main() would end the process
    os.write(answer, token.encode())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
