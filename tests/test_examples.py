"""The examples run, in the form that takes seconds."""

import csv
import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


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
    assert all(0 < error < 100 for error in errors.values())


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
