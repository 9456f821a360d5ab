"""Kinds of tenant directories, by every entry point: layouts × entries.

Where a directory that is neither adapter nor profile alone passes, the base is served, calibrated
or exported under the tenant's name.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tenant_layouts import ADAPTER, LAYOUTS, check_words, make
from test_plugin_validation import Worker

from safegene_vllm.cli import main
from safegene_vllm.errors import (
    AdapterRejectedError,
    MissingFileError,
    PickleRejectedError,
    SafegeneError,
    SourceError,
)
from safegene_vllm.formats import tenant_kind as kinds
from safegene_vllm.formats.directory_tree import Entry
from safegene_vllm.formats.family import load_family
from safegene_vllm.formats.tenant_directory import check_fits, kind_of
from safegene_vllm.formats.tenant_kind import is_weight_like, slot_kind, tenant_kind
from safegene_vllm.tiny_model import make_model, write_family, write_tenant


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `m`, its family `f`, an adapter `a` with a profile and a profile `p` alone."""
    root = tmp_path_factory.mktemp("kinds")
    make_model("llama", root / "m")
    family = write_family(root / "m", root / "f")
    write_tenant(root / "m", root / "a", family, 0.5)
    write_tenant(root / "m", root / "p", family, 0.5, adapter=False)
    return root


# -- the function --------------------------------------------------------------------------------


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_no_tenant_of_a_slot(
    root: Path, tmp_path: Path, layout: str, described: bool
) -> None:
    place = make(layout, tmp_path / "t", root / "a", root / "p" if described else None)
    with pytest.raises((AdapterRejectedError, MissingFileError, PickleRejectedError)) as caught:
        slot_kind(place)
    check_words(layout, place, str(caught.value))
    if LAYOUTS[layout].checkpoint:
        assert kind_of(place) == "checkpoint"
        return
    for new_profile in (True, False):
        with pytest.raises((AdapterRejectedError, MissingFileError, PickleRejectedError)):
            tenant_kind(place, new_profile=new_profile)


def test_what_peft_itself_saves_under_a_name(root: Path, tmp_path: Path) -> None:
    """The layout of `adapter_name="sales"`, made by PEFT; by default it is the directory itself."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    for name in ("sales", "default"):
        model = AutoModelForCausalLM.from_pretrained(root / "m")
        config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        place = tmp_path / name
        get_peft_model(model, config, adapter_name=name).save_pretrained(place)
        shutil.copy(root / "p" / "safegene.json", place)
    assert slot_kind(tmp_path / "default") == "adapter"
    with pytest.raises(AdapterRejectedError, match=f"point at {tmp_path}/sales/sales instead"):
        slot_kind(tmp_path / "sales")


@pytest.mark.parametrize(
    "companions",
    [
        (),
        ("checkpoint-500/adapter_model.safetensors", "optimizer.pt", "training_args.bin"),
        ("config.json", "tokenizer.json", "adapter_model.bin"),
        ("sales/adapter_config.json", "sales/adapter_model.safetensors"),
    ],
)
def test_an_adapter_is_one_whatever_is_with_it(
    root: Path, tmp_path: Path, companions: Sequence[str]
) -> None:
    place = Path(shutil.copytree(root / "a", tmp_path / "t"))
    for name in companions:
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).touch()
    assert slot_kind(place) == tenant_kind(place) == kind_of(place) == "adapter"


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("README.md", "LICENSE", ".gitattributes", "evaluation.json", "shots.pt.jsonl"),
        ("notes/2024/prompts.csv", "notes/harm.jsonl.gz", "empty.d/.keep"),
        ("tokenizer.json", "tokenizer.model", "generation_config.json", "index.html"),
    ],
)
def test_a_profile_alone_may_have_notes(root: Path, tmp_path: Path, names: Sequence[str]) -> None:
    place = Path(shutil.copytree(root / "p", tmp_path / "t"))
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).touch()
    assert slot_kind(place) == kind_of(place) == "profile"


def test_links_that_stay_inside_are_a_profile_alone(root: Path, tmp_path: Path) -> None:
    """As a ConfigMap is mounted; and a file of another directory that is not part of a model."""
    place = tmp_path / "t"
    shutil.copytree(root / "p", place / "..2026_01_02")
    (place / "..data").symlink_to("..2026_01_02")
    (place / "safegene.json").symlink_to("..data/safegene.json")
    (place / "..2026_01_02" / "up").symlink_to("../..data")
    (tmp_path / "README").touch()
    (place / "README").symlink_to(tmp_path / "README")
    assert slot_kind(place) == "profile"


@pytest.mark.parametrize("target", ["../a", "..data/../../a", "x/../../a", "./../a"])
def test_links_that_lead_out_are_not_followed(root: Path, tmp_path: Path, target: str) -> None:
    place = Path(shutil.copytree(root / "p", tmp_path / "t"))
    shutil.copytree(root / "a", tmp_path / "a")
    (place / "..data").mkdir()
    (place / "x").mkdir()
    (place / "link").symlink_to(target)
    with pytest.raises(AdapterRejectedError, match=r"t/link is not followed .it leads to"):
        slot_kind(place)


def test_a_link_that_leads_to_nothing_is_an_adapters_file_all_the_same(
    root: Path, tmp_path: Path
) -> None:
    """Files whose blobs are missing are no absence: reading them fails, nothing else is served."""
    place = Path(shutil.copytree(root / "p", tmp_path / "t"))
    for name in ADAPTER:
        (place / name).symlink_to(f"../blobs/{name}")
    assert slot_kind(place) == "adapter"
    (place / ADAPTER[0]).unlink()
    with pytest.raises(MissingFileError, match=r"no adapter_config\.json"):
        slot_kind(place)


def test_a_missing_or_empty_directory(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing", tmp_path / "file"):
        for function in (tenant_kind, slot_kind, kind_of):
            with pytest.raises(MissingFileError, match=f"{path} is not a directory"):
                function(path)
        with pytest.raises(MissingFileError, match="make an empty one"):
            tenant_kind(path, new_profile=True)
    (tmp_path / "empty").mkdir()
    for function in (tenant_kind, slot_kind, kind_of):
        with pytest.raises(MissingFileError, match="empty has none of"):
            function(tmp_path / "empty")
    assert tenant_kind(tmp_path / "empty", new_profile=True) == "profile"


@pytest.mark.parametrize("closed", ["t", "inner"])
def test_a_part_that_cannot_be_read_is_no_absence(
    root: Path, tmp_path: Path, closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Path(shutil.copytree(root / "p", tmp_path / "t"))
    (place / "inner").mkdir()
    opened = os.open

    def guarded(path: str | Path, *arguments: Any, **more: Any) -> int:
        if Path(path).name == closed:
            raise PermissionError(errno.EACCES, "permission denied")
        return opened(path, *arguments, **more)

    monkeypatch.setattr(os, "open", guarded)
    with pytest.raises(AdapterRejectedError, match=f"{closed} cannot be read .permission denied"):
        slot_kind(place)


class Listed:
    """A tree of directories as a map from path to names; a directory's name ends in a slash."""

    shown = "s3://bucket/acme"

    def __init__(self, tree: dict[str, Sequence[str] | SafegeneError]) -> None:
        self.tree = tree
        self.listed: list[str] = []

    def has(self, name: str) -> bool:
        top = self.tree[""]
        return not isinstance(top, SafegeneError) and name in top

    def entries(self, below: str, limit: int) -> list[Entry]:
        self.listed.append(below)
        names = self.tree[below]
        if isinstance(names, SafegeneError):
            raise names
        return [
            Entry(name.rstrip("/"), "directory" if name.endswith("/") else "file")
            for name in names[:limit]
        ]


def test_an_adapter_is_decided_without_a_listing() -> None:
    """An object store may permit reading its keys and not listing them."""
    tree = Listed({"": [*ADAPTER, "checkpoint-1/"]})
    assert slot_kind(tree) == "adapter" and tree.listed == []


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"": ["safegene.json", "x/"], "x": SourceError("x cannot be read")}, "x cannot be read"),
        ({"": ["safegene.json", "x/"], "x": MissingFileError("missing")}, "x went away"),
        ({"": ["safegene.json", "x/", "y/"], "x": SourceError("no"), "y": ["a.gguf"]}, "y/a.gguf"),
        ({"": ["safegene.json", *(f"{n}.txt" for n in range(8))]}, "more than 8 files"),
        ({"": ["safegene.json", "x/"], "x": [f"{n}.txt" for n in range(7)]}, "more than 8 files"),
        ({"": ["safegene.json", "x/"], "x": ["y/"], "x/y": ["z/"]}, "x/y/z is 3 levels down"),
        ({"": ["safegene.json", "two\nlines.bin"]}, r"two\nlines.bin"),
        ({"": ["safegene.json", "half\udc80.bin"]}, r"half\udc80.bin"),
    ],
)
def test_a_partly_unreadable_directory_is_rejected(
    tree: dict[str, Sequence[str] | SafegeneError], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kinds, "MAX_ENTRIES", 8)
    monkeypatch.setattr(kinds, "MAX_DEPTH", 3)
    with pytest.raises(SafegeneError) as caught:
        slot_kind(Listed(tree))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    str(caught.value).encode()


def test_bounds_count_every_depth_and_admit_what_is_within(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kinds, "MAX_ENTRIES", 8)
    tree = Listed({"": ["safegene.json", "x/"], "x": [f"{n}.txt" for n in range(6)]})
    assert slot_kind(tree) == "profile"


def test_a_listing_that_leaves_out_the_profile_proves_nothing() -> None:
    class Page(Listed):
        def has(self, name: str) -> bool:
            return name == "safegene.json"

    with pytest.raises(AdapterRejectedError, match="its listing leaves out"):
        slot_kind(Page({"": ["index.html"]}))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adapter_model.safetensors", True),
        ("Adapter.SafeTensors", True),
        ("model.safetensors.index.json", True),
        ("model.safetensors.metadata", True),
        ("weights.npz.gz.part", True),
        ("x.pt", True),
        ("x.pt.bak", True),
        ("adapter_config.json", True),
        ("config.json", True),
        ("acme.zip", True),
        ("harm.pt.jsonl", False),
        ("harm.jsonl.gz", False),
        ("safegene.json", False),
        ("safegene-export.json", False),
        ("README", False),
        ("pt", False),
        (".pt", True),
        ("tokenizer.model", False),
    ],
)
def test_names_of_models(name: str, expected: bool) -> None:
    assert is_weight_like(name) is expected


# -- the entries of the library ------------------------------------------------------------------


def command(*words: object) -> Callable[[Path, Path], Sequence[object]]:
    """The words of a command line; `None` stands for the tenant, a name for what is in the root."""

    def of(root: Path, place: Path) -> Sequence[object]:
        return [place if word is None else word(root) if callable(word) else word for word in words]

    return of


def at(name: str) -> Callable[[Path], Path]:
    return lambda root: root / name


def tenant_option(form: str) -> Callable[[Path, Path], Sequence[object]]:
    def of(root: Path, place: Path) -> Sequence[object]:
        given = f"acme={place}"
        flags = ("--adapter-root", place.parent) if form == "root" else ()
        words = ("--lora-modules", given) if form == "modules" else ("--tenant", given)
        return ["serve", root / "m", "--family", root / "f", *flags, *words, "--dry-run"]

    return of


SERVE = {
    "serve --tenant": tenant_option("tenant"),
    "serve --lora-modules": tenant_option("modules"),
    "serve --adapter-root": tenant_option("root"),
}
COMMANDS = {
    **SERVE,
    "verify": command(
        *("verify", "--model", at("m"), "--family", at("f")), "--tenant", None, "--tenant", at("a")
    ),
    "export": command("export", None, "--family", at("f"), "--out", at("out")),
    "export to a checkpoint": command(
        *("export", "--checkpoint", at("m"), "--adapter", None),
        *("--family", at("f"), "--out", at("out")),
    ),
}
ALSO_CHECKPOINTS = {
    "inspect": command("inspect", None),
    "inspect --family": command("inspect", None, "--family", at("f")),
    "profile": command("profile", at("f"), "--coefficient", 0.5, "--out", None),
}


def run(capsys: pytest.CaptureFixture[str], words: Sequence[object]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    code = left.value.code
    return (code if isinstance(code, int) else 0), " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("entry", [*COMMANDS, *ALSO_CHECKPOINTS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_commands_reject_it(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str, entry: str
) -> None:
    if LAYOUTS[layout].checkpoint and entry in ALSO_CHECKPOINTS:
        pytest.skip("a checkpoint is one of theirs")
    place = make(layout, tmp_path / "t", root / "a", root / "p")
    before = sorted(place.iterdir())
    code, output = run(capsys, {**COMMANDS, **ALSO_CHECKPOINTS}[entry](root, place))
    assert code == 1 and "Traceback" not in output
    if entry in (*SERVE, "verify"):
        check_words(layout, place, output)
    elif LAYOUTS[layout].checkpoint:
        assert "checkpoint; exp" in output and f"--checkpoint {place}" in output
    elif layout == "checkpoint in a subdirectory":
        assert f"point at {place}/out instead" in output
    else:
        check_words(layout, place, output)
    assert sorted(place.iterdir()) == before and not (root / "out").exists()


@pytest.mark.parametrize("form", ["tenant", "modules", "root"])
@pytest.mark.parametrize("layout", ["checkpoint", "named adapter", "trainer's checkpoints", "MLX"])
def test_a_dry_run_says_what_it_is_without_a_profile_and_in_the_open_mode(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str, form: str
) -> None:
    place = make(layout, tmp_path / "t", root / "a", None)
    words = tenant_option(form)(root, place)
    for more in ((), ("--missing-profile", "serve_unprotected")):
        code, output = run(capsys, [*words, *more])
        assert code == 1
        check_words(layout, place, output)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if not LAYOUTS[name].checkpoint])
def test_calibration_and_evaluation_reject_it(root: Path, tmp_path: Path, layout: str) -> None:
    from safegene_vllm.evaluation.targets import before_and_after
    from safegene_vllm.recipe.calibration import load_tenant

    header = load_family(root / "f").header
    place = make(layout, tmp_path / "t", root / "a", root / "p")
    rejections = (AdapterRejectedError, MissingFileError, PickleRejectedError)
    with pytest.raises(rejections, match="adapter"):
        load_tenant(header, place, root / "m")
    with pytest.raises(rejections, match="adapter"):
        before_and_after("acme", place, header)
    with pytest.raises(rejections, match="adapter"):
        check_fits(place, header)
    (place / "safegene.json").unlink()
    with pytest.raises(rejections, match="adapter"):
        load_tenant(header, place, root / "m")


def test_a_checkpoint_is_no_tenant_of_another(root: Path, tmp_path: Path) -> None:
    """Exported, it would be the base and the vector, with nothing of the tenant."""
    from safegene_vllm.export import export_adapter, export_checkpoint
    from safegene_vllm.formats.profile import load_profile

    full = Path(shutil.copytree(root / "m", tmp_path / "full"))
    family, profile = load_family(root / "f"), load_profile(root / "p")
    with pytest.raises(AdapterRejectedError, match=f"by --checkpoint {full}"):
        export_checkpoint(root / "m", full, family, profile, tmp_path / "out")
    with pytest.raises(AdapterRejectedError, match=f"by --checkpoint {full}"):
        export_adapter(full, family, profile, tmp_path / "out")


# -- the worker ----------------------------------------------------------------------------------


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    return Worker(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("rooted", "ahead", "described"),
    [(True, False, True), (True, True, True), (True, False, False), (False, False, True)],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_worker_rejects_it(
    root: Path,
    worker: Worker,
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
    rooted: bool,
    ahead: bool,
    described: bool,
) -> None:
    """Also in the open mode, in which a tenant needs no profile; staged or read ahead."""
    from safegene_vllm.plugin import validation

    place = make(layout, worker.root / "t", root / "a", root / "p" if described else None)
    if not rooted:
        worker.runtime.settings.adapter_roots = ()
        monkeypatch.setattr(validation.compat, "resolve", lambda name: lambda path: path)
        monkeypatch.setattr(worker, "add", lambda number, path: admitted(worker, number, path))
    elif ahead:
        worker.begun(1, str(place))
    output = worker.add(1, str(place)) or ""
    check_words(layout, place, output)
    assert "tenant 't@1'" in output
    assert worker.runtime.tenants == {} and worker.loaded == {} and worker.read == []
    staged = [path for path in (worker.root / "staging").rglob("*") if path.is_file()]
    assert staged == []


def admitted(worker: Worker, number: int, path: str) -> str | None:
    from test_plugin_validation import Request

    try:
        worker.runtime.register(Request(f"t@{number}", number, path))
    except SafegeneError as error:
        return str(error)
    return None


def test_a_worker_rejects_what_carries_a_vector_already(root: Path, worker: Worker) -> None:
    place = Path(shutil.copytree(root / "a", worker.root / "t"))
    (place / "safegene-export.json").write_text("{}")
    assert "added twice" in (worker.add(1, str(place)) or "")
    assert worker.runtime.tenants == {}


def test_files_that_vanish_while_they_are_copied(
    root: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory recognized as an adapter is never admitted as something less."""
    from safegene_vllm.plugin import staging

    place = Path(shutil.copytree(root / "a", worker.root / "t"))
    decide = staging.slot_kind

    def late(source: Path) -> str:
        kind = decide(source)
        for name in ADAPTER:
            (place / name).unlink()
        return kind

    monkeypatch.setattr(staging, "slot_kind", late)
    assert "lost adapter_config.json, adapter_model.safetensors" in (
        worker.add(1, str(place)) or ""
    )
    assert worker.runtime.tenants == {}
