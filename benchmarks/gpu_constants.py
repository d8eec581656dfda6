"""The constants that the kernels' choices by size read, from what `make gpu-tune` measured.

    python -m lora_fast.benchmarks.gpu_constants TUNE.json [--file constants.json]

Writes triton_kernels/constants.json, with the device's name, and prints what changes. Constants that the file has of
another compute capability go; those of the same that were not measured this time stay. `make aot` and `make gpu` then
tell whether the choices compile everywhere and are right.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from lora_fast.triton_kernels import constants

from . import report

ENOUGH = 0.98  # of today's time: what is nearer is noise, and today's constant stays
MOST_DIFFERENCE = 2**-7  # of the RMS, from today's results: bfloat16's ulp, for other orders of the sums


def plain(value: Any) -> Any:
    """A constant as JSON has it."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def ratio(us: Mapping[str, float], today: Mapping[str, float]) -> float:
    """The geometric mean over the sizes of the time in units of today's."""
    return math.exp(sum(math.log(us[size] / today[size]) for size in today) / len(today))


def is_right(record: Mapping[str, Any]) -> bool:
    return "failed" not in record and record["difference"] <= MOST_DIFFERENCE


def best(records: list[dict[str, Any]], today: Mapping[str, float], count: int) -> list[dict[str, Any]]:
    """The ``count`` fastest that are right."""
    return sorted((record for record in records if is_right(record)), key=lambda one: ratio(one["us"], today))[:count]


def winner(records: list[dict[str, Any]], today: Mapping[str, float], value: Any) -> Any:
    """The fastest value that is right, if it is faster than noise; else ``value``, today's."""
    fastest = best(records, today, 1)
    return fastest[0]["value"] if fastest and ratio(fastest[0]["us"], today) <= ENOUGH else value


def document(tune: Mapping[str, Any], source: str, before: Mapping[str, Any]) -> dict[str, Any]:
    """The content of constants.json; ValueError where ``tune`` names what there is not."""
    capability, origin = tune["compute_capability"], f"{source}, commit {tune.get('commit')}"
    for name, value in tune["constants"].items():
        constants.value(name, value)
    kept = before["constants"] if before["compute_capability"] == capability else {}
    measured = {
        name: {"value": value, "device": tune["device"], "source": origin} for name, value in tune["constants"].items()
    }
    return {"compute_capability": capability, "constants": kept | measured}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lora_fast.benchmarks.gpu_constants", description=__doc__)
    parser.add_argument("tune", type=Path, help="tune.json of gpu_tune")
    parser.add_argument("--file", type=Path, default=constants.FILE, help="default: %(default)s")
    arguments = parser.parse_args()
    before = json.loads(arguments.file.read_text(encoding="utf-8"))
    try:
        tune = json.loads(arguments.tune.read_text(encoding="utf-8"))
        after = document(tune, arguments.tune.name, before)
    except (OSError, KeyError, ValueError) as error:
        parser.error(f"{arguments.tune}: got {error!r}, expected what gpu_tune writes")
    for name, found in after["constants"].items():
        predicted = {"value": plain(getattr(constants.PREDICTED, name))}
        old, value = before["constants"].get(name, predicted)["value"], found["value"]
        change = f"{value}" if value == old else f"{old} -> {value}"
        print(f"{name}: {change} ({found['device']}, {found['source']})")
    report.write_json(arguments.file, after)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
