"""What the command says beside its results: on stderr, ours always, the libraries' if asked for."""

import logging
import os
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

from loguru import logger

from sparsessm_plugin import registration
from sparsessm_plugin.errors import SparseSSMWarning

_LEVEL = "LLM_COMPRESSOR_LOG_LEVEL"
_OURS = "sparsessm_plugin"
# Bars of compressed-tensors that TQDM_DISABLE does not reach: of loading what is quantized, and of
# the first forward pass after it.
_BARS = (
    "compressed_tensors.offload.dispatch",
    "compressed_tensors.quantization.lifecycle.apply",
    "compressed_tensors.compressors.model_compressors.model_compressor",
)
_WARNING, _ERROR = 30, 40  # numbers of loguru's levels
# Loggers with handlers of their own: AutoRound's takes over what transformers says.
_TALKATIVE = ("autoround", "torch.fx._symbolic_trace")


def show_messages(show: Callable[[str, str], Any], verbose: bool) -> None:
    """Send logs and warnings to one place, and never to stdout, which is for results.

    Warnings of this package are always shown; those of libraries, and what is less than a warning,
    only if asked for. LLM Compressor logs to stdout as soon as it is imported, so its handler is
    replaced then.

    :param show: called with the level, in lower case, and the text
    :param verbose: show everything, from the level in ``LLM_COMPRESSOR_LOG_LEVEL`` on
    """
    level, said = _level() if verbose else _ERROR, set[str]()

    def wanted(record: Any) -> bool:
        ours = (record["name"] or "").partition(".")[0] == _OURS
        if record["level"].no < (min(level, _WARNING) if ours else level):
            return False
        if record["extra"].get("log_once"):  # of LLM Compressor
            if record["message"] in said:
                return False
            said.add(record["message"])
        return True

    def write(message: Any) -> None:
        show(message.record["level"].name.lower(), message.record["message"])

    def attach(configure: Callable[[], None]) -> None:
        configure()  # takes away what was there
        logger.add(write, level=0, filter=wanted, format="{message}", catch=False)

    def instead_of_stdout(module: Any) -> None:
        configure = getattr(module.configure_logger, "__wrapped__", module.configure_logger)

        @wraps(configure)
        def configure_logger(*args: Any, **kwargs: Any) -> None:  # again, on several ranks
            attach(lambda: _without_console(configure, *args, **kwargs))

        module.configure_logger = configure_logger
        configure_logger()

    def show_warning(
        message: Any,
        category: Any,
        filename: str,
        lineno: int,
        file: Any = None,
        line: Any = None,
    ) -> None:
        if issubclass(category, SparseSSMWarning) or str(message) in registration.warned:
            show("warning", str(message))
        elif verbose:
            show("warning", f"{category.__name__}: {message} ({filename}, line {lineno})")

    attach(logger.remove)
    registration.after_import("llmcompressor.logger", instead_of_stdout)
    warnings.showwarning = show_warning
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DATASETS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        os.environ.setdefault("AR_LOG_LEVEL", "ERROR")  # AutoRound sets its level when imported
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler says that it starts
        for name in _BARS:
            registration.after_import(name, _without_bar)
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)
    if logging.lastResort is not None:  # of libraries that set up nothing
        logging.lastResort.setLevel(logging.WARNING if verbose else logging.ERROR)


def _without_bar(module: Any) -> None:
    bar = module.tqdm
    if getattr(bar, "_without_bar", False):
        return

    def tqdm(*args: Any, **kwargs: Any) -> Any:
        return bar(*args, **{**kwargs, "disable": True})

    tqdm._without_bar = True  # type: ignore[attr-defined]
    module.tqdm = tqdm


def _level() -> int:
    try:
        return int(logger.level((os.environ.get(_LEVEL) or "INFO").upper()).no)
    except ValueError:  # a level that there is not
        return int(logger.level("INFO").no)


def _without_console(configure: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Set up LLM Compressor's log as it does, with the files asked for but nothing on stdout."""
    level = os.environ.get(_LEVEL)
    os.environ[_LEVEL] = ""
    try:
        configure(*args, **kwargs)
    finally:
        if level is None:
            del os.environ[_LEVEL]
        else:
            os.environ[_LEVEL] = level
