"""Memory and time of a deployment on paper: sizes from config.json, bytes moved per decode step.

For choosing a mode, slots and cards before anything is started. Torch-free, reads no weights, asks
no device. Not a measurement: benchmarks/ measures.
"""

from safegene_vllm.planner.advice import Advice, advise
from safegene_vllm.planner.estimates import MODES, ServingMode, StepEstimate, plan_mode, plan_modes
from safegene_vllm.planner.gpus import GPUS, Gpu, find_gpu
from safegene_vllm.planner.model_shape import Linear, ModelShape, read_shape
from safegene_vllm.planner.slots import LORA_RANKS, rank_bucket
from safegene_vllm.planner.workload import Workload

__all__ = [
    "GPUS",
    "LORA_RANKS",
    "MODES",
    "Advice",
    "Gpu",
    "Linear",
    "ModelShape",
    "ServingMode",
    "StepEstimate",
    "Workload",
    "advise",
    "find_gpu",
    "plan_mode",
    "plan_modes",
    "rank_bucket",
    "read_shape",
]
