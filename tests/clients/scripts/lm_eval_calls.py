"""lm-evaluation-harness against a server: arguments are its base URL, a tokenizer folder and a file of questions.

Writes the scores of a multiple choice task and the log-likelihood of every choice as JSON.
"""

import json
import sys

from lm_eval import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI


def main() -> None:
    """Run the task."""
    base_url, tokenizer, questions = sys.argv[1:]
    model = LocalCompletionsAPI(
        base_url=f"{base_url}/completions",
        model="tiny",
        tokenizer=tokenizer,
        tokenizer_backend="huggingface",
        max_length=256,
        max_retries=1,
    )
    task = {
        "task": "questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": questions}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
    }
    results = simple_evaluate(model=model, tasks=[task], bootstrap_iters=0, log_samples=True)
    samples = results["samples"]["questions"]
    found = {
        "accuracy": results["results"]["questions"]["acc,none"],
        "loglikelihoods": [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples],
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
