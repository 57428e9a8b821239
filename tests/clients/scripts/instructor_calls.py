"""Instructor against the server whose base URL is the first argument; writes what it got in each mode as JSON."""

import json
import sys

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field


class Report(BaseModel):
    """What is asked for."""

    city: str
    degrees: int = Field(ge=-90, le=60)
    tags: set[str]


class StrictReport(BaseModel):
    """The same without what strict schemas cannot say: uniqueItems, which a set is written as."""

    city: str
    degrees: int
    tags: list[str]


MODES: dict[str, type[BaseModel]] = {
    "TOOLS": Report,
    "TOOLS_STRICT": Report,
    "JSON": Report,
    "MD_JSON": Report,
    "JSON_SCHEMA": Report,
    "RESPONSES_TOOLS": StrictReport,
}


def main() -> None:
    """Ask for a report in every mode for OpenAI's API, then partially and as an iterable, streamed."""
    openai = OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
    question = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Report."}],
        "max_retries": 0,
        "strict": False,
    }
    found: dict[str, object] = {}
    for mode, model in MODES.items():
        client = instructor.from_openai(openai, mode=instructor.Mode[mode])
        found[mode] = client.create(response_model=model, **question).model_dump(mode="json")
    client = instructor.from_openai(openai, mode=instructor.Mode.TOOLS)
    *_, last = client.create_partial(response_model=Report, **question)
    found["partial"] = last.model_dump(mode="json")
    found["iterable"] = [
        report.model_dump(mode="json") for report in client.create_iterable(response_model=Report, **question)
    ]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
