// Dense projections by cuBLASLt, which is column-major: a row-major matrix is its own transpose
// there, so y = x W^T is computed as y^T = W x^T, and so on.
//
// Products of few rows, one token of each sequence of a batch, go to kernels of our own that read
// the weight once and overlap the kernel before: cuBLASLt takes several microseconds for any of
// them.
//
// On Hopper products of few rows and very many columns, logits of a decoding step, go to a kernel
// whose blocks stay (linear_wide_sm90.cu), those of little depth in bfloat16 to one that keeps W in
// shared memory (linear_thin_sm90.cu), gradients of wide weights in TF32 to one of their own
// (linear_weight_sm90.cu). Large products of float32 go to Hopper's tensor cores, split so that
// they keep the accuracy of float32, unless TF32 is allowed.
//
// Algorithms come from the library's heuristic and are kept per shape. In-place split-K reductions,
// whose order is not fixed, are excluded.
#include "lrnn/ops/elementwise.hpp"
#include "lrnn/ops/linear.hpp"

#include "common/check.cuh"
#include "common/dtype.cuh"
#include "common/linear_few_rows.cuh"
#include "common/linear_float32_sm90.cuh"
#include "common/linear_sm90.cuh"
#include "common/linear_thin_sm90.cuh"
#include "common/linear_weight_sm90.cuh"
#include "common/linear_wide_sm90.cuh"
#include "ops/dispatch.hpp"
#include "runtime.hpp"

namespace lrnn::cuda {
namespace {

void check_blas(cublasStatus_t status, const char* call) {
  LRNN_CHECK(status == CUBLAS_STATUS_SUCCESS, CudaError, "linear: ", call, ": ",
             cublasLtGetStatusString(status));
}

cudaDataType_t data_type(DType dtype) {
  return dtype == DType::bfloat16 ? CUDA_R_16BF : CUDA_R_32F;
}

/// Owns one cuBLASLt descriptor.
template <class Handle, cublasStatus_t (*destroy)(Handle)>
class Descriptor {
 public:
  Descriptor() = default;
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (handle != nullptr) static_cast<void>(destroy(handle));
  }
  Handle handle = nullptr;
};
using MatmulDesc = Descriptor<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>;
using Preference = Descriptor<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>;

class Layout : public Descriptor<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy> {
 public:
  Layout(DType dtype, std::int64_t rows, std::int64_t cols, std::int64_t ld) {
    check_blas(
        cublasLtMatrixLayoutCreate(&handle, data_type(dtype), static_cast<std::uint64_t>(rows),
                                   static_cast<std::uint64_t>(cols), ld),
        "cublasLtMatrixLayoutCreate");
  }
};

/// A column-major operand as it lies in memory.
struct Operand {
  const void* data;
  DType dtype;
  std::int64_t rows, cols, ld;
  bool transposed;

  // The largest power of two, up to 256, that divides the address and the distance of columns.
  [[nodiscard]] std::uint32_t alignment() const {
    const auto bits = reinterpret_cast<std::uintptr_t>(data) |
                      (static_cast<std::uintptr_t>(ld) * size_of(dtype)) | std::uintptr_t{256};
    return static_cast<std::uint32_t>(bits & (~bits + 1));
  }
  /// Columns [first, first + count).
  [[nodiscard]] Operand part(std::int64_t first, std::int64_t count) const {
    const auto offset = static_cast<std::size_t>(first * ld) * size_of(dtype);
    return {static_cast<const std::byte*>(data) + offset, dtype, rows, count, ld, transposed};
  }
};

// cuBLASLt 13.0 lost the terms beyond a multiple of 8 in sums of bfloat16 that it had split: 7 of
// 16,903 rows of a weight's gradient. So it may split only sums of such a length.
constexpr std::int64_t kSplitUnit = 8;

template <class T>
void set(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute, const T& value) {
  check_blas(cublasLtMatmulDescSetAttribute(desc, attribute, &value, sizeof(value)),
             "cublasLtMatmulDescSetAttribute");
}
template <class T>
void set(cublasLtMatmulPreference_t pref, cublasLtMatmulPreferenceAttributes_t attribute,
         const T& value) {
  check_blas(cublasLtMatmulPreferenceSetAttribute(pref, attribute, &value, sizeof(value)),
             "cublasLtMatmulPreferenceSetAttribute");
}

/// D = op(A) op(B) (+ D) (+ bias, along rows of D).
struct Product {
  Operand A, B, D;
  bool accumulate;
  const void* bias;

  void run(Context& ctx) const {
    CudaRuntime& runtime = runtime_of(ctx);
    const bool tf32 = A.dtype == DType::float32 && ctx.allow_tf32();
    MatmulDesc desc;
    check_blas(
        cublasLtMatmulDescCreate(
            &desc.handle, tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F, CUDA_R_32F),
        "cublasLtMatmulDescCreate");
    set(desc.handle, CUBLASLT_MATMUL_DESC_TRANSA, A.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(desc.handle, CUBLASLT_MATMUL_DESC_TRANSB, B.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    if (bias != nullptr) {
      set(desc.handle, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
      set(desc.handle, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
    }
    const Layout a(A.dtype, A.rows, A.cols, A.ld);
    const Layout b(B.dtype, B.rows, B.cols, B.ld);
    const Layout d(D.dtype, D.rows, D.cols, D.ld);
    const cublasLtMatmulAlgo_t algorithm =
        choose(runtime, desc.handle, a.handle, b.handle, d.handle, tf32);
    const float alpha = 1.0F;
    const float beta = accumulate ? 1.0F : 0.0F;
    const MutableTensorView workspace = runtime.blas_workspace();
    check_blas(
        cublasLtMatmul(runtime.blas(), desc.handle, &alpha, A.data, a.handle, B.data, b.handle,
                       &beta, D.data, d.handle, const_cast<void*>(D.data), d.handle, &algorithm,
                       workspace.raw(), workspace.nbytes(), ctx.stream().handle),
        "cublasLtMatmul");
  }

 private:
  [[nodiscard]] cublasLtMatmulAlgo_t choose(CudaRuntime& runtime, cublasLtMatmulDesc_t desc,
                                            cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                            cublasLtMatrixLayout_t d, bool tf32) const {
    const std::int64_t flags = (A.transposed ? 1 : 0) + (B.transposed ? 2 : 0) +
                               (accumulate ? 4 : 0) + (bias != nullptr ? 8 : 0) + (tf32 ? 16 : 0) +
                               (A.dtype == DType::bfloat16 ? 32 : 0) +
                               (D.dtype == DType::bfloat16 ? 64 : 0);
    const GemmKey key = {flags, A.rows,        A.cols, A.ld,   A.alignment(), B.rows,        B.cols,
                         B.ld,  B.alignment(), D.rows, D.cols, D.ld,          D.alignment(), 0};
    auto& known = runtime.gemm_algorithms();
    if (const auto it = known.find(key); it != known.end()) return it->second;
    Preference pref;
    check_blas(cublasLtMatmulPreferenceCreate(&pref.handle), "cublasLtMatmulPreferenceCreate");
    set(pref.handle, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
        static_cast<std::uint64_t>(runtime.blas_workspace().nbytes()));
    const std::int64_t depth = A.transposed ? A.rows : A.cols;
    set(pref.handle, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
        static_cast<std::uint32_t>(depth % kSplitUnit != 0
                                       ? CUBLASLT_REDUCTION_SCHEME_NONE
                                       : CUBLASLT_REDUCTION_SCHEME_MASK &
                                             ~CUBLASLT_REDUCTION_SCHEME_INPLACE));
    set(pref.handle, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, A.alignment());
    set(pref.handle, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, B.alignment());
    set(pref.handle, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, D.alignment());
    set(pref.handle, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, D.alignment());
    cublasLtMatmulHeuristicResult_t result{};
    int found = 0;
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(runtime.blas(), desc, a, b, d, d,
                                                                 pref.handle, 1, &result, &found);
    LRNN_CHECK(status == CUBLAS_STATUS_SUCCESS && found == 1, CudaError,
               "linear: cuBLASLt has no algorithm for ", D.rows, " x ", D.cols, " x ", depth, " ",
               A.dtype, " -> ", D.dtype, ": ", cublasLtGetStatusString(status));
    known.emplace(key, result.algo);
    return result.algo;
  }
};

// A row-major tensor of rows is a column-major matrix with one column per row.
Operand columns_of(TensorView t, bool transposed = false) {
  return {t.raw(), t.dtype(), t.dim(-1), detail::row_count(t), detail::row_stride(t), transposed};
}

template <class T>
void few_rows_forward(Context& ctx, const LinearForward& a) {
  const few_rows::Args<T> args{.x = device_rows<T>(a.x),
                               .weight = device_rows<T>(a.weight),
                               .rows = static_cast<int>(detail::row_count(a.x)),
                               .columns = static_cast<int>(a.weight.dim(0)),
                               .depth = static_cast<int>(a.x.dim(-1)),
                               .stable_weight = a.stable_weight};
  const few_rows::StoreSum<T> store{.bias = a.bias ? a.bias.data<T>() : nullptr,
                                    .y = device_rows<T>(a.y),
                                    .accumulate = a.accumulate};
  few_rows::launch(ctx.stream().handle, args, store);
}

/// The operand whose rows are those of t.
linear_float32_sm90::Operand rows_of(TensorView t, bool across) {
  return {t.data<float>(), detail::row_stride(t), across};
}

/// y = left right^T (+ bias, or + y) of row-major operands in float32 on tensor cores, if it is
/// faster there.
bool multiply_float32([[maybe_unused]] Context& ctx, linear_float32_sm90::Operand left,
                      linear_float32_sm90::Operand right, MutableTensorView y, std::int64_t depth,
                      bool accumulate, TensorView bias = {}) {
  [[maybe_unused]] const linear_float32_sm90::Product product{
      .left = left,
      .right = right,
      .bias = bias ? bias.data<float>() : nullptr,
      .y = y.data<float>(),
      .y_stride = detail::row_stride(y),
      .accumulate = accumulate,
      .rows = detail::row_count(y),
      .columns = y.dim(-1),
      .depth = depth};
#ifdef LRNN_WITH_SM90A
  if (!ctx.allow_tf32() && linear_float32_sm90::pays(product)) {
    linear_float32_sm90::run(ctx, product);
    return true;
  }
#endif
  return false;
}

// cuBLASLt takes several times as long where rows of y are not aligned or their length is odd, as
// that of logits may be. A product of fewer columns takes little anyway, and few rows are no
// matter. (A caller that has padding rows of W does better: one product takes all columns.)
constexpr std::int64_t kFewestAlignedColumns = 1024;
constexpr std::int64_t kFewestAlignedRows = 17;
constexpr std::int64_t kColumnAlignment = 8;

/// Whether y is better formed with aligned rows and copied.
bool aligning_pays(const LinearForward& a) {
  return a.y.dim(-1) >= kFewestAlignedColumns && detail::row_count(a.y) >= kFewestAlignedRows &&
         detail::row_stride(a.y) % kColumnAlignment != 0 && !a.accumulate && a.x.is_contiguous() &&
         a.y.is_contiguous();
}

/// y = x W^T (+ bias) by way of aligned rows, some of them at a time; the few columns beyond a
/// multiple of kColumnAlignment by a product of their own.
void forward_aligned(Context& ctx, const LinearForward& a) {
  constexpr std::int64_t kMostRows = 1840;
  constexpr std::int64_t kPitch = 64;  // rows start at cache lines
  const std::int64_t rows = detail::row_count(a.y);
  const std::int64_t columns = a.y.dim(-1);
  const std::int64_t whole = columns / kColumnAlignment * kColumnAlignment;
  const TensorView x = a.x.reshape({rows, a.x.dim(-1)});
  const MutableTensorView y = a.y.reshape({rows, columns});
  Tensor aligned =
      ctx.empty({std::min(rows, kMostRows), (columns + kPitch - 1) / kPitch * kPitch}, y.dtype());
  for (std::int64_t begin = 0; begin < rows; begin += kMostRows) {
    const std::int64_t count = std::min(kMostRows, rows - begin);
    const MutableTensorView z = aligned.view().slice(0, 0, count).slice(1, 0, columns);
    const auto multiply = [&](std::int64_t first, std::int64_t number) {
      if (number == 0) return;
      lrnn::linear_forward(ctx, {.x = x.slice(0, begin, count),
                                 .weight = a.weight.slice(0, first, number),
                                 .bias = a.bias ? a.bias.slice(0, first, number) : TensorView(),
                                 .y = z.slice(1, first, number),
                                 .stable_weight = a.stable_weight});
    };
    multiply(0, whole);
    multiply(whole, columns - whole);
    lrnn::cast(ctx, {.src = z, .dst = y.slice(0, begin, count)});
  }
}

/// Whether dx = dy W is better formed as a product with a copy of W^T: tensor cores take TF32 only
/// with the summed dimension inside, and the library's kernels for other layouts lose a third.
bool transposing_pays(const Context& ctx, const LinearBackward& a) {
  constexpr std::int64_t kLeastRows = 4096;
  constexpr std::int64_t kLeastWidth = 256;  // below, both are bound by memory
  return a.dy.dtype() == DType::float32 && ctx.allow_tf32() &&
         detail::row_count(a.dy) >= kLeastRows &&
         std::min(a.weight.dim(0), a.weight.dim(1)) >= kLeastWidth;
}

void backward_input(Context& ctx, const LinearBackward& a) {
#ifdef LRNN_WITH_SM90A
  if (linear_thin::multiply(ctx, {.x = a.dy,
                                  .weight = a.weight,
                                  .bias = {},
                                  .y = a.dx,
                                  .accumulate = a.accumulate_dx,
                                  .transposed = true}))
    return;
#endif
  if (a.dy.dtype() == DType::float32 &&
      multiply_float32(ctx, rows_of(a.dy, false), rows_of(a.weight, true), a.dx, a.dy.dim(-1),
                       a.accumulate_dx))
    return;
  Tensor transposed;
  Operand weight = columns_of(a.weight);
  if (transposing_pays(ctx, a)) {
    transposed = ctx.empty({a.weight.dim(1), a.weight.dim(0)}, a.weight.dtype());
    lrnn::transpose(ctx, {.src = a.weight, .dst = transposed});
    weight = columns_of(transposed, true);
  }
  Product{weight, columns_of(a.dy), columns_of(a.dx), a.accumulate_dx, nullptr}.run(ctx);
}

void backward_weight(Context& ctx, const LinearBackward& a) {
  if (a.dy.dtype() == DType::float32 &&
      multiply_float32(ctx, rows_of(a.dy, true), rows_of(a.x, true), a.dweight,
                       detail::row_count(a.dy), true))
    return;
#ifdef LRNN_WITH_SM90A
  if (linear_weight::applies(ctx, a)) return linear_weight::add(ctx, a);
#endif
  const Operand x = columns_of(a.x);
  const Operand dy = columns_of(a.dy, true);
  const auto add = [&](std::int64_t first, std::int64_t rows) {
    if (rows > 0)
      Product{x.part(first, rows), dy.part(first, rows), columns_of(a.dweight), true, nullptr}.run(
          ctx);
  };
  const std::int64_t whole = x.cols / kSplitUnit * kSplitUnit;
  add(0, whole);
  add(whole, x.cols - whole);
}

}  // namespace

void linear_forward(Context& ctx, const LinearForward& a) {
  visit_float("linear_forward", a.x.dtype(), [&]<class T>() {
    const bool few = few_rows::applies<T>(a.x, a.weight, few_rows::most_rows<T>(a.weight));
#ifdef LRNN_WITH_SM90A
    if (linear_wide::applies(a)) return linear_wide::forward(ctx, a);
    if (linear_sm90::applies(a.x, a.weight) &&
        (few ? linear_sm90::streams(a.weight)
             : linear_sm90::pays(detail::row_count(a.x), a.weight, a.y)))
      return linear_sm90::forward(ctx, a);
    if (linear_thin::multiply(ctx, {.x = a.x,
                                    .weight = a.weight,
                                    .bias = a.bias,
                                    .y = a.y,
                                    .accumulate = a.accumulate,
                                    .transposed = false}))
      return;
#endif
    if (few) return few_rows_forward<T>(ctx, a);
    if (aligning_pays(a)) return forward_aligned(ctx, a);
    if constexpr (sizeof(T) == 4)
      if (multiply_float32(ctx, rows_of(a.x, false), rows_of(a.weight, false), a.y, a.x.dim(-1),
                           a.accumulate, a.bias))
        return;
    Product{columns_of(a.weight, true), columns_of(a.x), columns_of(a.y), a.accumulate,
            a.bias ? a.bias.raw() : nullptr}
        .run(ctx);
  });
}

void linear_backward(Context& ctx, const LinearBackward& a) {
  if (a.dx) backward_input(ctx, a);
  if (a.dweight) backward_weight(ctx, a);
  if (a.dbias) lrnn::sum_columns(ctx, {.a = a.dy, .out = a.dbias});
}

}  // namespace lrnn::cuda
