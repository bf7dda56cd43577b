"""benchmarks/gpu.sh and `make gpu`, among programs that only say what they were asked: no GPU is needed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.programs import program

ROOT = Path(__file__).resolve().parent.parent

PYTHON = """
echo "$*" >> "$FAKE/calls"
case "$*" in
  *benchmarks.gpu.ready*) what=ready; printf '%s\\n' "${READY-name=made
capability=9.0}" ;;
  *setup.py*) what=build; echo "for $TORCH_CUDA_ARCH_LIST, $PARAMKIT_BUILD, $PARAMKIT_CUDA" ;;
  *benchmarks.gpu.table*) what=table; echo 'THE TABLE' ;;
  *'benchmarks.gpu '*) what=bench; while [ "$1" != --json ]; do shift; done; echo '{}' > "$2" ;;
  *pytest*) what=test; echo 'ran tests' ;;
esac
[ "${SLOW:-}" != "$what" ] || sleep 30
[ "${FAIL:-}" != "$what" ] || { echo "reason of $what"; exit 3; }
"""
SANITIZER = """
echo "compute-sanitizer caching=${PYTORCH_NO_CUDA_MEMORY_CACHING:-} $*" >> "$FAKE/calls"
[ -z "${SANITIZER_SAYS:-}" ] || { echo "$SANITIZER_SAYS"; exit 1; }
"""
ALL = ["build", "test", "sanitize", "bench", "table"]


class Script:
    """gpu.sh among programs that only say what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        self.bin = folder / "bin"
        program(self.bin, "fake-python", PYTHON)
        program(self.bin, "compute-sanitizer", SANITIZER)

    def __call__(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in ("TORCH_CUDA_ARCH_LIST", "ARGS", "CUDA_HOME", "CUDA_PATH", "MAX_JOBS")
        }
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        settings = {**kept, "PATH": path, "FAKE": str(self.folder), "PYTHON": "fake-python"}
        (self.folder / "calls").unlink(missing_ok=True)
        return subprocess.run(
            [str(ROOT / "benchmarks" / "gpu.sh"), *arguments],
            cwd=self.folder,
            env={**settings, **environ},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def log(self, stage: str) -> str:
        return (self.out / f"{stage}.log").read_text()


@pytest.fixture
def script(tmp_path: Path) -> Script:
    if not shutil.which("bash") or not shutil.which("timeout"):
        pytest.skip("bash or timeout is not there")
    return Script(tmp_path)


def test_all_stages_in_order(script: Script) -> None:
    done = script("out")
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[1].strip() for line in done.stdout.splitlines() if " s" in line][
        :5
    ] == ALL
    assert "THE TABLE" in done.stdout and done.stdout.splitlines()[-1].endswith("s: out")
    calls = script.calls()
    assert calls[0] == "-m benchmarks.gpu.ready gpu nvcc gpu pytest gpu pytest gpu"
    assert calls[1] == "setup.py build_ext --inplace"
    assert "for 9.0, require, require" in script.log("build")
    assert [call.endswith("tests/gpu") for call in calls[2:4]] == [True, False]
    for tool, call in zip(("memcheck", "racecheck"), calls[4:6], strict=True):
        assert f"caching=1 --tool {tool} --error-exitcode 1 " in call
        assert call.endswith("tests/gpu -k sanitize")
    assert "-m benchmarks.gpu --seconds 230 --json" in calls[6]
    assert calls[6].endswith("gpu-made.json")
    assert calls[7].startswith("-m benchmarks.gpu.table ")
    # Few enough to be copied by hand.
    names = sorted(path.name for path in script.out.iterdir())
    assert names == sorted([f"{stage}.log" for stage in ALL] + ["gpu-made.json"])


@pytest.mark.parametrize("stage", ["build", "test", "bench", "table"])
def test_the_first_failing_stage_ends_it(script: Script, stage: str) -> None:
    done = script("out", FAIL=stage)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"gpu.sh: stage {stage} failed (exit 3): see out/{stage}.log; "
        f"run it alone: benchmarks/gpu.sh out {stage}"
    )
    assert f"reason of {stage}" in done.stderr
    assert f"reason of {stage}" in script.log(stage)
    later = ALL[ALL.index(stage) + 1 :]
    assert not any((script.out / f"{each}.log").exists() for each in later)


def test_a_race_ends_it(script: Script) -> None:
    done = script("out", SANITIZER_SAYS="========= ERROR SUMMARY: 1 error")
    assert done.returncode == 1
    assert "stage sanitize failed (exit 1)" in done.stderr
    assert "ERROR SUMMARY: 1 error" in script.log("sanitize")


def test_a_sanitizer_that_does_not_know_the_device(script: Script) -> None:
    done = script("out", SANITIZER_SAYS="========= Error: Device not supported")
    assert done.returncode == 0, done.stderr
    assert "sanitize: left out, compute-sanitizer says of memcheck: Device not" in done.stdout
    assert "THE TABLE" in done.stdout


def test_no_sanitizer(script: Script) -> None:
    (script.bin / "compute-sanitizer").unlink()
    if shutil.which("compute-sanitizer") or Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        pytest.skip("this machine has one")
    done = script("out", "sanitize", "table", FAIL="sanitize")
    assert "gpu.sh: sanitize: left out, there is no compute-sanitizer" in done.stdout
    # Nothing was benchmarked yet.
    assert "stage table failed (no result there yet: the stage bench makes it)" in done.stderr
    home = script.folder / "toolkit"
    program(home, "bin", "").unlink()
    program(home / "bin", "compute-sanitizer", SANITIZER)
    done = script("out", "sanitize", CUDA_HOME=str(home))
    assert done.returncode == 0 and "left out" not in done.stdout
    assert sum("--tool" in call for call in script.calls()) == 2


@pytest.mark.parametrize("stage", ALL[:4])
def test_a_stage_alone(script: Script, stage: str) -> None:
    done = script("out", stage)
    assert done.returncode == 0, done.stderr
    logs = [path.name for path in script.out.glob("*.log")]
    assert logs == [f"{stage}.log"]
    needs = {"build": "gpu nvcc", "test": "gpu pytest", "sanitize": "gpu pytest", "bench": "gpu"}
    assert script.calls()[0] == f"-m benchmarks.gpu.ready {needs[stage]}"


def test_the_table_needs_no_gpu(script: Script) -> None:
    script.out.mkdir()
    (script.out / "gpu-any.json").write_text("{}")
    done = script("out", "table", READY="nothing", FAIL="ready")
    assert done.returncode == 0 and "THE TABLE" in done.stdout
    assert [call.split()[1] for call in script.calls()] == ["benchmarks.gpu.table"]


def test_settings_reach_the_stages(script: Script) -> None:
    done = script("out", "build", "bench", TORCH_CUDA_ARCH_LIST="8.0", ARGS="--quick --only small")
    assert done.returncode == 0, done.stderr
    assert "for 8.0, require" in script.log("build")
    assert script.calls()[-1].endswith("gpu-made.json --quick --only small")


def test_arguments_that_are_wrong(script: Script) -> None:
    done = script("out", "build", "tests")
    assert done.returncode == 2 and not script.calls() and not script.out.exists()
    assert done.stderr == (
        "gpu.sh: there is no stage tests; expected some of build test sanitize bench table\n"
    )
    for arguments in ((), ("--quick",)):
        done = script(*arguments)
        assert done.returncode == 2 and "expected a folder for the results" in done.stderr
    done = script("--help")
    assert done.returncode == 0 and "OUT_DIR [STAGE...]" in done.stdout


def test_missing_requirements_are_a_line_each(script: Script) -> None:
    done = script("out", READY="torch has no CUDA device\nthere is no nvcc", FAIL="ready")
    assert done.returncode == 2
    assert done.stderr == (
        "gpu.sh: missing: torch has no CUDA device\ngpu.sh: missing: there is no nvcc\n"
        "gpu.sh: missing: reason of ready\n"
    )
    assert len(script.calls()) == 1
    done = script("out", PYTHON="no-such-python")
    assert done.returncode == 2
    assert done.stderr == (
        "gpu.sh: missing: there is no no-such-python: name another with PYTHON=...\n"
    )


def test_a_stage_that_takes_too_long(script: Script) -> None:
    done = script("out", "test", SLOW="test", GPU_SECONDS="2")
    assert done.returncode == 1
    assert "stage test failed (not done after " in done.stderr
    done = script("out", "build", GPU_SECONDS="0")
    assert "stage build failed (no time is left of 0 s)" in done.stderr


def test_the_script_is_clean() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", str(ROOT / "benchmarks" / "gpu.sh")], check=True)


def test_make_gpu_installs_nothing() -> None:
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    done = subprocess.run(
        ["make", "-n", "gpu", "OUT=some/where", "PYTHON=any-python", "ARGS=--quick"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == (
        "PYTHON='any-python' ARGS='--quick' benchmarks/gpu.sh 'some/where'"
    )
