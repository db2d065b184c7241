/// Learnable tensors, their lrnnx state-dict names and their gradients.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "lrnn/core/context.hpp"
#include "lrnn/core/random.hpp"

namespace lrnn {

struct ParameterOptions {
  bool weight_decay = true;   ///< false mirrors `_no_weight_decay` in lrnnx
  bool keep_float32 = false;  ///< float32 whatever the model dtype (A_log, D, dt bias, norms, ...)
  bool matrix = false;        ///< read by linear_forward and embedding_forward alone
  float lr_scale = 1.0F;      ///< multiplies the optimizer learning rate
  bool optional_on_load = false;  ///< may be missing in a checkpoint; then initialised
};

/// Fills a float64 host buffer. Receives a generator seeded from (model seed, parameter name),
/// so that a value does not depend on construction order or device.
using Initializer = std::function<void(std::span<double> values, const Shape& shape, Rng& rng)>;

namespace init {
/// Every element `value`.
[[nodiscard]] Initializer constant(double value);
/// U(-bound, bound).
[[nodiscard]] Initializer uniform(double bound);
/// N(0, stddev^2).
[[nodiscard]] Initializer normal(double stddev);
}  // namespace init

struct Parameter {
  std::string name;  ///< full state-dict name, e.g. "backbone.layers.0.mixer.A_log"
  Shape shape;
  ParameterOptions options;
  Initializer init;
  MutableTensorView value;  ///< a part of a slab; absent until materialize()
  MutableTensorView
      grad;      ///< same shape; float32 (float64 if value is); absent until enable_grad()
  int slab = 0;  ///< index into ParameterStore::slabs()
  std::int64_t offset = 0;  ///< first element in the slab
};

/// All parameters of one element type in one block, and their gradients at the same offsets.
/// Gaps between parameters (alignment) hold zeros.
struct ParameterSlab {
  DType dtype = DType::float32;
  std::int64_t numel = 0;
  Tensor values;
  Tensor grads;  ///< float32, or float64 when values are; empty until enable_grad()
};

/// Owns every parameter of a model. Addresses of Parameters are stable.
class ParameterStore {
 public:
  ParameterStore() = default;
  ParameterStore(const ParameterStore&) = delete;
  ParameterStore& operator=(const ParameterStore&) = delete;

  /// @throws InternalError if the name exists or the store is materialised.
  Parameter& add(std::string name, const Shape& shape, Initializer init,
                 ParameterOptions options = {});
  /// @throws InvalidArgument if there is no such parameter.
  [[nodiscard]] Parameter& at(std::string_view name);
  [[nodiscard]] Parameter* find(std::string_view name) noexcept;
  [[nodiscard]] auto begin() { return parameters_.begin(); }
  [[nodiscard]] auto end() { return parameters_.end(); }
  [[nodiscard]] auto begin() const { return parameters_.begin(); }
  [[nodiscard]] auto end() const { return parameters_.end(); }
  /// Number of learnable elements.
  [[nodiscard]] std::int64_t numel() const noexcept;

  /// Allocates one block per element type, then runs the initialisers unless the values are about
  /// to be loaded. `dtype` is float32, bfloat16 or float64; keep_float32 parameters of a bfloat16
  /// model form a second block.
  void materialize(Context& ctx, DType dtype, std::uint64_t seed, bool initialize_values = true);
  /// Before materialize(): bfloat16 there means the `matrix` parameters alone, and all others are
  /// float32. So does a CPU model store its weights. Such a store serves inference only.
  void restrict_bfloat16_to_matrices() noexcept { bfloat16_matrices_only_ = true; }
  /// Runs the initialiser of one parameter of a materialised store.
  static void initialize(Context& ctx, Parameter& parameter, std::uint64_t seed);
  /// Gradients come from the memory of the values, whatever MemoryScope is in force: they live as
  /// long as the store, not as long as whoever asks for them first.
  /// @throws DTypeError if bfloat16 is restricted to matrices
  void enable_grad(Context& ctx);
  void zero_grad(Context& ctx);
  [[nodiscard]] bool has_grad() const noexcept;
  [[nodiscard]] std::vector<ParameterSlab>& slabs() noexcept { return slabs_; }

 private:
  std::deque<Parameter> parameters_;
  std::vector<ParameterSlab> slabs_;
  MemoryResource* memory_ = nullptr;
  bool bfloat16_matrices_only_ = false;
};

/// A ParameterStore with a name prefix: `scope / "mixer"` names "mixer.*".
class ParameterScope {
 public:
  ParameterScope(ParameterStore& store, std::string prefix)
      : store_(&store), prefix_(std::move(prefix)) {}
  [[nodiscard]] ParameterScope operator/(std::string_view name) const {
    return {*store_, prefix_ + std::string(name) + "."};
  }
  Parameter& add(std::string_view name, const Shape& shape, Initializer init,
                 ParameterOptions options = {}) const {
    return store_->add(prefix_ + std::string(name), shape, std::move(init), options);
  }

 private:
  ParameterStore* store_;
  std::string prefix_;
};

}  // namespace lrnn
