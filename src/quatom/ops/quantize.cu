// Quantize tokens into the byte layout `groups` of quatom.ops.groups_layout (sm_90). Three operations share
// this source: OPERATION 0 reorders, 1 adds a residual, normalizes and reorders, 2 multiplies
// activation(gate) by up. Each is one pass over device memory.
//
// A half-warp owns one group: 16 lanes of 8 channels, so that codes leave as 8-byte pieces of one
// 128-byte line. Operations 0 and 1 bring their rows into shared memory first, as the 16-bit numbers
// they are, because the order gathers from all over them; operation 2 needs no order. A CTA takes one
// token, where time is latency, or two, where it is throughput: the rows of two tokens lie interleaved,
// so that one gather, one index and one shuffle serve both.
//
// Compiled by NVRTC with these defined:
//   THREADS, TOKENS (of a CTA; 1 for operation 2), VECTORS (4-channel pieces of a thread that cover a row),
//   ROUNDS (of THREADS / 16 groups), INPUT_BF16
//   E4M3, INT8   what normal groups are; else integers of at most 4 bits, which become e4m3 bytes
//   ROTATE       normal groups are multiplied by a Hadamard matrix
//   BLOCK        channels that a rotation mixes in every normal group, or 0 where groups differ
//   WHOLE_TOKEN  scales of a token's normal groups follow the largest of them: their numbers wait in registers
//                for its maximum. The scales are one, or with
//   MULTIPLES    multiples of one, and codes times multiples are INT8 bytes
//   CLUSTER      CTAs of a token that tell each other their maxima; 1 where one CTA has it or none asks
//   LAYER, WEIGHT_OFFSET, BIAS  of operation 1: the mean is subtracted, 1 is added to the weight, a bias at the end
//   SUMMANDS                    of operation 1: a token is the weighted sum of so many rows of x, rounded once; or 0
//   KEEP                        of operation 1: the normalized rows are kept too, in 16 bits, and what is quantized is them
//   ACTIVATION, GATED           of operation 2: 0 silu, 1 gelu, 2 gelu_tanh, 3 relu, 4 clamped_swiglu,
//                               5 relu2; x holds gates before ups

constexpr u32 ALL = ~0u;                       // every lane takes part in a shuffle
constexpr float MIN_SCALE = 6.103515625e-05f;  // 2**-14, see quatom.numerics.groups
constexpr float ROUND = 12582912.0f;           // 1.5 * 2**23: adding it rounds to an integer, ties to even
constexpr u32 ONES = 0x01010101;
constexpr bool PAIRS = TOKENS == 2 || (OPERATION == 1 && !KEEP);  // shared memory holds words of two numbers

__device__ __forceinline__ float low_half(u32 word) {
#if INPUT_BF16
  return __uint_as_float(word << 16);
#else
  float f;
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(f) : "r"(word));
  return f;
#endif
}
__device__ __forceinline__ float high_half(u32 word) {
#if INPUT_BF16
  return __uint_as_float(word & 0xFFFF0000);
#else
  float f;
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(f) : "r"(word));
  return f;
#endif
}
// The sum of two 16-bit numbers, rounded once: the same as a float32 sum rounded to 16 bits.
__device__ __forceinline__ u32 add_halves(u32 a, u32 b) {
  u32 sum;
#if INPUT_BF16
  asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
#else
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
#endif
  return sum;
}
__device__ __forceinline__ u32 lower_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ u32 upper_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x7632); }

// Words of 8 neighbouring channels: one by one, lanes would share banks.
__device__ __forceinline__ void read_neighbours(u32 (&out)[8], const u32* words, const u16* halves, int channel) {
  if (PAIRS) {
    const uint4 a = reinterpret_cast<const uint4*>(words + channel)[0];
    const uint4 b = reinterpret_cast<const uint4*>(words + channel)[1];
    const u32 read[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = read[i];
  } else {
    const uint4 a = *reinterpret_cast<const uint4*>(halves + channel);
    const u32 read[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = i % 2 ? read[i / 2] >> 16 : read[i / 2];
  }
}

// Two float32 numbers as 16-bit ones.
__device__ __forceinline__ u32 pack_halves(float low, float high) {
  u32 packed;
#if INPUT_BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#endif
  return packed;
}

__device__ __forceinline__ float round_to_half(float v) {
  u16 h;
  float f;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}

// 1 / sqrt(x): one Newton step on the approximation, to an ulp.
__device__ __forceinline__ float inverse_root(float x) {
  float guess;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(guess) : "f"(x));
  return fmaf(0.5f * guess, fmaf(-x * guess, guess, 1.0f), guess);
}

#if OPERATION == 2
// exp(x) as a part of 1 + exp(x), where what a subnormal result loses does not count.
__device__ __forceinline__ float exp_beside_one(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}
__device__ __forceinline__ float activate(float x) {
#if ACTIVATION == 0
  return __fdividef(x, 1.0f + exp_beside_one(-x));
#elif ACTIVATION == 1
  return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
#elif ACTIVATION == 2
  // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), with u = sqrt(2 / pi) (x + 0.044715 x**3).
  return __fdividef(x, 1.0f + exp_beside_one(-1.5957691216057308f * x * (1.0f + 0.044715f * x * x)));
#elif ACTIVATION == 3
  return x < 0.0f ? 0.0f : x;  // NaN stays NaN
#elif ACTIVATION == 5
  x = x < 0.0f ? 0.0f : x;
  return x * x;
#else
  x = x > 7.0f ? 7.0f : x;
  return __fdividef(x, 1.0f + exp_beside_one(-1.702f * x));
#endif
}

// What an activated gate is multiplied by.
__device__ __forceinline__ float lift(float up) {
#if ACTIVATION == 4
  return (up > 7.0f ? 7.0f : up < -7.0f ? -7.0f : up) + 1.0f;
#else
  return up;
#endif
}
#endif

__device__ __forceinline__ void release_next_kernel() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Loads of what no kernel computes, before griddepcontrol.wait. The compiler may move an ordinary load of constant
// memory to where its value is used, after that wait: it then queues after all weights of the next linear layer.
__device__ __forceinline__ void load_parameter(const void* from, uint2& to) { load_result(from, to); }
__device__ __forceinline__ void load_parameter(const void* from, int4& to) {
  uint4 words;
  load_result(from, words);
  to = make_int4(words.x, words.y, words.z, words.w);
}

struct Layout {
  int normal, group_size, outlier_size, num_normal, num_scales;
  float clip_ratio;
  int largest;
};

// The group of a half-warp, and the 8 channels of a lane in it.
struct Place {
  int group, first, size, column;
  bool outlier, inside;
  __device__ __forceinline__ Place(const Layout& layout, int index) {
    group = index;
    outlier = group >= layout.num_normal;
    first = outlier ? layout.normal + (group - layout.num_normal) * layout.outlier_size : group * layout.group_size;
    size = outlier ? layout.outlier_size : min(layout.group_size, layout.normal - first);
    column = threadIdx.x % 16 * 8;
    inside = group < layout.num_scales && column < size;
  }
  __device__ __forceinline__ int channel() const { return first + column; }
};

#if ROTATE
// Multiply each block of channels by a Hadamard matrix. Channels whose numbers differ in one bit meet,
// bit after bit: three bits are inside a lane, four are lanes. A block is the largest power of two
// that divides its group.
__device__ __forceinline__ void rotate(float (&x)[TOKENS][8], const Place& place) {
  // A block that is known leaves no conditions inside: outliers are rotated too, and put back.
  const int block = BLOCK ? BLOCK : place.outlier ? 1 : place.size & -place.size;
  const float norm = __frcp_rn(__fsqrt_rn(float(block)));
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    float given[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) given[i] = x[t][i];
#pragma unroll
    for (int bit = 1; bit < 8; bit *= 2) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i & bit) continue;
        const float a = x[t][i], b = x[t][i + bit];
        x[t][i] = block > bit ? a + b : a;
        x[t][i + bit] = block > bit ? a - b : b;
      }
    }
#pragma unroll
    for (int bit = 1; bit < 16; bit *= 2) {
      const float sign = threadIdx.x & bit ? -1.0f : 1.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float other = __shfl_xor_sync(ALL, x[t][i], bit);
        if (block > 8 * bit) x[t][i] = fmaf(x[t][i], sign, other);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) x[t][i] = BLOCK && place.outlier ? given[i] : x[t][i] * norm;
  }
}
#endif

// The scale of a magnitude, see quatom.numerics.groups.
__device__ __forceinline__ float scale_of(float magnitude, float largest) {
  const float wanted = magnitude < __int_as_float(0x7F800000) ? Divisor(largest).divide(magnitude) : magnitude;
  return round_to_half(fmaxf(wanted, MIN_SCALE));
}

// The row scale of a token, see quatom.numerics.multiples: a 16th of its largest scale, rounded up to 7 bits.
__device__ __forceinline__ float row_scale_of(float largest_scale) {
  return __uint_as_float((__float_as_uint(largest_scale * 0.0625f) + 0x1FFFFu) & ~0x1FFFFu);
}

// Of two tokens the lower eight lanes of a half-warp keep what concerns the first, the others the second.
__device__ __forceinline__ bool keeps_second() { return TOKENS == 2 && threadIdx.x & 8; }

// The largest magnitude of a group, of the token that this lane keeps.
__device__ __forceinline__ float reduce_max(const float (&x)[TOKENS][8]) {
  float absmax[TOKENS] = {};
#pragma unroll
  for (int t = 0; t < TOKENS; ++t)
#pragma unroll
    for (int i = 0; i < 8; ++i) absmax[t] = fmaxf(absmax[t], fabsf(x[t][i]));
  float kept = keeps_second() ? absmax[TOKENS - 1] : absmax[0];
  const float sent = keeps_second() ? absmax[0] : absmax[TOKENS - 1];
  kept = fmaxf(kept, __shfl_xor_sync(ALL, sent, 8));
#pragma unroll
  for (int d = 4; d > 0; d /= 2) kept = fmaxf(kept, __shfl_xor_sync(ALL, kept, d));
  return kept;
}
__device__ __forceinline__ float reduce_sum(const float (&values)[TOKENS]) {
  float kept = keeps_second() ? values[TOKENS - 1] : values[0];
  const float sent = keeps_second() ? values[0] : values[TOKENS - 1];
  kept += __shfl_xor_sync(ALL, sent, 8);
#pragma unroll
  for (int d = 4; d > 0; d /= 2) kept += __shfl_xor_sync(ALL, kept, d);
  return kept;
}

#if WHOLE_TOKEN
constexpr int TOPS = CLUSTER * (THREADS / 32);  // maxima of the warps of a token
struct __align__(16) TokenTops {
  float of[TOKENS][(TOPS + 3) / 4 * 4];
  u64 received;  // barrier of a cluster's maxima
};

#if CLUSTER > 1
// Ready to be told the maxima of all CTAs, and telling them so.
__device__ __forceinline__ void expect_tops(TokenTops& tops) {
  if (threadIdx.x == 0) {
    const u32 barrier = shared_address(&tops.received);
    barrier_init(barrier, 1);
    barrier_expect(barrier, TOPS * 4);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
  cluster_arrive();
}
#endif

// The largest of what the lanes of all CTAs of a token have, of the token that each keeps.
__device__ __forceinline__ float reduce_token(float top, TokenTops& tops) {
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  top = fmaxf(top, __shfl_xor_sync(ALL, top, 16));
#if CLUSTER > 1
  // By barriers that count bytes: a cluster barrier with release would fence the whole GPU.
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  const u32 slot = shared_address(&tops.of[0][rank * (THREADS / 32) + warp]), barrier = shared_address(&tops.received);
  cluster_wait();  // the others' barriers exist
  if (lane < CLUSTER)
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                     map_to_rank(slot, lane)), "r"(__float_as_uint(top)), "r"(map_to_rank(barrier, lane)) : "memory");
  barrier_wait(barrier, 0);
#else
  if (lane == (keeps_second() ? 8 : 0)) tops.of[keeps_second()][warp] = top;
  __syncthreads();
#endif
  const float* const of = tops.of[keeps_second()];
#pragma unroll
  for (int w = 0; w < TOPS; w += 4) {
    const float4 v = *reinterpret_cast<const float4*>(of + w);
    const float four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (w + i < TOPS) top = fmaxf(top, four[i]);
  }
  return top;
}
#endif

// Quantize 8 channels of each token, all of one group with those of the half-warp, and store them. x is 0
// outside the group; `top` is the magnitude that the scale follows and `row_scale` what it is a multiple of, of the
// token that this lane keeps.
__device__ __forceinline__ void store_group(const float (&x)[TOKENS][8], float top, float row_scale, const Place& place,
                                            u64 token, int tokens, u64 tokens_padded, const Layout& layout, u8* codes,
                                            float* scales) {
  const float largest = place.outlier ? 127.0f : float(layout.largest);
  float scale = scale_of(place.outlier ? top : top * layout.clip_ratio, largest);
  float stored_scale = scale;
#if MULTIPLES
  u32 multiples[TOKENS] = {1};
  if (!place.outlier) {
    stored_scale = row_scale;
    const float multiple = fminf(fmaxf(Divisor(stored_scale).divide(scale) + ROUND - ROUND, 1.0f), 16.0f);
    scale = multiple * stored_scale;
    multiples[0] = u32(multiple);
  }
  if (TOKENS == 2) {
    const u32 other = __shfl_xor_sync(ALL, multiples[0], 8), own = multiples[0];
    multiples[0] = keeps_second() ? other : own;
    multiples[TOKENS - 1] = keeps_second() ? own : other;
  }
#endif
  float group_scales[TOKENS] = {scale};
  if (TOKENS == 2) {
    const float other = __shfl_xor_sync(ALL, scale, 8);
    group_scales[0] = keeps_second() ? other : scale;
    group_scales[TOKENS - 1] = keeps_second() ? scale : other;
  }

  uint2 bytes[TOKENS];
  float sum = 0.0f;  // of the codes of the token that this lane keeps, in units that linear's weights count in
#if E4M3
  float sums[TOKENS] = {};
#elif !INT8 && !MULTIPLES
  u32 packed_sums = 0;  // 16 bits for each token
#endif
  // Codes are counted from the smallest one on, so that a minimum and a ReLU clamp two at once.
  const int offset = place.outlier ? 128 : layout.largest + 1;
  const float magic = ROUND + (place.outlier ? 128.0f : float(layout.largest + 1));
  const u32 limit = u32(2 * offset - 1) * 0x00010001;
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    const Divisor divisor(group_scales[t]);
    u32 words[2];
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      float units[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) units[i] = divisor.divide(x[t][4 * w + i]);
#if E4M3
      if (!place.outlier) {
        u16 pairs[2];
        float parts = 0.0f;
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          u32 halves;
          asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pairs[p]) : "f"(units[2 * p + 1]), "f"(units[2 * p]));
          asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(pairs[p]));
          float a, b;
          asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
              : "=f"(a), "=f"(b) : "r"(halves));
          parts += a + b;
        }
        sums[t] += parts;
        words[w] = u32(pairs[0]) | u32(pairs[1]) << 16;
        continue;
      }
#endif
      u32 counts[2];
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const u32 pair = lower_halves(__float_as_uint(units[2 * p] + magic), __float_as_uint(units[2 * p + 1] + magic));
        asm("min.relu.s16x2 %0, %1, %2;" : "=r"(counts[p]) : "r"(pair), "r"(limit));
      }
      u32 code = __byte_perm(counts[0], counts[1], 0x6420);
#if E4M3 || INT8
      words[w] = code ^ 0x80808080;
#elif MULTIPLES
      // Bytes do not meet: code * multiple, counted from -128 on, lies between 0 and 240.
      const u32 product = code * multiples[t] + 0x80808080 - multiples[t] * u32(offset) * ONES;
      words[w] = (place.outlier ? code : product) ^ 0x80808080;
#else
      packed_sums += __dp4a(code, ONES, 0u) << 16 * t;
      // The magnitude of an INT4 code is the e4m3 byte of magnitude * 2**-9. Now 8 stands for 0.
      const u32 shifted = code + u32(8 - offset) * ONES;
      const u32 negative = ~shifted >> 3 & ONES;
      const u32 signs = ((shifted ^ negative * 7) & 7 * ONES) + negative * 0x81;
      words[w] = place.outlier ? code ^ 0x80808080 : signs;
#endif
    }
    bytes[t] = make_uint2(words[0], words[1]);
  }
#if E4M3
  sum = reduce_sum(sums);
#elif !INT8 && !MULTIPLES
#pragma unroll
  for (int d = 8; d > 0; d /= 2) packed_sums += __shfl_xor_sync(ALL, packed_sums, d);
  const int counted = keeps_second() ? packed_sums >> 16 : packed_sums & 0xFFFF;
  sum = float(counted - 128 * offset) * (1.0f / 512.0f);  // the e4m3 number of a code of 1
#endif
  if (place.group >= layout.num_scales) return;
  const u64 row = u64(place.group) * tokens_padded + token;
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    const int piece = ((place.column / 16) ^ (int(token + t) % 8)) * 16 + place.column % 16;
    if (t == 0 || int(token) + t < tokens) *reinterpret_cast<uint2*>(codes + (row + t) * 128 + piece) = bytes[t];
  }
  // Weights enter the matrix unit as (code + 8) * 2**-9: what the 8 adds, with its sign changed. Under INT8 numbers
  // they have no offset.
  const int kept = keeps_second();
  if (threadIdx.x % (TOKENS == 2 ? 8 : 16) == 0 && int(token) + kept < tokens) {
    const int t = (int(token) + kept) % 16;  // of 16 tokens, whose scales and corrections are together
    float* const to = scales + (row + kept - t) * 2 + t % 8 / 2 * 4 + t / 8 * 2 + t % 2;
    to[0] = stored_scale;
    to[16] = place.outlier ? 0.0f : sum * -0.015625f * scale;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
quantize_groups(const u16* x,                      // [tokens][channels], or [tokens][2 channels] where GATED
                const u16* residual,               // [tokens][channels] or null
                const u16* __restrict__ weight,    // [channels], operation 1
                const int* __restrict__ order,     // [channels] or null
                u16* __restrict__ total,           // [tokens][channels], written where there is a residual
                u8* __restrict__ codes,            // [groups][tokens_padded][128]
                float* __restrict__ scales,        // [groups][tokens_padded / 16][2][16]
                int tokens, int tokens_padded, int channels, int x_stride, int residual_stride, int ctas,
                float mean_factor /* 1 / channels */, float eps,
                int normal, int group_size, int outlier_size, int num_normal, int num_scales, float clip_ratio,
                int largest
#if BIAS || KEEP || SUMMANDS
                , const u16* __restrict__ bias  // [channels]
#endif
#if KEEP || SUMMANDS
                , u16* __restrict__ kept        // [tokens][channels]
#endif
#if SUMMANDS
                , const u32* positions          // [tokens][SUMMANDS] rows of x
                , const u32* shares             // [tokens][SUMMANDS] floats
#endif
                ) {
  const Layout layout{normal, group_size, outlier_size, num_normal, num_scales, clip_ratio, largest};
  const int half_warp = threadIdx.x / 16;
#if WHOLE_TOKEN
  __shared__ TokenTops tops;
#endif
#if CLUSTER > 1
  expect_tops(tops);
#endif

  // `bring`: the numbers of 8 channels of each token, in the layout's order, 0 outside the group.
#if OPERATION == 2
  release_next_kernel();
  const u64 token = blockIdx.x / ctas;
  const int first_group = blockIdx.x % ctas * (ROUNDS * THREADS / 16) + half_warp;
#if GATED
  uint4 read_gates[ROUNDS] = {}, read_ups[ROUNDS] = {};
#else
  uint4 read_ups[ROUNDS] = {};
#endif
  asm volatile("griddepcontrol.wait;" ::: "memory");
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const Place place(layout, first_group + round * (THREADS / 16));
    if (!place.inside) continue;
    const u16* row = x + token * x_stride + place.channel();
#if GATED
    load_result(row, read_gates[round]);
    load_result(row + channels, read_ups[round]);
#else
    load_result(row, read_ups[round]);
#endif
  }
  auto bring = [&](int round, const Place&, float (&values)[TOKENS][8]) {
#if GATED
    const uint4 a = read_gates[round], b = read_ups[round];
    const u32 gates[4] = {a.x, a.y, a.z, a.w}, ups[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[0][2 * i] = activate(low_half(gates[i])) * lift(low_half(ups[i]));
      values[0][2 * i + 1] = activate(high_half(gates[i])) * lift(high_half(ups[i]));
    }
#else
    const uint4 b = read_ups[round];
    const u32 ups[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[0][2 * i] = activate(low_half(ups[i]));
      values[0][2 * i + 1] = activate(high_half(ups[i]));
    }
#endif
  };
#else
  const int first_group = half_warp;
  extern __shared__ __align__(16) u32 words[];  // rows, weights of two tokens' rows, partial sums
  u16* const halves = reinterpret_cast<u16*>(words);
  const u64 token = u64(blockIdx.x) * TOKENS;
  const bool whole = int(token) + TOKENS <= tokens;  // else the CTA has one token
  const auto holds = [&](int t, int channel) { return channel < channels && (t == 0 || whole); };

  // Parameters are not the work of the kernel before: they come while that still runs.
  int4 next[2];
  auto load_order = [&](int round) {
    const Place place(layout, round * (THREADS / 16) + half_warp);
    if (order == nullptr || !place.inside) return;
    load_parameter(order + place.channel(), next[0]);
    load_parameter(order + place.channel() + 4, next[1]);
  };
  load_order(0);
#if OPERATION == 1
  u16* const weights = halves + 2 * channels;  // where two tokens fill the words
#if BIAS
  u16* const biases = weights + (TOKENS == 2 ? channels : 0);
  float* const partial = reinterpret_cast<float*>(biases + channels);
#else
  float* const partial = reinterpret_cast<float*>(weights + (TOKENS == 2 ? channels : 0));
#endif
  uint2 norm_weight[VECTORS];
#if BIAS
  uint2 norm_bias[VECTORS];
#endif
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int k = (v * THREADS + threadIdx.x) * 4;
    if (k >= channels) continue;
    load_parameter(weight + k, norm_weight[v]);
#if BIAS
    load_parameter(bias + k, norm_bias[v]);
#endif
  }
#endif
  release_next_kernel();
#if OPERATION == 1 && !KEEP && (TOKENS == 2 || BIAS)
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int k = (v * THREADS + threadIdx.x) * 4;
    if (k >= channels) continue;
    if (TOKENS == 2) *reinterpret_cast<uint2*>(weights + k) = norm_weight[v];
#if BIAS
    *reinterpret_cast<uint2*>(biases + k) = norm_bias[v];
#endif
  }
#endif
  asm volatile("griddepcontrol.wait;" ::: "memory");

  uint2 loaded[TOKENS][VECTORS] = {};
#if SUMMANDS
  // As `combine` of quatom.ops.experts does: products and sums in float32, each rounded by itself.
  u32 rows[TOKENS][SUMMANDS], shares_of[TOKENS][SUMMANDS];
#pragma unroll
  for (int t = 0; t < TOKENS; ++t)
#pragma unroll
    for (int j = 0; j < SUMMANDS; ++j) {
      const u64 slot = (token + (whole ? t : 0)) * SUMMANDS + j;
      load_result(positions + slot, rows[t][j]);
      load_result(shares + slot, shares_of[t][j]);
    }
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    uint2 pieces[VECTORS][SUMMANDS] = {};
#pragma unroll
    for (int v = 0; v < VECTORS; ++v)
#pragma unroll
      for (int j = 0; j < SUMMANDS; ++j) {
        const int k = (v * THREADS + threadIdx.x) * 4;
        if (holds(t, k)) load_result(x + u64(rows[t][j]) * x_stride + k, pieces[v][j]);
      }
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      float sums[4] = {};
#pragma unroll
      for (int j = 0; j < SUMMANDS; ++j) {
        const float share = __uint_as_float(shares_of[t][j]);
        const u32 pairs[2] = {pieces[v][j].x, pieces[v][j].y};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          sums[2 * i] = __fadd_rn(sums[2 * i], __fmul_rn(low_half(pairs[i]), share));
          sums[2 * i + 1] = __fadd_rn(sums[2 * i + 1], __fmul_rn(high_half(pairs[i]), share));
        }
      }
      loaded[t][v] = make_uint2(pack_halves(sums[0], sums[1]), pack_halves(sums[2], sums[3]));
    }
  }
#else
#pragma unroll
  for (int t = 0; t < TOKENS; ++t)
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const int k = (v * THREADS + threadIdx.x) * 4;
      if (holds(t, k))
        load_result(x + (token + t) * x_stride + k, loaded[t][v]);
    }
#endif
#if OPERATION == 1
  if (residual != nullptr) {
    uint2 others[TOKENS][VECTORS] = {};
#pragma unroll
    for (int t = 0; t < TOKENS; ++t)
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        const int k = (v * THREADS + threadIdx.x) * 4;
        if (holds(t, k))
          load_result(residual + (token + t) * residual_stride + k, others[t][v]);
      }
#pragma unroll
    for (int t = 0; t < TOKENS; ++t)
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        const int k = (v * THREADS + threadIdx.x) * 4;
        uint2& sum = loaded[t][v];  // rounded as it is stored, before it is normalized
        sum = make_uint2(add_halves(sum.x, others[t][v].x), add_halves(sum.y, others[t][v].y));
        if (holds(t, k))
          *reinterpret_cast<uint2*>(total + (token + t) * channels + k) = sum;
      }
  }
#endif
  auto share_rows = [&]() {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const int k = (v * THREADS + threadIdx.x) * 4;
      if (k >= channels) continue;
      const uint2 a = loaded[0][v];
#if TOKENS == 2
      const uint2 b = loaded[1][v];
#elif OPERATION == 1 && !KEEP
      const uint2 b = norm_weight[v];
#endif
#if TOKENS == 2 || (OPERATION == 1 && !KEEP)
      *reinterpret_cast<uint4*>(words + k) =
          make_uint4(lower_halves(a.x, b.x), upper_halves(a.x, b.x), lower_halves(a.y, b.y), upper_halves(a.y, b.y));
#else
      *reinterpret_cast<uint2*>(halves + k) = a;
#endif
    }
  };
  if (!KEEP) share_rows();
#if LAYER
  float mean[TOKENS];  // of each token, known to all threads
  float* const sums = partial + TOKENS * (THREADS / 32);
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    float sum = 0.0f;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v)
      sum += (low_half(loaded[t][v].x) + high_half(loaded[t][v].x)) +
             (low_half(loaded[t][v].y) + high_half(loaded[t][v].y));
#pragma unroll
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(ALL, sum, d);
    if (threadIdx.x % 32 == 0) sums[t * (THREADS / 32) + threadIdx.x / 32] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < THREADS / 32; ++w) sum += sums[t * (THREADS / 32) + w];
    mean[t] = sum * mean_factor;
  }
#endif
#if OPERATION == 1
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    float squares = 0.0f;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const u32 pairs[2] = {loaded[t][v].x, loaded[t][v].y};
#if LAYER
      if ((v * THREADS + threadIdx.x) * 4 >= channels) continue;
#endif
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#if LAYER
        const float low = low_half(pairs[i]) - mean[t], high = high_half(pairs[i]) - mean[t];
        squares = fmaf(low, low, squares);
        squares = fmaf(high, high, squares);
#else
        squares = fmaf(low_half(pairs[i]), low_half(pairs[i]), squares);
        squares = fmaf(high_half(pairs[i]), high_half(pairs[i]), squares);
#endif
      }
    }
#pragma unroll
    for (int d = 16; d > 0; d /= 2) squares += __shfl_xor_sync(ALL, squares, d);
    if (threadIdx.x % 32 == 0) partial[t * (THREADS / 32) + threadIdx.x / 32] = squares;
  }
#endif
  __syncthreads();
#if OPERATION == 1
  float inverse[TOKENS];
  {
    float squares = 0.0f;
#pragma unroll
    for (int w = 0; w < THREADS / 32; ++w) squares += partial[(keeps_second() ? THREADS / 32 : 0) + w];
    inverse[0] = inverse_root(squares * mean_factor + eps);
    if (TOKENS == 2) {
      const float own = inverse[0], other = __shfl_xor_sync(ALL, own, 8);
      inverse[0] = keeps_second() ? other : own;
      inverse[TOKENS - 1] = keeps_second() ? own : other;
    }
  }
#if KEEP
  // As the norm alone would give them: from here on rows are only gathered.
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int k = (v * THREADS + threadIdx.x) * 4;
    if (k >= channels) continue;
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      const u32 pairs[2] = {loaded[t][v].x, loaded[t][v].y}, factors[2] = {norm_weight[v].x, norm_weight[v].y};
      u32 normed[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float low = low_half(pairs[i]), high = high_half(pairs[i]);
#if LAYER
        low -= mean[t], high -= mean[t];
#endif
        low *= inverse[t], high *= inverse[t];
#if !LAYER && !WEIGHT_OFFSET
        const u32 rounded = pack_halves(low, high);  // an RMS norm is rounded before it meets its weight
        low = low_half(rounded), high = high_half(rounded);
#endif
        low *= low_half(factors[i]) + float(WEIGHT_OFFSET), high *= high_half(factors[i]) + float(WEIGHT_OFFSET);
#if BIAS
        const u32 added[2] = {norm_bias[v].x, norm_bias[v].y};
        low += low_half(added[i]), high += high_half(added[i]);
#endif
        normed[i] = pack_halves(low, high);
      }
      loaded[t][v] = make_uint2(normed[0], normed[1]);
      if (holds(t, k)) *reinterpret_cast<uint2*>(kept + (token + t) * channels + k) = loaded[t][v];
    }
  }
  share_rows();
  __syncthreads();
#endif
#endif
  auto bring = [&](int round, const Place& place, float (&values)[TOKENS][8]) {
    const int indices[8] = {next[0].x, next[0].y, next[0].z, next[0].w, next[1].x, next[1].y, next[1].z, next[1].w};
    if (round + 1 < ROUNDS) load_order(round + 1);
    // A word holds the channel of both tokens, or of the token and its weight, or of the token alone.
    u32 gathered[8] = {};
#if OPERATION == 1 && TOKENS == 2 && !KEEP
    u32 factors[8] = {};
#endif
#if BIAS && !KEEP
    u32 added[8] = {};
#endif
    if (place.inside) {
      if (order == nullptr) {
        read_neighbours(gathered, words, halves, place.channel());
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) gathered[i] = PAIRS ? words[indices[i]] : halves[indices[i]];
      }
#if OPERATION == 1 && TOKENS == 2 && !KEEP
#pragma unroll
      for (int i = 0; i < 8; ++i) factors[i] = weights[order == nullptr ? place.channel() + i : indices[i]];
#endif
#if BIAS && !KEEP
#pragma unroll
      for (int i = 0; i < 8; ++i) added[i] = biases[order == nullptr ? place.channel() + i : indices[i]];
#endif
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      values[0][i] = low_half(gathered[i]);
      if (TOKENS == 2) values[TOKENS - 1][i] = high_half(gathered[i]);
#if OPERATION == 1 && !KEEP
#if TOKENS == 2
      float factor = low_half(factors[i]);
#else
      float factor = high_half(gathered[i]);
#endif
#if WEIGHT_OFFSET
      factor += 1.0f;
#endif
#if LAYER || BIAS
      if (!place.inside) continue;
#endif
#if LAYER
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) values[t][i] -= mean[t];
#endif
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) values[t][i] = values[t][i] * inverse[t] * factor;
#if BIAS
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) values[t][i] += low_half(added[i]);
#endif
#endif
    }
  };
#endif

  // Of WHOLE_TOKEN all rounds are brought before one is stored.
  constexpr int KEPT = WHOLE_TOKEN ? ROUNDS : 1, UNROLL = WHOLE_TOKEN || ROUNDS <= 4 ? ROUNDS : 1;
  float values[KEPT][TOKENS][8], top[KEPT];
  float token_top = 0.0f;
  // Whole warps take part in each round: the last one may hold a half-warp without a group.
  auto takes_part = [&](int round) { return first_group / 2 * 2 + round * (THREADS / 16) < num_scales; };
#pragma unroll UNROLL
  for (int round = 0; round < ROUNDS; ++round) {
    if (!takes_part(round)) break;
    const int kept = round % KEPT;
    const Place place(layout, first_group + round * (THREADS / 16));
    bring(round, place, values[kept]);
#if ROTATE
    rotate(values[kept], place);
#endif
    top[kept] = reduce_max(values[kept]);
    if (!place.outlier) token_top = fmaxf(token_top, top[kept]);
    if (!WHOLE_TOKEN) store_group(values[kept], top[kept], 0.0f, place, token, tokens, tokens_padded, layout, codes, scales);
  }
#if WHOLE_TOKEN
  token_top = reduce_token(token_top, tops);
  const float row_scale =
      MULTIPLES ? row_scale_of(scale_of(token_top * layout.clip_ratio, float(layout.largest))) : 0.0f;
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    if (!takes_part(round)) break;
    const Place place(layout, first_group + round * (THREADS / 16));
    store_group(values[round], place.outlier || MULTIPLES ? top[round] : token_top, row_scale, place, token, tokens,
                tokens_padded, layout, codes, scales);
  }
#endif
}
