"""Validation and loading of adapters without an engine: how often an adapter is read, and where."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from safegene_vllm.errors import AdapterRejectedError
from safegene_vllm.formats.adapter import Adapter, LoRAWeights, load_adapter, save_adapter
from safegene_vllm.plugin import adapter_prefetch, rpc, validation, worker_runtime
from safegene_vllm.plugin.staging import Staging
from safegene_vllm.plugin.target_modules import EngineShape

SITE = "model.layers.0.self_attn.q_proj"


class Request(SimpleNamespace):
    def __init__(self, name: str, number: int, path: str, load_inplace: bool = False) -> None:
        super().__init__(
            lora_name=name, lora_int_id=number, lora_path=path, load_inplace=load_inplace
        )


class Worker:
    """A worker that stores what the runtime loads; with `rejecting`, vLLM's part fails."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.rejecting = root, False
        self.read: list[Path] = []
        self.readers: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.adapters: list[weakref.ref[Adapter]] = []
        self.loaded: dict[int, Any] = {}
        self.runtime = object.__new__(worker_runtime.WorkerRuntime)
        settings: Any = SimpleNamespace(
            adapter_roots=(root,), missing_profile="serve_unprotected", apply="gain"
        )
        modules: Any = SimpleNamespace(find=lambda site: site, global_shape=lambda module: None)
        staging = Staging(root / "staging")
        validator = validation.AdapterValidator(
            settings,
            None,
            EngineShape(modules, 8, frozenset({torch.float16})),
            staging,
            self.runtime._with_same_weights,
        )
        vars(self.runtime).update(
            settings=settings,
            staging=staging,
            family=None,
            tenants={},
            _loaded_content={},
            _adapter_bytes={},
            prefix_cache=True,
            manager=SimpleNamespace(list_adapters=lambda: self.loaded),
            prefetcher=adapter_prefetch.AdapterPrefetcher(validator.validate, staging.drop),
        )
        self.model_runner = SimpleNamespace(lora_manager=SimpleNamespace(safegene=self.runtime))
        load_adapter = validation.load_adapter

        def counted(directory: Path) -> Adapter:
            self.read.append(directory)
            self.readers.append(threading.current_thread().name)
            self.gate.wait(30)
            adapter = load_adapter(directory)
            self.adapters.append(weakref.ref(adapter))
            return adapter

        monkeypatch.setattr(validation, "load_adapter", counted)
        monkeypatch.setattr(adapter_prefetch, "load_adapter", counted)
        monkeypatch.setattr(rpc.compat, "resolve", {"LoRARequest": Request}.__getitem__)
        monkeypatch.setattr(rpc, "safegene_receipt", lambda *_: {})
        monkeypatch.setattr(
            worker_runtime.WorkerRuntime,
            "_lora_model",
            lambda _self, _id, adapter: adapter.lora_weights,
        )

    def add_lora(self, request: Any) -> None:
        if self.rejecting:
            raise AdapterRejectedError("no free slot")
        self.loaded[request.lora_int_id] = self.runtime.load(request)

    def adapter(self, name: str, rank: int = 4, size: float = 1.0) -> str:
        lora = LoRAWeights(torch.randn(rank, 8), torch.randn(6, rank) * size)
        save_adapter(Adapter({SITE: lora}, None, {}), self.root / name, base_model="tiny")
        return str(self.root / name)

    def begin(self, number: int, path: str) -> bool:
        return rpc.safegene_begin(self, f"t@{number}", number, path)

    def begun(self, number: int, path: str) -> None:
        """Prefetch until it has ended."""
        deadline = time.monotonic() + 300
        while not self.begin(number, path):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def add(self, number: int, path: str) -> str | None:
        result = rpc.safegene_add(self, f"t@{number}", number, path, False)
        rejected: str | None = result["rejected"]
        gc.collect()
        # vLLM has its own copy; no reference to an adapter is left after the call.
        assert all(adapter() is None for adapter in self.adapters)
        return rejected


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    return Worker(tmp_path, monkeypatch)


def test_new_adapter_is_read_once(worker: Worker) -> None:
    assert worker.add(1, worker.adapter("a")) is None
    assert worker.read == [worker.runtime.tenants[1].staged]
    assert worker.add(2, worker.adapter("b")) is None
    assert worker.read == [worker.runtime.tenants[number].staged for number in (1, 2)]
    assert not torch.equal(worker.loaded[1][SITE].a, worker.loaded[2][SITE].a)


def test_adapter_is_read_again_after_it_left_memory(worker: Worker) -> None:
    path = worker.adapter("a")
    assert worker.add(1, path) is None
    worker.loaded.clear()
    worker.runtime.load(Request("t@1", 1, path))
    assert worker.read == [worker.runtime.tenants[1].staged] * 2


def test_adapter_that_vllm_rejected_is_not_cached(worker: Worker) -> None:
    path, worker.rejecting = worker.adapter("a"), True
    assert worker.add(1, path) == "no free slot"
    worker.rejecting = False
    assert worker.add(1, path) is None
    assert worker.read == [worker.runtime.tenants[1].staged] * 2


def test_rejected_adapter_is_not_cached(worker: Worker) -> None:
    assert "slots hold --max-lora-rank 8" in (worker.add(1, worker.adapter("a", rank=9)) or "")
    path = worker.adapter("b")
    assert worker.add(2, path) is None
    worker.adapter("b")
    assert (
        "has changed since it was first loaded"
        in (rpc.safegene_add(worker, "t@2", 3, path, False)["rejected"])
    )
    assert worker.runtime.prefetcher.adapter(worker.runtime.tenants[2]) is not None
    assert worker.read[-1] == worker.runtime.tenants[2].staged


def test_values_that_overflow_a_slot_are_rejected(worker: Worker) -> None:
    """Finite in the file, Inf in a float16 slot: NaN for every request of a shared step."""
    rejected = worker.add(1, worker.adapter("a", size=1e6)) or ""
    assert f"{SITE} overflows torch.float16 with its scaling 1" in rejected
    assert worker.runtime.tenants == {} and worker.loaded == {}


# prefetch


def test_prefetched_adapter_is_read_once_in_a_thread(worker: Worker) -> None:
    path = worker.adapter("a")
    worker.begun(1, path)
    assert worker.runtime.tenants == {} and worker.loaded == {}
    assert worker.add(1, path) is None
    assert worker.read == [worker.runtime.tenants[1].staged] and worker.loaded[1]
    assert worker.readers[0].startswith("safegene-prefetch")
    assert worker.begin(1, path) and len(worker.read) == 1


def test_other_adapters_are_added_during_a_prefetch(worker: Worker) -> None:
    slow, quick = worker.adapter("a"), worker.adapter("b")
    assert worker.add(2, quick) is None
    worker.gate.clear()
    assert not worker.begin(1, slow)
    # A revision with the same weights needs no reading.
    worker.runtime.register(Request("t@3", 3, quick))
    assert 3 in worker.runtime.tenants and not worker.begin(1, slow)
    worker.gate.set()
    assert worker.add(1, slow) is None
    assert set(worker.runtime.tenants) == {1, 2, 3}


def test_adding_waits_for_the_prefetch(worker: Worker) -> None:
    path = worker.adapter("a")
    worker.gate.clear()
    assert not worker.begin(1, path)
    threading.Timer(0.2, worker.gate.set).start()
    assert worker.add(1, path) is None and len(worker.read) == 1


def test_error_of_a_prefetch_is_reported_by_adding(worker: Worker) -> None:
    path = worker.adapter("a", rank=9)
    worker.begun(1, path)
    assert "slots hold --max-lora-rank 8" in (worker.add(1, path) or "")
    assert worker.runtime.tenants == {} and worker.loaded == {}
    missing = str(worker.root / "nothing")
    worker.begun(2, missing)
    assert "expected adapter_config.json" in (worker.add(2, missing) or "")


def test_prefetch_is_for_its_own_name_and_path(worker: Worker) -> None:
    one, other = worker.adapter("a"), worker.adapter("b")
    worker.begun(1, one)
    assert rpc.safegene_add(worker, "t@1", 1, other, False)["rejected"] is None
    assert worker.runtime.tenants[1].path == other
    assert torch.equal(worker.loaded[1][SITE].a, load_adapter(Path(other)).lora_weights[SITE].a)


def test_validated_copy_is_loaded_even_if_its_source_changed(worker: Worker) -> None:
    path = worker.adapter("a")
    checked = load_adapter(Path(path)).lora_weights[SITE].a
    worker.begun(1, path)
    worker.adapter("a")
    assert worker.add(1, path) is None
    assert torch.equal(worker.loaded[1][SITE].a, checked)


def test_unclaimed_prefetch_is_discarded(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker.begun(1, worker.adapter("a"))
    later = time.monotonic() + adapter_prefetch.UNCLAIMED_S + 1
    monkeypatch.setattr(adapter_prefetch, "time", SimpleNamespace(monotonic=lambda: later))
    worker.begun(2, worker.adapter("b"))
    gc.collect()
    assert worker.adapters[0]() is None and worker.adapters[1]() is not None
    assert not worker.read[0].exists() and worker.read[1].exists()


def test_prefetch_of_a_removed_adapter_is_discarded(worker: Worker) -> None:
    worker.begun(1, worker.adapter("a"))
    worker.gate.clear()
    assert not worker.begin(2, worker.adapter("b"))
    worker.runtime.forget(1)
    worker.runtime.forget(2)
    worker.gate.set()
    worker.begun(3, worker.adapter("c"))
    gc.collect()
    assert [adapter() is None for adapter in worker.adapters] == [True, True, False]
    assert [staged.exists() for staged in worker.read] == [False, False, True]


def test_engine_without_a_runtime_has_no_prefetch(worker: Worker) -> None:
    worker.model_runner = SimpleNamespace()
    assert worker.begin(1, "/nowhere")


def test_adapter_that_was_never_added_may_change(worker: Worker) -> None:
    """No prefix was cached for it; for an adapter that was added it would be stale."""
    path = worker.adapter("a")
    worker.begun(1, path)
    worker.runtime.forget(1)
    worker.adapter("a")
    assert rpc.safegene_add(worker, "t@1", 2, path, False)["rejected"] is None
    worker.adapter("a")
    rejected = rpc.safegene_add(worker, "t@1", 3, path, False)["rejected"]
    assert "has changed since it was first loaded" in rejected
    assert set(worker.runtime.tenants) == {2}
    assert [staged.exists() for staged in worker.read] == [False, True, False]


def test_vllm_is_given_weights_and_never_reads_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would run the keys of rank_pattern and alpha_pattern as regular expressions."""
    from vllm.lora.peft_helper import PEFTHelper

    from safegene_vllm.plugin.lora_manager import SafegeneWorkerLoRAManager

    def read(*_: object, **__: object) -> None:
        raise AssertionError("vLLM reads adapter_config.json")

    monkeypatch.setattr(PEFTHelper, "from_local_dir", read)
    monkeypatch.setattr(PEFTHelper, "_match_pattern", staticmethod(read))
    manager: Any = object.__new__(SafegeneWorkerLoRAManager)
    manager.safegene = SimpleNamespace(load=lambda request: f"weights of {request.lora_name}")
    assert manager._load_adapter(Request("acme", 1, "/acme")) == "weights of acme"
