"""Which replica a request goes to."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.cluster.affinity import Affinity, ReplicaOrder, read_affinity

REPLICAS = [f"replica-{index}" for index in range(12)]
IDLE = [0] * len(REPLICAS)

affinities = st.builds(Affinity, model=st.sampled_from(["", "base", "sql"]), beginning=st.text(max_size=20))
loads = st.lists(st.integers(0, 40), min_size=len(REPLICAS), max_size=len(REPLICAS))


def first(affinity: Affinity, replicas: list[str], adapters: tuple[str, ...] = ()) -> str:
    return replicas[ReplicaOrder(adapters).rank(affinity, replicas, [0] * len(replicas))[0]]


def body(**fields: object) -> bytes:
    return json.dumps(fields).encode()


@given(affinities, loads)
def test_every_replica_is_asked_once_and_those_over_their_share_last(affinity: Affinity, loads: list[int]) -> None:
    order = ReplicaOrder(["sql"]).rank(affinity, REPLICAS, loads)
    assert sorted(order) == list(range(len(REPLICAS)))
    limit = max(4, -(-5 * (sum(loads) + 1) // (4 * len(loads))))
    is_full = [loads[index] >= limit for index in order]
    assert is_full == sorted(is_full)
    overloaded = [loads[index] for index in order if loads[index] >= limit]
    assert overloaded == sorted(overloaded)


@given(affinities.filter(lambda affinity: affinity.beginning != ""), st.permutations(REPLICAS))
def test_gateways_agree_whatever_order_they_know_replicas_in(affinity: Affinity, shuffled: list[str]) -> None:
    assert first(affinity, shuffled, ("sql",)) == first(affinity, REPLICAS, ("sql",))


def test_a_replica_that_leaves_moves_its_own_conversations_alone() -> None:
    rest = REPLICAS[1:]
    conversations = [Affinity("base", str(index)) for index in range(500)]
    moved = [one for one in conversations if first(one, REPLICAS) != first(one, rest)]
    assert moved == [one for one in conversations if first(one, REPLICAS) == REPLICAS[0]]
    assert 0 < len(moved) < 100


def test_conversations_are_spread_evenly() -> None:
    counts = Counter(first(Affinity("base", str(index)), REPLICAS) for index in range(6000))
    assert min(counts.values()) > 400
    assert max(counts.values()) < 600


def test_an_adapter_keeps_to_a_quarter_of_the_replicas_while_they_keep_up() -> None:
    order = ReplicaOrder(["sql"])
    firsts = {order.rank(Affinity("sql", str(index)), REPLICAS, IDLE)[0] for index in range(200)}
    assert len(firsts) == 3
    loads = [9 if index in firsts else 0 for index in range(len(REPLICAS))]
    assert order.rank(Affinity("sql", "any"), REPLICAS, loads)[0] not in firsts


def test_a_request_without_a_beginning_goes_to_the_least_loaded() -> None:
    loads = [3] * len(REPLICAS)
    loads[7] = 1
    assert ReplicaOrder().rank(Affinity(), REPLICAS, loads)[0] == 7


def test_all_turns_of_a_conversation_have_one_affinity() -> None:
    messages: list[dict[str, object]] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    begun = read_affinity(body(model="m", messages=messages))
    messages += [{"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "And?"}]
    assert read_affinity(body(model="m", messages=messages)) == begun
    assert begun.model == "m"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, {"messages": [{"role": "user", "content": "b"}]}),
        ({"messages": [{"role": "system", "content": "a"}]}, {"messages": [{"role": "system", "content": "b"}]}),
        ({"prompt": "a"}, {"prompt": "b"}),
        ({"prompt": [1, 2]}, {"prompt": [1, 3]}),
        ({"input": "a"}, {"input": [{"role": "user", "content": "b"}]}),
        ({"instructions": "a", "input": "c"}, {"instructions": "b", "input": "c"}),
        ({"model": "a", "prompt": "c"}, {"model": "b", "prompt": "c"}),
        ({"prompt_cache_key": "a", "prompt": "c"}, {"prompt_cache_key": "b", "prompt": "c"}),
    ],
)
def test_other_conversations_have_other_affinities(one: dict[str, object], other: dict[str, object]) -> None:
    assert read_affinity(body(**one)) != read_affinity(body(**other))


def test_long_prompts_that_begin_alike_go_together() -> None:
    document = "All of the document. " * 200
    questions = [read_affinity(body(prompt=f"{document} Question {index}?")) for index in range(3)]
    assert len(set(questions)) == 1


def test_the_client_may_name_what_is_cached_together() -> None:
    assert read_affinity(body(prompt_cache_key="k", prompt="a")) == read_affinity(
        body(prompt_cache_key="k", prompt="b")
    )


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["model", "messages", "input", "prompt", "role", "content", "instructions"]),
                inner,
                max_size=4,
            )
        ),
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_body_has_an_affinity(given_body: bytes) -> None:
    assert isinstance(read_affinity(given_body), Affinity)
    ReplicaOrder().rank(read_affinity(given_body), REPLICAS, IDLE)


def test_deep_nesting_has_no_affinity_and_no_error() -> None:
    assert read_affinity(b"[" * 100_000) == Affinity()
