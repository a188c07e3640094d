#!/usr/bin/env bash
# Everything that needs a GPU: build, tests, compute-sanitizer, quickstart, benchmarks.
#
#   tools/gpu_check.sh OUT [PART...]     parts, all by default and in this order:
#                                        build info tests memcheck racecheck quickstart benchmarks
#                                        generate
#
# PYTHON=python3 names the interpreter; its torch is built against. Results and logs go to OUT.
# Every part runs even if one before it failed; the exit code says whether all passed.
set -uo pipefail
out=$(realpath -m "${1:?usage: tools/gpu_check.sh OUT [PART...]}")
shift
parts=("${@:-build info tests memcheck racecheck quickstart benchmarks generate}")
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 GRACE_EMULATION=ON
failed=0

part() { # NAME LIMIT_S COMMAND...: logs to OUT/NAME.log, prints the end of it and how long it took
  local name=$1 limit=$2 started=$SECONDS status
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  [ $status -eq 0 ] || failed=1
  printf '\n=== %s: exit code %s, %s s\n%s\n' "$name" $status $((SECONDS - started)) \
    "$(tail -n 15 "$out/$name.log")"
}

sanitizer() { # TOOL: the kernels' own tests under compute-sanitizer
  compute-sanitizer --tool "$1" --error-exitcode 9 --target-processes all \
    "$python" -m pytest -q -x -p no:cacheprovider tests/ops -k "cuda and (every_op or inside)"
}
export -f sanitizer
export python

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
for name in ${parts[*]}; do
  case $name in
  build) part build 300 "$python" -m pip install -q --no-build-isolation --no-deps -e . ;;
  info) part info 60 "$python" -m grace.cli info ;;
  tests) part tests 420 env OMP_NUM_THREADS=1 "$python" -m pytest -q -n 12 --dist loadscope tests ;;
  memcheck | racecheck) part "$name" 240 bash -c "sanitizer $name" ;;
  quickstart) part quickstart 480 "$python" -m grace.cli quickstart --out "$out/run" ;;
  benchmarks | generate)
    # Whole answers are a program of its own; kernels are profiled after all times are taken.
    if [ "$name" = benchmarks ]; then
      part benchmarks 480 "$python" -m benchmarks
    else
      part generate 400 "$python" -m benchmarks generate
      part profile 120 "$python" -m benchmarks generate --batches 1 --profile
    fi
    cp -r benchmarks/results "$out/results"
    ;;
  *)
    echo "no part '$name'" >&2
    failed=1
    ;;
  esac
done
exit $failed
