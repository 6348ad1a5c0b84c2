"""What the documentation states for a CPU, beside what a small run measures here and now."""

import time
import traceback
from collections.abc import Iterable
from contextlib import suppress

import harness
from harness import Job, markdown


def compare(budget: float, names: Iterable[str]) -> str:
    """One table: ratios of the result files that documentation shows, and of quick runs.

    :param budget: seconds for all of it; no row begins later
    :param names: of experiments
    """
    started, lines, remarks = time.monotonic(), [], []
    for name in names:
        one = harness.experiment(name)
        for result, fields in one.quick.items():
            if one.ratios is None or result not in one.results:
                continue
            begun, processor = time.monotonic(), time.process_time()
            left = budget - (begun - started)
            job = Job(result, one.configuration(**fields), budget=left)
            try:
                if left > 0:
                    harness.execute(one, job)
            except (Exception, SystemExit) as error:  # the others still run
                traceback.print_exc()
                remarks.append(f"{result}: {error}")
            now: dict[str, float] = {}
            with suppress(KeyError):  # of what was not begun
                now = one.ratios(job.numbers)
            for label, value in one.ratios(harness.load(result)).items():
                measured = f"{now[label]:.3f}" if label in now else "not measured"
                lines.append([result, label, f"{value:.3f}", measured])
            spent = time.monotonic() - begun, time.process_time() - processor
            remarks.append(f"{result}: {spent[0]:.0f} s, {spent[1]:.0f} s of the processor")
            print(remarks[-1], flush=True)
    head = ["result file", "ratio", "stated", "measured now, on less"]
    return "\n\n".join(["# Stated and measured", markdown(head, lines), "; ".join(remarks)])
