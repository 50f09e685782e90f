#!/bin/bash
# Runs a command again until it is done, as in: again.sh python train.py --config=... --workdir=...
#
# The same command continues a run. It is not given again where that would not help: 0 is done, 2 a
# mistake that its message explains, 130 and 143 are an interruption (all is saved). With AGAIN_CODE
# the last code is written to that file too.
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
