"""Tokens per forward pass and speed with and without a JSON schema, decoding token by token and with Jacobi.

    python -m benchmarks.structured --out benchmarks/results/structured [--model MODEL] [--adapter FOLDER] [--rounds 3]

Every way answers every prompt, in turns and round by round, so that a busy machine slows all of them alike. Writes
OUT.json and OUT.md.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from cllm_core.llm import LLM
from cllm_core.models.shipped import DEFAULT_MODEL
from cllm_core.request import SamplingParams
from cllm_core.text.grammar import json_grammar

KEYS = ["first_name", "family_name", "occupation", "year_of_birth", "home"]
SCHEMA = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "maxLength": 20},
        "family_name": {"type": "string", "maxLength": 20},
        "occupation": {"enum": ["teacher", "engineer", "doctor", "farmer", "artist", "other"]},
        "year_of_birth": {"type": "integer", "minimum": 1900, "maximum": 2025},
        "home": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "country": {"type": "string", "maxLength": 20},
            },
            "required": ["city", "country"],
            "additionalProperties": False,
        },
    },
    "required": KEYS,
    "additionalProperties": False,
}
PEOPLE = (
    "Maria Lopez, born in 1984, teaches mathematics at a school in Sevilla, Spain.",
    "The engineer Kenji Tanaka was born in 1991 and lives in Osaka, Japan.",
    "Born in 1955, Doctor Amina Diallo runs a small clinic in Dakar, Senegal.",
    "Peter Novak grows apples near Brno in the Czech Republic. He was born in 1972.",
    "Lena Berg, 1999, paints large murals all over Oslo, Norway.",
    "Rahul Mehta, who was born in 1968, designs bridges in Pune, India.",
)


class Way(msgspec.Struct, frozen=True):
    """One way to decode."""

    name: str
    params: SamplingParams


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """What a way reached over all prompts; tokens per second is the median over rounds."""

    name: str
    tokens_per_forward: float
    tokens_per_second: float
    num_tokens: int
    num_valid: int  # answers that are JSON with all keys of the schema


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All results."""

    model: str
    dtype: str
    processor: str
    num_prompts: int
    num_rounds: int
    speeds: list[Speed]


def ways(block_length: int, max_tokens: int) -> list[Way]:
    """Token by token and with Jacobi, each with and without the schema."""
    grammars = {"free": None, "schema": json_grammar(SCHEMA)}
    return [
        Way(
            f"{form}, {'AR' if length == 1 else f'Jacobi n = {length}'}",
            SamplingParams(temperature=0, max_tokens=max_tokens, block_length=length, grammar=grammar),
        )
        for form, grammar in grammars.items()
        for length in (1, block_length)
    ]


def measure(llm: LLM, all_ways: Sequence[Way], num_rounds: int) -> list[Speed]:
    """Let every way answer every prompt in every round."""
    answers: dict[str, list[list[Answer]]] = {way.name: [] for way in all_ways}
    for _ in range(num_rounds):
        for way in all_ways:
            answers[way.name].append([_answer(llm, person, way.params) for person in PEOPLE])
    return [_speed(name, rounds) for name, rounds in answers.items()]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One output and what it took."""

    text: str
    num_tokens: int
    num_forward_passes: int
    seconds: float


def _answer(llm: LLM, person: str, params: SamplingParams) -> Answer:
    question = f"{person}\nWrite this as a JSON object with the keys {', '.join(KEYS)}."
    started = time.perf_counter()
    result = llm.chat([{"role": "user", "content": question}], params, progress=False)[0]
    stats = result.outputs[0].stats
    return Answer(
        text=result.text,
        num_tokens=stats.num_output_tokens,
        num_forward_passes=stats.num_forward_passes,
        seconds=time.perf_counter() - started,
    )


def _speed(name: str, rounds: list[list[Answer]]) -> Speed:
    first = rounds[0]
    num_tokens = sum(answer.num_tokens for answer in first)
    return Speed(
        name=name,
        tokens_per_forward=num_tokens / sum(answer.num_forward_passes for answer in first),
        tokens_per_second=statistics.median(num_tokens / sum(answer.seconds for answer in one) for one in rounds),
        num_tokens=num_tokens,
        num_valid=sum(_is_valid(answer.text) for answer in first),
    )


def _is_valid(text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and value.keys() == set(KEYS)


def as_markdown(report: Report) -> str:
    """The report as a table."""
    rows = "".join(
        f"| {one.name} | {one.tokens_per_forward:.2f} | {one.tokens_per_second:.1f} | {one.num_valid} of "
        f"{report.num_prompts} |\n"
        for one in report.speeds
    )
    return (
        f"{report.model}, {report.dtype}, {report.processor}; {report.num_prompts} prompts, medians of "
        f"{report.num_rounds} rounds\n\n| | TPF | tokens/s | answers with all keys |\n| --- | --- | --- | --- |\n{rows}"
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        help=f"Hub id, folder, .gguf file or built-in name; left out: {DEFAULT_MODEL}, or the base of --adapter",
    )
    parser.add_argument("--adapter", help="PEFT adapter to merge")
    parser.add_argument("--block-length", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/structured"))
    args = parser.parse_args()
    llm = LLM(args.model, adapter=args.adapter)
    all_ways = ways(args.block_length, args.max_tokens)
    measure(llm, all_ways, num_rounds=1)  # grammars compiled, drafts' lengths learnt
    report = Report(
        model=llm.info.name,
        dtype=llm.info.dtype,
        processor=platform.processor() or platform.machine(),
        num_prompts=len(PEOPLE),
        num_rounds=args.rounds,
        speeds=measure(llm, all_ways, args.rounds),
    )
    args.out.with_suffix(".json").write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    args.out.with_suffix(".md").write_text(as_markdown(report), encoding="utf-8")
    print(as_markdown(report))


if __name__ == "__main__":
    main()
