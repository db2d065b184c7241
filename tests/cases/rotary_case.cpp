#include "lrnn/ops/rotary.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

struct Sizes {
  std::int64_t batch, seqlen, heads, head_dim, dim;
  bool interleaved = false;
  double base = 1e4;
  std::int64_t far = 0;  // > 0: positions up to this
  bool ids = false;
};

// y is the rotated copy of x; the op works in place.
void rotate(const Sizes& z, Context& ctx, Tensors& t, const char* from, const char* to,
            bool inverse) {
  ctx.copy(t[to], t[from]);
  rotary(ctx, {.x = t[to],
               .head_dim = z.head_dim,
               .dim = z.dim,
               .base = z.base,
               .interleaved = z.interleaved,
               .inverse = inverse,
               .positions = t["positions"],
               .position_ids = t["position_ids"]});
}

OpCase rotary_case(const Sizes& z) {
  const Shape shape = {z.batch, z.seqlen, z.heads * z.head_dim};
  OpCase c{
      .name = detail::concat("rotary/B:", z.batch, "/L:", z.seqlen, "/heads:", z.heads,
                             "/d:", z.head_dim, "/dim:", z.dim, "/base:", z.base,
                             z.interleaved ? "/interleaved" : "", z.far > 0 ? "/positions" : "",
                             z.ids ? "/ids" : ""),
      .inputs = {{.name = "x", .shape = shape, .time = 1}},
      .outputs = {{.name = "y", .shape = shape, .time = 1}},
      .forward = [z](Context& ctx, Tensors& t) { rotate(z, ctx, t, "x", "y", false); },
      .backward = [z](Context& ctx, Tensors& t) { rotate(z, ctx, t, "dy", "dx", true); },
      .gradcheck = shape.numel() < 2000,
      .bytes_forward = 8.0 * static_cast<double>(shape.numel()),
      .bytes_backward = 8.0 * static_cast<double>(shape.numel()),
  };
  if (z.far > 0)
    c.indices.push_back(
        {.name = "positions", .shape = {z.batch}, .low = 0, .high = static_cast<double>(z.far)});
  if (z.ids)
    c.indices.push_back(
        {.name = "position_ids", .shape = {z.batch, z.seqlen}, .low = 0, .high = 1000});
  return c;
}

const RegisterOpCases kRegister({
    rotary_case({2, 5, 3, 6, 6}),
    rotary_case({2, 5, 3, 6, 6, true}),
    rotary_case({1, 4, 2, 7, 4, false, 100}),
    rotary_case({1, 4, 2, 7, 4, true, 1e4, 50}),
    rotary_case({3, 3, 1, 2, 2, false, 1e4, 0, true}),
    rotary_case({2, 3, 2, 8, 8, false, 1e4, 2000000}),  // far: the angles need exact reduction
    rotary_case({2, 130, 24, 64, 64, false, 1e4, 1000}),
    rotary_case({2, 65, 5, 128, 32, true, 1e4, 1000, true}),
});
const RegisterBenchCases kRegisterBench({
    rotary_case({8, 2048, 24, 64, 64}),
    rotary_case({1, 65536, 32, 128, 128, true}),
});

}  // namespace
}  // namespace lrnn::testing
