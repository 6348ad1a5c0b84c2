"""What llama.cpp makes of GGUF files, run by a Python of its own that has xllamacpp.

That package carries the whole of llama.cpp, whose C functions are called here. Reads a JSON list of
folders, each with ``model.gguf`` and ``ids.json``, from the first argument, and how many greedy
tokens follow from the second; prints a JSON list of the logits of the whole text, of the same
token by token, and of the greedy tokens after the first text; or of the error. With three numbers,
which are tokens of a prompt, tokens generated and repeats, it prints tokens a second of processor
time on one thread instead.
"""

import ctypes
import importlib.util
import json
import sys
import time
from ctypes import c_char_p, c_float, c_int8, c_int32, c_uint8, c_uint32, c_void_p
from pathlib import Path

lib = ctypes.CDLL(importlib.util.find_spec("xllamacpp.xllamacpp").origin)


class ModelParameters(ctypes.Structure):
    """The beginning of llama_model_params; the rest keeps its defaults."""

    _fields_ = (("devices", c_void_p * 2), ("n_gpu_layers", c_int32), ("rest", c_uint8 * 236))


class ContextParameters(ctypes.Structure):
    """The beginning of llama_context_params."""

    _fields_ = (
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")),
        ("more", c_uint32 * 3),
        *((name, c_int32) for name in ("n_threads", "n_threads_batch")),
        ("kinds", c_int32 * 4),
        ("flash_attn_type", c_int32),
        ("rope", c_uint32 * 8),
        ("callback", c_void_p * 2),
        *((name, c_int32) for name in ("type_k", "type_v")),
        ("rest", c_uint8 * 144),
    )


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", ctypes.POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", ctypes.POINTER(c_int32)),
        ("n_seq_id", ctypes.POINTER(c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(c_int32))),
        ("logits", ctypes.POINTER(c_int8)),
    )


def function(name, result, *arguments):
    found = getattr(lib, name)
    found.restype, found.argtypes = result, arguments
    return found


model_defaults = function("llama_model_default_params", ModelParameters)
context_defaults = function("llama_context_default_params", ContextParameters)
load = function("llama_model_load_from_file", c_void_p, c_char_p, ModelParameters)
begin = function("llama_init_from_model", c_void_p, c_void_p, ContextParameters)
vocab_of = function("llama_model_get_vocab", c_void_p, c_void_p)
tokens_of = function("llama_vocab_n_tokens", c_int32, c_void_p)
batch_of = function("llama_batch_init", Batch, c_int32, c_int32, c_int32)
free_batch = function("llama_batch_free", None, Batch)
decode = function("llama_decode", c_int32, c_void_p, Batch)
logits_at = function("llama_get_logits_ith", ctypes.POINTER(c_float), c_void_p, c_int32)
free_context = function("llama_free", None, c_void_p)
free_model = function("llama_model_free", None, c_void_p)


@ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)
def errors_only(level, text, data):
    if level == 4:
        sys.stderr.write(text.decode(errors="replace"))


function("llama_log_set", None, c_void_p, c_void_p)(errors_only, None)
function("llama_backend_init", None)()


class Model:
    """A file, and one sequence that is decoded on one thread."""

    def __init__(self, path, context):
        parameters = model_defaults()
        parameters.n_gpu_layers = 0
        self.model = load(str(path).encode(), parameters)
        if not self.model:
            raise RuntimeError("llama.cpp does not load it")
        self.size = tokens_of(vocab_of(self.model))
        self.context_size, self.context = context, None

    def begin(self):
        """Forget what was read."""
        if self.context:
            free_context(self.context)
        parameters = context_defaults()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = self.context_size
        parameters.n_threads = parameters.n_threads_batch = 1
        parameters.type_k = parameters.type_v = 0  # float32
        parameters.flash_attn_type = 0
        self.context = begin(self.model, parameters)
        self.length = 0

    def read(self, ids, every=True):
        """Logits of every position, or of the last."""
        batch = batch_of(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, self.length + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = every or i == len(ids) - 1
        failed = decode(self.context, batch)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")
        wanted = range(len(ids)) if every else (len(ids) - 1,)
        found = [logits_at(self.context, i)[: self.size] for i in wanted]
        free_batch(batch)
        self.length += len(ids)
        return found

    def free(self):
        free_context(self.context)
        free_model(self.model)


def logits_of(folder, greedy):
    texts = json.loads((folder / "ids.json").read_text())
    model = Model(folder / "model.gguf", len(texts[0]) + greedy)
    whole, steps = [], []
    for ids in texts:
        model.begin()
        whole.append(model.read(ids))
        model.begin()
        steps.append([row for token in ids for row in model.read([token])])
    model.begin()
    row, tokens = model.read(texts[0], every=False)[-1], []
    for _ in range(greedy):
        tokens.append(max(range(model.size), key=row.__getitem__))
        row = model.read(tokens[-1:])[-1]
    model.free()
    return {"whole": whole, "steps": steps, "greedy": tokens}


def speed_of(folder, prompt, generated, repeats):
    """Tokens a second of a prompt and of generation, by processor time: others may be at work."""
    model = Model(folder / "model.gguf", prompt + generated)
    found = {"prompt": [], "generation": []}
    for repeat in range(-1, repeats):
        model.begin()
        started = time.process_time()
        model.read([1] * prompt, every=False)
        read = time.process_time()
        for _ in range(generated):
            model.read([1], every=False)
        if repeat >= 0:
            found["prompt"].append(prompt / (read - started))
            found["generation"].append(generated / (time.process_time() - read))
    model.free()
    return found


def main():
    folders = [Path(name) for name in json.loads(sys.argv[1])]
    numbers = [int(text) for text in sys.argv[2:]]
    results = []
    for folder in folders:
        try:
            results.append((logits_of if len(numbers) == 1 else speed_of)(folder, *numbers))
        except RuntimeError as error:
            results.append({"error": f"{error}"})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
