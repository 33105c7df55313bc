"""What the code itself does, counted on fake tensors: operations, bytes, launches, host waits, memory; ours and TRL's.

`fake_gpu` has a GPU that is not there, `operator_counter` counts, `flops` knows products, `triton_kernels` has Triton
kernels as counted launches, `head` and `steps` say what is counted, `report` prints it.
"""
