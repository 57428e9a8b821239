"""Records are written from a thread of their own: whoever does not read the log holds up nothing."""

import io
import logging
import subprocess
import sys
import threading
import time

from cllm_core.logs import BackgroundHandler


class SlowStream(io.StringIO):
    """Takes nothing before it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()

    def write(self, text: str) -> int:
        self.released.wait(10)
        return super().write(text)


def make_logger(handler: logging.Handler) -> logging.Logger:
    logger = logging.Logger("test")
    logger.addHandler(handler)
    return logger


def test_a_log_that_nobody_reads_holds_up_nobody_and_drops_what_is_too_much() -> None:
    stream = SlowStream()
    handler = BackgroundHandler(logging.StreamHandler(stream), max_waiting=10)
    logger = make_logger(handler)
    started = time.perf_counter()
    for number in range(50):
        logger.warning("record %d", number)
    assert time.perf_counter() - started < 1.0
    assert handler.num_dropped >= 39  # one is being written, ten wait
    stream.released.set()
    handler.stop()
    assert len(stream.getvalue().splitlines()) == 50 - handler.num_dropped
    handler.stop()


def test_what_was_logged_before_the_end_is_written() -> None:
    program = """
import structlog
from cllm_core.logs import configure_logging
configure_logging(level="info", log_format="json", in_background=True)
log = structlog.stdlib.get_logger("a")
for number in range(200):
    log.info("record", number=number)
raise SystemExit(3)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 200


def test_the_last_words_of_a_crash_are_written() -> None:
    program = """
import logging
from cllm_core.logs import configure_logging
configure_logging(level="info", log_format="json", in_background=True)
try:
    raise ValueError("the reason")
except ValueError:
    logging.getLogger("a").exception("crashed")
raise RuntimeError
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "the reason" in done.stderr
