"""What an engine learnt of drafts can be put aside, so that measurements do not learn from each other."""

from cllm_core.engine.step_times import StepTimes
from cllm_core.request import SamplingParams
from tests.engine.factories import Setup, decode_one, make_request, make_scripted_engine


def test_an_engine_begins_anew_and_goes_on_where_it_was() -> None:
    engine = make_scripted_engine(Setup(drafters=("own", "copy")), StepTimes({1: 0.01, 64: 0.011}, 64))
    shared = engine.runner.drafting.shared
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    decode_one(engine, make_request("a", (2, 3, 4, 5, 6), params))
    lengths = list(shared.lengths)
    assert max(lengths) > 1
    before = engine.exchange_learnt(None)
    assert set(engine.runner.drafting.shared.lengths) == {1.0}
    decode_one(engine, make_request("b", (7, 8, 9, 10, 11), params))
    engine.exchange_learnt(before)
    assert engine.runner.drafting.shared is shared
    assert shared.lengths == lengths
