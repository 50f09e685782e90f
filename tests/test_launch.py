"""The scripts in docs/launch, with fake cluster programs."""

import os
import shutil
import subprocess
import sys
import time

import pytest
import yaml

from helpers import ROOT, environment

LAUNCH = ROOT / "docs" / "launch"


def _write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}")
    path.chmod(0o755)


def _run_bash(*arguments, path=None, cwd=ROOT, check=True, **extra):
    """Runs a script with the directory `path` at the start of PATH."""
    if path:
        extra["PATH"] = f"{path}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", *map(str, arguments)],
        cwd=cwd,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_script_is_valid_bash_and_executable(script):
    _run_bash("-n", script)
    assert os.access(script, os.X_OK)


def test_again_retries_only_failures_that_may_be_transient(tmp_path):
    """The command exits twice with 1, which is retried, and then with a final code."""
    for code, runs in ((0, 3), (2, 3), (143, 3)):
        count = tmp_path / str(code)
        command = f'echo x >> {count}; [ "$(wc -l < {count})" -ge 3 ] && exit {code}; exit 1'
        result = _run_bash(LAUNCH / "again.sh", "bash", "-c", command, check=False, AGAIN_SECS="0")
        assert result.returncode == code
        assert len(count.read_text().split()) == runs


@pytest.mark.parametrize("name", ["gke_tpu.yaml", "gke_gpu.yaml"])
def test_job_set_starts_one_process_per_host(name):
    (job_set,) = yaml.safe_load_all((LAUNCH / name).read_text())
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = job_set["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] and spec["backoffLimit"] == 0
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    (devices,) = container["resources"]["limits"].values()
    if topology := pod["nodeSelector"].get("cloud.google.com/gke-tpu-topology"):
        width, height = map(int, topology.split("x"))
        assert devices * spec["parallelism"] == width * height
        return
    flags = dict(arg[2:].split("=", 1) for arg in container["args"] if arg.startswith("--"))
    assert int(flags["num_processes"]) == spec["parallelism"]
    # JobSet names the first pod SET-JOB-0-0, in the subdomain SET.
    host = f"{job_set['metadata']['name']}-{job['name']}-0-0.{job_set['metadata']['name']}"
    port = container["ports"][0]["containerPort"]
    assert flags["coordinator_address"] == f"{host}:{port}"


SRUN = r"""
# Sets the variables of a Slurm step on two nodes with one task each. Each task has an output file,
# because lines that two processes write to one pipe can be mixed.
while [ "${1#--}" != "$1" ]; do shift; done
for rank in 0 1; do
  SLURM_STEP_NUM_TASKS=2 SLURM_NTASKS=2 SLURM_PROCID=$rank SLURM_LOCALID=0 \
  SLURM_STEP_NODELIST=localhost SLURM_STEP_TASKS_PER_NODE='1(x2)' \
  "$@" > "$(dirname "$0")/task$rank.log" & pids[$rank]=$!
done
worst=0
for pid in ${pids[@]}; do
  wait $pid; code=$?
  [ $code -gt $worst ] && worst=$code
done
exit $worst
"""
PROBE = """
import sys
import jax
from mixer.parallel import join, processes
join.initialize()
print("process", jax.process_index(), jax.process_count(), *processes.gather(sys.argv[1:]))
"""


@pytest.mark.slow
def test_tasks_of_a_slurm_job_join(tmp_path):
    """`mixer.parallel.join` reads Slurm's variables; a probe replaces train.py."""
    _write_program(tmp_path / "srun", SRUN)
    _write_program(tmp_path / "python", f"exec {sys.executable} -c '{PROBE}' \"$@\"")
    job_id = os.getpid() % 4096  # JAX derives the port from the job id
    _run_bash(
        LAUNCH / "slurm.sh",
        "--workdir=x",
        path=tmp_path,
        PYTHON=str(tmp_path / "python"),
        SLURM_JOB_ID=str(job_id),
        SLURM_SUBMIT_DIR=str(ROOT),
    )
    arguments = "['train.py', '--workdir=x'] ['train.py', '--workdir=x']"
    for rank in (0, 1):
        lines = (tmp_path / f"task{rank}.log").read_text().splitlines()
        assert f"process {rank} 2 {arguments}" in lines


def test_interrupted_slurm_job_is_requeued(tmp_path):
    _write_program(tmp_path / "scontrol", f'echo "$@" > {tmp_path}/scontrol.log')
    for code in (143, 2):
        _write_program(tmp_path / "srun", f"exit {code}")
        result = _run_bash(LAUNCH / "slurm.sh", path=tmp_path, check=False, SLURM_JOB_ID="7")
        assert result.returncode == code
        log = tmp_path / "scontrol.log"
        assert log.exists() == (code == 143)
        if log.exists():
            assert log.read_text() == "requeue 7\n"
            log.unlink()


GCLOUD = r"""
# A slice of two workers with home directories w0 and w1; the file `state` is its queue state.
cd "$CLOUD"
echo "$*" >> log
echo "$3 $4" >> verbs
case "$3 $4" in
  "queued-resources create") echo ACTIVE > state; mkdir -p w0 w1 ;;
  "queued-resources describe") cat state 2> /dev/null || { echo "NOT_FOUND: $5" >&2; exit 1; } ;;
  "queued-resources delete")
    for pid in w*/mixer.pid; do kill -KILL -- "-$(cat "$pid")"; done 2> /dev/null
    rm -rf w0 w1 state ;;
  "tpu-vm scp") for worker in w0 w1; do cp "$5" "$worker/mixer.tar.gz"; done ;;
  "tpu-vm ssh")
    for argument in "$@"; do
      case "$argument" in
        --worker=*) worker=${argument#--worker=} ;;
        --command=*) command=${argument#--command=} ;;
      esac
    done
    [ "$(cat state)" = ACTIVE ] || exit 255
    [ "$worker" = all ] && workers="w0 w1" || workers=w$worker
    for worker in $workers; do (cd $worker && HOME=$PWD bash -c "$command") || exit; done ;;
esac
"""
# `uv venv` makes an environment whose Python prints its arguments and waits for SIGTERM.
UV = """
[ "$1" = venv ] || exit 0
mkdir -p .venv/bin
cat > .venv/bin/python <<'END'
#!/bin/bash
trap 'echo saved; exit 143' TERM
echo "$@"
for i in $(seq 600); do sleep 0.1; done
END
chmod +x .venv/bin/python
"""


@pytest.fixture
def cloud(tmp_path):
    """A git repository, and a fake gcloud whose workers are local directories."""
    programs, project, cloud = (tmp_path / name for name in ("programs", "project", "cloud"))
    _write_program(programs / "gcloud", GCLOUD)
    _write_program(programs / "uv", UV)
    cloud.mkdir()
    shutil.copytree(LAUNCH, project / "docs" / "launch")
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.com")
    for command in (("init", "-q"), ("add", "."), (*identity, "commit", "-q", "-m", "x")):
        subprocess.run(["git", *command], cwd=project, check=True)
    settings = dict(TPU="mixer", ZONE="z", TYPE="v5litepod-8", VERSION="v", CLOUD=str(cloud))

    def tpu(*arguments, **extra):
        script = project / "docs" / "launch" / "tpu.sh"
        return _run_bash(script, *arguments, path=programs, cwd=project, **settings, **extra)

    yield cloud, tpu
    for pid in cloud.glob("w*/mixer.pid"):
        subprocess.run(["kill", "-KILL", "--", f"-{pid.read_text().strip()}"], capture_output=True)


def _await(path, text):
    for _ in range(100):
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path}: {path.read_text() if path.exists() else 'missing'}")


def test_tpu_script_starts_and_stops_a_run_on_every_worker(cloud):
    directory, tpu = cloud
    tpu("create", "--spot")
    assert (
        "--accelerator-type=v5litepod-8 --runtime-version=v --spot"
        in (directory / "log").read_text()
    )
    tpu("install")
    tpu("start", "--workdir=gs://b/run", "--config.dataset.train_split=train[:90%]")
    for worker in ("w0", "w1"):
        _await(
            directory / worker / "mixer.log",
            "train.py --workdir=gs://b/run --config.dataset.train_split=train[:90%]",
        )
    tpu("stop")
    _await(directory / "w0" / "mixer.log", "saved")
    tpu("delete")
    assert tpu("state").stdout == "NONE\n"


def test_tpu_script_restarts_a_preempted_run(cloud):
    directory, tpu = cloud
    (directory / "state").write_text("SUSPENDED\n")
    # This `sleep` ends the process of worker 0 once it runs; `keep` notices and returns.
    _write_program(
        directory.parent / "programs" / "sleep",
        'pid=$(cat "$CLOUD/w0/mixer.pid" 2> /dev/null) && kill -KILL -- "-$pid" '
        '&& echo 0 > "$CLOUD/w0/mixer.code"; exit 0',
    )
    tpu("keep", "--workdir=gs://b/run")
    verbs = (directory / "verbs").read_text().splitlines()
    verbs = [verb.removeprefix("queued-resources ") for verb in verbs]
    assert [verb for verb in verbs if verb in ("delete", "create")] == ["delete", "create"]
    assert verbs.count("tpu-vm scp") == 1  # installed once
