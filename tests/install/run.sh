#!/bin/sh
# usage: run.sh MESON BUILD SOURCE PREFIX shared|static|both COMPILER...
# Installs BUILD into a temporary folder, compiles the example of the README against every library
# found there with the flags of pkg-config, and runs it and the program.
set -eu
meson=$1 build=$2 source=$3 prefix=$4 kind=$5
shift 5
root=$(mktemp -d)
trap 'status=$?; rm -rf "$root"; [ $status = 0 ] || echo "failed: $step"' EXIT
step='meson install'
DESTDIR=$root "$meson" install -C "$build" --no-rebuild --quiet

pc=$(find "$root" -name lrnn.pc)
[ -n "$pc" ] || { echo "lrnn.pc is not installed"; exit 1; }
export PKG_CONFIG_PATH="${pc%/*}"
# Not by PKG_CONFIG_SYSROOT_DIR, which would move the toolkit's libraries as well.
flags() { pkg-config --define-variable=prefix="$root$prefix" "$@" lrnn; }
libdir=${pc%/pkgconfig/*}
include=$root$prefix/include
cflags=$(flags --cflags)
cd "$root"

step="headers"
# Every header compiles from where it was installed, and all of them are there.
(cd "$source/include" && find lrnn -name '*.hpp' | sort) > expected
(cd "$include" && find lrnn -type f | sort) > found
cmp expected found
sed 's/.*/#include <&>/' found > headers.cpp
# shellcheck disable=SC2086
"$@" -std=c++20 -Wall -Wextra -Werror $cflags -fsyntax-only headers.cpp

run() {
  rm -rf hello_lrnn
  "$@" | tail -n 1 | grep -qxF '[1, 7, 256] [1, 27]'
  [ -f hello_lrnn/model.safetensors ]
}
# shellcheck disable=SC2086,SC2046
if [ "$kind" != static ]; then
  step='shared library'
  "$@" -std=c++20 $cflags "$source/tests/examples/readme.cpp" $(flags --libs) -o shared
  LD_LIBRARY_PATH=$libdir:${LD_LIBRARY_PATH:-} ldd ./shared | grep -q "$libdir/liblrnn.so"
  LD_LIBRARY_PATH=$libdir:${LD_LIBRARY_PATH:-} run ./shared
fi
# shellcheck disable=SC2086,SC2046
if [ "$kind" != shared ]; then
  step='static library'
  "$@" -std=c++20 $cflags "$source/tests/examples/readme.cpp" \
    $(flags --static --libs | sed "s|-llrnn|$libdir/liblrnn.a|") -o static
  run ./static
fi

step=program
"$root$prefix/bin/lrnn" inspect hello_lrnn | grep -q 'backbone.layers.0.mixer'
echo "headers, $kind library, lrnn.pc and program work from $prefix"
