"""GPU kernels: a tenant's own LoRA product and the safety product in the same two launches.

For CUDA devices with Triton; plugin/ops/triton_lora.py decides whether an engine uses them. Not for CPU
(plugin/ops/cpu_lora.py) and not the definition of anything: that is reference.py here, in plain torch.
Only programs.py needs Triton, and only product.py imports it.
"""
