"""Prune a forecaster: a state-space model without a vocabulary, on a multivariate series.

python examples/forecast.py                    # on a generated series, about a minute on 2 cores
python examples/forecast.py --csv ETTh1.csv    # on your own file

The file has a header ``date,HUFL,HULL,MUFL,MULL,LUFL,LULL,OT``, as the public ETT series have it
(Electricity Transformer Temperature, arXiv 2012.07436): six loads of a transformer and the
temperature of its oil, one row an hour. A small Mamba learns to say the next day from the four
days before, and 70 % of its weights are then pruned, with and without tuning what is left. All
errors are mean squared ones over the normalised columns, on the last fifth of the rows, which
nothing else saw.
"""

import argparse
import csv
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaModel

from sparsessm_plugin import fast_forward
from sparsessm_plugin.methods import prune_by_gradient

COLUMNS = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
PAST, FUTURE = 96, 24  # hours
TRAIN = 0.8  # share of the rows that is trained on


# -- the series ----------------------------------------------------------------------------


def read_series(path: Path) -> Tensor:
    """(rows, 7) of a file in the layout of ETT.

    :raises SystemExit: no such file, other columns, a value that is no finite number, few rows
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
            if missing:
                raise SystemExit(f"{path} has no column {missing[0]}; needed: {', '.join(COLUMNS)}")
            series = torch.tensor([[float(row[c]) for c in COLUMNS] for row in reader])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SystemExit(f"cannot read {path}: {error}") from error
    except (TypeError, ValueError) as error:
        raise SystemExit(f"{path} holds a value that is no number: {error}") from error
    if not bool(series.isfinite().all()):
        raise SystemExit(f"{path} holds NaN or infinite values")
    needed = 2 * (PAST + FUTURE)
    if len(series) < needed:
        raise SystemExit(f"{path} has {len(series)} rows; at least {needed} are needed")
    return series


def generate_series(rows: int, seed: int = 0) -> Tensor:
    """(rows, 7) of the same kind: days, weeks and seasons, noise that lasts, a slow temperature."""
    generator = torch.Generator().manual_seed(seed)
    hours = torch.arange(rows, dtype=torch.float32)
    day, week, year = (2 * math.pi * hours / period for period in (24, 168, 8766))
    loads = []
    for i in range(6):
        phase, strength = torch.rand(2, generator=generator).tolist()
        daily = torch.sin(day + 2 * phase) + 0.4 * torch.sin(2 * day + 5 * phase)
        weekly = 0.6 * torch.tanh(4 * torch.cos(week + phase)) + 0.4 * torch.cos(year)
        noise, value = [], 0.0
        for shock in torch.randn(rows, generator=generator).tolist():
            value = 0.95 * value + 0.3 * shock
            noise.append(value)
        loads.append((1 + strength) * daily * (1.5 + weekly) + torch.tensor(noise) + i)
    total = torch.stack(loads).mean(0)
    oil, value = [], float(total[0])
    for load in total.tolist():  # warms and cools slowly
        value += (load - value) / 12
        oil.append(value)
    oil_noise = 0.1 * torch.randn(rows, generator=generator)
    return torch.stack([*loads, torch.tensor(oil) + torch.cos(year) + oil_noise], dim=1)


def cut(series: Tensor, every: int) -> Tensor:
    """(windows, PAST + FUTURE, 7), one beginning at each so many rows."""
    return series.unfold(0, PAST + FUTURE, every).transpose(1, 2).contiguous()


# -- the model -----------------------------------------------------------------------------


class Forecaster(nn.Module):
    """(b, PAST, 7) -> (b, FUTURE, 7), as changes from the day before."""

    def __init__(self, hidden_size: int, layers: int):
        super().__init__()
        self.enter = nn.Linear(len(COLUMNS), hidden_size)
        # the vocabulary has one token, which is never used
        self.backbone = MambaModel(
            MambaConfig(vocab_size=1, hidden_size=hidden_size, num_hidden_layers=layers)
        )
        self.leave = nn.Linear(hidden_size, FUTURE * len(COLUMNS))

    def forward(self, past: Tensor) -> Tensor:
        hidden = self.backbone(inputs_embeds=self.enter(past), use_cache=False)
        change = self.leave(hidden.last_hidden_state[:, -1])
        return past[:, -FUTURE:] + change.view(-1, FUTURE, len(COLUMNS))


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean squared error of a batch of windows: what the modifier differentiates."""
    return (model(batch[:, :PAST]) - batch[:, PAST:]).square().mean()


@torch.no_grad()
def test_error(model: nn.Module, windows: Tensor) -> float:
    """Mean squared error over windows."""
    model.eval()
    with fast_forward(model):
        losses = [float(loss_fn(model, batch)) * len(batch) for batch in windows.split(256)]
    return sum(losses) / len(windows)


def train(model: nn.Module, windows: Tensor, steps: int, batch_size: int, seed: int) -> None:
    """Adam with a learning rate that falls along a cosine."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with fast_forward(model, gradients=True):  # transformers' own loop is far slower on a CPU
        for _ in range(steps):
            chosen = torch.randint(len(windows), (batch_size,), generator=generator)
            optimizer.zero_grad()
            loss_fn(model, windows[chosen]).backward()
            optimizer.step()
            schedule.step()


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="a series in the layout of ETT")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it runs")
    options = parser.parse_args(arguments)
    if not 0 < options.sparsity <= 0.99:  # 1 % of each weight stays
        parser.error(f"--sparsity must be above 0 and at most 0.99, got {options.sparsity}")
    torch.manual_seed(options.seed)

    size, layers, steps, distill_steps, rows = (16, 1, 20, 3, 2000) if options.quick else SIZES
    series = read_series(options.csv) if options.csv else generate_series(rows, options.seed)
    end = int(TRAIN * len(series))
    series = (series - series[:end].mean(0)) / series[:end].std(0).clamp(min=1e-6)
    training, test = cut(series[:end], 1), cut(series[end - PAST :], FUTURE)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    training, test = training.to(device), test.to(device)
    print(f"{options.csv or 'a generated series'}: {len(series)} hours, {len(test)} test windows")

    started = time.perf_counter()
    model = Forecaster(size, layers).to(device)
    train(model, training, steps, 32, options.seed)
    print(f"trained {sum(p.numel() for p in model.parameters()):,} parameters", end=" ")
    print(f"in {time.perf_counter() - started:.0f} s")
    dense = {k: v.clone() for k, v in model.state_dict().items()}

    errors = {
        "last value": float((test[:, PAST - 1 : PAST] - test[:, PAST:]).square().mean()),
        "day before": float((test[:, PAST - FUTURE : PAST] - test[:, PAST:]).square().mean()),
        "dense": test_error(model, test),
    }
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(training), generator=generator)
    batches = list(training[order[: 32 * (4 if options.quick else 64)]].split(32))
    for name, settings in {
        "magnitude": {"saliency": "magnitude"},
        "gradient": {},
        "gradient, tuned": {"distill_steps": distill_steps, "distill_learning_rate": 1e-3},
    }.items():
        started = time.perf_counter()
        model.load_state_dict(dense)
        total = prune_by_gradient(
            model,
            batches,
            sparsity=options.sparsity,
            rounds=2 if options.quick else 8,
            calibration_batches=1 if options.quick else 2,
            loss_fn=loss_fn,
            **settings,
        ).total
        errors[name] = test_error(model, test)
        print(f"{name}: {total.pruned:,} of {total.entries:,} weights pruned", end=" ")
        print(f"in {time.perf_counter() - started:.0f} s")
    print("\nmean squared error on the test rows")
    for name, error in errors.items():
        print(f"  {name:16} {error:.4f}  {error / errors['dense']:.3f} of dense")
    return errors


# hidden_size, layers, training steps, tuning steps a round, generated hours
SIZES = (48, 2, 400, 20, 12000)


if __name__ == "__main__":
    main(sys.argv[1:])
