"""What vLLM makes of checkpoints, run by a Python of its own that has it.

Reads a JSON list of folders, each with ``ids.json``, from the first argument, and how many greedy
tokens follow from the second; prints a JSON list of the logarithms of probabilities of the whole
text and of the greedy tokens after the first text; or of the error of loading.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from vllm import LLM, SamplingParams


def read(folder, greedy):
    texts = json.loads((folder / "ids.json").read_text())
    model = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        dtype="float32",
        max_model_len=len(texts[0]) + greedy,
        max_num_seqs=len(texts),
        max_logprobs=-1,
        enforce_eager=True,
    )
    settings = SamplingParams(
        max_tokens=greedy, temperature=0, prompt_logprobs=-1, ignore_eos=True, detokenize=False
    )
    outputs = model.generate([{"prompt_token_ids": ids} for ids in texts], settings, use_tqdm=False)
    # of each position but the first, as vLLM has nothing to say there
    whole = [
        [[row[token].logprob for token in sorted(row)] for row in output.prompt_logprobs[1:]]
        for output in outputs
    ]
    return {"log_probabilities": whole, "greedy": list(outputs[0].outputs[0].token_ids)}


def main():
    results = []
    for name in json.loads(sys.argv[1]):
        try:
            results.append(read(Path(name), int(sys.argv[2])))
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
