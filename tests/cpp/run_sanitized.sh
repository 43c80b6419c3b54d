#!/bin/sh
# run_sanitized.sh PROGRAM [SEED]: runs the tests. GCC 12's ThreadSanitizer does not start on kernels that spread
# mappings further than it knows; then the same again without address randomisation.
program=$1
seed=${2:-$(date +%s)}
log=$program.log
run() {
  { "$@" --seed "$seed" 2>&1; echo $? >"$log.status"; } | tee "$log"
  return "$(cat "$log.status")"
}
echo "== $program, seed $seed"
run "$program" && exit 0
grep -q "unexpected memory mapping" "$log" || exit 1
echo "== again without address randomisation (setarch -R)"
run setarch "$(uname -m)" -R "$program"
