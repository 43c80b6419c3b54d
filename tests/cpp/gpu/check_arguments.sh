#!/bin/sh
# check_arguments.sh PROGRAM: what the tests for a GPU do without one.
program=$1
fail() {
  echo "$program: $1"
  exit 1
}
expect() {  # expect STATUS ARGUMENTS...
  wanted=$1
  shift
  "$program" "$@" >/dev/null 2>&1
  status=$?
  [ $status -eq "$wanted" ] || fail "$* exits with $status, not $wanted"
}
expect 0 --help
expect 0 --list
for bad in --nonsense "--seed x" "--limit 0" "--limit" "--fewer no" "--memory tape" "--after nothing" "--only nobody_at_all"; do
  # shellcheck disable=SC2086
  expect 2 $bad --list
done
[ "$("$program" --list | head -n 1)" = kernels_are_loaded_and_one_block_fits ] || fail "the first test is another"
"$program" --list --only two_ranks | grep -q one_rank && fail "--only lets others through"
"$program" --list --only two_ranks --skip waves | grep -q waves && fail "--skip does not skip"
[ "$("$program" --list --after one_rank_plans | head -n 1)" = blocks_of_a_grid_meet ] || fail "--after goes on elsewhere"
"$program" --list | grep -q "^not run: .*: " || fail "what is not run is not listed"
if ldd "$program" | grep -q libcuda; then fail "it needs libcuda to start"; fi
echo "$("$program" --list | grep -vc '^not run') tests for a GPU are linked"
