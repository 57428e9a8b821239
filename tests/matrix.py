"""One case of the matrix: a tiny random model of an architecture, served here and computed by transformers.

Compared are log-probabilities of prompts and greedy texts, drafted and one token at a time, of unlike lengths in one
batch whose prompts are read in chunks. Flat random models would agree on texts whatever is wrong with them; the
log-probabilities do not.
"""

import functools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, GenerationConfig, PreTrainedModel

from cllm_core import LLM, SamplingParams
from cllm_core.errors import CllmError, ModelLoadError
from cllm_core.llm import GeneratedOutput
from cllm_core.models import proven
from cllm_core.models.architecture import check_architecture
from cllm_core.models.attention import PAGED_ATTENTION
from cllm_core.models.checkpoint import Checkpoint, is_multimodal, read_config
from cllm_core.models.proven import Proven
from tests.checkpoints import build_tokenizer
from tests.matrix_cases import Case
from tests.tiny_models import FIRST_MEDIA_ID, build_tiny, tiny_config

PROMPT_LENGTHS = (5, 33, 90)
NUM_TOKENS = 20
MAX_ERROR = 1e-3  # nats

Result = Literal["equal", "refused", "wrong", "not built"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a case; `detail` tells why, or how far off."""

    result: Result
    detail: str = ""


def run_case(case: Case, folder: Path) -> Verdict:
    """Build, serve and compare; `folder` takes the checkpoint."""
    try:
        config = tiny_config(case.model_type, **case.settings)
        config.architectures = [case.class_name]
        config.save_pretrained(folder)
    except Exception as error:  # whatever transformers' configurations raise
        return Verdict("not built", f"configuration: {_line(error)}")
    try:
        checkpoint = Checkpoint(folder)
        check_architecture(checkpoint, read_config(checkpoint), attention=PAGED_ATTENTION)
    except ModelLoadError as error:
        return Verdict("refused", _reason(error, folder))
    try:
        model = build_tiny(config)
        model.generation_config = GenerationConfig()
        model.save_pretrained(folder)
    except Exception as error:
        return Verdict("not built", f"weights: {_line(error)}")
    build_tokenizer().save_pretrained(folder)
    auto_class: Any = AutoModelForMultimodalLM if is_multimodal(config) else AutoModelForCausalLM
    return compare(auto_class.from_pretrained(folder), folder)


def compare(model: PreTrainedModel, folder: Path) -> Verdict:
    """Serve what the folder holds and compare it with the model."""
    try:
        log_probs = [reference_logprobs(model, prompt) for prompt in prompts()]
    except Exception as error:
        return Verdict("not built", f"transformers cannot run it: {_line(error)}")
    texts = [greedy_text(model, prompt) for prompt in prompts()]
    distances: list[float] = []
    try:
        for block_length in (1, 16):
            outputs = answers(folder, block_length)
            for prompt, expected, text, output in zip(prompts(), log_probs, texts, outputs, strict=True):
                found = torch.tensor([entry.logprob for entry in output.prompt_logprobs])
                distances.append(float((found - expected).abs().max()))
                if not distances[-1] <= MAX_ERROR:
                    return Verdict("wrong", f"n={block_length}, prompt of {len(prompt)}: {distances[-1]:.2g} nats")
                if list(output.token_ids) != text:
                    return Verdict("wrong", f"n={block_length}, prompt of {len(prompt)}: another text")
    except CllmError as error:
        return Verdict("refused", _reason(error, folder))
    except Exception as error:  # whatever a model's own code raises: it should have been refused
        return Verdict("wrong", f"crashed: {_line(error)}")
    return Verdict("equal", f"{max(distances):.0e}")


def answers(folder: Path, block_length: int) -> list[GeneratedOutput]:
    """Of all prompts in one batch. Every model checks itself, as if none were proven yet."""
    with mock.patch.object(proven, "read_proven", return_value=Proven((0, 0), (0, 0), {}, [])):
        llm = serve(folder, block_length)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, prompt_logprobs=0, ignore_eos=True)
    results = llm.generate([list(prompt) for prompt in prompts()], params, progress=False)
    return [result.outputs[0] for result in results]


def serve(folder: Path, block_length: int) -> LLM:
    return LLM(
        str(folder),
        device="cpu",
        dtype="float32",
        block_length=block_length,
        adaptive_block_length=False,
        max_batched_tokens=64,
        max_num_seqs=4,
        num_cache_blocks=64,
        cache_block_size=16,
        max_model_len=256,
    )


@functools.cache
def prompts() -> tuple[tuple[int, ...], ...]:
    draw = random.Random(11)
    return tuple(tuple(draw.randrange(3, FIRST_MEDIA_ID) for _ in range(length)) for length in PROMPT_LENGTHS)


@torch.inference_mode()
def reference_logprobs(model: PreTrainedModel, prompt: tuple[int, ...]) -> torch.Tensor:
    """[L - 1] of each token but the first."""
    ids = torch.tensor([prompt])
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


@torch.inference_mode()
def greedy_text(model: PreTrainedModel, prompt: tuple[int, ...]) -> list[int]:
    ids = list(prompt)
    for _ in range(NUM_TOKENS):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: " + " ".join(str(error).split())[:300]


def _reason(error: CllmError, folder: Path) -> str:
    return " ".join(str(error).replace(f"{folder}: ", "").split())[:300]
