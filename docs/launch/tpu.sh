#!/bin/bash
# Manages a Cloud TPU slice. Needs gcloud; run it in the root of the project:
#
#   export TPU=mixer ZONE=us-west4-a TYPE=v5litepod-32 VERSION=v2-alpha-tpuv5-lite
#   docs/launch/tpu.sh create --spot
#   docs/launch/tpu.sh install
#   docs/launch/tpu.sh start --config=configs/mixer_b16_i1k.py --workdir=gs://BUCKET/runs/b16
#   docs/launch/tpu.sh log
#   docs/launch/tpu.sh keep --config=... --workdir=...     # create to start, again after each preemption
#   docs/launch/tpu.sh stop
#   docs/launch/tpu.sh delete
set -euo pipefail
: "${TPU:?the name of the slice}" "${ZONE:?such as us-west4-a}"
slice=(gcloud compute tpus tpu-vm)
queue=(gcloud compute tpus queued-resources)

on_workers() { # WORKERS COMMAND
  "${slice[@]}" ssh "$TPU" --zone="$ZONE" --worker="$1" --command="$2"
}

state() {
  local said
  if said=$("${queue[@]}" describe "$TPU" --zone="$ZONE" --format="value(state.state)" 2>&1); then
    echo "$said"
  elif [[ "$said" == *NOT_FOUND* ]]; then
    echo NONE
  else
    echo "$said" >&2
    return 1
  fi
}

create() { # [--spot] [other flags of the command below]
  : "${TYPE:?such as v5litepod-32}" "${VERSION:?the software version that the type asks for}"
  "${queue[@]}" create "$TPU" --node-id="$TPU" --zone="$ZONE" --accelerator-type="$TYPE" \
    --runtime-version="$VERSION" "$@"
}

# Copies an archive of the last commit to the workers. Uncommitted changes are not copied.
install() {
  local archive
  archive=$(mktemp --suffix=.tar.gz)
  git archive --format=tar.gz --output="$archive" HEAD
  "${slice[@]}" scp "$archive" "$TPU:mixer.tar.gz" --zone="$ZONE" --worker=all
  rm "$archive"
  on_workers all 'set -e
    mkdir -p mixer && tar -xzf mixer.tar.gz -C mixer && cd mixer
    export PATH="$HOME/.local/bin:$PATH"
    command -v uv || pip install --user --quiet uv
    [ -x .venv/bin/python ] || uv venv --quiet --python 3.12 .venv
    uv pip install --quiet --no-deps -r requirements.txt
    uv pip install --quiet -c requirements.txt "jax[tpu]" "google-cloud-storage>=3"
    uv pip install --quiet --no-deps --no-build-isolation -e .'
}

# setsid starts a new session, so that the run outlives the ssh connection. again.sh repeats the run
# after a failure.
start() { # FLAGS of train.py
  on_workers all "cd mixer && rm -f ../mixer.code ../mixer.stopped
    AGAIN_CODE=../mixer.code setsid nohup bash docs/launch/again.sh .venv/bin/python train.py $(printf '%q ' "$@") \
      >> ../mixer.log 2>&1 < /dev/null &
    echo \$! > ../mixer.pid"
}

# SIGTERM on one host makes all hosts save and ends the run.
stop() {
  on_workers 0 'touch mixer.stopped; kill -TERM -- "-$(cat mixer.pid)"'
}

log() { # [WORKER]
  on_workers "${1:-0}" 'tail -n 40 -f mixer.log'
}

delete() {
  "${queue[@]}" delete "$TPU" --zone="$ZONE" --force --quiet
}

# Prints what the slice is doing: new, running, ended (success, a user error, or `stop`), or
# interrupted (for example, while a spot slice is being preempted). Prints nothing if the slice does
# not answer.
doing() {
  on_workers 0 'if ! [ -e mixer.pid ]; then echo new
    elif kill -0 "$(cat mixer.pid)" 2> /dev/null; then echo running
    elif [ -e mixer.stopped ] || grep -qxE "0|2" mixer.code; then echo ended
    else echo interrupted; fi' 2> /dev/null || true
}

# Spot slices are preempted. This deletes what is left and resumes the run on a new slice.
keep() { # FLAGS of train.py
  while true; do
    case "$(state)" in
      NONE) create --spot || true ;;
      SUSPENDED | FAILED) delete || true ;;
      ACTIVE)
        case "$(doing)" in
          new) if install; then start "$@"; fi ;;
          interrupted) start "$@" || true ;;
          ended)
            on_workers 0 'tail -n 5 mixer.log'
            return
            ;;
        esac
        ;;
    esac
    sleep "${KEEP_SECS:=60}"
  done
}

case "${1:-}" in
  create | install | start | stop | log | delete | state | keep) "$@" ;;
  *) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
