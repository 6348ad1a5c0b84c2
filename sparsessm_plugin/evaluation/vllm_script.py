"""Times vLLM; run by whichever Python has it, so that nothing of this package is imported.

Takes a JSON object (model, batch_sizes, prompt_length, decode_steps, repeats, dtype, vocab_size) as
its argument, and prints one last: for each batch size the seconds of prefill and of decode.
"""

import json
import os
import random
import sys
import time


def main() -> None:
    asked = json.loads(sys.argv[1])
    try:
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
    except ModuleNotFoundError:
        print("\n" + json.dumps({"error": f"vLLM is not installed in {sys.executable}"}))
        return
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    length, steps = asked["prompt_length"], asked["decode_steps"]
    model = LLM(
        model=asked["model"],
        skip_tokenizer_init=True,
        enable_prefix_caching=False,  # every prompt is read; hybrids want it so
        dtype=asked["dtype"],
        max_model_len=length + steps + 1,
        max_num_seqs=max(asked["batch_sizes"]),
    )
    draw = random.Random(0)
    found = {}
    for batch_size in asked["batch_sizes"]:
        ids = [
            [draw.randrange(asked["vocab_size"]) for _ in range(length)] for _ in range(batch_size)
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in ids]

        def seconds(tokens: int, prompts: list[dict[str, list[int]]] = prompts) -> float:
            settings = SamplingParams(
                max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False
            )
            started = time.perf_counter()
            model.generate(prompts, settings, use_tqdm=False)
            return time.perf_counter() - started

        times: dict[str, list[float]] = {"prefill": [], "decode": []}
        for repeat in range(-1, asked["repeats"]):
            first, all_tokens = seconds(1), seconds(1 + steps)
            if repeat >= 0:
                times["prefill"].append(first)
                times["decode"].append(max(all_tokens - first, 1e-9))
        found[batch_size] = times
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
