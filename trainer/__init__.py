"""A lean FSDP trainer for the R1-Zero loop, on the fused policy-gradient head of `kernels`."""
