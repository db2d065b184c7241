# Sourced by tools/test: the checks of tools/test --extended, in a build of their own, build-fuzz/.

lrnn_fuzz_seconds="${LRNN_FUZZ_SECONDS:-60}"

have_fuzz_tools() {
  local out
  command -v clang++ >/dev/null || return 1
  out=$(mktemp) || return 1
  printf 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }\n' |
    clang++ -std=c++20 -fopenmp -fsanitize=fuzzer,address,undefined -x c++ - -o "$out" 2>/dev/null
  local status=$?
  rm -f "$out"
  return $status
}

# The runtime's packages carry the version of the distribution's clang in their names.
install_fuzz_tools() {
  command -v clang++ >/dev/null || install_packages clang
  local version
  version=$(clang++ -dumpversion | cut -d . -f 1)
  install_packages "libclang-rt-$version-dev" "libomp-$version-dev"
}

# The address and undefined-behaviour sanitizers and libFuzzer; warnings are the other build's task.
build_with_sanitizers() {
  have_fuzz_tools || install_fuzz_tools
  have_fuzz_tools || fail "clang++ cannot link a fuzzer after installing clang, its runtime and OpenMP"
  [ -f build-fuzz/build.ninja ] || CXX=clang++ meson setup build-fuzz \
    -Dcuda=disabled -Dfuzz=enabled -Db_sanitize=address,undefined -Dbuildtype=debugoptimized \
    -Doptimization=1 -Ddefault_library=static -Dbench=disabled -Dtools=disabled -Dwerror=false
  ninja -C build-fuzz
}

# What touches files, bad operands and memory; the recorded numbers of lrnnx compute for long.
run_under_sanitizers() {
  local status=0
  export ASAN_OPTIONS=detect_stack_use_after_return=1 LRNN_POISON=1
  build-fuzz/tests/unit_tests --gtest_brief=1 || status=1
  build-fuzz/tests/op_tests --gtest_brief=1 --gtest_filter='*OpRefusal*' || status=1
  build-fuzz/tests/model_tests --gtest_brief=1 --gtest_filter='-*Golden*' || status=1
  return $status
}

# Each goes on from its seeds and from what it kept of earlier runs.
run_fuzzers() {
  local fuzzer status=0
  for fuzzer in build-fuzz/tests/fuzz/*_fuzz; do
    run_fuzzer "$fuzzer" "$(basename "$fuzzer" _fuzz)" || status=1
  done
  return $status
}

run_fuzzer() {
  local dictionary=json log="build-fuzz/$2.log" status=0
  case $2 in cache | model | safetensors) dictionary=safetensors ;; esac
  mkdir -p "build-fuzz/corpus/$2"
  "$1" -max_total_time="$lrnn_fuzz_seconds" -max_len=8192 -timeout=10 -rss_limit_mb=2048 \
    -dict="tests/fuzz/dictionaries/$dictionary.dict" -artifact_prefix="build-fuzz/$2-" \
    -print_final_stats=1 -print_funcs=0 "build-fuzz/corpus/$2" "tests/fuzz/seeds/$2" >"$log" 2>&1 || status=$?
  printf '%-12s %10s executions, exit status %s\n' "$2" \
    "$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")" "$status"
  [ "$status" -eq 0 ] || tail -n 40 "$log"
  return "$status"
}
