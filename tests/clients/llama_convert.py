"""Convert checkpoints without a tokenizer to GGUF, by llama.cpp's own converter.

Arguments: the folder of llama.cpp that holds ``convert_hf_to_gguf.py``, f32 or f16, then folders;
each gets a ``model.gguf``. Prints a JSON list: null, or the error of each.
"""

import json
import logging
import sys
from pathlib import Path

root = Path(sys.argv[1])
sys.path[:0] = [str(root), str(root / "gguf-py")]

import torch  # noqa: E402
from conversion import ModelBase, get_model_class  # noqa: E402
from conversion.base import gguf  # noqa: E402

logging.basicConfig(level=logging.ERROR)
errors = []
formats = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16}
for folder in map(Path, sys.argv[3:]):
    try:
        hparams = ModelBase.load_hparams(folder, False)
        kind = get_model_class(hparams["architectures"][0], mmproj=False)
        if kind.supports_mtp_export:  # the option --no-mtp: nothing predicts several tokens here
            kind.no_mtp = True
        # ids are given and asked for, so that no text has to be known
        kind.set_vocab = lambda self: (
            self.gguf_writer.add_vocab_size(self.hparams["vocab_size"]),
            self._set_vocab_none(),
        )
        with torch.inference_mode():
            kind(folder, formats[sys.argv[2]], folder / "model.gguf", eager=True).write()
        errors.append(None)
    except (Exception, SystemExit) as error:
        errors.append(f"{type(error).__name__}: {error}")
print(json.dumps(errors))
