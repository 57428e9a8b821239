"""`python -m cllm_core.worker`: see cllm_core.worker.process."""

import sys

from cllm_core.worker.process import main

if __name__ == "__main__":
    sys.exit(main())
