"""The queue lets users take turns, keeps each one's order, and lets nobody starve."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_core.engine.request_state import RequestState
from cllm_core.engine.waiting_queue import WaitingQueue
from cllm_core.request import NewRequest, SamplingParams


def make_state(name: str, *, user: str = "", weight: float = 1.0, priority: int = 0) -> RequestState:
    request = NewRequest(
        request_id=name, prompt_ids=(1,), params=SamplingParams(), user=user, weight=weight, priority=priority
    )
    return RequestState(request=request, seed=0, block_length=1, max_tokens=1, stop_token_ids=frozenset())


def queue_of(*states: RequestState) -> WaitingQueue:
    queue = WaitingQueue()
    for state in states:
        queue.add(state)
    return queue


def drain(queue: WaitingQueue, most: int = 10**6) -> list[str]:
    return [queue.pop().request_id for _ in range(min(most, len(queue)))]


def test_one_user_is_served_in_the_order_of_arrival() -> None:
    names = [str(number) for number in range(50)]
    assert drain(queue_of(*(make_state(name) for name in names))) == names


def test_a_request_stands_behind_the_first_of_a_user_with_a_hundred() -> None:
    queue = queue_of(*(make_state(f"a{number}", user="a") for number in range(100)))
    assert drain(queue, 10) == [f"a{number}" for number in range(10)]
    queue.add(make_state("b0", user="b"))
    queue.add(make_state("b1", user="b"))
    assert drain(queue, 4) in (["b0", "a10", "b1", "a11"], ["a10", "b0", "a11", "b1"], ["b0", "a10", "a11", "b1"])


def test_turns_are_shared_by_weight() -> None:
    states = [make_state(f"{user}{n}", user=user, weight=w) for n in range(60) for user, w in (("a", 3.0), ("b", 1.0))]
    first = Counter(name[0] for name in drain(queue_of(*states), 40))
    assert first["a"] == pytest.approx(30, abs=1)


def test_a_user_that_was_idle_has_saved_nothing_up() -> None:
    queue = queue_of(*(make_state(f"a{n}", user="a") for n in range(20)))
    drain(queue, 20)
    for n in range(5):
        queue.add(make_state(f"b{n}", user="b"))
        queue.add(make_state(f"a{n}", user="a"))
    assert Counter(name[0] for name in drain(queue, 6)) == {"a": 3, "b": 3}


def test_lower_priority_numbers_go_first_and_preempted_requests_before_all() -> None:
    queue = queue_of(make_state("late", priority=5), make_state("plain"), make_state("urgent", priority=-1))
    queue.add_first(make_state("preempted first"))
    queue.add_first(make_state("preempted last"))
    assert [state.request_id for state in queue] == [
        *("preempted last", "preempted first", "urgent", "plain", "late"),
    ]


def test_users_that_come_and_go_leave_nothing_behind() -> None:
    queue = queue_of(make_state("the first"), make_state("the second"))
    for number in range(3000):
        queue.add(make_state(str(number), user=f"user {number}"))
        queue.pop()
    assert len(queue._next_start) <= 1024


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0.5, 1.0, 4.0]), st.booleans()), max_size=60))
def test_every_request_leaves_once_in_the_order_of_its_user(events: list[tuple[str, float, bool]]) -> None:
    queue, seen, sent = WaitingQueue(), [], Counter[str]()
    for user, weight, pops in events:
        queue.add(make_state(f"{user}{sent[user]:03}", user=user, weight=weight))
        sent[user] += 1
        if pops:
            seen.append(queue.pop().request_id)
    seen += drain(queue)
    assert len(queue) == 0
    for user in "abc":
        assert [name for name in seen if name[0] == user] == [f"{user}{n:03}" for n in range(sent[user])]


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=60), st.data())
def test_a_request_can_leave_from_anywhere(users: list[str], data: st.DataObject) -> None:
    states = [make_state(f"{n}", user=user) for n, user in enumerate(users)]
    queue = queue_of(*states)
    gone = data.draw(st.sampled_from(states))
    before = [state.request_id for state in queue]
    queue.remove(gone)
    assert [state.request_id for state in queue] == [name for name in before if name != gone.request_id]
    with pytest.raises(KeyError):
        queue.remove(gone)
