#!/usr/bin/env bash
# Proves and measures the CUDA route on a machine with a GPU, torch with CUDA and nvcc. Needs no network,
# installs nothing, and ends within eight minutes.
#
#   benchmarks/gpu.sh OUT_DIR [STAGE...]
#
# Stages, all of them in this order if none is named:
#   build      compiles the extension and the CUDA library in place, for this GPU
#   test       the GPU's tests, and some of the CPU's on the binary just built
#   sanitize   compute-sanitizer, memcheck and racecheck, on a small set; left out where there is none
#   bench      python -m benchmarks.gpu, into OUT_DIR/gpu-NAME.json
#   table      the short table of that result
#
# Each stage leaves a log in OUT_DIR. The first one that fails ends it all.
#
# Environment: PYTHON (python3), TORCH_CUDA_ARCH_LIST (this GPU's), MAX_JOBS (all cores), CUDA_HOME,
# ARGS (for the benchmark, as in ARGS=--quick), GPU_SECONDS (470, for everything).
set -euo pipefail

PYTHON=${PYTHON:-python3}
STAGES=(build test sanitize bench table)
TOTAL=${GPU_SECONDS:-470}
# A build that fails, or a test without its binary, is a failure here.
export PARAMKIT_BUILD=require PARAMKIT_CUDA=require

say() { printf 'gpu.sh: %s\n' "$*"; }

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; }

# --- arguments ----------------------------------------------------------------------------------

case ${1:-} in
  -h | --help)
    usage
    exit
    ;;
  '' | -*)
    say "expected a folder for the results: benchmarks/gpu.sh OUT_DIR [STAGE...]" >&2
    exit 2
    ;;
esac
named=$1 # as the user wrote it, for the messages
shift
chosen=("$@")
[ ${#chosen[@]} -gt 0 ] || chosen=("${STAGES[@]}")
for stage in "${chosen[@]}"; do
  case " ${STAGES[*]} " in
    *" $stage "*) ;;
    *)
      say "there is no stage $stage; expected some of ${STAGES[*]}" >&2
      exit 2
      ;;
  esac
done
[[ $PYTHON != */* || $PYTHON == /* ]] || PYTHON=$PWD/$PYTHON
mkdir -p "$named"
OUT=$(cd "$named" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# --- what must be there -------------------------------------------------------------------------

if ! command -v "$PYTHON" > /dev/null; then
  say "missing: there is no $PYTHON: name another with PYTHON=..." >&2
  exit 2
fi
needs=()
for stage in "${chosen[@]}"; do
  case $stage in
    build) needs+=(gpu nvcc) ;;
    test | sanitize) needs+=(gpu pytest) ;;
    bench) needs+=(gpu) ;;
  esac
done
name='' capability=''
if [ ${#needs[@]} -gt 0 ]; then
  if ! facts=$("$PYTHON" -m benchmarks.gpu.ready "${needs[@]}" 2> "$OUT/ready.log"); then
    [ -n "$facts" ] || facts="an answer of $PYTHON -m benchmarks.gpu.ready: see $named/ready.log"
    while IFS= read -r line; do say "missing: $line" >&2; done <<< "$facts"
    exit 2
  fi
  rm -f "$OUT/ready.log"
  while IFS='=' read -r key value; do
    case $key in
      name) name=$value ;;
      capability) capability=$value ;;
    esac
  done <<< "$facts"
fi

# --- stages -------------------------------------------------------------------------------------

# fail STAGE WHY: the end of its log, and the line that says what to do.
fail() {
  printf '%s\n' "$2" >> "$OUT/$1.log"
  tail -n 25 "$OUT/$1.log" >&2
  say "stage $1 failed ($2): see $named/$1.log; run it alone: benchmarks/gpu.sh $named $1" >&2
  exit 1
}

# within STAGE SECONDS COMMAND...: into the log of the stage; ended when its time is up, or that of all.
# Where EXCUSE is set, a failure whose log says that, and one for want of time, is only status 1.
EXCUSE=''
within() {
  local stage=$1 seconds=$2 left=$((TOTAL - SECONDS)) began=$SECONDS status=0
  shift 2
  [ "$left" -ge "$seconds" ] || seconds=$left
  [ "$seconds" -gt 0 ] || fail "$stage" "no time is left of $TOTAL s"
  printf '+ %s\n' "$*" >> "$OUT/$stage.log"
  timeout --kill-after=10 "$seconds" "$@" >> "$OUT/$stage.log" 2>&1 || status=$?
  [ "$status" -ne 0 ] || return 0
  if [ -n "$EXCUSE" ]; then
    if grep -q "$EXCUSE" "$OUT/$stage.log"; then return 1; fi
    if [ $((SECONDS - began)) -ge "$seconds" ]; then return 1; fi
  fi
  [ $((SECONDS - began)) -lt "$seconds" ] || fail "$stage" "not done after $seconds s"
  fail "$stage" "exit $status"
}

build() {
  within build 240 env TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$capability}" \
    "$PYTHON" setup.py build_ext --inplace
}

# Several failures: a GPU is rare.
PYTEST=("$PYTHON" -m pytest -q --maxfail=20 -p no:cacheprovider)

run_tests() {
  within test 150 "${PYTEST[@]}" tests/gpu
  # What the emulated backends do has been tested without a GPU.
  within test 100 "${PYTEST[@]}" tests/test_ops.py tests/test_foreach.py tests/test_kernels.py \
    -k 'not cuda'
}

# The program, wherever it is; nothing if it is not there.
sanitizer() {
  local folder
  command -v compute-sanitizer && return
  for folder in "${CUDA_HOME:-}" "${CUDA_PATH:-}" /usr/local/cuda; do
    if [ -n "$folder" ] && [ -x "$folder/bin/compute-sanitizer" ]; then
      echo "$folder/bin/compute-sanitizer"
      return
    fi
  done
}

sanitize() {
  local program tool
  program=$(sanitizer)
  if [ -z "$program" ]; then
    say 'sanitize: left out, there is no compute-sanitizer' | tee -a "$OUT/sanitize.log"
    return
  fi
  EXCUSE='Device not supported'
  for tool in memcheck racecheck; do
    # torch's cache of blocks would hide what lies beyond a tensor's end.
    within sanitize 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      "$program" --tool "$tool" --error-exitcode 1 "${PYTEST[@]}" tests/gpu -k sanitize ||
      say "sanitize: left out, compute-sanitizer says of $tool: $EXCUSE, or took more than 90 s" |
      tee -a "$OUT/sanitize.log"
  done
  EXCUSE=''
}

bench() {
  # The run keeps to its time by itself, and has written what it has if it does not.
  local seconds=$((TOTAL - SECONDS - 40)) extra
  [ "$seconds" -lt 230 ] || seconds=230
  [ "$seconds" -gt 20 ] || seconds=20
  read -ra extra <<< "${ARGS:-}"
  within bench $((seconds + 40)) \
    "$PYTHON" -m benchmarks.gpu --seconds "$seconds" --json "$OUT/gpu-$name.json" "${extra[@]}"
}

table() {
  local result found=''
  for result in "$OUT"/gpu-*.json; do
    [ -e "$result" ] || continue
    found=yes
    within table 30 "$PYTHON" -m benchmarks.gpu.table "$result"
  done
  [ -n "$found" ] || fail table 'no result there yet: the stage bench makes it'
  grep -v '^+ ' "$OUT/table.log"
}

for stage in "${chosen[@]}"; do
  start=$SECONDS
  rm -f "$OUT/$stage.log"
  case $stage in
    test) run_tests ;;
    *) "$stage" ;;
  esac
  say "$stage: $((SECONDS - start)) s"
done
say "done in $SECONDS s: $named"
