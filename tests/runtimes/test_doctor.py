"""The doctor: everything required works where the tests run, and what is broken is reported, never fatal."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megalodon_export.cli import run
from megalodon_export.commands import inspecting
from megalodon_export.doctor import checks as doctor
from megalodon_export.doctor.checks import PROBES, diagnose, main
from megalodon_export.doctor.machine import machine_checks
from megalodon_export.doctor.report import Check, table
from megalodon_export.doctor.run_probes import Probe
from support.namespaces import in_mounts

COMPILER = next(probe for probe in PROBES if probe.function == "compiler")


def rows(*probes: Probe) -> dict[str, Check]:
    return {check.name: check for check in diagnose(probes)}


def wrapper(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def script(path: Path, code: str) -> Path:
    path.write_text(f"import os, pathlib, signal, sys, time\nfolder = pathlib.Path(sys.argv[1])\n{code}\n")
    return path


# Slow: every probe at once, two of which compile. Faster tests run them one by one, on broken machines.
@pytest.mark.slow
def test_everything_required_works_here(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(json=True)
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    checks = {check["name"]: check for check in answer["checks"]}
    assert status == 0, [check for check in answer["checks"] if check["ok"] is False]
    assert answer["ok"] is True
    assert f"{len(PROBES)}/{len(PROBES)}" in printed.err
    for name in ("Python", "torch", "transformers", "msgspec", "onnx_ir", "C++ compiler", "torch's C++ ABI"):
        assert checks[name]["ok"] is True
    assert "run" in checks["AOTInductor on the CPU"]["found"]
    assert "exported and run" in checks["ONNX Runtime on the CPU"]["found"]


def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [
        Check("torch", True, "2.11", "unused"),
        Check("C++ compiler", False, "none", "install one"),
        Check("CUDA", None, "none"),
    ]
    monkeypatch.setattr(doctor, "diagnose", lambda: checks)
    assert main(json=False) == 1
    assert capsys.readouterr().out.splitlines() == [
        "ok    torch         2.11",
        "FAIL  C++ compiler  none",
        "                    -> install one",
        "-     CUDA          none",
        "",
        "Not working: C++ compiler.",
    ]
    assert table([]) == ""


def test_a_compiler_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", wrapper(tmp_path / "broken-g++", "exit 1"))
    check = rows(COMPILER)["C++ compiler"]
    assert check.ok is False
    assert "broken-g++" in check.found
    assert "CXX=/usr/bin/g++" in check.advice


def test_a_compiler_that_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = '[ "$1" = --version ] && exit 0; echo "fatal error: no such header" >&2; exit 1'
    monkeypatch.setenv("CXX", wrapper(tmp_path / "half-g++", refuse))
    check = rows(COMPILER)["C++ compiler"]
    assert check.ok is False
    assert "no such header" in check.found
    assert "CXX=/usr/bin/g++" in check.advice


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux")
def test_a_compiler_that_links_its_own_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = f'exec {shutil.which("g++")} -static-libstdc++ "$@"'
    monkeypatch.setenv("CXX", wrapper(tmp_path / "static-g++", command))
    found = rows(COMPILER)
    assert found["C++ compiler"].ok is True
    assert found["C++ standard library"].ok is False
    assert "CXX=/usr/bin/g++" in found["C++ standard library"].advice


def test_a_missing_package_and_an_old_one() -> None:
    found = rows(
        Probe("absent", "package", ("no_such_package", ""), advice="install it"),
        Probe("old", "package", ("tokenizers", "999"), advice="upgrade it"),
    )
    assert found["absent"].ok is False
    assert "no_such_package" in found["absent"].found
    assert found["absent"].advice == "install it"
    assert found["old"].ok is False
    assert "999 or newer is needed" in found["old"].found


def test_an_onnx_runtime_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import onnxruntime\nonnxruntime.__version__ = '1.25.0'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = rows(next(probe for probe in PROBES if probe.title == "ONNX Runtime on the CPU"))["ONNX Runtime on the CPU"]
    assert check.ok is False
    assert "the ONNX graphs need onnxruntime 1.26 or newer, found 1.25.0" in check.found
    assert "onnxruntime-gpu>=1.26" in check.advice


def test_a_crash_is_reported_with_what_came_before_it(tmp_path: Path) -> None:
    crash = script(
        tmp_path / "crash.py",
        '(folder / "checks").write_text(\'{"name": "before", "ok": true, "found": "fine"}\\n\')\n'
        '(folder / "stage").write_text("loading the compiled program")\n'
        "os.kill(os.getpid(), signal.SIGSEGV)",
    )
    found = rows(
        Probe("crashing", "", advice="change the compiler", script=crash), Probe("after", "package", ("json", ""))
    )
    assert found["before"].ok is True
    assert found["crashing"] == Check(
        "crashing", False, "killed by SIGSEGV while loading the compiled program", "change the compiler"
    )
    assert "after" in found


def test_a_probe_that_fails_to_report(tmp_path: Path) -> None:
    broken = script(tmp_path / "broken.py", 'sys.exit("no space left")')
    check = rows(Probe("broken", "", script=broken))["broken"]
    assert check.ok is False
    assert "exit status 1: no space left" in check.found


def test_a_probe_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    hang = script(tmp_path / "hang.py", f'os.system("sleep 600 & echo $! > {tmp_path}/pid; wait")')
    check = rows(Probe("hanging", "", timeout=1.0, script=hang))["hanging"]
    assert check.ok is False
    assert "not done after 1 s" in check.found
    child = Path("/proc") / (tmp_path / "pid").read_text().strip() / "stat"
    for _ in range(100):
        if not child.exists() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child of a stopped probe still runs")


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Check]:
    """The row about the temporary folder, in a process that begins with a TMPDIR."""

    def check(folder: Path) -> Check:
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setenv("TMPDIR", str(folder))
        return next(check for check in machine_checks() if check.name == "temporary folder")

    return check


def test_the_temporary_folder(temporary: Callable[[Path], Check], tmp_path: Path) -> None:
    (tmp_path / "with space").mkdir()
    assert temporary(tmp_path) == Check("temporary folder", True, str(tmp_path))
    odd, missing = temporary(tmp_path / "with space"), temporary(tmp_path / "missing")
    assert (odd.ok, odd.found) == (False, f"{tmp_path}/with space has a path that compilers do not take")
    assert missing.ok is None
    assert f"since TMPDIR, {tmp_path}/missing, is not there or cannot be written" in missing.found
    assert odd.advice.startswith("Set TMPDIR to a folder that can be written")


def test_no_temporary_folder_is_named_with_its_remedy() -> None:
    code = "from megalodon_export.cli import run; run(['doctor'])"
    command = in_mounts("mount -o remount,bind,ro /; cd /", sys.executable, "-c", code)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "FAIL  temporary folder  none that can be written" in done.stdout
    assert "-> Set TMPDIR to a folder that can be written" in done.stdout


def test_a_command_that_finds_no_temporary_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Importing torch, for one, may ask for it."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc"])
    monkeypatch.setattr(inspecting, "inspect", lambda args: tempfile.gettempdir())
    assert run(["inspect", "bundle"]) == 1
    printed = capsys.readouterr().err
    assert "No usable temporary directory found in ['/proc']; set TMPDIR to a folder that can be written" in printed


def test_a_temporary_folder_that_nothing_may_run_from(tmp_path: Path) -> None:
    mounts = f"mount -t tmpfs -o noexec disk '{tmp_path}'; export TMPDIR='{tmp_path}'"
    code = "from megalodon_export.doctor.machine import machine_checks; print(machine_checks())"
    done = subprocess.run(in_mounts(mounts, sys.executable, "-c", code), capture_output=True, text=True, check=True)
    assert f"{tmp_path} is on a file system mounted noexec" in done.stdout
