"""A rank above 0: loads its part of the model, then computes what rank 0 says on standard input until that is closed.

python -m cllm_core.parallel.follower --config JSON --rank 1 --port 12345
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import BinaryIO

import msgspec

from cllm_core.backends.choose import prepare_model
from cllm_core.backends.paged_model import PagedModel
from cllm_core.config import EngineConfig
from cllm_core.errors import CllmError
from cllm_core.models.loader import load_model
from cllm_core.parallel.group import join_group, leave_group
from cllm_core.parallel.messages import AllocateCache, ClearBlocks, Forward, FreeCache, read_message

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Follow rank 0; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="EngineConfig as JSON")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--port", type=int, required=True, help="where rank 0 waits")
    options = parser.parse_args(arguments)
    config = msgspec.json.decode(options.config, type=EngineConfig)
    try:
        join_group(config, rank=options.rank, port=options.port)
        loaded = load_model(config, lambda stage, fraction: None)
        follow(prepare_model(config, loaded.model), sys.stdin.buffer)
    except CllmError as error:  # rank 0 has the same one
        logger.info("rank %d: %s", options.rank, error)
        return 1
    finally:
        leave_group()
    return 0


def follow(model: PagedModel, pipe: BinaryIO) -> None:
    """Make the calls that come through the pipe until it is closed; results other than the cache are rank 0's alone."""
    while (message := read_message(pipe)) is not None:
        match message:
            case AllocateCache(num_blocks, block_size):
                model.allocate_cache(num_blocks=num_blocks, block_size=block_size)
            case ClearBlocks(block_ids):
                model.clear_blocks(block_ids)
            case FreeCache():
                model.free_cache()
            case Forward(rows=rows):
                input_ids, positions, sampled = message.tensors(model.device)
                model.forward(input_ids, positions, rows, sampled)


if __name__ == "__main__":
    sys.exit(main())
