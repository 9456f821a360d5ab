"""Capacity planner: memory and decode time of a deployment, from config.json and GPU data sheets.

Loads no torch, reads no weights and queries no device. Sizes of slots, vector and gain table are
compared with a running engine in the tests; everything in ESTIMATED is computed only.
"""

from safegene_vllm.planner.advice import Advice, advise, fit_slots
from safegene_vllm.planner.estimates import (
    COMPARED,
    ESTIMATED,
    MODES,
    ServingMode,
    StepEstimate,
    plan_mode,
    plan_modes,
)
from safegene_vllm.planner.gpus import GPUS, Gpu, find_gpu
from safegene_vllm.planner.model_shape import Linear, ModelShape, read_shape
from safegene_vllm.planner.slots import LORA_RANKS, rank_bucket
from safegene_vllm.planner.workload import Workload

__all__ = [
    "COMPARED",
    "ESTIMATED",
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
    "fit_slots",
    "plan_mode",
    "plan_modes",
    "rank_bucket",
    "read_shape",
]
