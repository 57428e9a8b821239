"""Run by a Python with transformers 4 (and PEFT): prints what it makes of a folder.

Arguments: the folder, a text, and optionally the folder of an adapter.
"""

import json
import sys

import torch
import transformers

_PROMPT_LENGTH = 300


def main(folder: str, text: str, adapter: str | None = None) -> None:
    """Print token ids of the text, special tokens, template, and log-probabilities behind a fixed random prompt."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    if adapter is not None:
        import peft  # noqa: PLC0415 - not needed otherwise

        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    ids = torch.randint(3, model.config.vocab_size, (1, _PROMPT_LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    answer = {
        "release": transformers.__version__,
        "ids": tokenizer(text)["input_ids"],
        "special_tokens": tokenizer.special_tokens_map,
        "chat_template": tokenizer.chat_template,
        "prompt": ids[0].tolist(),
        "logprobs": torch.log_softmax(logits, dim=-1).tolist(),
    }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
