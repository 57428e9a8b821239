"""Consistency LLMs that others published without a cllm.json decode with what they were trained for."""

from pathlib import Path

import pytest

from cllm_core.config import EngineConfig
from cllm_core.engine.build import build_engine
from cllm_core.models import source
from cllm_core.models.cllm_json import PUBLISHED, CllmCard, write_card
from cllm_core.models.source import resolve_source
from cllm_core.request import SamplingParams
from tests.checkpoints import write_checkpoint
from tests.engine.factories import decode_one, greedy_ar, make_request, plain_model

CODER = "JacobiForcing/JacobiForcing_Coder_7B_v1"
PROMPT = tuple(range(40, 60))


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub whose repositories all hold a tiny checkpoint of the architecture of Jacobi Forcing's."""
    folder = write_checkpoint(tmp_path / "checkpoint", "qwen2")
    monkeypatch.setattr(source, "fetch", lambda *args, **settings: folder)
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_its_block_length_and_domain_are_known(published: Path, name: str) -> None:
    card = resolve_source(EngineConfig(model=name), lambda stage, fraction: None).card
    assert card == PUBLISHED[name]
    assert card.block_length == 64


def test_other_ids_and_a_file_beside_the_weights_are_not_overruled(published: Path) -> None:
    assert resolve_source(EngineConfig(model="owner/other"), lambda stage, fraction: None).card is None
    own = CllmCard(format_version=1, block_length=32)
    write_card(published, own)
    assert resolve_source(EngineConfig(model=CODER), lambda stage, fraction: None).card == own


@pytest.mark.parametrize("drafters", [("own", "copy"), ("own", "pool")])
def test_it_decodes_what_its_architecture_says_token_by_token(published: Path, drafters: tuple[str, ...]) -> None:
    config = EngineConfig(model=CODER, dtype="float32", device="cpu", num_cache_blocks=64, drafters=drafters)
    engine = build_engine(config)
    assert (engine.info.block_length, engine.info.domain) == (64, "code")
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    answer = decode_one(engine, make_request("a", PROMPT, params))
    assert answer.token_ids == greedy_ar(plain_model("qwen2"), PROMPT, 40)
