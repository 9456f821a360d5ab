"""Choice of the layers that use the kernels, and placement of the vector in them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from safegene_vllm.errors import VllmCompatibilityError
from safegene_vllm.formats.adapter import LoRAWeights
from safegene_vllm.plugin import resident_vector
from safegene_vllm.plugin.ops import triton_lora
from safegene_vllm.plugin.ops.gain_table import GainTable
from safegene_vllm.plugin.ops.layer_weights import LayerShape
from safegene_vllm.plugin.ops.reference import disagreement, expected
from safegene_vllm.plugin.ops.step_state import StepPunica, StepState
from safegene_vllm.plugin.ops.triton_lora import safety_lora
from safegene_vllm.plugin.target_modules import TargetModule, stack_parts

CUDA = torch.device("cuda")
BF16 = torch.bfloat16


def lora(width: int, rank: int = 4, d_in: int = 48) -> LoRAWeights:
    generator = torch.Generator().manual_seed(width)
    return LoRAWeights(
        torch.randn(rank, d_in, generator=generator), torch.randn(width, rank, generator=generator)
    )


def layer(widths: tuple[int, ...] = (24, 8), dtype: torch.dtype = BF16) -> SimpleNamespace:
    one = SimpleNamespace(
        lora_a_stacked=tuple(torch.zeros(2, 1, 8, 48, dtype=dtype) for _ in widths),
        lora_b_stacked=tuple(torch.zeros(2, 1, w, 8, dtype=dtype) for w in widths),
        output_slices=widths,
        tp_size=1,
        punica_wrapper=SimpleNamespace(mark="vllm"),
    )
    one.set_mapping = lambda wrapper: setattr(one, "punica_wrapper", wrapper)
    return one


def layers(**named: SimpleNamespace) -> dict[str, Any]:
    return {
        name: (one, [lora(width) for width in one.output_slices]) for name, one in named.items()
    }


@pytest.fixture
def triton_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pretend that Triton is installed, as on a GPU machine."""
    product = SimpleNamespace(MAX_PARTS=3)
    monkeypatch.setitem(sys.modules, "safegene_vllm.plugin.ops.triton_ops", product)
    monkeypatch.setattr(triton_lora.importlib.util, "find_spec", lambda name: object())
    yield


def test_right_kernels_are_used_without_a_note(triton_found: None) -> None:
    requested: list[LayerShape] = []

    def check(shapes: list[LayerShape], dtype: torch.dtype, device: Any) -> None:
        requested.extend(shapes)
        assert (dtype, device) == (BF16, CUDA)

    found = layers(qkv=layer((24, 8, 8)), o=layer((48,)))
    assert triton_lora.choose_layers("auto", CUDA, BF16, found, check) == ({"qkv", "o"}, ())
    assert requested == [LayerShape((24, 8, 8), 48, 8, 4), LayerShape((48,), 48, 8, 4)]


def test_wrong_kernels_are_not_used(triton_found: None, caplog: pytest.LogCaptureFixture) -> None:
    def check(*_: Any) -> str:
        return "12 of 40 values differ"

    names, notes = triton_lora.choose_layers("auto", CUDA, BF16, layers(o=layer()), check)
    assert names == set()
    assert len(notes) == 1 and "12 of 40 values differ" in notes[0] and "1 of 1 layers" in notes[0]
    assert notes[0] in caplog.text
    with pytest.raises(VllmCompatibilityError, match=r"12 of 40 values differ.*'auto'"):
        triton_lora.choose_layers("triton", CUDA, BF16, layers(o=layer()), check)


def test_layers_that_do_not_fit_use_the_plain_product(triton_found: None) -> None:
    strided = layer()
    strided.lora_b_stacked = tuple(b.mT.contiguous().mT for b in strided.lora_b_stacked)
    found = layers(
        fits=layer(), four=layer((8, 8, 8, 8)), other=layer(dtype=torch.float32), strided=strided
    )
    names, notes = triton_lora.choose_layers("auto", CUDA, BF16, found, lambda *_: None)
    assert names == {"fits"}
    for words in ("3 of 4 layers", "four: 4 parts", "other: adapters in torch.float32", "strided"):
        assert words in notes[0]


@pytest.mark.parametrize(
    ("setting", "device", "words"),
    [("torch", CUDA, "kernels = 'torch'"), ("torch", torch.device("cpu"), "kernels = 'torch'")],
)
def test_torch_is_never_checked(setting: str, device: torch.device, words: str) -> None:
    names, notes = triton_lora.choose_layers(
        setting, device, BF16, layers(o=layer()), lambda *_: 1 / 0
    )
    assert names == set()
    assert words in notes[0]


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_lora.importlib.util, "find_spec", lambda name: None)
    names, notes = triton_lora.choose_layers("auto", CUDA, BF16, layers(o=layer()))
    assert names == set() and "Triton is not installed" in notes[0]
    with pytest.raises(VllmCompatibilityError, match="Triton is not installed"):
        triton_lora.choose_layers("triton", CUDA, BF16, layers(o=layer()))


def test_cpu_is_not_a_fall_back() -> None:
    assert triton_lora.choose_layers("auto", torch.device("cpu"), BF16, layers(o=layer())) == (
        set(),
        (),
    )
    with pytest.raises(VllmCompatibilityError, match="cpu device"):
        triton_lora.choose_layers("triton", torch.device("cpu"), BF16, layers(o=layer()))


def test_safety_weights_are_the_stacked_weights() -> None:
    """The same product as the plain path's layout, with a missing part and unequal ranks."""
    parts, widths = [lora(24), None, lora(8, rank=6)], (24, 10, 8)
    a, b = triton_lora.safety_lora(parts, widths, dtype=torch.float32, device="cpu")
    assert a.shape == (3 * 6, 48) and b.shape == (42, 6)
    plain_a, plain_bt = stack_parts(parts, widths, dtype=torch.float32, device="cpu")
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    hidden = (x @ a.T).view(5, 3, 6)
    blocks = [hidden[:, i] @ block.T for i, block in enumerate(b.split(widths))]
    torch.testing.assert_close(torch.cat(blocks, dim=1), x @ plain_a.T @ plain_bt)


def test_overwriting_product_is_rejected() -> None:
    wrapper = object.__new__(triton_lora.TritonPunica)
    with pytest.raises(VllmCompatibilityError, match="not added"):
        wrapper.add_lora_linear(*[torch.zeros(1, 1)] * 4, 1.0, (1,), add_inputs=False)


def test_base_gains_are_remembered_on_the_cpu() -> None:
    table = GainTable(2, 3, 8, "cpu")
    table.write(0, [1.0, 1.0, 1.0])
    assert table.base.tolist() == [False] * 3
    table.write(-1, [0.0, 2.0, 0.0])
    assert table.base.tolist() == [False, True, False]
    table.write(-1, [0.0, 0.0, 0.0])
    assert table.base.tolist() == [False, True, False], "a captured graph may still launch"


@pytest.mark.parametrize("fused_layers", ["all", "some", "none"])
def test_vector_is_placed_in_layers(monkeypatch: pytest.MonkeyPatch, fused_layers: str) -> None:
    """Layers, table and steps as in a worker, with interpreted kernels on the CPU.

    vLLM's own product is left out, so plain layers are compared with adapters of zeros.
    """
    world = None
    if fused_layers != "none":
        world = pytest.importorskip("kernel_cases", exc_type=ImportError)

    modules = {
        "model.layers.1.qkv": layer((24, 8, 8), torch.float32),
        "model.layers.0.o": layer((48,), torch.float32),
    }
    chosen = {"all": set(modules), "some": {"model.layers.1.qkv"}, "none": set()}[fused_layers]
    for name, one in modules.items():
        one.punica_wrapper.add_lora_linear = lambda *_: None
        for stacked in (*one.lora_a_stacked, *one.lora_b_stacked) if name in chosen else ():
            stacked.normal_(std=0.2, generator=torch.Generator().manual_seed(stacked.shape[2]))
    places = {
        "model.layers.1.q": TargetModule("q", "model.layers.1.qkv", 0),
        "model.layers.1.v": TargetModule("v", "model.layers.1.qkv", 2),
        "model.layers.0.o": TargetModule("o", "model.layers.0.o", None),
    }
    lora_weights = {name: lora(w) for name, w in zip(places, (24, 8, 48), strict=True)}
    inner = SimpleNamespace(update_metadata=lambda *_: None, token_lora_indices=None)
    manager = SimpleNamespace(modules=modules, lora_slots=2)
    monkeypatch.setattr(resident_vector, "choose_layers", lambda *_: (chosen, ()))
    monkeypatch.setattr(resident_vector, "layer_of", lambda site: int(site.split(".")[2]))
    table = GainTable(2, 2, 64, "cpu")
    step = StepState(table)
    modules_map: Any = SimpleNamespace(find=places.get)
    vector = resident_vector.place_vector(
        lora_weights, manager, modules_map, step,
        kernels="auto", dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    table.write(0, [0.5, -1.0])
    table.write(1, [0.0, 2.0])
    if fused_layers == "all":
        assert vector.bytes == 4 * ((3 * 4 * 48 + 40 * 4) + (4 * 48 + 48 * 4))
    assert (step.triton is not None) == (fused_layers != "none")
    assert step.reads_token_gains == (fused_layers != "all")

    punica = StepPunica(inner, step)
    for ids, slots in (([7, 0, 9, 7], [0, -1, 1, 0]), ([0, 0], [-1, -1]), ([9], [1])):
        inner.token_lora_indices = torch.tensor(slots)
        punica.update_metadata(SimpleNamespace(index_mapping=tuple(ids)), [7, 9], 3, 100)
        for name, one in modules.items():
            x = torch.randn(len(slots), 48, generator=torch.Generator().manual_seed(3))
            y = torch.ones(len(slots), sum(one.output_slices))
            stacked = one.lora_a_stacked, one.lora_b_stacked
            parts = [lora_weights.get(f"model.layers.1.{part}") for part in "qkv"]
            parts = parts if name.endswith("qkv") else [lora_weights["model.layers.0.o"]]
            of_vector = safety_lora(parts, one.output_slices, dtype=y.dtype, device="cpu")
            number = int(name.split(".")[2])
            want, bound = expected(
                y, x, *stacked, *of_vector, table.rows, number, torch.tensor(slots)
            )
            with world.launches() if world else nullcontext([]) as seen:
                one.punica_wrapper.add_lora_linear(y, x, *stacked, 1.0, one.output_slices)
            assert disagreement(y, want, 2.0 * bound) is None
            assert len(seen) == (2 if any(ids) and name in chosen else 0)
            assert one.punica_wrapper.mark == "vllm"
