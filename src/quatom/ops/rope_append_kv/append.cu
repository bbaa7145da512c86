// Rotary embedding of q and k, quantization of k and v, and their way into the paged cache (sm_90).
//
// A head of a token is the work of LANES lanes, N channels and their N partners D / 2 further for each:
// the pairs that rotary embedding turns, which are also the two nibbles of a cached INT4 byte. Every
// rounding is the reference's: products and sums are not contracted, quotients correctly rounded.
//
// Compiled by NVRTC with N (4 or 8), HEAD_DIM, BLOCK_SIZE (tokens of a page), BITS (of a cached number: 4, 8 or 16),
// INPUT_BF16, CACHE_BF16, ROTATE_KEYS (K is stored after rotary embedding), HADAMARD (q and k of a
// head are multiplied by a Hadamard matrix, or by its block form), NORMED (q and k of a head are normalized first),
// WEIGHT_OFFSET (0 or 1, added to the norm's weights) and SETTLED (no kernel that may still run writes positions or slots:
// they are read, and cosines with them, before the wait for the last kernel) defined.

constexpr int HALF = HEAD_DIM / 2;
constexpr int ACTIVE = HALF / N;  // lanes that hold channels
static_assert(HALF % N == 0, "a lane holds N whole channels of each half");
constexpr int LANES = ACTIVE <= 4 ? 4 : ACTIVE <= 8 ? 8 : ACTIVE <= 16 ? 16 : 32;
constexpr int THREADS = 128;
constexpr int ROW = HEAD_DIM * BITS / 8;                            // bytes of a cached row
constexpr int RECORD = BLOCK_SIZE * 2 * (ROW + (BITS <= 8 ? 4 : 0));  // of one KV head in a page
constexpr u32 ALL = ~0u;

struct Parameters {
  const u16* q;  // (T, H, D), k and v (T, KV, D), by token and head strides
  const u16* k;
  const u16* v;
  const float* cos;  // (max_position, D / 2)
  const float* sin;
  const long long* positions;  // (T,)
  const long long* slots;      // (T,), -1: not stored
  u16* rotated;                // (T, H, D)
  u8* storage;                 // (P, KV, RECORD)
  const float* key_offset;     // (KV, D), taken from K once it is rotated; or null
  const u16* q_weight;         // (D,) each, of the norms
  const u16* k_weight;
  long long q_token_stride, k_token_stride, v_token_stride;
  int q_head_stride, k_head_stride, v_head_stride;
  int tokens, heads, kv_heads;
  float margin;  // half of what clipping takes from a row's range
  float norm;    // 1 / sqrt of the channels that HADAMARD mixes
  float eps;     // of NORMED
};

template <bool BF16>
__device__ __forceinline__ float low_half(u32 word) {
  if constexpr (BF16) return __uint_as_float(word << 16);
  float f;
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(f) : "r"(word));
  return f;
}
template <bool BF16>
__device__ __forceinline__ float high_half(u32 word) {
  if constexpr (BF16) return __uint_as_float(word & 0xFFFF0000);
  float f;
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(f) : "r"(word));
  return f;
}
template <bool BF16>
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 word;
  if constexpr (BF16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <int WORDS>
__device__ __forceinline__ void store(void* to, const u32 (&words)[WORDS]) {
  if constexpr (WORDS == 1) *reinterpret_cast<u32*>(to) = words[0];
  if constexpr (WORDS == 2) *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  if constexpr (WORDS == 4) *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}
template <bool BF16>
__device__ __forceinline__ void store_halves(u16* to, const float (&x)[N]) {
  u32 words[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) words[i] = pack<BF16>(x[2 * i], x[2 * i + 1]);
  store(to, words);
}
__device__ __forceinline__ void load_halves(const u16* from, float (&x)[N]) {
  u32 words[N / 2];
  if constexpr (N == 4) {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    words[0] = v.x, words[1] = v.y;
  } else {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  }
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    x[2 * i] = low_half<INPUT_BF16>(words[i]);
    x[2 * i + 1] = high_half<INPUT_BF16>(words[i]);
  }
}
__device__ __forceinline__ void load_floats(const float* from, float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float4 v = *reinterpret_cast<const float4*>(from + i);
    x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
  }
}

#if NORMED
// Numbers as they are in the input's format.
__device__ __forceinline__ void round_halves(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    const u32 word = pack<INPUT_BF16>(x[i], x[i + 1]);
    x[i] = low_half<INPUT_BF16>(word);
    x[i + 1] = high_half<INPUT_BF16>(word);
  }
}

// Normalized channels times their weights; without an offset of the weight they are rounded before that too.
__device__ __forceinline__ void scale_normed(float (&x)[N], float inverse, const u16* weight) {
  float factors[N];
  load_halves(weight, factors);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] *= inverse;
  if (!WEIGHT_OFFSET) round_halves(x);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] *= factors[i] + float(WEIGHT_OFFSET);
  round_halves(x);
}
#endif

// A Hadamard matrix times each block of a head: `mixed` neighbouring channels, the largest power of two in HALF, and
// their partners. Channels whose numbers differ in one bit meet, bit after bit.
__device__ __forceinline__ void hadamard(float (&low)[N], float (&high)[N], float norm) {
  constexpr int mixed = HALF & -HALF;
  float* const parts[2] = {low, high};
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    float* x = parts[part];
#pragma unroll
    for (int bit = 1; bit < (N < mixed ? N : mixed); bit *= 2)
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (i & bit) continue;
        const float a = x[i], b = x[i + bit];
        x[i] = a + b;
        x[i + bit] = a - b;
      }
#pragma unroll
    for (int bit = 1; bit < mixed / N; bit *= 2) {
      const float sign = threadIdx.x & bit ? -1.0f : 1.0f;
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = fmaf(x[i], sign, __shfl_xor_sync(ALL, x[i], bit));
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float a = low[i], b = high[i];
    low[i] = (a + b) * norm;
    high[i] = (a - b) * norm;
  }
}

#if BITS <= 8
constexpr float LARGEST = (1 << BITS) - 1;
constexpr float MIN_SCALE = 6.103515625e-05f, FLOAT16_MAX = 65504.0f;
constexpr float ROUND = 12582912.0f;  // 1.5 * 2**23: adding it rounds to an integer, ties to even

// Codes of N channels, one in each byte.
__device__ __forceinline__ void encode(const float (&x)[N], float minimum, const Divisor& scale, u32 (&words)[N / 4]) {
  u32 code[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float steps = scale.divide(__fsub_rn(x[i], minimum));
    code[i] = __float_as_uint(fminf(fmaxf(steps, 0.0f), LARGEST) + ROUND);
  }
#pragma unroll
  for (int i = 0; i < N; i += 4)
    words[i / 4] = __byte_perm(__byte_perm(code[i], code[i + 1], 0x5410), __byte_perm(code[i + 2], code[i + 3], 0x5410), 0x6420);
}
#endif

// Store a head in its row: all lanes of a warp come here, those without channels or without a row, too.
__device__ __forceinline__ void store_row(const float (&low)[N], const float (&high)[N], u8* row, u8* pair,
                                          int lane, bool active, bool stored, float margin_share) {
#if BITS == 16
  if (!stored || !active) return;
  store_halves<CACHE_BF16>(reinterpret_cast<u16*>(row) + lane * N, low);
  store_halves<CACHE_BF16>(reinterpret_cast<u16*>(row) + HALF + lane * N, high);
#else
  float bottom = fminf(low[0], high[0]), top = fmaxf(low[0], high[0]);
#pragma unroll
  for (int i = 1; i < N; ++i) {
    bottom = fminf(bottom, fminf(low[i], high[i]));
    top = fmaxf(top, fmaxf(low[i], high[i]));
  }
  if (!active) {
    bottom = __int_as_float(0x7F800000);
    top = -bottom;
  }
#pragma unroll
  for (int d = 1; d < LANES; d *= 2) {
    bottom = fminf(bottom, __shfl_xor_sync(ALL, bottom, d));
    top = fmaxf(top, __shfl_xor_sync(ALL, top, d));
  }
  const float margin = __fmul_rn(__fsub_rn(top, bottom), margin_share);
  const float wanted_minimum = fminf(fmaxf(__fadd_rn(bottom, margin), -FLOAT16_MAX), FLOAT16_MAX);
  const u32 stored_minimum = pack<false>(wanted_minimum, 0.0f);
  const float minimum = low_half<false>(stored_minimum);
  const float range = __fsub_rn(__fsub_rn(top, margin), minimum);
  const float step = Divisor(LARGEST).divide(range);
  const u32 stored_pair = pack<false>(fminf(fmaxf(step, MIN_SCALE), FLOAT16_MAX), minimum);
  const Divisor scale(low_half<false>(stored_pair));
  u32 low_codes[N / 4], high_codes[N / 4];
  encode(low, minimum, scale, low_codes);
  encode(high, minimum, scale, high_codes);
  if (!stored || !active) return;
#if BITS == 4
#pragma unroll
  for (int i = 0; i < N / 4; ++i) low_codes[i] |= high_codes[i] << 4;
  store(row + lane * N, low_codes);
#else
  store(row + lane * N, low_codes);
  store(row + HALF + lane * N, high_codes);
#endif
  if (lane == 0) *reinterpret_cast<u32*>(pair) = stored_pair;
#endif
}

#if SETTLED
// Past the L1 cache, which may hold what an earlier kernel read there.
__device__ __forceinline__ long long load_settled(const long long* from) {
  long long number;
  asm volatile("ld.relaxed.gpu.global.s64 %0, [%1];" : "=l"(number) : "l"(from));
  return number;
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS) rope_append_kv(const Parameters p) {
  // Heads of a token: H of q, then KV of k, then KV of v. Lanes past the last token repeat its work
  // without storing it, so that whole warps reach every shuffle.
  const int lane = threadIdx.x % LANES;
  const int all_heads = p.heads + 2 * p.kv_heads;
  const int item = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
  const bool exists = item < p.tokens * all_heads;
  const int token = exists ? item / all_heads : p.tokens - 1;
  const int head = exists ? item - token * all_heads : all_heads - 1;
  const bool is_q = head < p.heads, is_v = head >= p.heads + p.kv_heads;
  const int kv_head = head - p.heads - (is_v ? p.kv_heads : 0);
  const bool active = lane < ACTIVE;
  const u16* from = is_q   ? p.q + token * p.q_token_stride + head * p.q_head_stride
                    : is_v ? p.v + token * p.v_token_stride + kv_head * p.v_head_stride
                           : p.k + token * p.k_token_stride + kv_head * p.k_head_stride;
#define TURNED (active && (ROTATE_KEYS ? !is_v : is_q))
#if SETTLED
  float cosines[N], sines[N];
  const long long position = load_settled(p.positions + token), slot = load_settled(p.slots + token);
  if (TURNED) {
    load_floats(p.cos + position * HALF + N * lane, cosines);
    load_floats(p.sin + position * HALF + N * lane, sines);
  }
#endif
#if SETTLED
  // Decode attention then reads older tokens while the linear layer before this kernel ends.
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  asm volatile("griddepcontrol.wait;" ::: "memory");
#if !SETTLED
  // Not before: attention's CTAs would fill the SMs that the linear layer before leaves first.
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  float low[N] = {}, high[N] = {};
#if !SETTLED
  const long long position = p.positions[token], slot = p.slots[token];
#endif
  if (active) {
    load_halves(from + N * lane, low);
    load_halves(from + HALF + N * lane, high);
  }
#if NORMED
  float squares = 0.0f;  // lanes without channels hold zeros
#pragma unroll
  for (int i = 0; i < N; ++i) squares = fmaf(low[i], low[i], fmaf(high[i], high[i], squares));
#pragma unroll
  for (int d = 1; d < LANES; d *= 2) squares += __shfl_xor_sync(ALL, squares, d);
  if (active && !is_v) {
    const float inverse = __frcp_rn(__fsqrt_rn(fmaf(squares, 1.0f / HEAD_DIM, p.eps)));
    const u16* weight = (is_q ? p.q_weight : p.k_weight) + N * lane;
    scale_normed(low, inverse, weight);
    scale_normed(high, inverse, weight + HALF);
  }
#endif
  if (TURNED) {
#if !SETTLED
    float cosines[N], sines[N];
    load_floats(p.cos + position * HALF + N * lane, cosines);
    load_floats(p.sin + position * HALF + N * lane, sines);
#endif
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float a = low[i], b = high[i];
      low[i] = __fsub_rn(__fmul_rn(a, cosines[i]), __fmul_rn(b, sines[i]));
      high[i] = __fadd_rn(__fmul_rn(b, cosines[i]), __fmul_rn(a, sines[i]));
    }
  }
  if (p.key_offset && active && !is_q && !is_v) {
    float offset_low[N], offset_high[N];
    load_floats(p.key_offset + kv_head * HEAD_DIM + N * lane, offset_low);
    load_floats(p.key_offset + kv_head * HEAD_DIM + HALF + N * lane, offset_high);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      low[i] = __fsub_rn(low[i], offset_low[i]);
      high[i] = __fsub_rn(high[i], offset_high[i]);
    }
  }
#if HADAMARD
  float turned_low[N], turned_high[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    turned_low[i] = low[i];
    turned_high[i] = high[i];
  }
  hadamard(turned_low, turned_high, p.norm);
  if (!is_v) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      low[i] = turned_low[i];
      high[i] = turned_high[i];
    }
  }
#endif
  if (is_q && active) {
    u16* to = p.rotated + (token * (long long)p.heads + head) * HEAD_DIM + N * lane;
    store_halves<INPUT_BF16>(to, low);
    store_halves<INPUT_BF16>(to + HALF, high);
  }
  const bool stored = exists && !is_q && slot >= 0;
  const long long page = stored ? slot / BLOCK_SIZE : 0;
  const int offset = stored ? int(slot - page * BLOCK_SIZE) : 0;
  u8* record = p.storage + (page * p.kv_heads + max(kv_head, 0)) * RECORD;
  store_row(low, high, record + (is_v * BLOCK_SIZE + offset) * ROW,
            record + BLOCK_SIZE * (2 * ROW + is_v * 4) + offset * 4, lane, active, stored, p.margin);
}
