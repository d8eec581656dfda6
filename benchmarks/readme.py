"""python -m lora_fast.benchmarks.readme: the figures in README.md and docs, from committed result files.

What stands between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->`` is replaced. A test holds the pages to
the files.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import grid as grid_of_sizes, readme_gpu, trainers as of_trainers
from .report import digits, traffic
from .tables import OURS, bars_lines, table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "intel-xeon-processor-2-threads"
# Processors without AMX, whose tables stand after the other's: Zen 5, the same with fewer instruction sets, and the
# same Intel with AMX turned off.
ZEN_5 = ROOT / "benchmarks" / "results" / "amd-epyc-family-26-model-2-2-threads"
ZEN_5_AVX512, ZEN_5_AVX2 = (
    ZEN_5.with_name(f"amd-epyc-family-26-model-2-with-onednn-max-cpu-isa-{isa}-2-threads")
    for isa in ("avx512-core", "avx2")
)
ZEN_4 = ZEN_5.with_name("amd-epyc-family-25-model-17-2-threads")
WITHOUT_AMX = ROOT / "benchmarks" / "results" / "intel-xeon-processor-without-amx-2-threads"
_DOCS = ("benchmarks.md", "distributed.md", "gpu.md", "integrations.md", "peft.md", "quantised.md", "serving.md")
PAGES = (ROOT / "README.md", *(ROOT / "docs" / name for name in _DOCS))
REGION = re.compile(
    r"(?P<begin><!-- figures: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<end><!-- end of figures -->)", re.S
)
GIB = 2**30
# Of the README's table: the file, the start of the row's title, what is put before it, and the records of the frozen
# linear, lora_fast's DoRA, PEFT's LoRA and PEFT's DoRA. One row in which PEFT's LoRA is faster is there on purpose.
_LAYER = ("frozen linear", "lora_fast DoRA", "PEFT LoRA", "PEFT DoRA")
_PEFT = (None, "accelerated DoRA", "PEFT LoRA", "PEFT DoRA")
_T0_3B = (None, "lora_fast DoRA, accelerate", "PEFT LoRA, fp32 adapters", "PEFT DoRA, fp32 adapters")
SUMMARY = (
    ("bench.json", "layer, inference, 16 tokens", "", _LAYER),
    ("bench.json", "layer, training step, 512 tokens, 4096×4096 bfloat16, rank 16", "", _LAYER),
    ("bench.json", "layer, training step, 512 tokens, 4096×4096 bfloat16, rank 384", "", _LAYER),
    ("peft.json", "training step with the optimizer step, 16 tokens", "PEFT model of four layers, ", _PEFT),
    ("t0-3b.json", "T0-3B, training step, 4×128 tokens and 4×32 targets, bfloat16, rank 16", "", _T0_3B),
)
SUMMARY_WITHOUT_AMX = (
    ("layer.json", "inference, 16 tokens, 4096×4096 bfloat16", "layer, ", _LAYER),
    ("layer.json", "training step, 512 tokens, 4096×4096 bfloat16", "layer, ", _LAYER),
    ("layer.json", "training step, 16 tokens, 4096×4096 bfloat16", "layer, ", _LAYER),
    ("layer.json", "training step, 512 tokens, 2048×2048 float32", "layer, ", _LAYER),
    SUMMARY[3],
)


def render(page: str) -> str:
    """The page with its figures made anew."""
    return REGION.sub(lambda match: match["begin"] + FIGURES[match["name"]]() + match["end"], page)


def main() -> None:
    for page in PAGES:
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")


def read(name: str, folder: Path | None = None) -> dict[str, Any]:
    return json.loads(((folder or RESULTS) / name).read_text(encoding="utf-8"))


def for_each_processor(section: Callable[[Path], str], name: str) -> str:
    """The section of each kind of processor that has this result file, one after the other."""
    folders = (RESULTS, ZEN_5, ZEN_5_AVX512, ZEN_5_AVX2, WITHOUT_AMX)
    return "\n".join(section(folder) for folder in folders if (folder / name).exists())


def origin(results: dict[str, Any], name: str, folder: Path | None = None) -> str:
    link = f"benchmarks/results/{(folder or RESULTS).name}/{name}"
    return f"{_conditions(results)}: [{link}](../{link})\n"


def _conditions(results: dict[str, Any]) -> str:
    versions = results["versions"]
    packages = ", ".join(f"{package} {versions[package]}" for package in ("torch", "peft") if versions.get(package))
    return f"{results['device']}, {results['threads']} threads, {packages}, {results['date'][:10]}"


def summary() -> str:
    """The README's tables: lora_fast's DoRA beside the frozen linear and PEFT, in time and memory."""
    return "\n".join(_summary(folder, rows) for folder, rows in ((RESULTS, SUMMARY), (ZEN_5, SUMMARY_WITHOUT_AMX)))


def _summary(folder: Path, chosen: Sequence[tuple[str, str, str, Sequence[str | None]]]) -> str:
    files = {name: read(name, folder) for name, *_ in chosen}
    links: dict[str, list[str]] = {}
    for name, results in files.items():
        links.setdefault(_conditions(results), []).append(f"[{name}](benchmarks/results/{folder.name}/{name})")
    lines = []
    for name, start, prefix, contenders in chosen:
        rows = (row for row in files[name]["rows"] if row["title"].startswith(start))
        row = next(row for row in rows if contenders[1] in row["records"])  # of LoRA's rows and DoRA's, the one of DoRA
        records = [row["records"].get(contender, {}) for contender in contenders]
        completed = [record for record in records[1:] if record.get("outcome", "completed") == "completed"]
        fastest = min(completed, key=lambda record: record["median_ms"])
        cells = (f"**{_cell(record)}**" if record is fastest else _cell(record) for record in records)
        lines.append([prefix + row["title"], *cells])
    origins = "; ".join(f"{conditions}: {', '.join(those)}" for conditions, those in links.items())
    return f"{origins}\n\n{table(['', 'frozen linear', 'lora_fast DoRA', 'PEFT LoRA', 'PEFT DoRA'], lines)}"


def _cell(record: dict[str, Any]) -> str:
    """Time and, in brackets, memory."""
    if not record:
        return ""
    ms, peak = record["median_ms"], record.get("peak_bytes") or 0
    time = f"{digits(ms / 1e3)} s" if ms >= 1e3 else f"{digits(ms)} ms"
    if record.get("outcome", "completed") != "completed":
        return f"{record['outcome']} ({time} a step)"
    return f"{time} ({f'{peak / GIB:.2f} GiB' if peak >= GIB else f'{digits(peak / 2**20)} MiB'})"


def layer() -> str:
    """One layer: each contender in units of the frozen linear, then every target."""
    return for_each_processor(_layer, "layer.json")


def _layer(folder: Path) -> str:
    results = read("layer.json", folder)
    steps = [row for row in results["rows"] if row["dtype"] == "bfloat16" and row["mode"] != "weight_norm"]
    columns = sorted({(row["mode"], row["tokens"]) for row in steps})
    names = dict.fromkeys(name for row in steps for name in row["records"] if not re.search(", (torch|cpu)$", name))

    def cell(name: str, column: tuple[str, int]) -> str:
        for row in steps:
            if (row["mode"], row["tokens"]) == column and name in row["records"]:
                record, frozen = row["records"][name], row["records"]["frozen linear"]
                text = f"{digits(record['median_ms'] / frozen['median_ms'])} ({digits(record['peak_bytes'] / 2**20)})"
                return f"**{text}**" if OURS.match(name) else text
        return ""

    first = table(
        ["", *(f"{mode}, {tokens} tokens" for mode, tokens in columns)],
        ([name, *(cell(name, column) for column in columns)] for name in names),
    )
    return f"{origin(results, 'layer.json', folder)}\n{first}\n{bars_lines(results['rows'])}"


def peft() -> str:
    """A PEFT model before and after acceleration: time and memory in units of PEFT's LoRA, then every target."""
    return for_each_processor(_peft, "peft.json")


def _peft(folder: Path) -> str:
    results = read("peft.json", folder)
    rows = results["rows"]

    def cell(row: dict[str, Any], name: str) -> str:
        record, baseline = row["records"][name], row["records"][row["baseline"]]
        text = f"{digits(record['median_ms'] / baseline['median_ms'])} ({digits(record['peak_bytes'] / 2**20)})"
        return f"**{text}**" if name.startswith("accelerated") else text

    first = table(
        ["", *(row["title"] for row in rows)],
        ([name, *(cell(row, name) for row in rows)] for name in rows[0]["records"]),
    )
    return f"{origin(results, 'peft.json', folder)}\n{first}\n{bars_lines(rows)}"


def mlp() -> str:
    """The memory of PEFT models whose MLPs run as one, on the processors that have measured it."""
    folders = [folder for folder in (RESULTS, ZEN_5, ZEN_4) if (folder / "mlp.json").exists()]
    return "\n".join(map(_mlp, folders))


ALL = 'accelerated DoRA, recompute="all"'


def mlp_peaks() -> str:
    """The README's sentence, and the picture."""
    results = read("mlp.json", ZEN_4)
    (row,) = results["rows"]
    peaks = {name: f"{digits(record['peak_bytes'] / 2**20)} MiB" for name, record in row["records"].items()}
    times = [row["records"][name]["median_ms"] for name in (ALL, "accelerated DoRA")]
    text = (
        f"In a PEFT model of four Llama-like layers a training step of {row['tokens']} tokens holds "
        f"{peaks['accelerated DoRA']} beyond the weights with accelerated DoRA, where PEFT's LoRA holds "
        f"{peaks['PEFT LoRA']}, or {peaks['PEFT LoRA, bfloat16 adapters']} with adapters in bfloat16; and "
        f'{peaks[ALL]} with `recompute="all"`, in {times[0] / times[1]:.2f} times the time.'
    )
    folder = f"benchmarks/results/{ZEN_4.name}"
    source = f"{_conditions(results)}: [mlp.json]({folder}/mlp.json)"
    return f"{textwrap.fill(text, 120)}\n\n![Peak memory of a training step]({folder}/mlp.svg)\n\n{source}\n"


def _mlp(folder: Path) -> str:
    results = read("mlp.json", folder)
    (row,) = results["rows"]
    baseline = row["records"][row["baseline"]]
    lines = (
        [
            f"**{name}**" if "DoRA" in name else name,
            f"{digits(record['peak_bytes'] / 2**20)} MiB",
            digits(record["peak_bytes"] / baseline["peak_bytes"]),
            f"{digits(record['median_ms'] / 1e3)} s",
        ]
        for name, record in row["records"].items()
    )
    first = table([row["title"], "peak memory beyond the weights", "× PEFT LoRA", "time"], lines)
    return f"{origin(results, 'mlp.json', folder)}\n{first}\n{bars_lines(results['rows'])}"


def trainers() -> str:
    """A step of each trainer, before and after acceleration, on the processors that have measured it."""
    folders = [folder for folder in (RESULTS, ZEN_5, ZEN_4) if (folder / "trainers.json").exists()]
    return "\n".join(map(_trainers, folders))


def _trainers(folder: Path) -> str:
    results = read("trainers.json", folder)
    return f"{origin(results, 'trainers.json', folder)}\n{of_trainers.as_table(results['rows'])}"


def quantised() -> str:
    """PEFT models over quantised linears, on the processors that have measured them."""
    folders = [folder for folder in (RESULTS, ZEN_5) if (folder / "quantised.json").exists()]
    return "\n".join(map(_quantised, folders))


def _quantised(folder: Path) -> str:
    results = read("quantised.json", folder)
    names = list(dict.fromkeys(name for row in results["rows"] for name in row["records"]))

    def cell(row: dict[str, Any], name: str) -> str:
        if name not in row["records"]:
            return "fails"
        record, baseline = row["records"][name], row["records"][row["baseline"]]
        text = f"{digits(record['median_ms'] / baseline['median_ms'])} ({digits(record['peak_bytes'] / 2**20)})"
        return f"**{text}**" if name.startswith("accelerated") else text

    times = table(["", *names], ([row["title"], *(cell(row, name) for name in names)] for row in results["rows"]))
    return f"{origin(results, 'quantised.json', folder)}\n{times}\n{bars_lines(results['rows'])}"


def grouped() -> str:
    """Rows that have adapters of their own, beside the frozen linear; then the targets, and what was missed."""
    folders = [folder for folder in (RESULTS, ZEN_5, ZEN_4) if (folder / "grouped.json").exists()]
    return "\n".join(map(_grouped, folders))


def _grouped(folder: Path) -> str:
    results = read("grouped.json", folder)
    rows = results["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["records"] if name != row["baseline"]))

    def cell(row: dict[str, Any], name: str) -> str:
        records = row["records"]
        return digits(records[name]["median_ms"] / records[row["baseline"]]["median_ms"]) if name in records else ""

    times = table(["", *names], ([row["title"], *(cell(row, name) for name in names)] for row in rows))
    peers = [bar for row in rows for bar in row["bars"] if bar.get("at_most") == 1.0]
    shown = [row | {"bars": [bar for bar in row["bars"] if bar not in peers or not bar["met"]]} for row in rows]
    met = sum(bar["met"] for bar in peers)
    said = f"Not slower than PEFT's loop and than a sort with `F.grouped_mm`: {met} of {len(peers)} comparisons.\n"
    return f"{origin(results, 'grouped.json', folder)}\n{times}\n{said}\n{bars_lines(shown)}"


def distributed() -> str:
    """Training steps in two processes, by engine: time and memory, targets, and what the processes send each other."""
    folders = [folder for folder in (RESULTS, ZEN_5) if (folder / "distributed.json").exists()]
    return "\n".join(map(_distributed, folders))


def _distributed(folder: Path) -> str:
    results = read("distributed.json", folder)
    rows = [row for row in results["rows"] if row["records"]]
    names = list(dict.fromkeys(name for row in rows for name in (*row["records"], *row["left_out"])))

    def cell(row: dict[str, Any], name: str) -> str:
        if name not in row["records"]:
            return "fails"
        record, baseline = row["records"][name], row["records"][row["baseline"]]
        ratios = (record[field] / baseline[field] for field in ("median_ms", "peak_bytes"))
        return "{:.2f} ({:.2f})".format(*ratios)

    times = table(
        ["engine", "tokens", *names],
        ([row["engine"], str(row["tokens"]), *(cell(row, name) for name in names)] for row in rows),
    )
    of_engines = {row["engine"]: row for row in rows}.values()  # what they send does not depend on the tokens
    rings = list(rows[0]["records"][rows[0]["baseline"]]["ring"])
    sent = table(
        ["engine", "", "calls, MiB of a step", *(f"each of {ranks} sends" for ranks in rings)],
        (
            [row["engine"], name, _calls(row["records"][name]), *map(traffic, row["records"][name]["ring"].values())]
            for row in of_engines
            for name in ("PEFT LoRA", "accelerated DoRA")
        ),
    )
    return f"{origin(results, 'distributed.json', folder)}\n{times}\n{bars_lines(rows)}\n{sent}"


def _calls(record: dict[str, Any]) -> str:
    return ", ".join(f"{kind} {traffic(count)}" for kind, count in record["collectives"].items())


def t0_3b() -> str:
    """T0-3B at full depth: how each contender ended, time and memory."""
    folders = [folder for folder in (RESULTS, ZEN_4) if (folder / "t0-3b.json").exists()]
    return "\n".join(map(_t0_3b, folders))


def _t0_3b(folder: Path) -> str:
    results = read("t0-3b.json", folder)
    first = table(
        ["dtype, rank", "", "outcome", "s a step", "live GiB", "× LoRA", "resident GiB", "× LoRA"],
        _t0_3b_rows(results["rows"]),
    )
    bars = [row | {"title": f"{row['dtype']}, rank {row['rank']}"} for row in results["rows"] if row["rank"] == 16]
    text = f"{origin(results, 't0-3b.json', folder)}\n{first}"
    return f"{text}\n{bars_lines(bars)}" if bars else text


def _t0_3b_rows(rows: Iterable[dict[str, Any]]) -> Iterator[list[str]]:
    for row in rows:
        baseline = row["records"].get(row["baseline"], {})
        for name, record in row["records"].items():
            completed = record["outcome"] == "completed"
            cells = [f"{row['dtype']}, {row['rank']}", f"**{name}**" if name.startswith("lora_fast") else name]
            cells.append("completed" if completed else f"**{record['outcome']}**, {record['stage']}")
            cells.append(digits(record["median_ms"] / 1e3) if record["step_ms"] else "")
            for measure in ("peak_bytes", "resident_bytes"):
                value, unit = record.get(measure), baseline.get(measure)
                if completed and value:
                    cells += [f"{value / GIB:.2f}", f"{value / unit:.3f}" if unit else ""]
                else:
                    prediction = record["prediction"] if measure == "peak_bytes" else None
                    cells += [f"{prediction['predicted_bytes'] / GIB:.1f} predicted" if prediction else "", ""]
            yield cells


def losses() -> str:
    """Every row of the suite in which a peer that computes the same is faster than what lora_fast takes by itself."""
    results = read("bench.json")
    rows = list(_losses(results["rows"]))
    return f"{origin(results, 'bench.json')}\n" + table(
        ["row", "lora_fast", "", "a peer", "", "ratio"], rows or [["none", "", "", "", "", ""]]
    )


def _losses(rows: Iterable[dict[str, Any]]) -> Iterator[list[str]]:
    for row in rows:
        records = row["records"]
        for name, kind in ((name, match[1]) for name in records if (match := OURS.match(name))):
            peers = {
                peer: record
                for peer, record in records.items()
                if not peer.startswith(("lora_fast", "frozen", "copy")) and (kind == "DoRA") == ("LoRA" not in peer)
            }
            for peer, record in peers.items():
                ratio = records[name]["median_ms"] / record["median_ms"]
                if ratio > 1:
                    times = (f"{digits(entry['median_ms'])} ms" for entry in (records[name], record))
                    yield [row["title"], name, next(times), peer, next(times), digits(ratio)]


def grid() -> str:
    """The grid of sizes and numbers of tokens, of each kind of processor that has one; nothing without any."""
    found = for_each_processor(_grid, grid_of_sizes.NAME)
    return f"{GRID}\n{found}" if found else ""


GRID = """\
## Sizes and numbers of tokens

The tables have lora_fast's median time as a multiple of PEFT's LoRA's, rank 16, by the number of tokens. LoRA is
compared with PEFT's LoRA with adapters of the same dtype, and DoRA with PEFT's LoRA as users get it, with float32
adapters: in inference with nothing changed, and in training steps of 256 tokens and more. lora_fast is meant to be
slower nowhere; a ratio up to 1.02 counts as noise, and what is above it is bold. `python -m lora_fast.benchmarks.grid`
repeats the measurement.
"""


def _grid(folder: Path) -> str:
    results = read(grid_of_sizes.NAME, folder)
    parts = [origin(results, grid_of_sizes.NAME, folder)]
    for kind, lines in grid_of_sizes.ratios(results["rows"]).items():
        headings = [f"lora_fast {kind}", *(f"{tokens}" for tokens in grid_of_sizes.TOKENS)]
        cells = (
            [f"{mode}, {size} {dtype}", *(_ratio(line.get(tokens)) for tokens in grid_of_sizes.TOKENS)]
            for (mode, dtype, size), line in lines.items()
        )
        parts.append(table(headings, cells))
    return "\n".join(parts)


def _ratio(measured: tuple[float, bool] | None) -> str:
    if measured is None:
        return ""
    ratio, broken = measured
    return f"**{ratio:.2f}**" if broken else f"{ratio:.2f}"


FIGURES: dict[str, Callable[[], str]] = {
    "summary": summary,
    "gpu-status": readme_gpu.gpu_status,
    "layer": layer,
    "peft": peft,
    "quantised": quantised,
    "grouped": grouped,
    "mlp": mlp,
    "trainers": trainers,
    "mlp-peaks": mlp_peaks,
    "distributed": distributed,
    "t0-3b": t0_3b,
    "losses": losses,
    "grid": grid,
    "gpu": readme_gpu.gpu,
    "gpu-bars": readme_gpu.gpu_bars,
    "gpu-settings": readme_gpu.gpu_settings,
    "gpu-kernels": readme_gpu.gpu_kernels,
}

if __name__ == "__main__":
    main()
