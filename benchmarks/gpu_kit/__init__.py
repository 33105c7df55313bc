"""Answers with one call on a machine with an NVIDIA GPU: is everything right, how fast is it, where does the time go.

    python -m benchmarks.gpu_kit [--seconds 480] [--plan first|second] [--facts FILE]

Every phase is a process of its own with a deadline, so a crash costs one phase. Facts are appended to FILE as they are
found, one JSON object a line; a table of the most important ones is printed last. docs/benchmarks.md says how to read
it. `--device cpu --tiny` rehearses every phase on a machine without a GPU and claims nothing.
"""
