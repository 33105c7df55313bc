"""Measures everything that needs an NVIDIA GPU in one call: correctness, speed, and where the time goes.

    python -m benchmarks.gpu_kit [--seconds 480] [--plan first|second] [--facts FILE]

Every phase is a process of its own with a deadline, so a crash costs one phase. Facts are appended to FILE as they are
found, one JSON object a line; a table of the most important ones is printed last. docs/benchmarks.md says how to read
it. `--device cpu --tiny` rehearses every phase on a machine without a GPU and claims nothing.
"""
