"""A lean FSDP trainer for the R1-Zero and R1 loops, built on the fused policy-gradient head of `kernels`."""
