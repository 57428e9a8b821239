from cllm_core.worker.supervisor import Loss, RestartPolicy


def crash(ready_seconds: float | None = 1.0, *, retry: bool = True) -> Loss:
    return Loss("killed", retry=retry, ready_seconds=ready_seconds)


def test_the_wait_doubles_up_to_its_bound() -> None:
    policy = RestartPolicy(first_delay=0.5, max_delay=3.0)
    assert [policy.delay_after(crash()) for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_a_while_of_health_starts_the_count_anew() -> None:
    policy = RestartPolicy(first_delay=0.5, healthy_seconds=60)
    policy.delay_after(crash())
    policy.delay_after(crash())
    assert policy.delay_after(crash(ready_seconds=61)) == 0.5
    assert policy.delay_after(crash(ready_seconds=59)) == 1.0


def test_a_worker_that_never_gets_ready_is_given_up() -> None:
    policy = RestartPolicy(max_failed_starts=3)
    delays = [policy.delay_after(crash(None)) for _ in range(3)]
    assert None not in delays[:2]
    assert delays[2] is None


def test_only_failed_starts_in_a_row_count() -> None:
    policy = RestartPolicy(max_failed_starts=2)
    losses = [crash(None), crash(), crash(None), crash()]
    assert None not in [policy.delay_after(loss) for loss in losses]


def test_a_failure_that_retrying_cannot_mend_is_given_up_at_once() -> None:
    assert RestartPolicy().delay_after(crash(None, retry=False)) is None


def test_a_policy_without_limit_never_gives_up() -> None:
    policy = RestartPolicy(max_failed_starts=None)
    assert None not in [policy.delay_after(crash(None, retry=False)) for _ in range(50)]
