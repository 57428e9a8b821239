"""freeze_garbage_collector acts on a whole process, so in one of its own."""

import subprocess
import sys

_SCRIPT = """
import gc
from cllm_core.heap import freeze_garbage_collector
kept = [[number] for number in range(100_000)]
freeze_garbage_collector()
looked_through = len(gc.get_objects())
assert looked_through < 1000 and gc.isenabled(), looked_through
class Node: pass
def make_garbage():
    for _ in range(50_000):
        node = Node()
        node.itself = node
make_garbage()
left = sum(isinstance(one, Node) for one in gc.get_objects())
assert left < 20_000, left
"""


def test_what_is_there_is_left_alone_and_new_garbage_is_still_found() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
