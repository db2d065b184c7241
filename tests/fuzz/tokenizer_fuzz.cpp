// Any text as a tokenizer.json: refused with a ConfigError, or a tokenizer whose ids are those of
// its vocabulary and can be decoded.

#include "lrnn/io/tokenizer.hpp"

#include "fuzz/fuzz.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace lrnn::fuzz;
  lrnn::Tokenizer tokenizer;
  if (!accepts<lrnn::ConfigError>(
          kName, [&] { tokenizer = lrnn::Tokenizer::from_json(text_of(data, size), kName); }))
    return 0;
  accepts<lrnn::InvalidArgument>("", [&] {
    const auto ids = tokenizer.encode("Aa aa'll  \t1e\u0301<a>");
    for (const std::int32_t id : ids)
      require(id >= 0 && id < tokenizer.vocab_size(), "ids are those of the vocabulary");
    (void)tokenizer.decode(ids);
  });
  return 0;
}
