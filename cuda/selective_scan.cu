// Forward. Ownership: common/selective_scan.cuh.
//
// Forward: a barrier per tile of steps. While a group of steps advances, a lane prepares its own
// step of a later group (softplus, gate) and writes that of the group before, so that what waits
// stands beside what does not. Bound by issue slots, shared memory and the unit of exponentials
// together: at B8 L2048 D1536 N16 in bfloat16 on an H200 0.174 ms. With 5 blocks of 96 registers,
// 5 % slower, 79 % of the issue slots and 69 % of the last were used at L65536.
#include "common/selective_scan.cuh"

namespace lrnn::cuda {
namespace selective {
namespace {

__device__ __forceinline__ float reciprocal_approx(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

/// *p = v if `exists`, without a branch that would split the code around it.
__device__ __forceinline__ void store_if(bool exists, float* p, float v) {
  asm volatile("{.reg .pred q; setp.ne.s32 q, %2, 0; @q st.global.f32 [%0], %1;}" ::"l"(p), "f"(v),
               "r"(static_cast<int>(exists))
               : "memory");
}
__device__ __forceinline__ void store_if(bool exists, __nv_bfloat16* p, __nv_bfloat16 v) {
  asm volatile("{.reg .pred q; setp.ne.s32 q, %2, 0; @q st.global.u16 [%0], %1;}" ::"l"(p),
               "h"(__bfloat16_as_ushort(v)), "r"(static_cast<int>(exists))
               : "memory");
}

template <class T>
struct ForwardArgs {
  Operands<T> in;
  Starts starts;
  DeviceRows<T> y;
  float* state_out;
  float* chunk_states;
};

/// Steps of a tile: as many as 64 KB of shared memory hold, which every GPU has.
template <class T, class L>
constexpr int steps_per_tile() {
  constexpr int kPerStep =
      2 * 3 * (L::kChannels + 8) * static_cast<int>(sizeof(T)) + 3 * 2 * L::kN * 4;
  constexpr int kRest = 2 * 8 * L::kChannels * 12;
  int steps = 32;
  while (kRest + steps * kPerStep > 64 * 1024) steps /= 2;
  return steps;
}

/// How time is cut: tiles of kSteps, whose operands are staged at once, of groups of kGroup steps,
/// of which every lane of a channel prepares and finishes one, of quads, whose delta a lane reads
/// at once.
template <class T, class L>
struct Pace {
  static constexpr int kSteps = steps_per_tile<T, L>();
  static constexpr int kGroup = std::min({L::kLanes, 8, kSteps / 2});
  static constexpr int kCopies = L::kLanes / kGroup;  // lanes that have the same step
  static constexpr int kQuad = 4;
  // Steps whose B and C are in registers before they are needed. More states of a thread need the
  // registers themselves, and have work enough between two reads.
  static constexpr int kAhead = L::kLanes > 4 ? 0 : sizeof(T) == 4 ? 2 : 1;
  static constexpr bool kPipelined = kAhead > 0;
  static_assert(kChunk % kSteps == 0 && kSteps % (2 * kGroup) == 0 && kGroup % kQuad == 0);
};

/// Elements of a tile of steps, as they come from memory.
template <class T, class L>
struct Elements {
  // Rows are this far apart so that a warp reads its channels of several steps without conflicts.
  static constexpr int kPitch = L::kChannels + 8;
  alignas(16) T u[Pace<T, L>::kSteps][kPitch];
  alignas(16) T dt[Pace<T, L>::kSteps][kPitch];
  alignas(16) T z[Pace<T, L>::kSteps][kPitch];
};
template <class T, class L>
struct States {
  alignas(16) float B[Pace<T, L>::kSteps][L::kN];
  alignas(16) float C[Pace<T, L>::kSteps][L::kN];
};
/// Operands of a group of steps: delta and delta u, of two steps side by side; general: delta, u
/// and alpha.
template <class T, class L, bool kGeneral>
struct Operand {
  alignas(16) float2 delta_and_drive[Pace<T, L>::kGroup / 2][L::kChannels][2];
  alignas(16) float alpha[kGeneral ? Pace<T, L>::kGroup : 1][L::kChannels];
};
/// What is read while the next is written. Of B and C three: the last groups of one tile are read
/// when the next one has to be there already.
template <class T, class L, bool kGeneral>
struct ForwardShared {
  Elements<T, L> elements[2];
  States<T, L> states[3];
  Operand<T, L, kGeneral> operands[2];
};

/// Takes u, dt and z to shared memory, one tile of steps after the other.
template <class T, class L>
class ElementStream {
  static constexpr int kVec = kWide<T>;
  static constexpr int kPerRow = L::kChannels / kVec;
  static constexpr int kRows = L::kThreads / kPerRow;  // that a block copies at once
  static constexpr int kPitch = Elements<T, L>::kPitch;
  static constexpr int kSteps = Pace<T, L>::kSteps;

 public:
  __device__ ElementStream(const Operands<T>& in, const Place<L>& at)
      : in_(in),
        at_(at),
        row_(static_cast<int>(threadIdx.x) / kPerRow),
        rows_(min(at.length, at.stop) - at.begin) {
    const int column = at.tile * L::kChannels + static_cast<int>(threadIdx.x) % kPerRow * kVec;
    inside_ = column < in.sizes.channels;
    const std::int64_t row = at.first_row + at.begin + row_;
    u_ = in.u.row(row) + column;
    dt_ = in.dt.row(row) + column;
    z_ = in.z.row(row) + column;
  }

  /// The next tile. Steps behind the valid ones and channels that do not exist are zero.
  __device__ __forceinline__ void load(Elements<T, L>& to) {
    if (in_.wide_channels) {
      copy(u_, in_.u.stride, to.u[0]);
      copy(dt_, in_.dt.stride, to.dt[0]);
      if (in_.z.data != nullptr) copy(z_, in_.z.stride, to.z[0]);
    } else {
      copy_elements(in_.u, to.u[0]);
      copy_elements(in_.dt, to.dt[0]);
      if (in_.z.data != nullptr) copy_elements(in_.z, to.z[0]);
    }
    rows_ -= kSteps;
    first_ += kSteps;
  }

 private:
  __device__ __forceinline__ void copy(const T*& from, std::int64_t stride, T* to) const {
#pragma unroll
    for (int k = 0; k < (kSteps + kRows - 1) / kRows; ++k) {
      const int row = row_ + k * kRows;
      if (kSteps % kRows == 0 || row < kSteps)
        copy_16_bytes_async(to + row * kPitch + static_cast<int>(threadIdx.x) % kPerRow * kVec,
                            from + k * kRows * stride, inside_ && row < rows_);
    }
    from += kSteps * stride;
  }
  __device__ __forceinline__ void copy_elements(const DeviceRows<const T>& from, T* to) const {
    const std::int64_t first = at_.first_row + at_.begin + first_;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kSteps * L::kChannels; i += L::kThreads) {
      const int row = i / L::kChannels;
      const int c = i % L::kChannels;
      const int channel = at_.tile * L::kChannels + c;
      to[row * kPitch + c] = row < rows_ && channel < in_.sizes.channels
                                 ? from.row(first + row)[channel]
                                 : from_float<T>(0.0F);
    }
  }

  const Operands<T>& in_;
  const Place<L>& at_;
  int row_;
  int rows_;  // valid steps from the next tile on
  int first_ = 0;
  bool inside_;
  const T* u_;
  const T* dt_;
  const T* z_;
};

/// Takes B and C to shared memory, one tile of steps after the other, by way of the
/// registers of a block.
template <class T, class L>
class StateStream {
  static constexpr int kVec = kWide<T>;
  static constexpr int kPerRow = L::kN / kVec;
  static constexpr int kSteps = Pace<T, L>::kSteps;
  static constexpr int kPerMatrix = kSteps * kPerRow;
  // Few vectors: half of the threads take B and the others C.
  static constexpr bool kSplit = 2 * kPerMatrix <= L::kThreads;
  static constexpr int kMatrices = kSplit ? 1 : 2;
  static constexpr int kItems = (kPerMatrix + L::kThreads - 1) / L::kThreads;  // of a matrix
  static constexpr int kRows = L::kThreads / kPerRow;  // that a block takes at once

 public:
  __device__ StateStream(const Operands<T>& in, const Place<L>& at)
      : dstate_(in.sizes.dstate),
        wide_(in.wide_states),
        item_(static_cast<int>(threadIdx.x)),
        rows_(min(at.length, at.stop) - at.begin) {
    const bool second = kSplit && item_ >= kPerMatrix;
    row_ = (item_ - (second ? kPerMatrix : 0)) / kPerRow;
    column_ = item_ % kPerRow * kVec;
    from_[0] = second ? in.C : in.B;
    if constexpr (kMatrices == 2) from_[1] = in.C;
    for (DeviceRows<const T>& m : from_) m.data = m.row(at.first_row + at.begin + row_) + column_;
  }

  /// Asks for the next tile. Steps behind the valid ones are zero.
  __device__ __forceinline__ void load() {
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) {
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        Packed<T, kVec>& v = values_[m][k];
        v = {};
        if (row_ + k * kRows < min(rows_, kSteps)) {
          const T* const p = from_[m].row(k * kRows);
          if (wide_) {
            if (column_ < dstate_) v.load_constant(p);
          } else {
            load_elements(p, v);
          }
        }
      }
      from_[m].data += kSteps * from_[m].stride;
    }
    rows_ -= kSteps;
  }
  __device__ __forceinline__ void put(States<T, L>& to) const {
    float* const tile = to.B[0];
    static_assert(sizeof(States<T, L>) == 2 * sizeof(to.B));
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) {
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        float v[kVec];
#pragma unroll
        for (int j = 0; j < kVec; ++j) v[j] = values_[m][k].get(j);
        const int i = item_ + k * L::kThreads;
        if (i < (kSplit ? 2 : 1) * kPerMatrix)
          write_shared<kVec>(tile + (m * kPerMatrix + i) * kVec, v);
      }
    }
  }

 private:
  __device__ __forceinline__ void load_elements(const T* p, Packed<T, kVec>& to) const {
    float v[kVec];
#pragma unroll
    for (int j = 0; j < kVec; ++j) v[j] = column_ + j < dstate_ ? to_float(p[j]) : 0.0F;
    to.set(v);
  }

  int dstate_;
  bool wide_;
  int item_;
  int row_;
  int column_;
  int rows_;  // valid steps from the next tile on
  DeviceRows<const T> from_[kMatrices];
  Packed<T, kVec> values_[kMatrices][kItems];
};

/// What a thread owns of a scan: the states of its lane of a channel, and of every group of steps
/// the step that it prepares for the lanes of the channel and whose output it writes. While a group
/// advances, the one before is written and the second one behind is prepared: all that waits for
/// something is beside work that does not. Positions count from the start of the segment.
template <class T, class L, bool kGeneral>
struct Forward {
  using P = Pace<T, L>;
  using Shared = ForwardShared<T, L, kGeneral>;
  static constexpr int kGroup = P::kGroup;
  static constexpr int kAhead = P::kAhead;
  static constexpr bool kPipelined = P::kPipelined;
  static constexpr int kSlots = kPipelined ? kAhead : 1;
  static constexpr int kQuad = P::kQuad;

  /// What all lanes of a channel need of some steps. delta and delta u; general: delta and u.
  struct Quad {
    float delta[kQuad];
    float drive[kQuad];
    float alpha[kGeneral ? kQuad : 1];
  };
  /// What the writer of an output needs for it.
  struct Output {
    float u, gate;
  };

  const ForwardArgs<T>& p;
  const Place<L>& at;
  Shared& s;
  float A[L::kStates];  // times log2(e) unless general
  float h[L::kStates];
  float bias;
  float D;
  float rate = 0.0F;
  int own;           // step of a group
  int t;             // position of the own step of the next group
  int valid;         // positions from here on are padding
  unsigned written;  // positions from here on are not written
  T* y;              // of the group before
  std::int64_t y_pace;
  Quad quad;              // the next steps
  Output output[3] = {};  // of the group before, the next one and the one behind
  float sums[kGroup];
  float B[kSlots][L::kStates];
  float C[kSlots][L::kStates];

  __device__ Forward(const ForwardArgs<T>& args, const Place<L>& place, Shared& shared)
      : p(args), at(place), s(shared) {
    const Operands<T>& in = p.in;
    read_A<L>(in.A_log, at, in.sizes.dstate, kGeneral ? 1.0F : kLog2e, A);
    D = in.D != nullptr && at.active ? in.D[at.channel] : 0.0F;
    bias = at.active ? in.dt_bias[at.channel] : 0.0F;
    if (kGeneral && in.tau != nullptr) rate = at.active ? softplus(in.dtA_bias[at.channel]) : 0.0F;
    own = at.part / P::kCopies;
    t = own;
    valid = min(at.length, at.stop) - at.begin;
    written = at.active && at.part % P::kCopies == 0 ? at.stop - at.begin : 0;
    y = p.y.row(at.first_row + at.begin + own - kGroup) + at.channel;
    y_pace = kGroup * p.y.stride;
  }

  [[nodiscard]] __device__ __forceinline__ const T* own_element(const Elements<T, L>& tile,
                                                                int step) const {
    return tile.u[step + own] + at.local;
  }
  [[nodiscard]] __device__ __forceinline__ const float* own_states(const States<T, L>& tile,
                                                                   int step) const {
    return tile.B[step] + at.part * L::kStates;
  }

  /// u, dt and z of the own step of a group.
  struct Element {
    T u, dt, z;
  };
  [[nodiscard]] __device__ __forceinline__ Element read(const T* element) const {
    constexpr int kPlane = P::kSteps * Elements<T, L>::kPitch;
    return {element[0], element[kPlane], element[2 * kPlane]};
  }
  struct Prepared {
    float delta, drive, alpha;
    Output output;
  };
  [[nodiscard]] __device__ __forceinline__ Prepared prepare(const Element& e, int position) const {
    const float u = to_float(e.u);
    const float v = softplus_of_step<T>(to_float(e.dt) + bias);
    const bool exists = position < valid;
    const float delta = exists ? v : 0.0F;
    Prepared r{delta, kGeneral ? u : delta * u, delta, {u, 1.0F}};
    const float z = to_float(e.z);
    const float gate = z * reciprocal_approx(1.0F + exp2_approx(-kLog2e * z));
    if (p.in.z.data != nullptr) r.output.gate = gate;
    if (kGeneral && p.in.tau != nullptr)
      r.alpha = exists ? p.in.tau[at.first_row + at.begin + position] * rate : 0.0F;
    return r;
  }
  __device__ __forceinline__ void put(const Prepared& r, Operand<T, L, kGeneral>& to) const {
    if (P::kCopies > 1 && at.part % P::kCopies != 0) return;
    to.delta_and_drive[own / 2][at.local][own % 2] = {r.delta, r.drive};
    if constexpr (kGeneral) to.alpha[own][at.local] = r.alpha;
  }
  __device__ __forceinline__ void get(Quad& to, const Operand<T, L, kGeneral>& from, int step) {
#pragma unroll
    for (int j = 0; j < kQuad; j += 2) {
      const float4 v =
          *reinterpret_cast<const float4*>(from.delta_and_drive[(step + j) / 2][at.local]);
      to.delta[j] = v.x;
      to.drive[j] = v.y;
      to.delta[j + 1] = v.z;
      to.drive[j + 1] = v.w;
    }
    if constexpr (kGeneral)
      for (int j = 0; j < kQuad; ++j) to.alpha[j] = from.alpha[step + j][at.local];
  }
  /// B and C of a step.
  __device__ __forceinline__ void get(const float* states, int slot) {
    read_shared<L::kStates>(states, B[slot]);
    read_shared<L::kStates>(states + P::kSteps * L::kN, C[slot]);
  }

  /// Before the first group.
  __device__ void start() {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const Element element = read(own_element(s.elements[0], k * kGroup));
      const Prepared prepared = prepare(element, t + k * kGroup);
      put(prepared, s.operands[k]);
      output[k + 1] = prepared.output;
    }
    __syncwarp();
    if constexpr (kPipelined) get(quad, s.operands[0], 0);
    for (float& v : sums) v = 0.0F;
#pragma unroll
    for (int j = 0; j < kAhead; ++j) get(own_states(s.states[0], j), j);
  }

  /// One group of steps. `element`: own one of the second group behind; `states` and
  /// `next_states`: of this group and of the one behind.
  template <int kParity>
  __device__ __forceinline__ void advance(const T* element, const float* states,
                                          const float* next_states) {
    const Element behind = read(element);
#pragma unroll
    for (int first = 0; first < kGroup; first += kQuad) {
      Quad next;
      if constexpr (kPipelined) {
        const bool last = first + kQuad == kGroup;
        if (last) __syncwarp();
        get(next, s.operands[last ? kParity ^ 1 : kParity], last ? 0 : first + kQuad);
      } else {
        get(quad, s.operands[kParity], first);
      }
      if (first == 0) write();
#pragma unroll
      for (int j = first; j < first + kQuad; ++j) {
        if constexpr (!kPipelined) get(states + j * L::kN, 0);
        sums[j] = advance_step(j);
        const int ahead = j + kAhead;
        if constexpr (kPipelined)
          get(ahead < kGroup ? states + ahead * L::kN : next_states + (ahead - kGroup) * L::kN,
              j % kSlots);
      }
      if constexpr (kPipelined) quad = next;
    }
    const Prepared prepared = prepare(behind, t + 2 * kGroup);
    if constexpr (!kPipelined) __syncwarp();
    put(prepared, s.operands[kParity]);
    output[0] = output[1];
    output[1] = output[2];
    output[2] = prepared.output;
    t += kGroup;
  }

  /// Returns the part of sum C h of this thread.
  __device__ __forceinline__ float advance_step(int j) {
    const float (&b)[L::kStates] = B[j % kSlots];
    const float (&c)[L::kStates] = C[j % kSlots];
    const float delta = quad.delta[j % kQuad];
    const float drive = quad.drive[j % kQuad];
    float sum = 0.0F;
#pragma unroll
    for (int i = 0; i < L::kStates; ++i) {
      if constexpr (kGeneral) {
        const GeneralRule rule{p.in.discretization};
        const float a = rule.multiplier(quad.alpha[j % kQuad], A[i]);
        h[i] = fmaf(a, h[i], rule.factor(delta, A[i]) * drive * b[i]);
      } else {
        h[i] = fmaf(decay(delta, A[i]), h[i], drive * b[i]);
      }
      sum = i == 0 ? c[i] * h[i] : fmaf(c[i], h[i], sum);
    }
    return sum;
  }

  /// The output of the group before.
  __device__ __forceinline__ void write() {
    transpose_add<kGroup, L::kLanes, L::kPerWarp>(sums, at.part);
    const int position = t - kGroup;
    const float v = fmaf(D, output[0].u, sums[0]) * output[0].gate;
    store_if(static_cast<unsigned>(position) < written, y,
             from_float<T>(position < valid ? v : 0.0F));
    y += y_pace;
  }
};

/// Blocks of a multiprocessor. Registers are worth more than warps: 5 blocks of 96 registers were
/// 5 % slower than 4, also where all blocks fit at once only with 5.
template <class L, bool kGeneral>
constexpr int forward_blocks() {
  if (kGeneral) return 1;
  return L::kThreads > 128 ? 3 : 4;
}

template <class T, class L, bool kGeneral>
__global__ __launch_bounds__(
    L::kThreads,
    (forward_blocks<L, kGeneral>())) void selective_scan_forward_kernel(ForwardArgs<T> p) {
  using P = Pace<T, L>;
  using Shared = ForwardShared<T, L, kGeneral>;
  extern __shared__ __align__(16) unsigned char bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(bytes);
  const Sizes& sizes = p.in.sizes;
  const Place<L> at(sizes, p.in.lengths, sizes.segments);
  Forward<T, L, kGeneral> scan(p, at, shared);
  ElementStream<T, L> elements(p.in, at);
  StateStream<T, L> B_and_C(p.in, at);
  elements.load(shared.elements[0]);
  commit_copies();
  B_and_C.load();
  p.starts.template read<L>(sizes, at, at.segment, 1, scan.h);

  int tile = -1;
  int third = 0;  // tile % 3 of the next one
  // Makes the tile behind `tile` readable and asks for the one after that.
  const auto turn = [&] {
    B_and_C.put(shared.states[third]);
    wait_for_copies();
    __syncthreads();
    elements.load(shared.elements[tile & 1]);
    commit_copies();
    B_and_C.load();
  };
  turn();
  scan.start();
  const float* states = scan.own_states(shared.states[0], 0);
  for (int first = at.begin; first < at.stop; first += P::kSteps) {
    ++tile;
    third = third == 2 ? 0 : third + 1;
    if (p.chunk_states != nullptr && first % kChunk == 0)
      write_states<L>(
          p.chunk_states,
          (std::int64_t{at.batch} * sizes.chunks + first / kChunk) * sizes.channels + at.channel,
          at, sizes.dstate, scan.h);
    const T* element = scan.own_element(shared.elements[tile & 1], 2 * P::kGroup);
#pragma unroll 1
    for (int j = 0; j < P::kSteps; j += 2 * P::kGroup) {
      const float* next = states + 2 * P::kGroup * L::kN;
      // What the last two groups read ahead is of the next tile.
      if (j + 2 * P::kGroup == P::kSteps) {
        turn();
        element = scan.own_element(shared.elements[(tile & 1) ^ 1], 0);
        next = scan.own_states(shared.states[third], 0);
      }
      constexpr int kBehind = P::kGroup * L::kN;
      scan.template advance<0>(element, states, states + kBehind);
      constexpr int kElements = P::kGroup * Elements<T, L>::kPitch;
      scan.template advance<1>(element + kElements, states + kBehind, next);
      element += 2 * kElements;
      states = next;
    }
  }
  wait_for_copies();  // of the tile behind the last one: none may be on its way when a block ends
  scan.write();
  if (p.state_out != nullptr && at.segment == sizes.segments - 1)
    write_states<L>(p.state_out, std::int64_t{at.batch} * sizes.channels + at.channel, at,
                    sizes.dstate, scan.h);
}

template <class T, class L, bool kGeneral>
void launch_forward(Context& ctx, const SelectiveScanForward& a) {
  // 16 warps for every multiprocessor of the largest devices. Cutting may repeat most of the work,
  // so it stops below.
  constexpr std::int64_t kWarps = 2112;
  Sizes sizes(a.in, L::kChannels, L::kWarps);
  sizes.cut(kWarps / (std::int64_t{sizes.batch} * sizes.tiles * L::kWarps));
  const Operands<T> in(a.in, sizes);
  const SegmentEnds ends =
      segment_ends<T, kGeneral>(ctx, in, {nullptr, 0}, data_or_null<float>(a.in.state_in));
  const ForwardArgs<T> p{in, ends.starts(), device_rows<T>(a.y), data_or_null<float>(a.state_out),
                         data_or_null<float>(a.chunk_states)};
  constexpr std::size_t kBytes = sizeof(ForwardShared<T, L, kGeneral>);
  static_assert(kBytes <= 64 * 1024);
  const auto kernel = selective_scan_forward_kernel<T, L, kGeneral>;
  allow_shared(kernel, kBytes);
  kernel<<<sizes.blocks(sizes.segments), L::kThreads, kBytes, ctx.stream().handle>>>(p);
  LRNN_CUDA_CHECK_LAUNCH();
}

/// Calls f.operator()<L>(). The general rule has fewer layouts: more lanes hold no state.
template <bool kGeneral, class F>
void visit_layout(std::int64_t dstate, F&& f) {
  if (dstate <= 16) return f.template operator()<Layout<4, 4, 32>>();
  if constexpr (!kGeneral) {
    if (dstate <= 32) return f.template operator()<Layout<8, 4, 32>>();
  }
  if (dstate <= 64) return f.template operator()<Layout<8, 8, 16>>();
  if constexpr (!kGeneral) {
    if (dstate <= 128) return f.template operator()<Layout<16, 8, 16>>();
  }
  return f.template operator()<Layout<32, 8, 8>>();
}

}  // namespace

}  // namespace selective

void selective_scan_forward(Context& ctx, const SelectiveScanForward& a) {
  constexpr const char* op = "selective_scan_forward";
  const std::int64_t dstate = a.in.A_log.dim(1);
  selective::check_limits(op, a.in);
  visit_float(op, a.in.u.dtype(), [&]<class T>() {
    selective::visit_rule(selective::is_general(a.in), [&]<bool kGeneral>() {
      selective::visit_layout<kGeneral>(
          dstate, [&]<class L>() { selective::launch_forward<T, L, kGeneral>(ctx, a); });
    });
  });
}

}  // namespace lrnn::cuda
