#!/bin/bash
# Repeats a command until it succeeds: again.sh python train.py --config=... --workdir=...
#
# The same command resumes a run. Exit codes for which a repetition would not help end the loop: 0
# (success), 2 (a user error, which the message explains), 130 and 143 (an interruption, after which
# everything is saved). If AGAIN_CODE names a file, the last exit code is written to it.
while true; do
  "$@"
  code=$?
  case "$code" in
    0 | 2 | 130 | 143)
      echo "$code" > "${AGAIN_CODE:-/dev/null}"
      exit "$code"
      ;;
  esac
  echo "exit code $code; again in ${AGAIN_SECS:=10} s" >&2
  sleep "$AGAIN_SECS"
done
