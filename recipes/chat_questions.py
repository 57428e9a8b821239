"""The 140 prompts that cllm-chat is judged by, none of which it was trained on, for `cllm eval --task chat`.

usage: python recipes/chat_questions.py MT_BENCH GSM8K_TEST OUTPUT
"""

import json
import sys
from pathlib import Path

NUM_GSM8K = 60


def main(mt_bench: Path, gsm8k_test: Path, output: Path) -> None:
    """Write both turns of every MT-bench question, each alone, and the first questions of GSM8K's test part."""
    questions = [json.loads(line)["turns"] for line in mt_bench.read_text(encoding="utf-8").splitlines()]
    problems = [json.loads(line)["question"] for line in gsm8k_test.read_text(encoding="utf-8").splitlines()]
    prompts = [turns[0] for turns in questions] + problems[:NUM_GSM8K] + [turns[1] for turns in questions]
    output.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
