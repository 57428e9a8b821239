"""The cllm-sql that comes with the package writes SQL, in few passes, on a schema that is in no data set."""

import sqlite3

import pytest

from cllm_core.config import EngineConfig
from cllm_core.engine.build import build_engine
from cllm_core.evaluation.answering import ChatCodec
from cllm_core.models.shipped import shipped_names
from cllm_core.request import SamplingParams
from tests.engine.factories import decode, make_request

pytestmark = pytest.mark.slow

SCHEMA = {
    "bakery": "id integer, name text, city text, founded integer",
    "bread": "id integer, bakery_id integer, name text, price real, weight integer",
}
QUESTIONS = (
    "How many bakeries are there?",
    "List the names of all breads, from the most expensive to the cheapest.",
    "What is the average price of the breads?",
    "Show the names of bakeries in the city of Lyon that were founded after 1950.",
    "How many breads does each bakery have?",
)


def prompt(question: str) -> str:
    columns = {table: [part.split()[0] for part in parts.split(", ")] for table, parts in SCHEMA.items()}
    return "\n".join(f"{table}({', '.join(names)})" for table, names in columns.items()) + f"\n\n{question}"


def runs(database: sqlite3.Connection, query: str) -> bool:
    try:
        database.execute(query)
    except sqlite3.Error:
        return False
    return True


@pytest.mark.skipif("cllm-sql" not in shipped_names(), reason="this build brings no cllm-sql")
def test_cllm_sql_writes_sql_in_few_passes() -> None:
    config = EngineConfig(model="cllm-sql", device="cpu", cache_memory_gib=0.2, adaptive_block_length=False)
    engine = build_engine(config)
    codec = ChatCodec(engine.info.tokenizer, engine.info.name)
    params = SamplingParams(temperature=0, max_tokens=64)
    answers = decode(engine, [make_request(q, codec.prompt_ids(prompt(q)), params) for q in QUESTIONS])
    database = sqlite3.connect(":memory:")
    for table, columns in SCHEMA.items():
        database.execute(f"CREATE TABLE {table} ({columns})")
    queries = [
        codec.text.decode([i for i in answer.token_ids if i not in engine.info.eos_token_ids])
        for answer in answers.values()
    ]
    # a model of this size makes mistakes: it is known to close a quoted text with the other quote
    assert sum(runs(database, query) for query in queries) >= len(QUESTIONS) - 1
    num_tokens = sum(len(answer.token_ids) for answer in answers.values())
    num_passes = sum(answer.stats.num_forward_passes for answer in answers.values())
    assert num_tokens > 1.8 * num_passes
