import subprocess
import sys

CHECK = """
import sys
import cllm_core.worker.client, cllm_core.worker.supervisor, cllm_core.worker.process
print(*sorted(sys.modules.keys() & {"torch", "transformers", "cllm_core.engine.engine", "server"}))
"""


def test_the_api_side_imports_neither_torch_nor_transformers() -> None:
    loaded = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, check=True).stdout
    assert loaded.split() == []
