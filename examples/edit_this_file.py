"""Edit a file with a predicted output: most of the answer is the file itself, so it seeds the drafts.

    cllm serve &
    pip install openai
    python examples/edit_this_file.py [FILE] [--instruction "Rename ... to ..."] [--base-url http://127.0.0.1:8000/v1]

The answer is asked for twice, without the prediction and with it. It is the same text; only the time differs.
"""

import argparse
import time
from pathlib import Path

from openai import OpenAI
from openai.types.chat import ChatCompletion

SAMPLE = '''\
class Basket:
    """What a customer is about to buy."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.items: list[tuple[str, int]] = []

    def add(self, name: str, price: int) -> None:
        """Put an article into the basket; its price is in cents."""
        self.items.append((name, price))

    def total(self) -> int:
        """Sum of all prices in cents."""
        return sum(price for _, price in self.items)
'''
INSTRUCTION = "Rename the class Basket to Cart. Change nothing else."


def main() -> None:
    """Ask twice and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="a small Python class where left out")
    parser.add_argument("--instruction", default=INSTRUCTION)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--max-tokens", type=int, default=512)
    args = parser.parse_args()
    text = args.file.read_text(encoding="utf-8") if args.file else SAMPLE
    with OpenAI(base_url=args.base_url, api_key=args.api_key) as client:
        answers = []
        for prediction in (None, text):
            started = time.perf_counter()
            answer = edit(client, text, args.instruction, prediction=prediction, max_tokens=args.max_tokens)
            show("with a prediction" if prediction else "without one", answer, time.perf_counter() - started)
            answers.append(answer.choices[0].message.content)
    print(
        "the same answer"
        if answers[0] == answers[1]
        else "another answer: see docs/explanation/exactness.md on near ties"
    )


def edit(client: OpenAI, text: str, instruction: str, *, prediction: str | None, max_tokens: int) -> ChatCompletion:
    """The answer of the first model that the server has."""
    extras = {} if prediction is None else {"prediction": {"type": "content", "content": prediction}}
    return client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": f"{instruction} Answer with the whole file alone.\n\n{text}"}],
        temperature=0,
        max_completion_tokens=max_tokens,
        extra_body={**extras, "include_decoding_stats": True},
    )


def show(name: str, answer: ChatCompletion, seconds: float) -> None:
    """One line on what an answer took."""
    assert answer.usage is not None
    decoding = answer.usage.model_dump()["decoding"]
    details = answer.usage.completion_tokens_details
    accepted = details.accepted_prediction_tokens if details else 0
    print(
        f"{name}: {answer.usage.completion_tokens} tokens in {decoding['forward_passes']} forward passes "
        f"({decoding['tokens_per_forward']:.2f} each), {seconds:.2f} s, {accepted} predicted tokens accepted"
    )


if __name__ == "__main__":
    main()
