"""Counts the work of operators on fake tensors: operations of products, bytes, launches.

`flops` knows products, `bytes_moved` what is read and written, `known_values` numbers that the work depends on, and
`work` adds up a step's stages. The planner and `benchmarks.roofline` go by them.
"""
