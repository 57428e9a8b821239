"""Routing by affinity among many replicas, simulated: how much of the prompts is found in a cache, and the balance.

    python -m benchmarks.routing [--replicas 1000] [--gateways 20] [--seconds 120]

Conversations arrive as a Poisson process, each of some turns with pauses between them. Every prompt is a system prompt,
one of 200 whose popularity falls as 1 / rank, and all earlier turns. A replica remembers the prompts of its latest
conversations, as many tokens as its cache has, and answers a turn in a time that grows with what it has to compute and
with how many it answers. Each gateway knows the loads of replicas as they were at its latest look, and its own requests
since. Compared: the order of `server.cluster.affinity`, two random choices (Ray Serve's default), one random choice.
"""

import argparse
import heapq
import itertools
import random
import statistics
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from server.cluster.affinity import Affinity, ReplicaOrder

SYSTEM_PROMPTS = 200
SYSTEM_TOKENS = 600
TURN_TOKENS = 150
MEAN_TURNS = 5
PAUSE_SECONDS = 10.0
CACHE_TOKENS = 200_000
PROMPT_TOKENS_PER_SECOND = 5_000.0
ANSWER_SECONDS = 2.0
LOAD_PER_REPLICA = 4.0
LOOK_SECONDS = 1.0

Choose = Callable[[Affinity, Sequence[int]], int]


@dataclass
class Replica:
    """A replica: its requests, and the conversations and system prompts that it has cached, the latest last."""

    load: int = 0
    cached: OrderedDict[str, int] = field(default_factory=OrderedDict)

    def take(self, system: str, conversation: str, prompt_tokens: int) -> int:
        """Tokens of the prompt that are found; all of it is cached afterwards."""
        found = self.cached.get(conversation, self.cached.get(system, 0))
        for name, size in ((system, SYSTEM_TOKENS), (conversation, prompt_tokens + TURN_TOKENS)):
            self.cached[name] = size
            self.cached.move_to_end(name)
        while sum(self.cached.values()) > CACHE_TOKENS:
            self.cached.popitem(last=False)
        return min(found, prompt_tokens)


@dataclass
class Gateway:
    """What one gateway believes of the loads."""

    known: list[int]
    looked_at: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What a policy came to."""

    name: str
    num_requests: int
    found: float  # share of prompt tokens
    most_over_mean: float  # load of the busiest replica over the mean, median over time
    p99_over_mean: float


class Simulation:
    """One policy over the arrivals of a seed.

    Args:
        choose: the policy.
        num_replicas: all alike.
        num_gateways: each with loads of its own belief.
    """

    def __init__(self, choose: Choose, *, num_replicas: int, num_gateways: int) -> None:
        self._choose = choose
        self._rng = random.Random(0)
        self._replicas = [Replica() for _ in range(num_replicas)]
        self._gateways = [Gateway([0] * num_replicas) for _ in range(num_gateways)]
        self._turns_per_second = num_replicas * LOAD_PER_REPLICA / ANSWER_SECONDS
        self._weights = [1 / rank for rank in range(1, SYSTEM_PROMPTS + 1)]
        self._events: list[tuple[float, int, Callable[..., None], tuple[int, ...]]] = []
        self._counter = itertools.count()
        self._now = self._warm_at = 0.0
        self._num_requests = self._prompt_tokens = self._found_tokens = 0
        self._peaks: list[float] = []
        self._nines: list[float] = []

    def run(self, name: str, seconds: float) -> Outcome:
        """What counts is the second half, when caches are warm."""
        self._warm_at = seconds / 2
        self._after(0.0, self._arrive, 0)
        self._after(self._warm_at, self._look)
        while self._now <= seconds:
            self._now, _, happen, values = heapq.heappop(self._events)
            happen(*values)
        found = self._found_tokens / self._prompt_tokens
        return Outcome(name, self._num_requests, found, statistics.median(self._peaks), statistics.median(self._nines))

    def _after(self, seconds: float, happen: Callable[..., None], *values: int) -> None:
        heapq.heappush(self._events, (self._now + seconds, next(self._counter), happen, values))

    def _arrive(self, conversation: int) -> None:
        (system,) = self._rng.choices(range(SYSTEM_PROMPTS), self._weights)
        self._turn(conversation, system, 0)
        self._after(self._rng.expovariate(self._turns_per_second / MEAN_TURNS), self._arrive, conversation + 1)

    def _turn(self, conversation: int, system: int, turn: int) -> None:
        index = self._route(Affinity("", f"{system}/{conversation}"))
        size = SYSTEM_TOKENS + (2 * turn + 1) * TURN_TOKENS
        replica = self._replicas[index]
        found = replica.take(f"system {system}", str(conversation), size)
        replica.load += 1
        if self._now > self._warm_at:
            self._num_requests += 1
            self._prompt_tokens += size
            self._found_tokens += found
        seconds = (size - found) / PROMPT_TOKENS_PER_SECOND + ANSWER_SECONDS * (1 + replica.load / 32)
        self._after(seconds, self._answered, index)
        if self._rng.random() > 1 / MEAN_TURNS:
            pause = self._rng.expovariate(1 / PAUSE_SECONDS)
            self._after(seconds + pause, self._turn, conversation, system, turn + 1)

    def _route(self, affinity: Affinity) -> int:
        gateway = self._rng.choice(self._gateways)
        if self._now - gateway.looked_at > LOOK_SECONDS:
            gateway.known, gateway.looked_at = [replica.load for replica in self._replicas], self._now
        index = self._choose(affinity, gateway.known)
        gateway.known[index] += 1
        return index

    def _answered(self, index: int) -> None:
        self._replicas[index].load -= 1

    def _look(self) -> None:
        loads = sorted(replica.load for replica in self._replicas)
        mean = statistics.fmean(loads)
        self._peaks.append(loads[-1] / mean)
        self._nines.append(loads[int(0.99 * len(loads))] / mean)
        self._after(LOOK_SECONDS, self._look)


def policies(num_replicas: int) -> dict[str, Choose]:
    """The policies compared."""
    rng = random.Random(1)
    names = [f"replica-{index}" for index in range(num_replicas)]
    order = ReplicaOrder()

    def by_affinity(affinity: Affinity, loads: Sequence[int]) -> int:
        return order.rank(affinity, names, loads)[0]

    def two_choices(_: Affinity, loads: Sequence[int]) -> int:
        return min(rng.sample(range(num_replicas), 2), key=loads.__getitem__)

    def one_choice(_: Affinity, loads: Sequence[int]) -> int:
        return rng.randrange(len(loads))

    return {"affinity": by_affinity, "two random choices": two_choices, "one random choice": one_choice}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--gateways", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120.0)
    options = parser.parse_args()
    print("| policy | requests | prompt tokens found in a cache | load: p99 over mean | load: most over mean |")
    print("| --- | --- | --- | --- | --- |")
    for name, choose in policies(options.replicas).items():
        simulation = Simulation(choose, num_replicas=options.replicas, num_gateways=options.gateways)
        outcome = simulation.run(name, options.seconds)
        print(
            f"| {name} | {outcome.num_requests} | {outcome.found:.1%} | {outcome.p99_over_mean:.2f} "
            f"| {outcome.most_over_mean:.2f} |"
        )


if __name__ == "__main__":
    main()
