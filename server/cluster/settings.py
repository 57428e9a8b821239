"""The settings of a server on a Ray cluster, beside those of each replica."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from cllm_core.errors import ConfigError

from ..engine_settings import CLUSTER, SERVER
from ..settings import ServerSettings


class ClusterSettings(ServerSettings):
    """The settings of `cllm serve` and how many replicas of it run where."""

    response_store: Annotated[
        str,
        SERVER,
        Field(
            min_length=1,
            description="Where /v1/responses keeps answers: off, or the path of a SQLite file that all nodes share.",
        ),
    ] = "off"
    address: Annotated[
        str | None,
        CLUSTER,
        Field(
            description="Of the Ray cluster, as ray://HOST:10001; auto: the one that this machine belongs to. Left "
            "out: a cluster of this machine alone, which ends with the command."
        ),
    ] = None
    app_name: Annotated[str, CLUSTER, Field(min_length=1, description="Name of the application on the cluster.")] = (
        "cllm"
    )
    min_replicas: Annotated[int, CLUSTER, Field(ge=1, description="Replicas that always run.")] = 1
    max_replicas: Annotated[
        int | None, CLUSTER, Field(ge=1, description="Replicas that run under load. Left out: --min-replicas.")
    ] = None
    target_requests: Annotated[
        float | None,
        CLUSTER,
        Field(
            gt=0,
            description="Requests at a replica, waiting ones included, from which on another one is started. Left "
            "out: three quarters of --max-num-seqs.",
        ),
    ] = None
    upscale_delay_seconds: Annotated[
        float, CLUSTER, Field(ge=0, description="Seconds of such load before replicas are added.")
    ] = 15.0
    downscale_delay_seconds: Annotated[
        float, CLUSTER, Field(ge=0, description="Seconds of low load before replicas are taken away.")
    ] = 300.0
    replica_cpus: Annotated[
        float, CLUSTER, Field(ge=0, description="Processors that a replica takes; also its threads on a CPU.")
    ] = 1.0
    replica_gpus: Annotated[float, CLUSTER, Field(ge=0, description="GPUs that a replica takes.")] = 0.0
    num_gateways: Annotated[
        int, CLUSTER, Field(ge=1, description="Processes that read requests and choose their replica.")
    ] = 1

    @property
    def most_replicas(self) -> int:
        """`max_replicas`, or what it is where it is left out."""
        return self.max_replicas or self.min_replicas

    @property
    def target_ongoing_requests(self) -> float:
        """`target_requests`, or what it is where it is left out."""
        return self.target_requests or 0.75 * self.max_num_seqs

    @model_validator(mode="after")
    def _check_cluster(self) -> Self:
        if self.most_replicas < self.min_replicas:
            raise ConfigError(
                f"max_replicas={self.max_replicas}: is less than min_replicas={self.min_replicas}; raise it"
            )
        if self.worker is not None:
            raise ConfigError(f"worker={self.worker}: replicas start workers of their own; leave it out")
        if self.response_store == "memory":
            raise ConfigError(
                "response_store=memory: a replica cannot read what another one stored; "
                "name a SQLite file that all nodes share, or off"
            )
        return self
