"""AffinityRouter: Ray Serve's request router that keeps conversations on their replica."""

from collections.abc import Sequence

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from .affinity import Affinity, ReplicaOrder


class AffinityRouter(RequestRouter):
    """Asks replicas in the order of `ReplicaOrder`; calls carry their `affinity` as a keyword argument."""

    def initialize_state(self, adapters: Sequence[str] = ()) -> None:
        """See RequestRouter; `adapters` as in ReplicaOrder."""
        self._order = ReplicaOrder(adapters)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of one replica each; Ray takes the first that has room, and waits a little where none has."""
        affinity = Affinity()
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            affinity = pending_request.kwargs.get("affinity", affinity)
        loads = [self.replica_queue_len_cache.get(replica.replica_id) or 0 for replica in candidate_replicas]
        names = [replica.replica_id.unique_id for replica in candidate_replicas]
        return [[candidate_replicas[index]] for index in self._order.rank(affinity, names, loads)]
