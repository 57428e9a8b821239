"""Clients of other makers, run as their users run them, against a `cllm serve` (`make test-clients`)."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.server.serve_process import ServeProcess, serving

HERE = Path(__file__).parent
PYTHON = Path(os.environ.get("CLLM_CLIENTS_PYTHON", ".venv-clients/bin/python")).absolute()
MESSAGES = [{"role": "user", "content": "Hello"}]
LIMIT = {"temperature": 0, "max_tokens": 12}

pytestmark = pytest.mark.clients

needs_python_clients = pytest.mark.skipif(
    not PYTHON.exists(), reason=f"{PYTHON} is missing: make test-clients installs the clients there"
)
needs_node = pytest.mark.skipif(
    shutil.which("node") is None or not (HERE / "node" / "node_modules").exists(),
    reason="Node.js or its openai package is missing: install node and npm, then make test-clients",
)


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random checkpoint with room for descriptions of tools, which its tokenizer spells in many tokens."""
    folder = tmp_path_factory.mktemp("roomy") / "checkpoint"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return folder


@pytest.fixture(scope="module")
def served(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    with serving(checkpoint, tmp_path_factory.mktemp("serve") / "log") as process:
        yield process


@pytest.fixture(scope="module")
def expected(served: ServeProcess) -> str:
    """What plain HTTP gets for the question that the clients ask."""
    body = {"model": "tiny", "messages": MESSAGES, **LIMIT}
    return str(served.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"])


def run(*command: str | Path, **environment: str) -> str:
    """Standard output of a client program, which must succeed."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_script(name: str, *arguments: str | Path) -> Any:
    """What a script of ours, run among the client packages, found."""
    return json.loads(run(PYTHON, HERE / "scripts" / name, *arguments).splitlines()[-1])


@pytest.fixture(scope="module")
def by_node(served: ServeProcess) -> Any:
    """What the Node script found."""
    return json.loads(run("node", HERE / "node" / "calls.mjs", f"{served.url}/v1"))


@needs_node
def test_node_sdk(by_node: Any, expected: str) -> None:
    found = by_node
    assert found["chat"]["text"] == found["chatChunks"]["text"] == found["chatHelper"]["text"] == expected
    assert found["chatHelper"]["final"] == expected
    assert found["chat"]["requestId"]
    assert found["chat"]["usage"]["completion_tokens"] == found["chatChunks"]["usage"]["completion_tokens"] == 12
    assert found["completion"] == {"reason": "length", "numTokens": 4}
    assert found["models"] == ["tiny"]


@needs_node
def test_node_sdk_responses(by_node: Any, expected: str) -> None:
    assert by_node["responses"] == {"text": expected, "whole": expected, "final": expected, "status": "incomplete"}


@needs_node
def test_node_sdk_runs_tools_and_parses_structured_answers(by_node: Any) -> None:
    assert by_node["tools"]["calls"] == [7]
    assert json.loads(by_node["structured"]) == {"n": 7}


@needs_node
def test_node_sdk_raises_its_own_error_for_a_refusal(by_node: Any) -> None:
    expected = {"kind": "BadRequestError", "status": 400, "code": "invalid_value", "param": "temperature"}
    assert by_node["refusal"] == expected


@needs_python_clients
def test_langchain(served: ServeProcess, expected: str) -> None:
    found = run_script("langchain_calls.py", f"{served.url}/v1")
    assert found["text"] == found["streamed"] == found["awaited"]
    assert found["batched"] == [found["text"]] * 2
    assert found["usage"]["output_tokens"] == found["logprobs"] == 12
    assert found["structured"] == {"n": 7}
    assert [(call["name"], call["args"]) for call in found["calls"]] == [("count", {"n": 7})]
    assert found["responses"] == expected
    assert found["completion"] == served.complete(max_tokens=12)


@needs_python_clients
def test_litellm(served: ServeProcess, expected: str) -> None:
    found = run_script("litellm_calls.py", f"{served.url}/v1")
    assert found["text"] == found["streamed"] == expected
    assert found["completion"] == served.complete(max_tokens=12)
    assert found["total_tokens"] > 12
    assert found["refusal"] == 400


@needs_python_clients
@pytest.mark.parametrize("streaming", [(), ("--no-stream",)])
def test_llm(served: ServeProcess, expected: str, tmp_path: Path, streaming: tuple[str, ...]) -> None:
    model = {"model_id": "mine", "model_name": "tiny", "api_base": f"{served.url}/v1"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))  # JSON is YAML
    options = ("-o", "temperature", "0", "-o", "max_tokens", "12")
    answer = run(
        PYTHON, "-m", "llm", "-m", "mine", "Hello", "--key", "none", *options, *streaming, LLM_USER_PATH=str(tmp_path)
    )
    assert answer.strip() == expected.strip()


@needs_python_clients
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
