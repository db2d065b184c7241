#include "lrnn/io/safetensors.hpp"

#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <unistd.h>

#include <gtest/gtest.h>

#include "lrnn/core/error.hpp"
#include "lrnn/core/random.hpp"

namespace lrnn {
namespace {

class Safetensors : public ::testing::Test {
 protected:
  void SetUp() override { std::filesystem::create_directories(folder_); }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  [[nodiscard]] std::filesystem::path path() const { return folder_ / "file.safetensors"; }
  void write_raw(const std::string& bytes) const {
    std::ofstream(path(), std::ios::binary | std::ios::trunc) << bytes;
  }
  void write_header(const std::string& header, std::size_t data_bytes) const {
    std::string bytes(8, '\0');
    const std::uint64_t length = header.size();
    std::memcpy(bytes.data(), &length, 8);
    write_raw(bytes + header + std::string(data_bytes, '\1'));
  }
  [[nodiscard]] std::string read_raw() const {
    std::ifstream in(path(), std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  [[nodiscard]] std::string error() const {
    try {
      (void)SafetensorsFile::open(path());
    } catch (const IoError& e) {
      return e.what();
    }
    return "accepted";
  }
  static SafetensorsFile in_memory(const std::string& text) {
    const auto bytes = std::as_bytes(std::span(text));
    return SafetensorsFile::parse("memory", {bytes.begin(), bytes.end()});
  }
  // Two tensors of different element sizes, a scalar and an empty tensor.
  void write_sample() const {
    write_safetensors(path(),
                      {safetensors_item<std::int32_t>("ids", {3}, {1, -2, 3}),
                       safetensors_item<double>("weight", {2, 2}, {1.0, -0.0, 1e300, 0.1}),
                       safetensors_item<float>("scale", {}, {2.5F}),
                       safetensors_item<float>("empty", {0, 4}, {})},
                      {{"format", "pt"}});
  }

 private:
  std::filesystem::path folder_ =
      std::filesystem::temp_directory_path() / ("lrnn_safetensors_" + std::to_string(::getpid()));
};

TEST_F(Safetensors, ReadsWhatItWrote) {
  write_sample();
  const auto file = SafetensorsFile::open(path());
  EXPECT_EQ(file.names(), (std::vector<std::string>{"empty", "ids", "scale", "weight"}));
  EXPECT_EQ(file.metadata().at("format"), "pt");
  EXPECT_EQ(file.at("weight").shape, (Shape{2, 2}));
  EXPECT_EQ(file.at("weight").dtype, FileDType::F64);
  EXPECT_EQ(file.read_doubles(file.at("weight")), (std::vector<double>{1.0, -0.0, 1e300, 0.1}));
  EXPECT_EQ(file.read_integers(file.at("ids")), (std::vector<std::int64_t>{1, -2, 3}));
  EXPECT_EQ(file.read_doubles(file.at("scale")), std::vector<double>{2.5});
  EXPECT_EQ(file.at("scale").shape.rank(), 0);
  EXPECT_EQ(file.at("empty").nbytes, 0U);
  EXPECT_EQ(file.find("absent"), nullptr);
  EXPECT_THROW((void)file.at("absent"), IoError);
  EXPECT_THROW((void)file.read_integers(file.at("weight")), IoError);
}

TEST_F(Safetensors, SameContentSameBytesAndAligned) {
  write_sample();
  const std::string first = read_raw();
  write_sample();
  EXPECT_EQ(read_raw(), first);
  const auto file = SafetensorsFile::open(path());
  for (const auto& [name, entry] : file.entries())
    EXPECT_EQ(entry.offset % size_of(entry.dtype), 0U) << name;
}

TEST_F(Safetensors, WriterRefusesDuplicatesAndWrongSizesAndLeavesTheOldFile) {
  write_sample();
  const std::string before = read_raw();
  const auto item = safetensors_item<float>("a", {2}, {1.0F, 2.0F});
  EXPECT_THROW(write_safetensors(path(), {item, item}), InvalidArgument);
  EXPECT_THROW(write_safetensors(path(), {safetensors_item<float>("a", {3}, {1.0F})}),
               InvalidArgument);
  EXPECT_EQ(read_raw(), before);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(path().parent_path()), {}), 1);
}

TEST_F(Safetensors, ConvertsFloat16) {
  EXPECT_EQ(float16_to_float(0x3C00), 1.0F);
  EXPECT_EQ(float16_to_float(0xC000), -2.0F);
  EXPECT_EQ(float16_to_float(0x7BFF), 65504.0F);
  EXPECT_EQ(float16_to_float(0x0001), 0x1p-24F);
  EXPECT_EQ(float16_to_float(0x03FF), 1023 * 0x1p-24F);
  EXPECT_EQ(float16_to_float(0x0400), 0x1p-14F);
  EXPECT_TRUE(std::signbit(float16_to_float(0x8000)));
  EXPECT_EQ(float16_to_float(0xFC00), -INFINITY);
  EXPECT_TRUE(std::isnan(float16_to_float(0x7E00)));
  write_header(R"({"h":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}})", 2);
  const auto file = SafetensorsFile::open(path());
  EXPECT_EQ(file.read_doubles(file.at("h")),
            std::vector<double>{static_cast<double>(float16_to_float(0x0101))});
}

TEST_F(Safetensors, RefusesMalformedFiles) {
  struct Bad {
    const char* header;
    std::size_t data;
    const char* reason;
  };
  const Bad bad[] = {
      {"", 0, "expected a JSON object"},
      {"[]", 0, "expected a JSON object"},
      {" {}", 0, "expected a JSON object"},
      {"{", 0, "malformed JSON"},
      {"{}x", 0, "malformed JSON"},
      {"{\"a\xff\":1}", 0, "malformed JSON"},
      {R"({"a":1})", 0, "'a'"},
      {R"({"a":[1]})", 0, "'a'"},
      {R"({"a":null})", 0, "'a'"},
      {R"({"a":{}})", 0, "expected dtype, shape and data_offsets"},
      {R"({"a":{"dtype":"F32","shape":[1]}})", 4, "expected dtype"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}})", 4, "unknown key 'x'"},
      {R"({"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 4, "duplicate"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
       R"("a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
       8, "duplicate"},
      {R"({"__metadata__":{},"__metadata__":{}})", 0, "duplicate"},
      {R"({"__metadata__":{"a":"b","a":"c"}})", 0, "duplicate"},
      {R"({"__metadata__":{"a":1}})", 0, "a number"},
      {R"({"__metadata__":{"a":{"b":"c"}}})", 0, "an object"},
      {R"({"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}})", 1, "F8_E4M3"},
      {R"({"a":{"dtype":4,"shape":[1],"data_offsets":[0,4]}})", 4, "a number"},
      {R"({"a":{"dtype":"F32","shape":1,"data_offsets":[0,4]}})", 4, "a number"},
      {R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 4, "negative"},
      {R"({"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}})", 4, "not an integer"},
      {R"({"a":{"dtype":"F32","shape":[[1]],"data_offsets":[0,4]}})", 4, "an array"},
      {R"({"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1],"data_offsets":[0,4]}})", 4, "more than 6"},
      {R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0,
       "overflows"},
      {R"({"a":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,4]}})", 4,
       "overflows"},
      {R"({"a":{"dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,4]}})", 4,
       "not an integer"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4, "expected 8"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", 4, "begin after end"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}})", 4, "[begin, end]"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", 8, "gap"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
       R"("b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
       8, "overlap"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
       R"("b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}})",
       8, "overlap"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 3, "ends at 4"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 5, "after the last tensor"},
      {"{}", 1, "after the last tensor"},
  };
  for (const Bad& b : bad) {
    write_header(b.header, b.data);
    const std::string message = error();
    EXPECT_NE(message.find(b.reason), std::string::npos) << b.header << "\n  " << message;
    EXPECT_NE(message.find("file.safetensors"), std::string::npos) << message;
  }
}

TEST_F(Safetensors, RefusesHugeHeadersBeforeAllocating) {
  write_raw(std::string(8, '\xff'));
  EXPECT_NE(error().find("at most"), std::string::npos);
  std::string length(8, '\0');
  length[3] = 1;  // 16 MiB in a file of 8 bytes
  write_raw(length);
  EXPECT_NE(error().find("in a file of 8"), std::string::npos);
}

TEST_F(Safetensors, RefusesTooManyTensorsAndDeepNesting) {
  std::string header = "{";
  for (int i = 0; i < 65'537; ++i)
    header += (i == 0 ? "\"" : ",\"") + std::to_string(i) +
              R"(":{"dtype":"F32","shape":[0],"data_offsets":[0,0]})";
  write_header(header + "}", 0);
  EXPECT_NE(error().find("more than 65,536"), std::string::npos);
  write_header("{\"a\":" + std::string(1'000'000, '['), 0);
  EXPECT_NE(error().find("an array"), std::string::npos);
}

TEST_F(Safetensors, EveryTruncationIsAnError) {
  write_sample();
  const std::string whole = read_raw();
  for (std::size_t n = 0; n < whole.size(); ++n) {
    write_raw(whole.substr(0, n));
    EXPECT_NE(error(), "accepted") << n;
    EXPECT_NE(error().find(path().string()), std::string::npos) << n;
  }
}

TEST_F(Safetensors, BytesInMemoryAreReadAsTheFile) {
  write_sample();
  const auto file = SafetensorsFile::open(path());
  const auto memory = in_memory(read_raw());
  EXPECT_EQ(memory.path(), "memory");
  EXPECT_EQ(memory.metadata(), file.metadata());
  ASSERT_EQ(memory.names(), file.names());
  for (const auto& [name, entry] : file.entries()) {
    EXPECT_EQ(memory.at(name).shape, entry.shape);
    EXPECT_EQ(memory.read_bytes(memory.at(name)), file.read_bytes(entry));
  }
  SafetensorsEntry beyond = memory.at("ids");
  beyond.offset = ~std::uint64_t{0};
  EXPECT_THROW((void)memory.read_bytes(beyond), IoError);
  auto moved = SafetensorsFile::open(path());
  moved = in_memory(read_raw());
  EXPECT_EQ(moved.read_bytes(moved.at("ids")), file.read_bytes(file.at("ids")));
}

TEST_F(Safetensors, BitFlipsNeverCrash) {
  write_sample();
  const std::string whole = read_raw();
  Rng rng(1);
  int refused = 0;
  for (int i = 0; i < 100'000; ++i) {
    std::string damaged = whole;
    for (std::uint64_t k = 0; k <= rng.below(3); ++k)
      damaged[static_cast<std::size_t>(rng.below(whole.size()))] ^=
          static_cast<char>(1U << rng.below(8));
    try {
      const auto file = in_memory(damaged);
      for (const auto& [name, entry] : file.entries()) (void)file.read_doubles(entry);
    } catch (const IoError& e) {
      ++refused;
      ASSERT_TRUE(std::string_view(e.what()).starts_with("memory: ")) << e.what();
    }
  }
  EXPECT_GT(refused, 50'000);
}

TEST_F(Safetensors, NamesTheFileThatIsMissingOrNotAFile) {
  EXPECT_NE(error().find("cannot open"), std::string::npos);
  std::filesystem::create_directory(path());
  EXPECT_NE(error().find("not a regular file"), std::string::npos);
}

}  // namespace
}  // namespace lrnn
