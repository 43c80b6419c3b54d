#!/bin/sh
# same_functions.sh A B: whether both headers declare the same __device__ functions, to the letter.
declared() {
  tr '\n' ' ' <"$1" | grep -oE '(template <[^>]*> *)?__device__ __forceinline__ [^{]*\) *\{' | tr -s ' ' | sort
}
a=$(mktemp) b=$(mktemp)
trap 'rm -f "$a" "$b"' EXIT
declared "$1" >"$a"
declared "$2" >"$b"
test -s "$a" && diff "$a" "$b" && exit 0
echo "$1 (<) and $2 (>) declare different functions" >&2
exit 1
