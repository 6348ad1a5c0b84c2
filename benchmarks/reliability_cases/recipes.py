"""Recipes: right ones, wrong ones and hostile ones, drawn by number.

A recipe that is certainly right has to work, one that is certainly wrong has to be refused; of most
mixtures nobody knows beforehand, and either is good.
"""

# ruff: noqa: RUF001 - digits that only look like digits

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from reliability_cases.processes import DEMO, OUTPUT, PRUNE, SIZES, Case

IGNORE = ["lm_head", "re:.*dt_proj$"]
Fields = dict[str, Any]


# -- right ones ----------------------------------------------------------------------------


def sparse_ssm(rng: random.Random) -> Fields:
    fields: Fields = {"pruned_value": rng.choice(["zero", "memoryless"])}
    if rng.random() < 0.3:
        fields["mask_structure"] = rng.choice(["1:2", "2:4", "4:8", "1:4"])
    else:
        fields["sparsity"] = round(rng.uniform(0.05, 0.95), 3)
    fields["saliency"] = rng.choice(["output_error", "hessian", "transition", "magnitude"])
    if rng.random() < 0.3:
        fields["targets"] = rng.choice([["re:.*layers.[0-2].mixer$"], ["MambaMixer"]])
    return fields


def state_removal(rng: random.Random) -> Fields:
    fields: Fields = (
        {"keep": rng.randint(2, 15)}
        if rng.random() < 0.5
        else {"sparsity": rng.choice([0.25, 0.5, 0.75])}
    )
    fields["saliency"] = rng.choice(["output_energy", "magnitude", "last", "paper", "ghost"])
    if rng.random() < 0.4:
        fields["compensate"] = rng.choice([["D"], ["D", "C"], ["D", "out_proj"], []])
    if rng.random() < 0.2:
        fields["distill_steps"] = rng.randint(1, 2)
    return fields


def channel_removal(rng: random.Random) -> Fields:
    fields: Fields = rng.choice(
        [{"sparsity": 0.25}, {"sparsity": 0.5}, {"keep": 192}, {"keep": 128, "axis": "channels"}]
    )
    fields = dict(fields)
    fields["saliency"] = rng.choice(["output_energy", "magnitude", "out_proj_norm"])
    if rng.random() < 0.3:
        fields["compensate"] = rng.choice([["x_proj"], ["out_proj"], []])
    return fields


def sensitivity(rng: random.Random) -> Fields:
    fields: Fields = {"solver": rng.choice(["magnitude", "wanda", "sparsegpt", "alps"])}
    if rng.random() < 0.3:
        fields["mask_structure"] = rng.choice(["2:4", "1:4"])
        fields["ignore"] = ["re:.*dt_proj$"]
    else:
        fields["sparsity"] = round(rng.uniform(0.1, 0.8), 3)
        if rng.random() < 0.4:
            fields["allocation"] = "uniform"
    fields["targets"] = rng.choice([["in_proj"], ["out_proj"], ["in_proj", "out_proj"]])
    return fields


def gradient_magnitude(rng: random.Random) -> Fields:
    fields: Fields = {"sparsity": round(rng.uniform(0.1, 0.9), 3), "rounds": rng.randint(1, 2)}
    fields["schedule"] = rng.choice(["cubic", "linear"])
    fields["saliency"] = rng.choice(["weight_x_gradient_norm", "weight_x_gradient", "magnitude"])
    fields["scope"] = rng.choice(["global", "per_layer", "per_kind"])
    if rng.random() < 0.3:
        fields |= {"distill_steps": 1, "distill_loss": rng.choice(["labels", "dense"])}
    return fields


def sparse_gptq(rng: random.Random) -> Fields:
    scheme = rng.choice(["W8A8", "FP8_DYNAMIC", "W4A16"])
    targets = ["re:.*(in|out)_proj$"] if scheme == "W4A16" else ["Linear"]
    return {"scheme": scheme, "targets": targets, "ignore": IGNORE}


OURS: dict[str, Callable[[random.Random], Fields]] = {
    "SparseSSMModifier": sparse_ssm,
    "StateRemovalModifier": state_removal,
    "ChannelRemovalModifier": channel_removal,
    "SensitivitySparseGPTModifier": sensitivity,
    "GradientMagnitudeModifier": gradient_magnitude,
    "SparseGPTQModifier": sparse_gptq,
}
UPSTREAM: dict[str, Fields] = {
    "SparseGPTModifier": {"sparsity": 0.5, "targets": ["re:.*in_proj$"]},
    "WandaPruningModifier": {"sparsity": 0.5, "targets": ["re:.*out_proj$"]},
    "GPTQModifier": {"scheme": "W8A8", "targets": ["Linear"], "ignore": IGNORE},
    "QuantizationModifier": {"scheme": "FP8_DYNAMIC", "targets": ["Linear"], "ignore": IGNORE},
    "MagnitudePruningModifier": {
        "init_sparsity": 0.0, "final_sparsity": 0.5, "targets": ["re:.*in_proj$"],
    },
    "ConstantPruningModifier": {"targets": ["re:.*in_proj.weight$"]},
    "SmoothQuantModifier": {"smoothing_strength": 0.5},
    "AWQModifier": {"scheme": "W4A16", "targets": ["re:.*in_proj$"]},
    "QuIPModifier": {"targets": ["re:.*in_proj$"]},
    "SpinQuantModifier": {},
    "LogarithmicEqualizationModifier": {},
    "REAPPruningModifier": {},
    "Modifier": {},
}  # fmt: skip


def stage(*modifiers: tuple[str, Any]) -> dict[str, Any]:
    return {"prune_stage": {"prune_modifiers": dict(modifiers)}}


def right(rng: random.Random) -> tuple[Any, str, str]:
    kind = rng.choice(list(OURS))
    fields = OURS[kind](rng)
    return stage((kind, fields)), f"{kind} {fields}", "works"


def several(rng: random.Random) -> tuple[Any, str, str]:
    """Two or three modifiers, upstream's too, in one stage or more, in any order."""
    kinds = rng.sample([*OURS, *rng.sample(list(UPSTREAM), 3)], rng.randint(2, 3))
    chosen = [(k, OURS[k](rng) if k in OURS else UPSTREAM[k]) for k in kinds]
    what = "; ".join(f"{kind} {fields}" for kind, fields in chosen)
    if rng.random() < 0.5:
        return stage(*chosen), what, "either"
    stages = {f"s{i}_stage": {f"s{i}_modifiers": {k: f}} for i, (k, f) in enumerate(chosen)}
    return stages, what, "either"


# -- wrong values --------------------------------------------------------------------------

STRANGE: list[Any] = [
    None, True, False, -1, 0, 1, 2, 1.0, 0.5, 1e308, -1e308, 1e-320, float("inf"), float("-inf"),
    float("nan"), 10**30, -(10**30), 2**63, "", " ", "x", "0.5", "50%", "2:4", "2:4\n", "２:４",
    "4:2", "0:4", "4:4", "-1:4", "2:0", "1e400", "a" * 5000, "\0", "\ud7ff\u202e", "../../x",
    "/dev/full", "re:[", "re:(a+)+$", "re:.*", "re:" + "(.*)*" * 12 + "q", "re:", [], [[]], [None],
    [1, 2], ["re:[ab"], ["re:(\\w+)+#"], ["x"] * 2000, {}, {"a": 1}, {1: 2}, [{"a": []}],
    "{{ 1 }}", "eval(0.5)", "auto", "Linear", ["Linear"], ["lm_head"], ["re:.*norm.*"],
]  # fmt: skip
# Fields and values that are wrong whatever the rest.
WRONG: list[tuple[str, str, list[Any]]] = [
    ("*", "sparsity", [-0.1, 1.5, "half", [0.5], float("nan"), float("inf"), {}, 1e308]),
    ("*", "report_path", [1, [], "report.txt", "missing/report.json", "a\0b.json", "\ud7ff/"]),
    ("*", "sparsty", [0.5]),
    ("*", "targets", [["NoSuchModule"], 5, {"a": "b"}, ["re:["], ["re:no_such_module"]]),
    ("*", "ignore", [5, {"a": "b"}, ["re:["]]),
    ("*", "initialized_", [True]),
    ("StateRemovalModifier", "keep", [0, -3, 16, 17, 10**9, 2.5, "eight", [8]]),
    ("StateRemovalModifier", "compensate", [["E"], "D, C and more", 3]),
    ("ChannelRemovalModifier", "axis", ["rows", "heads", "head_dim", 1]),
    ("ChannelRemovalModifier", "keep", [0, 256, 257, 100, -64, "many"]),
    ("ChannelRemovalModifier", "multiple_of", [0, -8, 1000, "two"]),
    ("SensitivitySparseGPTModifier", "solver", ["alp", "", 3, None]),
    ("SensitivitySparseGPTModifier", "mask_structure", ["2:4\n", "２:４", "3:2", "a:b", "2:4:6"]),
    ("SensitivitySparseGPTModifier", "dampening_frac", [-1, float("nan"), "much"]),
    ("SensitivitySparseGPTModifier", "block_size", [0, -128, 1.5, "big"]),
    ("SparseSSMModifier", "mask_structure", ["2:4\n", "２:４", "3:7", "4:2", "0:0", 124]),
    ("SparseSSMModifier", "saliency", ["", "outputerror", 3]),
    ("SparseSSMModifier", "pruned_value", ["one", 38, None]),
    ("GradientMagnitudeModifier", "rounds", [0, -1, 1.5, "two"]),
    ("GradientMagnitudeModifier", "distill_learning_rate", [0, -1.0, float("inf")]),
    ("GradientMagnitudeModifier", "min_keep", [1.0, -0.1, 2]),
    ("GradientMagnitudeModifier", "loss_fn", ["print", "os.system"]),
    ("SparseGPTQModifier", "scheme", ["W3A5", 5, [], {}, "w8 a8"]),
    ("SparseGPTQModifier", "targets", [["re:.*dt_proj$"], ["re:.*conv1d$"], ["NoSuch"]]),
    ("SparseGPTQModifier", "ignore", [["re:.*"]]),
    ("SparseGPTQModifier", "block_size", ["x", -1, 0]),
]


def wrong_value(rng: random.Random) -> tuple[Any, str, str]:
    """A right modifier with one value that cannot be right."""
    owner, field, values = rng.choice(WRONG)
    kind = rng.choice(list(OURS)) if owner == "*" else owner
    fields = OURS[kind](rng)
    if field == "sparsity" and kind == "SparseGPTQModifier":
        kind, fields = "SparseSSMModifier", sparse_ssm(rng)
    if field in ("sparsity", "keep"):
        for other in ("sparsity", "keep", "mask_structure"):
            fields.pop(other, None)
    value = rng.choice(values)
    fields[field] = value
    expected = "refused"
    if field == "targets" and kind == "SparseSSMModifier" and value == ["Linear"]:
        expected = "either"
    return stage((kind, fields)), f"{kind} with {field}: {value!r:.120}", expected


def strange_value(rng: random.Random) -> tuple[Any, str, str]:
    """Any value in any field: one line or a whole result."""
    kind = rng.choice(list(OURS))
    fields = OURS[kind](rng)
    names = [*fields, "targets", "ignore", "report_path", "start", "end", "index", "group", "keep"]
    names += ["sparsity", "mask_structure", "alpha", "calibration_batches", "distill_steps"]
    names += ["block_size"]
    field, value = rng.choice(names), rng.choice(STRANGE)
    if field == "distill_steps" and isinstance(value, int) and value > 2:
        value = 3
    fields[field] = value
    return stage((kind, fields)), f"{kind} with {field}: {value!r:.80}", "either"


# -- shapes of YAML ------------------------------------------------------------------------

GROUP = "prune_stage:\n  prune_modifiers:\n    "
PRUNER = GROUP + "SparseSSMModifier:"
RIGHT = PRUNER + " {sparsity: 0.5}\n"
JSON = '{"prune_stage": {"prune_modifiers": {"SparseSSMModifier": {"sparsity": 0.5}}}}'
SHAPES: list[tuple[str, str, str]] = [
    ("modifiers as a list", GROUP + "- SparseSSMModifier: {sparsity: 0.5}\n", "refused"),
    ("no stage", "prune_modifiers:\n  SparseSSMModifier: {sparsity: 0.5}\n", "refused"),
    ("a modifier alone", "SparseSSMModifier: {sparsity: 0.5}\n", "refused"),
    ("misspelt group", RIGHT.replace("prune_modifiers", "prune_modifier"), "refused"),
    ("misspelt stage", RIGHT.replace("prune_stage", "prune_stages"), "refused"),
    ("misspelt modifier", RIGHT.replace("SparseSSM", "SparseSMM"), "refused"),
    ("empty", "", "refused"),
    ("spaces", "  \n\n", "refused"),
    ("a comment", "# nothing\n", "refused"),
    ("null", "~\n", "refused"),
    ("a scalar", "prune\n", "refused"),
    ("a number", "1\n", "refused"),
    ("a list", "- a\n- b\n", "refused"),
    ("empty stage", "prune_stage:\n", "refused"),
    ("empty group", "prune_stage:\n  prune_modifiers:\n", "refused"),
    ("a modifier without fields", PRUNER + "\n", "refused"),
    ("a modifier that is a text", PRUNER + " half\n", "refused"),
    ("a modifier that is a list", PRUNER + " [0.5]\n", "refused"),
    ("tabs", RIGHT.replace("  ", "\t"), "refused"),
    ("a key twice", RIGHT + "    SparseSSMModifier: {sparsity: 0.25}\n", "refused"),
    ("a stage twice", RIGHT + RIGHT, "refused"),
    ("two documents", RIGHT + "---\n" + RIGHT, "refused"),
    ("byte order mark", "\ufeff" + RIGHT, "works"),
    ("Windows line ends", RIGHT.replace("\n", "\r\n"), "works"),
    ("JSON", JSON, "works"),
    ("unclosed", "prune_stage: {prune_modifiers: {SparseSSMModifier: {sparsity: 0.5}", "refused"),
    ("quoted number", RIGHT.replace("0.5", '"0.5"'), "either"),
    ("octal-like", RIGHT.replace("0.5", "0o7"), "refused"),
    ("sexagesimal", PRUNER + " {mask_structure: 2:4}\n", "refused"),
    ("a date", RIGHT.replace("0.5", "2024-01-01"), "refused"),
    ("an impossible date", RIGHT.replace("0.5", "2024-99-99"), "refused"),
    ("null key", "? \n: {prune_modifiers: {SparseSSMModifier: {sparsity: 0.5}}}\n", "refused"),
    ("a key that is a list", "[a, b]: 1\n", "refused"),
    ("a key that is a mapping", "? {a: 1}\n: 2\n", "refused"),
    ("a number as modifier", GROUP + "5: {sparsity: 0.5}\n", "refused"),
    ("merge key", PRUNER + " &x {sparsity: 0.5}\n    StateRemovalModifier: {<<: *x}\n", "either"),
    ("anchor that means itself", "a_stage: &a\n  b_modifiers: *a\n", "refused"),
    ("unknown alias", "a_stage: *nowhere\n", "refused"),
    ("python object", "a_stage: !!python/object/apply:os.system ['touch ../payload']\n", "refused"),
    ("python module", "a_stage: !!python/module:os\n", "refused"),
    ("python name", PRUNER + " !!python/name:os.system\n", "refused"),
    ("python tuple", PRUNER + " {targets: !!python/tuple [a]}\n", "refused"),
    ("own tag", "prune_stage: !mine\n  prune_modifiers: 1\n", "refused"),
    ("set", "prune_stage:\n  prune_modifiers: !!set {SparseSSMModifier}\n", "refused"),
    ("ordered map", "prune_stage: !!omap [prune_modifiers: {SparseSSMModifier: {}}]\n", "refused"),
    ("binary", PRUNER + " {sparsity: !!binary aGk=}\n", "refused"),
    ("args", "args: {x: 1}\n" + RIGHT, "either"),
    ("jinja", "{{ cycler.__init__.__globals__.os.system('touch ../payload') }}\n", "refused"),
    ("formula", RIGHT.replace("0.5", "eval(open('../payload', 'w').close())"), "refused"),
    ("control characters", RIGHT + "\x07\x1b[2J\n", "refused"),
    ("trailing null byte", RIGHT + "\0", "refused"),
    ("surrogate escape", RIGHT.replace("0.5", '"\\ud800"'), "refused"),
]  # fmt: skip


def shape(number: int, rng: random.Random) -> tuple[str, str, str]:
    what, text, expected = SHAPES[number % len(SHAPES)]
    return text, what, expected


# -- hostile ones --------------------------------------------------------------------------


def bomb(levels: int, width: int, field: str) -> str:
    """Aliases of aliases: a few hundred bytes that mean ``width ** levels`` items."""
    lines = ["a0: &a0 [" + ", ".join(["x"] * width) + "]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [" + ", ".join([f"*a{level - 1}"] * width) + "]")
    inner = "\n".join("    " + line for line in lines)
    return (
        f"prune_stage:\n  prune_modifiers:\n    SparseSSMModifier:\n      {field}: "
        + "[" + ", ".join(f"*a{levels - 1}" for _ in range(width)) + "]\n"
    ).replace("prune_stage:", "args:\n" + inner + "\nprune_stage:")  # fmt: skip


def hostile(number: int, rng: random.Random, place: Path) -> tuple[bytes | None, str, str]:
    """Content that is meant to hurt; None where the recipe is no ordinary file."""
    recipe = place / "work" / "recipe.yaml"
    depth, size = rng.choice([1000, 20_000, 100_000]), rng.choice([5_000, 200_000])
    field = rng.choice(["sparsity", "targets", "ignore", "saliency", "report_path"])
    choice = number % 20
    if choice == 0:
        levels, width = rng.choice([(9, 9), (20, 2), (30, 2), (7, 30)])
        return (
            bomb(levels, width, field).encode(),
            f"aliases {width}^{levels} in {field}",
            "refused",
        )
    if choice == 1:
        return b"[" * depth, f"{depth} open brackets", "refused"
    if choice == 2:
        text = b"a_stage: " + b"{a: " * depth + b"1" + b"}" * depth
        return text, f"mappings {depth} deep", "refused"
    if choice == 3:
        text = RIGHT.replace("0.5", "9" * size).encode()
        return text, f"an integer of {size} digits", "refused"
    if choice == 4:
        return RIGHT.replace("0.5", "x" * size).encode(), f"a value of {size} letters", "refused"
    if choice == 5:
        return bytes(rng.randrange(256) for _ in range(2000)), "random bytes", "refused"
    if choice == 6:
        return RIGHT.encode("utf-16"), "UTF-16", "either"
    if choice == 7:
        return RIGHT.encode() + b"# \xff\xfe\n", "not UTF-8", "refused"
    if choice == 8:
        os.mkfifo(recipe)
        return None, "a fifo as recipe", "refused"
    if choice == 9:
        recipe.symlink_to(rng.choice(["/dev/zero", "/dev/random", "/dev/full"]))
        return None, f"{os.readlink(recipe)} as recipe", "refused"
    if choice == 10:
        recipe.mkdir()
        return None, "a folder as recipe", "refused"
    if choice == 11:
        recipe.symlink_to("recipe.yaml")
        return None, "a link to itself as recipe", "refused"
    if choice == 13:
        patterns = [
            "re:(a|a)*$b",
            "re:(\\w*\\.*)*#",
            "re:((a*)*)*#",
            "re:(.*.*)*.*#",
            "re:^(\\w+\\.?)+#",
        ]
        pattern, kind = rng.choice(patterns), rng.choice(["targets", "ignore"])
        owner = rng.choice(["SparseSSMModifier", "SensitivitySparseGPTModifier"])
        text = yaml.safe_dump(stage((owner, {"sparsity": 0.5, kind: [pattern]})))
        return text.encode(), f"{owner}, {kind}: {pattern}", "either"
    if choice == 14:
        keys = "".join(f"  k{i}_modifiers: {{}}\n" for i in range(size // 10))
        return f"a_stage:\n{keys}".encode(), f"{size // 10} empty groups", "refused"
    if choice == 15:
        return RIGHT.encode() + b"#" * (20 << 20), "a comment of 20 MiB", "either"
    if choice == 16:
        merges = "a0: &a0 {k: 1}\n" + "".join(
            f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 24)
        )
        return f"{merges}a_stage: {{b_modifiers: *a23}}\n".encode(), "merges of merges", "refused"
    if choice == 17:
        return (
            RIGHT.replace("0.5", "1e" + "9" * 400).encode(),
            "an exponent of 400 digits",
            "refused",
        )
    if choice == 18:
        return RIGHT.replace("0.5", "0x" + "f" * size).encode(), f"{size} hex digits", "refused"
    if choice == 19:
        target = "/" + "a" * 300 + ".json"
        fields = {"sparsity": 0.5, "report_path": rng.choice([target, "/proc/x.json", "/x/y.json"])}
        return (
            yaml.safe_dump(stage(("SparseSSMModifier", fields))).encode(),
            "report nowhere",
            "refused",
        )
    text = RIGHT.replace("{sparsity: 0.5}", "{sparsity: 0.5, targets: [" + "x, " * size + "x]}")
    return text.encode(), f"{size} targets that match nothing", "refused"


# -- calibration data and options ----------------------------------------------------------


def data(number: int, rng: random.Random, place: Path) -> tuple[list[str], str, str]:
    """Options in place of the usual ones, with files that they name."""
    work = place / "work"
    text = work / "other.jsonl"
    contents: list[tuple[str, bytes]] = [
        ("JSON lines nested 100,000 deep", b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"),
        ("JSON lines with 5,000 digits", b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n"),
        ("JSON lines that are no JSON", b'{"text": "a"\n'),
        ("JSON lines without text", b'{"txt": "a"}\n'),
        ("JSON lines with a number as text", b'{"text": 5}\n'),
        ("empty text", b""),
        ("blank texts", b'{"text": ""}\n{"text": "  "}\n'),
        ("text that is not UTF-8", b'{"text": "\xff\xfe"}\n'),
        ("a lone surrogate", b'{"text": "' + b"a \\ud800 b " * 50 + b'"}\n'),
        ("too short a text", b'{"text": "one two"}\n'),
        ("null bytes", b"\0" * 5000),
    ]
    usual = ["--recipe", "alog-50", *SIZES, "--output", OUTPUT]
    choice = number % (len(contents) + 9)
    if choice < len(contents):
        what, content = contents[choice]
        text.write_bytes(content)
        return [*usual, "--calibration", text.name], f"calibration: {what}", "refused"
    choice -= len(contents)
    if choice == 0:
        os.mkfifo(text)
        return [*usual, "--calibration", text.name], "calibration: a fifo", "refused"
    if choice == 1:
        text.symlink_to("/dev/zero")
        return [*usual, "--calibration", text.name], "calibration: a link to /dev/zero", "refused"
    if choice == 2:
        return [*usual, "--calibration", "/dev/zero"], "calibration: /dev/zero", "refused"
    if choice == 3:
        many = str(10 ** rng.choice([19, 30]))
        return (
            ["--recipe", "alog-50", *PRUNE, "--batch-size", many],
            f"--batch-size {many}",
            "either",
        )
    if choice == 4:
        many = str(10 ** rng.choice([9, 30]))
        return (
            ["--recipe", "alog-50", *PRUNE, "--max-seq-length", many],
            f"windows of {many}",
            "refused",
        )
    if choice == 5:
        number = rng.choice([-1, 2**64, 10**40])
        return ["--recipe", "alog-50", *PRUNE, "--seed", str(number)], f"--seed {number}", "either"
    if choice == 6:
        name = rng.choice(["no such data set", "wikitext:x:y:z", "::", "../../../etc", "a\nb"])
        return [*usual, "--calibration", name], f"calibration: {name!r}", "refused"
    if choice == 7:
        (work / OUTPUT).mkdir()
        report = rng.choice(
            [b"{", b"[]", b'{"files": 5}', b'{"files": [[]]}', b"\xff", b"[" * 100_000]
        )
        (work / OUTPUT / "sparsessm_report.json").write_bytes(report)
        return (
            ["--recipe", "alog-50", *PRUNE],
            f"a damaged report in the output: {report[:20]!r}",
            "refused",
        )
    output = rng.choice(["text.jsonl", "text.jsonl/out", "/proc/out", ".", "..", "a" * 300, "/"])
    return ["--recipe", "alog-50", *PRUNE, "--output", output], f"--output {output:.40}", "refused"


# -- drawing -------------------------------------------------------------------------------


def make(number: int, rng: random.Random, place: Path) -> Case:
    """The recipe of a number: of ten, two right, one of several modifiers, two and one with wrong
    and strange values, two of other shapes, one hostile, one with other data or options."""
    recipe = place / "work" / "recipe.yaml"
    arguments = ["prune", DEMO, "--recipe", recipe.name, *PRUNE]
    turn, place_in_list = number % 10, number // 10
    content: Any
    if turn == 9:
        options, what, expected = data(place_in_list, rng, place)
        return Case(what, ["prune", DEMO, *options], expected)
    if turn == 8:
        content, what, expected = hostile(place_in_list, rng, place)
    elif turn in (6, 7):
        content, what, expected = shape((2 * place_in_list + turn) * 17, rng)
    else:
        draw = (right, right, several, wrong_value, wrong_value, strange_value)[turn]
        content, what, expected = draw(rng)
        content = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    if content is not None:
        recipe.write_bytes(content)
    return Case(what, arguments, expected)
