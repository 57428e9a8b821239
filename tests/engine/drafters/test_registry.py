"""Sources of drafts by name."""

import pytest

from cllm_core.config import DRAFTERS, DRAFTERS_WITH_PATH, EngineConfig
from cllm_core.engine.drafters.registry import MAKERS
from cllm_core.errors import ConfigError
from cllm_core.request import SamplingParams
from tests.engine.factories import Setup, decode_one, make_request, make_scripted_engine, text_drafters
from tests.engine.scripted import scripted_ar

PROMPT = (2, 3, 4, 5, 6, 7)


def test_every_name_that_settings_take_is_made_by_something() -> None:
    assert set(MAKERS) == {*DRAFTERS, *DRAFTERS_WITH_PATH}


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_source_is_called_as_users_name_it(name: str) -> None:
    assert [source.name for source in text_drafters(EngineConfig(drafters=(name,)))] == [name]


@pytest.mark.parametrize(
    ("drafters", "message"),
    [
        ((), "names none"),
        (("own", "heads"), "'heads' is unknown; give some of own, copy"),
        (("copy", "own", "copy"), "'copy' is given twice"),
        (("own:path",), "'own:path' is unknown"),
    ],
)
def test_wrong_names_are_refused_with_the_known_ones(drafters: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(drafters=drafters)


def test_a_request_takes_only_the_sources_that_it_names() -> None:
    """The scripted text repeats itself: copies are right and the model's own predictions behind a wrong token not."""
    drafted = {}
    for name in ("own", "copy"):
        params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, drafters=(name,))
        drafted[name] = decode_one(make_scripted_engine(Setup(max_model_len=100)), make_request(name, PROMPT, params))
    assert drafted["own"].token_ids == drafted["copy"].token_ids
    assert drafted["own"].stats.num_forward_passes > 1.5 * drafted["copy"].stats.num_forward_passes


def test_a_source_that_knows_nothing_leaves_the_draft_to_stand_ins() -> None:
    engine = make_scripted_engine(Setup(drafters=("copy",)))
    answer = decode_one(engine, make_request("a", PROMPT, SamplingParams(temperature=0, max_tokens=40)))
    assert answer.token_ids == scripted_ar(PROMPT, 40)
