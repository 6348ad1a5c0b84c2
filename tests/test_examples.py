"""The examples, and what the documentation says of oneshot(), run, in forms that take seconds."""

import csv
import importlib.util
import re
import shutil
from pathlib import Path

import pytest
from conftest import DEMO, tiny_model
from datasets import Dataset
from llmcompressor import active_session

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def forecast():
    spec = importlib.util.spec_from_file_location("forecast", EXAMPLES / "forecast.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path, forecast, rows, columns=None, value=None):
    columns = columns or forecast.COLUMNS
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["date", *columns])
        for i, row in enumerate(forecast.generate_series(rows, seed=5).tolist()):
            writer.writerow([f"hour {i}", *row[: len(columns)]])
            if value is not None:
                writer.writerow(["hour", *[value] * len(columns)])


def test_forecast_of_a_file(forecast, tmp_path, capsys):
    path = tmp_path / "series.csv"
    write(path, forecast, 700)
    errors = forecast.main(["--quick", "--csv", str(path)])
    text = capsys.readouterr().out
    assert "700 hours, 5 test windows" in text
    # every run has pruned to the same exact number
    lines = [line for line in text.splitlines() if "weights pruned" in line]
    assert len({line.split(": ")[1].split(" weights")[0] for line in lines}) == 1
    assert set(errors) > {"dense", "magnitude", "gradient", "gradient, tuned"}
    pruned = [e for name, e in errors.items() if name.startswith(("magnitude", "gradient"))]
    assert all(0.3 < error / errors["dense"] < 3 for error in pruned)


def test_generated_series_has_days(forecast):
    """Days come again: yesterday says more of today than the last value does."""
    windows = forecast.cut(forecast.generate_series(1500), 24)
    past, future = windows[:, : forecast.PAST], windows[:, forecast.PAST :]
    day_before = (past[:, -forecast.FUTURE :] - future).square().mean()
    assert day_before < 0.5 * (past[:, -1:] - future).square().mean()


@pytest.mark.parametrize(
    ("columns", "rows", "value", "message"),
    [
        (("HUFL", "OT"), 700, None, "no column HULL"),
        (None, 50, None, "has 50 rows; at least 240 are needed"),
        (None, 700, "n/a", "no number"),
        (None, 700, "nan", "NaN or infinite"),
    ],
)
def test_files_that_are_refused(forecast, tmp_path, columns, rows, value, message):
    write(tmp_path / "series.csv", forecast, rows, columns, value)
    with pytest.raises(SystemExit, match=message):
        forecast.main(["--quick", "--csv", str(tmp_path / "series.csv")])


# -- snippets ------------------------------------------------------------------------------


def snippets(language, containing):
    """Code of the documentation that holds a text, by file and number."""
    found = {}
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        blocks = re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.S)
        for block in blocks:
            if containing in block:
                found[f"{path.name} {len(found) + 1}"] = block
    return found


def rows(*texts):
    """Every other row is blank, as in WikiText."""
    return Dataset.from_dict({"text": [text for row in texts for text in ("", row, "")]})


SNIPPETS = snippets("python", "oneshot(")


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippets_with_blank_rows(name, tmp_path, monkeypatch):
    """As they stand, but for the model, the data and how much of it is read."""
    import datasets
    import llmcompressor

    real, data = llmcompressor.oneshot, rows(*["Some words here, enough of them."] * 8)
    ran = []
    # of the family whose states are removed fastest
    tiny_model("falcon_mamba", vocab_size=2048, state_size=16).save_pretrained(tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / file, tmp_path / "model")

    def oneshot(model, recipe, dataset, output_dir=None, **settings):
        settings.pop("dataset_config_name", None)
        settings.pop("splits", None)
        settings["max_seq_length"] = min(64, settings.get("max_seq_length", 64))
        real(model="model", recipe=recipe, dataset=data, output_dir=output_dir, **settings)
        ran.append(active_session().lifecycle.recipe.modifiers)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(llmcompressor, "oneshot", oneshot)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: data)
    monkeypatch.setattr("compressed_tensors.distributed.init_dist", lambda: None)
    monkeypatch.setattr("llmcompressor.datasets.get_rank_partition", lambda split, n: split)
    (recipe, *_) = snippets("yaml", "StateRemovalModifier").values()
    Path("recipe.yaml").write_text(recipe, encoding="utf-8")
    exec(compile(SNIPPETS[name], name, "exec"), {"oneshot": oneshot})
    assert len(ran) == SNIPPETS[name].count("oneshot(")
    for modifiers in ran:
        (layer, *_) = modifiers[0].report()["layers"]
        assert layer["after"] == 8
        assert layer["tokens"] > 8
