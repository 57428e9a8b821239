"""docs/reference/python.md names everything that the offline API offers, with its defaults."""

import dataclasses
import inspect
import re
from pathlib import Path

from cllm_core import LLM, SamplingParams
from cllm_core.llm import GeneratedOutput, GenerationResult

PAGE = (Path(__file__).parent.parent / "docs" / "reference" / "python.md").read_text(encoding="utf-8")


def test_every_sampling_parameter_is_in_the_table_with_its_default() -> None:
    table = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", PAGE, re.MULTILINE))
    defaults = SamplingParams()
    assert table == {name: str(getattr(defaults, name)) for name in SamplingParams.__struct_fields__}


def test_every_method_is_on_the_page_with_its_parameters() -> None:
    for name, member in inspect.getmembers(LLM, lambda value: inspect.isfunction(value) or isinstance(value, property)):
        if name.startswith("_"):
            continue
        assert f"`{name}" in PAGE
        if inspect.isfunction(member):
            documented = re.search(rf"`{name}\(([^)]*(?:\([^)]*\))?[^)]*)\)`", PAGE)
            assert documented, name
            parameters = list(inspect.signature(member).parameters)[1:]
            assert re.findall(r"(\w+)(?==|,|$)(?:=[^,]*)?", documented[1].replace(", *,", ",")) == parameters


def test_every_field_of_a_result_is_on_the_page() -> None:
    names = {field.name for kind in (GenerationResult, GeneratedOutput) for field in dataclasses.fields(kind)}
    assert {name for name in names if f"`{name}`" not in PAGE} == set()
