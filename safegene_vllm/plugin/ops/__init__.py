"""Tensor operations: the gain table and the LoRA products for CPU, Triton and plain torch.

`reference` defines what the Triton kernels compute; only `triton_kernels` needs Triton, and only
`triton_ops` imports it.
"""
