"""Memory and time of a deployment on paper: sizes from config.json, bytes moved per decode step.

For choosing a mode, slots and cards before anything is started. Torch-free, reads no weights, asks
no device. Not a measurement: benchmarks/ measures.
"""

from safegene_vllm.plan.advice import Advice, advise
from safegene_vllm.plan.ask import Ask
from safegene_vllm.plan.gpus import GPUS, Gpu, find_gpu
from safegene_vllm.plan.modes import MODES, Mode, Step, plan_mode, plan_modes
from safegene_vllm.plan.shape import Linear, ModelShape, read_shape
from safegene_vllm.plan.slots import LORA_RANKS, rank_bucket

__all__ = [
    "GPUS",
    "LORA_RANKS",
    "MODES",
    "Advice",
    "Ask",
    "Gpu",
    "Linear",
    "Mode",
    "ModelShape",
    "Step",
    "advise",
    "find_gpu",
    "plan_mode",
    "plan_modes",
    "rank_bucket",
    "read_shape",
]
