# Sourced by tools/quickstart and tools/test: installs what is missing, configures and builds build/.

lrnn_packages="meson ninja-build pkg-config g++ python3 libeigen3-dev nlohmann-json3-dev libcli11-dev \
libfmt-dev libpcre2-dev libutf8proc-dev libgtest-dev libgmock-dev libbenchmark-dev"

fail() {
  printf '%s\n' "$*" >&2
  exit 1
}

# Whether everything the build needs can be used, however it got here.
have_build_tools() {
  command -v meson >/dev/null && command -v ninja >/dev/null && command -v g++ >/dev/null &&
    command -v pkg-config >/dev/null && command -v python3 >/dev/null &&
    pkg-config --exists eigen3 nlohmann_json fmt gtest gmock benchmark libpcre2-8 libutf8proc &&
    printf '#include <CLI/CLI.hpp>\n' | g++ -std=c++20 -E -x c++ - >/dev/null 2>&1
}

# install_packages NAME...: as root, with sudo, or else prints the line to run and stops.
install_packages() {
  local as_root=""
  if [ "$(id -u)" -ne 0 ]; then
    if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
      as_root="sudo"
    else
      fail "Packages are missing. Install them, then run this again:
  sudo apt-get update && sudo apt-get install -y --no-install-recommends $*"
    fi
  fi
  command -v apt-get >/dev/null || fail "Packages are missing and apt-get is not here: $*"
  $as_root apt-get update -qq
  DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# Configures and builds build/; afterwards build/lrnn is the program.
configure_and_build() {
  have_build_tools || install_packages $lrnn_packages
  have_build_tools || fail "The build tools are still incomplete after installing: $lrnn_packages"
  [ -f build/build.ninja ] || meson setup build
  ninja -C build
  ln -sf tools/lrnn build/lrnn
}
