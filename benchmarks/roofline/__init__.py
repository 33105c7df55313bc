"""Counts on fake tensors what our code and TRL's does: operations, bytes, launches, host waits, memory.

`fake_gpu` has a GPU that is not there, `operator_counter` counts by the rules of `trl_fast.planning.roofline`,
`triton_kernels` has TRL's Triton kernels as counted launches, `head` and `steps` say what is counted, `report` prints
it.
"""
