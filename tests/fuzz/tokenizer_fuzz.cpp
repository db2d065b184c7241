// Any text as a tokenizer.json: refused with a ConfigError or an IoError, or a tokenizer.

#include "lrnn/io/tokenizer.hpp"

#include "fuzz/fuzz.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace lrnn::fuzz;
  accepts<lrnn::ConfigError, lrnn::IoError>(
      kName, [&] { (void)lrnn::Tokenizer::from_json(text_of(data, size), kName); });
  return 0;
}
