"""The app as deployments of Ray Serve: gateways that take requests, and replicas that answer them.

    serve run cllm_server.cluster.deployment:build model=SmolLM2-135M-Instruct max_replicas=4

`build` takes the settings by their names (ClusterSettings); so does a file for `serve deploy`.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from ray import serve
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message

from cllm_core.errors import EngineBusy, EngineUnavailable

from ..http.middleware import REQUEST_ID_HEADER
from .affinity import Affinity
from .calls import HttpCall
from .gateway import ReplicaLost, ReplicaMetrics, create_gateway
from .replica import Replica
from .router import AffinityRouter
from .settings import ClusterSettings

# Requests in all at a gateway: they only wait there.
_GATEWAY_REQUESTS = 100_000
_BUSY_RETRY_SECONDS = 2.0
_HEALTH_SECONDS = 5.0


class ReplicaDeployment:
    """A replica; ready once its model is loaded. Ray calls the methods."""

    async def __init__(self, settings: Mapping[str, Any]) -> None:  # type: ignore[misc]
        self._replica = Replica(ClusterSettings(**settings))
        await self._replica.start()

    async def answer(self, call: HttpCall, affinity: Affinity) -> AsyncGenerator[list[Message]]:
        """See Replicas.answer; the affinity is for the router."""
        async for messages in self._replica.answer(call):
            yield messages

    async def answer_whole(self, call: HttpCall) -> list[Message]:
        """All of one answer."""
        return [message async for messages in self._replica.answer(call) for message in messages]

    def metrics(self) -> ReplicaMetrics:
        """See Replicas.metrics."""
        return ReplicaMetrics(serve.get_replica_context().replica_id.unique_id, self._replica.metrics())

    def check_health(self) -> None:
        """A replica whose worker failed for good is replaced."""
        self._replica.check()

    async def __del__(self) -> None:
        await self._replica.stop()


@serve.ingress()
class GatewayDeployment:
    """A gateway. Ray builds its app from it."""

    def __init__(self, replicas: DeploymentHandle, settings: Mapping[str, Any]) -> None:
        self._replicas = _RayReplicas(replicas)
        self._settings = ClusterSettings(**settings)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return create_gateway(self._replicas, self._settings)


class _RayReplicas:
    """Replicas by a handle of Ray Serve."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def answer(self, call: HttpCall, affinity: Affinity) -> AsyncGenerator[list[Message]]:
        response = self._handle.options(method_name="answer", stream=True).remote(call, affinity=affinity)
        is_whole = False
        try:
            async for messages in response:
                for message in messages:
                    if message["type"] == "http.response.start":
                        del MutableHeaders(raw=message["headers"])[REQUEST_ID_HEADER]  # Ray's proxy adds the same
                yield messages
            is_whole = True
        except (RayActorError, ActorUnavailableError) as error:
            raise ReplicaLost(str(error)) from error
        except BackPressureError as error:
            raise EngineBusy(
                "too many requests wait for a replica; try again later", retry_after=_BUSY_RETRY_SECONDS
            ) from error
        except DeploymentUnavailableError as error:
            raise EngineUnavailable("no replica can be started; the cluster's log tells why") from error
        finally:
            if not is_whole:
                response.cancel()

    async def answer_everywhere(self, call: HttpCall) -> Sequence[list[Message]]:
        answers: Sequence[list[Message]] = await self._everywhere("answer_whole", call)
        return answers

    async def metrics(self) -> Sequence[ReplicaMetrics]:
        metrics: Sequence[ReplicaMetrics] = await self._everywhere("metrics")
        return metrics

    async def _everywhere(self, method: str, *arguments: object) -> Any:
        try:
            return await self._handle.broadcast(method, *arguments).results_async()
        except (RayActorError, ActorUnavailableError) as error:
            raise EngineUnavailable("a replica was lost meanwhile; ask again") from error


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """The application with these settings, given by name; lists as CLLM_* variables have them.

    Raises:
        pydantic.ValidationError: a setting is unknown or has a bad value.
    """
    settings = ClusterSettings(**arguments)
    given = settings.model_dump(mode="json", exclude_unset=True)
    gateways = serve.deployment(GatewayDeployment).options(
        name="gateway",
        num_replicas=settings.num_gateways,
        max_ongoing_requests=_GATEWAY_REQUESTS,
        graceful_shutdown_timeout_s=_end_seconds(settings),
        ray_actor_options={"num_cpus": 0},
    )
    return gateways.bind(_replicas(settings).bind(given), given)


def _replicas(settings: ClusterSettings) -> serve.Deployment:
    config = settings.to_engine_config()
    return serve.deployment(ReplicaDeployment).options(
        name="replica",
        **_scale(settings),
        # More would wait at the replica instead of going to one that has room.
        max_ongoing_requests=config.max_num_seqs,
        max_queued_requests=max(1, config.max_waiting),
        graceful_shutdown_timeout_s=_end_seconds(settings),
        health_check_period_s=_HEALTH_SECONDS,
        ray_actor_options={"num_cpus": settings.replica_cpus, "num_gpus": settings.replica_gpus},
        request_router_config=RequestRouterConfig(
            request_router_class=AffinityRouter, request_router_kwargs={"adapters": list(config.adapters)}
        ),
    )


def _scale(settings: ClusterSettings) -> dict[str, object]:
    if settings.min_replicas == settings.most_replicas:
        return {"num_replicas": settings.min_replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=settings.min_replicas,
            max_replicas=settings.most_replicas,
            target_ongoing_requests=settings.target_ongoing_requests,
            upscale_delay_s=settings.upscale_delay_seconds,
            downscale_delay_s=settings.downscale_delay_seconds,
        )
    }


def _end_seconds(settings: ClusterSettings) -> float:
    return settings.drain_seconds + _HEALTH_SECONDS
