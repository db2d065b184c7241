/// Multi-head attention with grouped keys and values, rotary positions, an optional causal
/// convolution of q, k and v, and an optional internal gated MLP.
///
///   [q | k | v | up | gate] = in_proj(x);  [q | k | v] = conv1d([q | k | v]) if d_conv > 0
///   O = attention(rotary(q), rotary(k), v);   out = out_proj([O | up silu(gate)])
///
/// The state holds the rotated keys and the values of the past, the window of the convolution and
/// the position of every sequence. causal = false has no state: forward and backward only.
/// State dict: in_proj.weight [d (Hq + 2 Hk) + M, H] (.bias), conv1d.weight [d (Hq + 2 Hk), 1, K]
/// (.bias) if d_conv > 0, out_proj.weight [H, Hq d + M / 2] (.bias).
/// Matches: lrnnx/layers/mha.py.
#pragma once

#include "lrnn/mixers/config.hpp"
#include "lrnn/mixers/mixer.hpp"
#include "lrnn/nn/linear.hpp"
#include "lrnn/ops/attention.hpp"

namespace lrnn {

struct AttentionConfig {
  std::optional<std::int64_t> num_heads = {};  ///< max(1, d_model / 64) where that divides d_model
  std::optional<std::int64_t> num_heads_kv = {};  ///< default: num_heads
  std::optional<std::int64_t> head_dim = {};      ///< default: d_model / num_heads
  std::int64_t mlp_dim = 0;                       ///< rounded up to a multiple of 256; 0: none
  bool qkv_proj_bias = true;
  bool out_proj_bias = true;
  std::optional<double> softmax_scale = {};  ///< default: head_dim^-0.5
  bool causal = true;
  std::int64_t d_conv = 0;  ///< width of the convolution; 0: none
  std::int64_t rotary_emb_dim = 0;
  double rotary_emb_base = 10000.0;
  bool rotary_emb_interleaved = false;

  static void visit(auto& self, auto&& v) {
    v("num_heads", self.num_heads);
    v("num_heads_kv", self.num_heads_kv);
    v("head_dim", self.head_dim);
    v("mlp_dim", self.mlp_dim);
    v("qkv_proj_bias", self.qkv_proj_bias);
    v("out_proj_bias", self.out_proj_bias);
    v("softmax_scale", self.softmax_scale);
    v("causal", self.causal);
    v("d_conv", self.d_conv);
    v("rotary_emb_dim", self.rotary_emb_dim);
    v("rotary_emb_base", self.rotary_emb_base);
    v("rotary_emb_interleaved", self.rotary_emb_interleaved);
  }
};

class Attention final : public Mixer {
 public:
  using Config = AttentionConfig;
  /// @throws ConfigError
  static AttentionConfig resolve(AttentionConfig config, const MixerBuild& build);
  Attention(const AttentionConfig& config, const MixerBuild& build, const ParameterScope& scope);

  /// @throws InvalidArgument if not causal
  [[nodiscard]] std::unique_ptr<MixerState> make_state(Context& ctx, std::int64_t batch,
                                                       std::int64_t max_seqlen,
                                                       DType dtype) const override;

  struct State final : MixerState {
    Tensor keys;        // [B, max_seqlen, Hk d]  after rotation, activation dtype
    Tensor values;      // [B, max_seqlen, Hk d]
    Tensor conv_state;  // [B, (Hq + 2 Hk) d, K]  if d_conv > 0
    Tensor positions;   // [B] int32
    void visit(const Visitor& visitor) override;
  };

 private:
  struct Saved final : MixerSaved {
    TensorView x;             // [B, L, H]
    TensorView position_ids;  // [B, L]
    const State* state_in = nullptr;
    Tensor p;             // [B, L, (Hq + 2 Hk) d + M]  in_proj output; q and k rotated in place
                          //                            unless there is a convolution
    Tensor qkv;           // [B, L, (Hq + 2 Hk) d]      after convolution and rotation, if any
    Tensor keys, values;  // [B, S, Hk d]               what the queries saw, if a cache
    Tensor out;           // [B, L, Hq d + M / 2]       input of out_proj
    Tensor lse;           // [B, Hq, L]
  };

  std::unique_ptr<MixerSaved> do_forward(Context& ctx, const MixerForward& args,
                                         bool keep_for_backward) const override;
  void do_backward(Context& ctx, MixerSaved& saved, const MixerBackward& args) const override;
  void do_step(Context& ctx, const MixerStep& args) const override;

  /// Columns of the concatenated projection.
  [[nodiscard]] std::int64_t q_width() const { return num_heads_ * head_dim_; }
  [[nodiscard]] std::int64_t kv_width() const { return num_heads_kv_ * head_dim_; }
  [[nodiscard]] std::int64_t qkv_width() const { return q_width() + 2 * kv_width(); }
  void rotate(Context& ctx, MutableTensorView qkv, TensorView positions, TensorView position_ids,
              bool inverse) const;
  [[nodiscard]] AttentionInputs attention_inputs(TensorView qkv, TensorView keys, TensorView values,
                                                 TensorView lengths, TensorView positions) const;
  void attention_gradients(Context& ctx, const Saved& saved, const MixerBackward& args,
                           TensorView d_o, MutableTensorView dqkv) const;
  void cache_gradients(Context& ctx, const Saved& saved, const MixerBackward& args,
                       MutableTensorView dkeys, MutableTensorView dvalues, MutableTensorView dk,
                       MutableTensorView dv) const;
  [[nodiscard]] TensorView conv_weight() const;
  [[nodiscard]] TensorView conv_bias() const;

  bool causal_;
  std::int64_t num_heads_, num_heads_kv_, head_dim_, mlp_width_, d_conv_;
  double softmax_scale_;
  std::int64_t rotary_dim_;
  double rotary_base_;
  bool rotary_interleaved_;
  Linear in_proj_;
  Parameter* conv_weight_ = nullptr;
  Parameter* conv_bias_ = nullptr;
  Linear out_proj_;
};

}  // namespace lrnn
