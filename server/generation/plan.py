"""What one API call asks of the engine."""

from dataclasses import dataclass

from cllm_core.request import NewRequest
from cllm_core.text.expected_answer import OutputSyntax


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationPlan:
    """What one API call asks of the engine.

    Attributes:
        requests: one per choice; position i is the choice's index. Those of one prompt stand together. All have the
            same prediction.
        echoes: per choice, the text that its answer starts with; empty where nothing is echoed.
        continues_text: outputs go on where the prompt's text ends, so a leading space is part of them.
        shows_reasoning: what the model thinks is given, else it is left out.
        syntax: how reasoning and calls of functions look in the outputs, None where neither is read.
        num_best: how many choices of each prompt to return, those of the highest mean log-probability per token; None
            returns all. Needs requests with log-probabilities.
        scores_echo: echoes come with log-probabilities, so outputs have an entry for the token that ended them too.
        shows_token_ids: give the ids of prompts and outputs beside the texts.
    """

    requests: tuple[NewRequest, ...]
    echoes: tuple[str, ...]
    continues_text: bool
    syntax: OutputSyntax | None = None
    shows_reasoning: bool = True
    num_best: int | None = None
    scores_echo: bool = False
    shows_token_ids: bool = False
