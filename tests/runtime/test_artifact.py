"""Opening artifacts: what is changed, missing, foreign or unsafe is refused in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy_artifact

from moec.errors import InputError
from moec.runtime import errors as e
from moec.runtime import open_artifact
from moec.runtime.manifest import parse_manifest

Copy = Callable[[], Path]
CHECKED = ["program.ir", "plan.json", "kernels/kernels.so", "kernels/kernels.json", "tokenizer/tokenizer.json"]


def flip(file: Path, position: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[position % len(raw)] ^= 0x10
    file.write_bytes(raw)


def refused(kind: type[InputError], path: Path | str, *, names: str, check: bool = False) -> None:
    """The artifact is refused with `kind`, in one line that contains `names`."""
    with pytest.raises(kind) as caught:
        open_artifact(path, check=check)
    assert "\n" not in str(caught.value)
    assert names in str(caught.value)


def test_a_good_artifact_opens_and_says_what_it_is(toy: Path) -> None:
    artifact = open_artifact(toy, check=True)
    assert artifact.manifest.model == "toy"
    assert (artifact.manifest.batch, artifact.manifest.context) == (toy_artifact.BATCH, toy_artifact.CONTEXT)
    assert artifact.plan.pages == toy_artifact.PAGES


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize("position", [0, 1000, -1])
def test_a_flipped_byte_is_found_without_asking(copy: Copy, name: str, position: int) -> None:
    path = copy()
    flip(path / name, position)
    refused(e.WrongHash, path, names=name)


def test_a_flip_anywhere_in_the_manifest_is_found(toy: Path) -> None:
    raw = (toy / "manifest.json").read_bytes()
    for position in range(len(raw)):
        spoiled = raw[:position] + bytes([raw[position] ^ 0x10]) + raw[position + 1 :]
        with pytest.raises(InputError):
            parse_manifest(spoiled, "toy.moec")


def test_a_flipped_byte_of_the_weights_is_found_when_asked(copy: Copy) -> None:
    path = copy()
    flip(path / "weights" / "rank-00000.safetensors", -5)
    open_artifact(path)
    refused(e.WrongHash, path, names="rank-00000", check=True)


@pytest.mark.parametrize("name", [*CHECKED, "weights/rank-00000.safetensors"])
def test_a_missing_file_is_named(copy: Copy, name: str) -> None:
    path = copy()
    (path / name).unlink()
    refused(e.MissingFile, path, names=name)


@pytest.mark.parametrize("name", CHECKED)
def test_a_truncated_file_is_named(copy: Copy, name: str) -> None:
    path = copy()
    raw = (path / name).read_bytes()
    (path / name).write_bytes(raw[: len(raw) // 2])
    refused(e.WrongHash, path, names=name)


def test_paths_that_are_no_artifact(tmp_path: Path) -> None:
    refused(e.NotAnArtifact, tmp_path / "nowhere", names="no such folder")
    (tmp_path / "file").write_text("x")
    refused(e.NotAnArtifact, tmp_path / "file", names="a file")
    refused(e.NotAnArtifact, tmp_path, names="manifest.json")
    (tmp_path / "manifest.json").write_text("{")
    refused(e.MalformedFile, tmp_path, names="not JSON")
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    refused(e.MalformedFile, tmp_path, names="not JSON")


def test_format_versions(copy: Copy) -> None:
    path = copy()
    toy_artifact.seal(path, format_version=2)
    refused(e.OtherFormat, path, names="upgrade moec")
    toy_artifact.seal(path, format_version=0)
    refused(e.OtherFormat, path, names="compile the model again")


@pytest.mark.parametrize(
    ("change", "kind", "names"),
    [
        ({"triple": "s390x-ibm-linux-gnu"}, e.OtherArchitecture, "s390x"),
        ({"triple": "x86_64-pc-windows-msvc"}, e.OtherArchitecture, "windows"),
        ({"features": ["avx99", "sse1"]}, e.MissingCpuFeatures, "avx99"),
    ],
)
def test_kernels_for_another_machine(copy: Copy, change: dict[str, Any], kind: type[InputError], names: str) -> None:
    path = copy()
    toy_artifact.seal(path, target=toy_artifact.manifest(path)["target"] | change)
    refused(kind, path, names=names)


def without(path: Path, *names: str) -> None:
    files = toy_artifact.manifest(path)["files"]
    toy_artifact.seal(path, files={k: v for k, v in files.items() if k not in names})


def test_artifacts_that_do_not_run_in_one_cpu_process(copy: Copy) -> None:
    path = copy()
    without(path, "kernels/kernels.so")
    refused(e.NotForCpu, path, names="--target cpu")
    without(path, "weights/rank-00000.safetensors")
    refused(e.NoWeights, path, names="--weights")
    without(path, "plan.json")
    refused(e.NotAnArtifact, path, names="plan.json")
    (path / "weights" / "rank-00001.safetensors").write_bytes(b"")
    toy_artifact.seal(path)
    refused(e.NeedsRanks, path, names="2 ranks")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "kernels/../../outside", "a\\b", ""])
def test_paths_out_of_the_artifact_are_refused(copy: Copy, name: str) -> None:
    path = copy()
    toy_artifact.seal(path, files=toy_artifact.manifest(path)["files"] | {name: "0" * 64})
    refused(e.UnsafePath, path, names=repr(name))


def test_a_link_out_of_the_artifact_is_refused(copy: Copy, tmp_path: Path) -> None:
    path = copy()
    outside = tmp_path / "kernels.so"
    (path / "kernels" / "kernels.so").rename(outside)
    (path / "kernels" / "kernels.so").symlink_to(outside)
    refused(e.UnsafePath, path, names="kernels.so")


@pytest.mark.parametrize("name", ["x" * 5000, "a\ud800", "circle"])
def test_names_that_no_file_has(copy: Copy, name: str) -> None:
    path = copy()
    files = toy_artifact.manifest(path)["files"]
    (path / "circle").symlink_to("circle")
    toy_artifact.seal(path, files=files | {name: "0" * 64})
    refused(e.MissingFile, path, names="incomplete")


def test_a_link_to_an_artifact_opens(toy: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.moec"
    os.symlink(toy, link)
    assert open_artifact(link).manifest.model == "toy"


@pytest.mark.parametrize(
    ("key", "value", "names"),
    [
        ("limits", {"batch": 0, "context": 1, "chunk": 1}, "limits.batch"),
        ("limits", {"batch": True, "context": 1, "chunk": 1}, "limits.batch"),
        ("limits", [], "limits"),
        ("recipe", "", "recipe"),
        ("model", {"name": "m", "config": {}, "vocab": "300", "eos_token_ids": []}, "model.vocab"),
        ("model", {"name": "m", "config": {}, "vocab": 300, "eos_token_ids": [-1]}, "model.eos_token_ids"),
        ("model", {"name": "m", "vocab": 300, "eos_token_ids": []}, "model.config"),
        ("files", {"program.ir": "abc"}, "files.program.ir"),
    ],
)
def test_wrong_manifest_fields_are_named(copy: Copy, key: str, value: Any, names: str) -> None:
    path = copy()
    toy_artifact.seal(path, **{key: value})
    refused(e.MalformedFile, path, names=names)


def change_plan(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    plan = json.loads((path / "plan.json").read_text())
    change(plan)
    (path / "plan.json").write_text(json.dumps(plan))
    toy_artifact.seal(path)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda p: p.pop("entries"), "entries"),
        (lambda p: p["entries"].pop("decode"), "entries.decode"),
        (lambda p: p.update(page_size=0), "page_size"),
        (lambda p: p["cache"].update(shape=[1, 2, 64, 8]), "12 pages"),
        (lambda p: p["entries"]["decode"].update(max_tokens=1), "the 3 tokens"),
        (lambda p: p["entries"]["prefill"]["args"][0].update(kind="magic"), "args[0].kind"),
        (lambda p: p["entries"]["prefill"]["args"][0].update(name="magic"), "known inputs"),
        (lambda p: p["entries"]["prefill"]["args"][6].update(shape=["T"]), "args[6].shape"),
        (lambda p: p["entries"]["prefill"]["args"][6].update(dtype="float33"), "float33"),
        (lambda p: p["entries"]["prefill"]["args"].pop(8), "logits"),
    ],
)
def test_wrong_plan_fields_are_named(copy: Copy, change: Callable[[dict[str, Any]], Any], names: str) -> None:
    path = copy()
    change_plan(path, change)
    refused(e.MalformedFile, path, names=names)
