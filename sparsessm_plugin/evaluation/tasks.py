"""Zero-shot tasks, run by lm-eval on a model in memory, and recall, which needs neither.

Tasks are lm-eval's own, by name, where their data can be reached, and those of ``task_configs``,
which read JSON lines from a folder and need no network. lm-eval is an optional dependency.
``recall`` is made of the model's vocabulary and a text, see :mod:`.recall`.
"""

import difflib
import io
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any
from weakref import WeakKeyDictionary

import yaml

from sparsessm_plugin.errors import SparseSSMError, cut, shown
from sparsessm_plugin.evaluation.data import UTF8, tokenize
from sparsessm_plugin.evaluation.recall import NAME as RECALL
from sparsessm_plugin.evaluation.recall import (
    SEQUENCES,
    Probe,
    Recalled,
    evaluate_recall,
    make_probes,
    sequences_of,
    vocabulary_of,
)
from sparsessm_plugin.families.fast_forward import fast_forward
from sparsessm_plugin.files import parse_json

TASK_CONFIGS = Path(__file__).parent / "task_configs"
_FEWSHOT_SEED = 1234  # lm-eval's default
# draws for the standard error of LAMBADA's perplexity; that of an accuracy has a closed form
_BOOTSTRAP_DRAWS = 200


@dataclass(frozen=True)
class Metric:
    """One number of a task, and its standard error where lm-eval gives one."""

    value: float
    stderr: float | None
    higher_is_better: bool


@dataclass(frozen=True)
class TaskResult:
    """What a model scores at a task, or on average at a group of tasks.

    :param samples: documents scored
    :param metrics: by name, as ``acc``, ``acc_norm``, ``perplexity``
    :param subtasks: of a group, the names of its tasks
    """

    samples: int
    metrics: dict[str, Metric]
    subtasks: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for a report."""
        return asdict(self)


@dataclass
class Tasks:
    """Loaded tasks, to be run on any number of models.

    :param names: as they were asked for
    :param loaded: lm-eval's dictionary of tasks and groups
    :param limit: documents a task at most; None for all
    :param encodings: token ids of strings, by tokenizer
    :param recall: whether recall is asked for
    :param text: documents for the parts of recall that read one
    """

    names: tuple[str, ...]
    loaded: dict[str, Any]
    limit: int | None = None
    encodings: WeakKeyDictionary[Any, dict[Any, list[int]]] = field(
        default_factory=WeakKeyDictionary
    )
    recall: bool = False
    text: list[str] | None = None

    def requests_of(self, model: Any, tokenizer: Any) -> int:
        """Requests that one run makes of a model, which may be on the meta device.

        :raises SparseSSMError: see :meth:`recall_probes`
        """
        of_tasks = sum(len(task.instances) for task in self.loaded.get("tasks", {}).values())
        return of_tasks + sequences_of(self.recall_probes(model, tokenizer))

    def recall_probes(self, model: Any, tokenizer: Any) -> list[Probe]:
        """The sequences of recall for a model, none where it is not asked for.

        :raises SparseSSMError: the model or the text is too short, or the vocabulary too small
        """
        if not self.recall:
            return []
        config = model.config.get_text_config()
        return make_probes(
            vocabulary_of(tokenizer, model.get_input_embeddings().num_embeddings),
            None if self.text is None else tokenize(self.text, tokenizer),
            getattr(config, "max_position_embeddings", None),
            SEQUENCES if self.limit is None else min(self.limit, SEQUENCES),
        )


def local_task_names() -> list[str]:
    """Names of the tasks that read a folder."""
    return sorted(path.stem for path in TASK_CONFIGS.glob("*.yaml"))


def load_tasks(
    names: Iterable[str],
    data: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    text: list[str] | None = None,
) -> Tasks:
    """Load tasks and their data.

    :param names: of lm-eval's tasks, groups and tags, of :func:`local_task_names`, or ``recall``
    :param data: the folder that the local ones read
    :param limit: documents a task at most, sequences a probe and distance of recall
    :param text: documents that recall reads; None for its random tokens alone
    :raises SparseSSMError: lm-eval is not installed, there is no such task, its data cannot
        be fetched, or the folder does not hold it
    """
    asked_for = tuple(dict.fromkeys(names))
    recall = RECALL in asked_for
    names = [name for name in asked_for if name != RECALL]
    if not names:
        return Tasks(asked_for, {}, limit, recall=recall, text=text)
    _check_lm_eval()

    local = local_task_names()
    ours, theirs = [n for n in names if n in local], [n for n in names if n not in local]
    if ours and data is None:
        raise SparseSSMError(f"task {ours[0]} reads a folder; give --tasks-data")
    built: dict[str, Any] = {name: _build_local(name, Path(data)) for name in ours if data}
    manager = _manager(bool(theirs))
    for name in theirs:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, [RECALL, *local, *manager.all_tasks], n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise SparseSSMError(
                f"no task {shown(name)}; {hint}from a folder: {', '.join(local)}; all others are "
                "lm-eval's (`lm-eval ls tasks`)"
            )
    for name in theirs:
        built[name] = _build_theirs(manager, name)
    try:
        loaded: Any = manager.load([task for name in names for task in built[name]])
    except ValueError as error:  # a task in two groups
        raise SparseSSMError(f"tasks {', '.join(names)}: {error}") from error
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
        with _quiet_lm_eval():
            _build_requests(task, limit)
    return Tasks(asked_for, loaded, limit, recall=recall, text=text)


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Tasks,
    batch_size: int = 64,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, TaskResult]:
    """Score a model at tasks, with lm-eval's requests, metrics and averages.

    Nothing of the model changes. Log-likelihoods come from full sequences, which run
    this package's scans on the CPU; a task that generates text runs the model's own decoding.

    :param model: transformers causal language model
    :param tokenizer: its tokenizer
    :param tasks: from :func:`load_tasks`
    :param batch_size: sequences a forward pass
    :param progress: called with the number of requests done after each pass
    :return: by name, groups and all tasks
    :raises SparseSSMError: the model computes NaN, or a score is not a finite number
    """
    results = _recall(model, tokenizer, tasks, progress)
    if not tasks.loaded:
        return results
    from lm_eval.evaluator import evaluate

    from sparsessm_plugin.evaluation.harness import BatchedLM

    encodings = tasks.encodings.setdefault(tokenizer, {})
    training = model.training
    try:
        with _quiet_lm_eval(), fast_forward(model):
            # it may get a padding token
            lm = BatchedLM(model, deepcopy(tokenizer), batch_size, encodings, progress)
            found: Any = evaluate(
                lm=lm,
                task_dict=tasks.loaded,
                limit=tasks.limit,
                log_samples=False,
                bootstrap_iters=_BOOTSTRAP_DRAWS,
            )
    finally:
        model.train(training)
    subtasks = found["group_subtasks"]
    return results | {
        name: _result(name, numbers, found["higher_is_better"].get(name, {}), subtasks)
        for name, numbers in found["results"].items()
    }


def _recall(
    model: Any, tokenizer: Any, tasks: Tasks, progress: Callable[[int], Any] | None
) -> dict[str, TaskResult]:
    probes = tasks.recall_probes(model, tokenizer)
    if not probes:
        return {}
    by_name: dict[str, list[Recalled]] = {}
    for each in evaluate_recall(model, probes, progress):
        by_name.setdefault(each.name, []).append(each)
    of_probes = {f"{RECALL}_{name}": _of_probe(found) for name, found in by_name.items()}
    means = {f"{name}_loss": of_probes[f"{RECALL}_{name}"].metrics["loss"] for name in by_name}
    answers = sum(result.samples for result in of_probes.values())
    return {RECALL: TaskResult(answers, means, tuple(of_probes)), **of_probes}


def _of_probe(found: list[Recalled]) -> TaskResult:
    """Means over the distances of a probe, and the loss at each."""
    metrics = {
        "loss": Metric(fmean(each.loss for each in found), None, False),
        "loss_unseen": Metric(fmean(each.loss_unseen for each in found), None, False),
        "acc": Metric(fmean(each.accuracy for each in found), None, True),
    }
    for each in found:
        metrics[f"loss_{each.distance}"] = Metric(each.loss, each.stderr, False)
    return TaskResult(sum(each.answers for each in found), metrics)


def read_local(files: Path, fields: list[str], **_: Any) -> dict[str, list[dict[str, Any]]]:
    """The documents of a JSON-lines file as lm-eval takes a data set, in the split ``test``.

    :param files: the file
    :param fields: keys of a document: ``choices`` (two strings or more), ``gold`` (the index of
        one of them), all others strings
    :raises SparseSSMError: naming the line that is wrong
    """
    from datasets import Dataset

    rows = []
    if not files.is_file():  # a device or a pipe may never end
        raise SparseSSMError(f"{files} is no regular file")
    try:
        with files.open(encoding=UTF8) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(_document(line, fields, f"{files}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise SparseSSMError(f"cannot read {files}: {error}") from error
    if not rows:
        raise SparseSSMError(f"{files} holds no documents")
    return {"test": Dataset.from_list(rows)}


def _document(line: str, fields: list[str], where: str) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        reason = cut(getattr(error, "msg", str(error)))
        raise SparseSSMError(f"{where} is not JSON: {reason}") from error
    if not isinstance(row, dict):
        raise SparseSSMError(f"{where} is no mapping")
    for key in fields:
        value = row.get(key)
        if key == "choices":
            good = isinstance(value, list) and len(value) > 1 and all(map(_is_text, value))
        elif key == "gold":
            good = isinstance(value, int) and value in range(len(row["choices"]))
        else:
            good = _is_text(value)
        if not good:
            raise SparseSSMError(f"{where}: {key!r} is missing or wrong, got {shown(value)}")
    return {key: row[key] for key in fields}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


@cache
def _manager(include_defaults: bool) -> Any:
    """lm-eval's index; reading its thousands of configs takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults)


class _TaskLoader(yaml.SafeLoader):
    """Reads lm-eval's files without the functions that they name."""


_TaskLoader.add_constructor("!function", lambda loader, node: None)


def _build_local(name: str, data: Path) -> list[Any]:
    """A task of a folder, or a group with a task for each of the files."""
    from lm_eval.api.group import Group
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.config.group import GroupConfig

    text = (TASK_CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    config = yaml.load(text, _TaskLoader)
    pattern, fields = config["dataset_kwargs"]["files"], config.pop("dataset_kwargs")["fields"]
    files = sorted(data.glob(pattern))
    if not files:
        raise SparseSSMError(f"task {name}: there is no {data / pattern}")
    made = {}
    for file in files:
        task = f"{name}_{file.stem}" if "*" in pattern else name
        dataset = partial(read_local, files=file, fields=fields)
        with _quiet_lm_eval():
            made[task] = ConfigurableTask(
                config={**deepcopy(config), "task": task, "custom_dataset": dataset}
            )
    if "*" not in pattern:
        return list(made.values())
    average = {"metric": "acc", "aggregation": "mean", "weight_by_size": False}
    group = Group.from_config(
        GroupConfig(group=name, task=list(made), aggregate_metric_list=[average])
    )
    for member in made.values():
        group.add(member)
    return [group]


def _build_theirs(manager: Any, name: str) -> list[Any]:
    try:
        with _quiet_lm_eval():
            loaded = manager.load([name])
    except SparseSSMError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        what = "its data cannot be fetched" if isinstance(error, OSError) else "cannot be loaded"
        raise SparseSSMError(f"task {name}: {what}: {reason}") from error
    top = set(loaded.get("groups", {})) - {
        child for children in loaded.get("group_map", {}).values() for child in children
    }
    if top:
        return [loaded["groups"][group] for group in sorted(top)]
    return list(loaded["tasks"].values())


def _build_requests(task: Any, limit: int | None) -> None:
    """Requests depend on the documents alone: make them now, and keep them from model to model."""
    task.build_all_requests(limit=limit)

    def forget_answers(**_: Any) -> None:
        for instance in task.instances:
            instance.resps, instance.filtered_resps = [], {}

    task.build_all_requests = forget_answers


def _result(
    name: str,
    numbers: dict[str, Any],
    higher_is_better: dict[str, bool],
    subtasks: dict[str, list[str]],
) -> TaskResult:
    metrics = {}
    for key, value in numbers.items():
        metric, separator, filters = key.partition(",")
        if not separator or metric.endswith("_stderr") or not isinstance(value, float | int):
            continue
        if not math.isfinite(value):
            raise SparseSSMError(f"task {name}: {metric} is {value}")
        stderr = numbers.get(f"{metric}_stderr,{filters}")
        known = isinstance(stderr, float | int) and math.isfinite(stderr)
        label = metric if filters == "none" else f"{metric} ({filters})"
        metrics[label] = Metric(
            float(value),
            float(stderr) if known else None,  # type: ignore[arg-type]
            bool(higher_is_better.get(metric, True)),
        )
    return TaskResult(int(numbers.get("sample_len", 0)), metrics, tuple(subtasks.get(name, ())))


def _check_lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise SparseSSMError(
            "tasks need lm-eval, which is not installed: pip install 'sparsessm-plugin[tasks]'"
        ) from error


@contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """Keep what it prints and logs off the screen, and its bootstrap in this process.

    Its pool would fork a process that holds a model, and threads.
    """
    logger = logging.getLogger("lm_eval")
    level, forks = logger.level, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if forks is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = forks
