"""Libraries of other makers, called as their users call them, against a `cllm serve` with a tiny random model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.clients.harness import needs, needs_node, program, run, run_node_script, run_script
from tests.server.serve_process import ServeProcess

pytestmark = pytest.mark.clients


@pytest.fixture(scope="module")
def by_node(served: ServeProcess) -> Any:
    """What the Node script found."""
    return run_node_script("calls.mjs", f"{served.url}/v1")


@needs_node()
def test_node_sdk(by_node: Any, expected: str) -> None:
    found = by_node
    assert found["chat"]["text"] == found["chatChunks"]["text"] == found["chatHelper"]["text"] == expected
    assert found["chatHelper"]["final"] == expected
    assert found["chat"]["requestId"]
    assert found["chat"]["usage"]["completion_tokens"] == found["chatChunks"]["usage"]["completion_tokens"] == 12
    assert found["completion"] == {"reason": "length", "numTokens": 4}
    assert found["models"] == ["tiny"]


@needs_node()
def test_node_sdk_responses(by_node: Any, expected: str) -> None:
    assert by_node["responses"] == {"text": expected, "whole": expected, "final": expected, "status": "incomplete"}


@needs_node()
def test_node_sdk_runs_tools_and_parses_structured_answers(by_node: Any) -> None:
    assert by_node["tools"]["calls"] == [7]
    assert json.loads(by_node["structured"]) == {"n": 7}


@needs_node()
def test_node_sdk_raises_its_own_error_for_a_refusal(by_node: Any) -> None:
    expected = {"kind": "BadRequestError", "status": 400, "code": "invalid_value", "param": "temperature"}
    assert by_node["refusal"] == expected


@needs("libraries")
def test_langchain(served: ServeProcess, expected: str) -> None:
    found = run_script("langchain_calls.py", f"{served.url}/v1")
    assert found["text"] == found["streamed"] == found["awaited"]
    assert found["batched"] == [found["text"]] * 2
    assert found["usage"]["output_tokens"] == found["logprobs"] == 12
    assert found["structured"] == {"n": 7}
    assert [(call["name"], call["args"]) for call in found["calls"]] == [("count", {"n": 7})]
    assert found["responses"] == expected
    assert found["completion"] == served.complete(max_tokens=12)


@needs("libraries")
def test_agent_frameworks_get_answers_of_a_type(served: ServeProcess) -> None:
    found = run_script("typed_calls.py", f"{served.url}/v1")
    assert list(found.values()) == [{"n": 7}] * 6


@needs("libraries")
def test_litellm(served: ServeProcess, expected: str) -> None:
    found = run_script("litellm_calls.py", f"{served.url}/v1")
    assert found["text"] == found["streamed"] == expected
    assert found["completion"] == served.complete(max_tokens=12)
    assert found["total_tokens"] > 12
    assert found["refusal"] == 400


@needs("libraries")
@pytest.mark.parametrize("streaming", [(), ("--no-stream",)])
def test_llm(served: ServeProcess, expected: str, tmp_path: Path, streaming: tuple[str, ...]) -> None:
    model = {"model_id": "mine", "model_name": "tiny", "api_base": f"{served.url}/v1"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))  # JSON is YAML
    options = ("-o", "temperature", "0", "-o", "max_tokens", "12")
    answer = run(
        program("libraries"),
        "-m",
        "llm",
        "-m",
        "mine",
        "Hello",
        "--key",
        "none",
        *options,
        *streaming,
        LLM_USER_PATH=str(tmp_path),
    )
    assert answer.strip() == expected.strip()


@needs("libraries")
def test_lm_evaluation_harness_scores_what_transformers_scores(
    served: ServeProcess, checkpoint: Path, tmp_path: Path
) -> None:
    questions = [
        {"question": "The server reads the", "choices": ["request", "token and the draft", "answer"], "answer": 0},
        {"question": "Every token that", "choices": ["matches", "the model predicts"], "answer": 1},
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in questions))
    found = run_script("lm_eval_calls.py", f"{served.url}/v1", checkpoint, file)
    for question, scores in zip(questions, found["loglikelihoods"], strict=True):
        choices = question["choices"]
        assert isinstance(choices, list)
        expected = [loglikelihood(checkpoint, str(question["question"]), f" {choice}") for choice in choices]
        assert scores == pytest.approx(expected, abs=1e-3)


def loglikelihood(checkpoint: Path, context: str, continuation: str) -> float:
    """Sum of the log-probabilities of the continuation's tokens, by one forward pass of transformers."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = tokenizer(context + continuation, return_tensors="pt", add_special_tokens=False).input_ids
    num_context = len(tokenizer(context, add_special_tokens=False).input_ids)
    with torch.inference_mode():
        logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    return float(logprobs[num_context - 1 :].sum())
