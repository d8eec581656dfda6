"""Benchmarks of lora_fast against what people use today; installs as ``lora_fast.benchmarks``.

registry: what is measured (inputs, contenders, bars). contenders: how each one is built. runner: time and peak memory,
alternated in one process. layer: the table of one layer's speed. report: tables, provenance, JSON.
suite: the rows of `lora-fast bench`, which are prepared by ops and models, run by bench, kept by records; memory and
roofline: what the machine has. page, figures: `lora-fast report`. command: the options of both.
"""
