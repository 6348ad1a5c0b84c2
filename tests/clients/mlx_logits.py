"""What mlx-lm makes of checkpoints, run by a Python of its own that has it.

Reads a JSON list of folders, each with ``ids.json``, from the first argument; prints a JSON list of
the logits, or of the error of loading.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)
results = []
for folder in json.loads(sys.argv[1]):
    try:
        model, _ = load_model(Path(folder))
    except Exception as error:
        results.append({"error": f"{type(error).__name__}: {error}"})
        continue
    ids = mx.array(json.loads((Path(folder) / "ids.json").read_text()))
    whole = model(ids).astype(mx.float32)
    cache, steps = model.make_cache(), []
    for t in range(ids.shape[1]):  # token by token, as generation does
        steps.append(model(ids[:, t : t + 1], cache=cache).astype(mx.float32))
    results.append({"whole": whole.tolist(), "steps": mx.concatenate(steps, axis=1).tolist()})
print(json.dumps(results))
