// Rotary embedding of q and k, quantization of k and v, and their way into the paged cache (sm_90).
//
// A head of a token is the work of LANES lanes, 4 channels and their 4 partners D / 2 further for each:
// the pairs that rotary embedding turns, which are also the two nibbles of a cached INT4 byte. Every
// rounding is the reference's: products and sums are not contracted, quotients correctly rounded.
//
// Compiled by NVRTC with HEAD_DIM, BLOCK_SIZE (tokens of a page), BITS (of a cached number: 4, 8 or 16),
// INPUT_BF16, CACHE_BF16, ROTATE_KEYS (K is stored after rotary embedding) and HADAMARD (q and k of a
// head are multiplied by a Hadamard matrix) defined.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

constexpr int HALF = HEAD_DIM / 2;
constexpr int ACTIVE = HALF / 4;  // lanes that hold channels
constexpr int LANES = ACTIVE <= 8 ? 8 : ACTIVE <= 16 ? 16 : 32;
constexpr int THREADS = 128;
constexpr int ROW = HEAD_DIM * BITS / 8;                            // bytes of a cached row
constexpr int RECORD = BLOCK_SIZE * 2 * (ROW + (BITS <= 8 ? 4 : 0));  // of one KV head in a page
constexpr u32 ALL = ~0u;
constexpr float MIN_SCALE = 6.103515625e-05f, FLOAT16_MAX = 65504.0f;
constexpr float ROUND = 12582912.0f;  // 1.5 * 2**23: adding it rounds to an integer, ties to even

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
  long long q_token_stride, k_token_stride, v_token_stride;
  int q_head_stride, k_head_stride, v_head_stride;
  int tokens, heads, kv_heads;
  float margin;  // half of what clipping takes from a row's range
  float norm;    // 1 / sqrt(D)
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
template <bool BF16>
__device__ __forceinline__ uint2 pack4(const float (&x)[4]) {
  return make_uint2(pack<BF16>(x[0], x[1]), pack<BF16>(x[2], x[3]));
}
__device__ __forceinline__ void load4(const u16* from, float (&x)[4]) {
  const uint2 words = *reinterpret_cast<const uint2*>(from);
  x[0] = low_half<INPUT_BF16>(words.x);
  x[1] = high_half<INPUT_BF16>(words.x);
  x[2] = low_half<INPUT_BF16>(words.y);
  x[3] = high_half<INPUT_BF16>(words.y);
}

// Correctly rounded division by a number of at most 11 significant bits: quatom/ops/quantize.cu says why.
struct Divisor {
  float high, low;
  __device__ __forceinline__ explicit Divisor(float d) {
    float guess;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(guess) : "f"(d));
    high = fmaf(guess, fmaf(-d, guess, 1.0f), guess);
    low = fmaf(-d, high, 1.0f) * high;
  }
  __device__ __forceinline__ float divide(float x) const { return fmaf(x, high, x * low); }
};

// H / sqrt(D) times a head: channels whose numbers differ in one bit meet, bit after bit.
__device__ __forceinline__ void hadamard(float (&low)[4], float (&high)[4], float norm) {
  float* const parts[2] = {low, high};
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    float* x = parts[part];
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i & bit) continue;
        const float a = x[i], b = x[i + bit];
        x[i] = a + b;
        x[i + bit] = a - b;
      }
#pragma unroll
    for (int bit = 1; bit < ACTIVE; bit *= 2) {
      const float sign = threadIdx.x & bit ? -1.0f : 1.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = fmaf(x[i], sign, __shfl_xor_sync(ALL, x[i], bit));
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float a = low[i], b = high[i];
    low[i] = (a + b) * norm;
    high[i] = (a - b) * norm;
  }
}

#if BITS <= 8
constexpr float LARGEST = (1 << BITS) - 1;

// Codes of 4 channels, one in each byte.
__device__ __forceinline__ u32 codes4(const float (&x)[4], float minimum, const Divisor& scale) {
  u32 code[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float steps = scale.divide(__fsub_rn(x[i], minimum));
    code[i] = __float_as_uint(fminf(fmaxf(steps, 0.0f), LARGEST) + ROUND);
  }
  return __byte_perm(__byte_perm(code[0], code[1], 0x5410), __byte_perm(code[2], code[3], 0x5410), 0x6420);
}
#endif

// Store a head in its row: all lanes of a warp come here, those without channels or without a row, too.
__device__ __forceinline__ void store_row(const float (&low)[4], const float (&high)[4], u8* row, u8* pair,
                                          int lane, bool active, bool stored, float margin_share) {
#if BITS == 16
  if (!stored || !active) return;
  *reinterpret_cast<uint2*>(row + lane * 8) = pack4<CACHE_BF16>(low);
  *reinterpret_cast<uint2*>(row + HEAD_DIM + lane * 8) = pack4<CACHE_BF16>(high);
#else
  float bottom = fminf(low[0], high[0]), top = fmaxf(low[0], high[0]);
#pragma unroll
  for (int i = 1; i < 4; ++i) {
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
  const u32 low_codes = codes4(low, minimum, scale), high_codes = codes4(high, minimum, scale);
  if (!stored || !active) return;
#if BITS == 4
  *reinterpret_cast<u32*>(row + lane * 4) = low_codes | high_codes << 4;
#else
  *reinterpret_cast<u32*>(row + lane * 4) = low_codes;
  *reinterpret_cast<u32*>(row + HALF + lane * 4) = high_codes;
#endif
  if (lane == 0) *reinterpret_cast<u32*>(pair) = stored_pair;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) rope_append_kv(const Parameters p) {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
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
  asm volatile("griddepcontrol.wait;" ::: "memory");
  float low[4] = {}, high[4] = {};
  const long long position = p.positions[token], slot = p.slots[token];
  if (active) {
    load4(from + 4 * lane, low);
    load4(from + HALF + 4 * lane, high);
  }
  if (active && (ROTATE_KEYS ? !is_v : is_q)) {
    const float4 c = *reinterpret_cast<const float4*>(p.cos + position * HALF + 4 * lane);
    const float4 s = *reinterpret_cast<const float4*>(p.sin + position * HALF + 4 * lane);
    const float cosines[4] = {c.x, c.y, c.z, c.w}, sines[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float a = low[i], b = high[i];
      low[i] = __fsub_rn(__fmul_rn(a, cosines[i]), __fmul_rn(b, sines[i]));
      high[i] = __fadd_rn(__fmul_rn(b, cosines[i]), __fmul_rn(a, sines[i]));
    }
  }
#if HADAMARD
  float turned_low[4] = {low[0], low[1], low[2], low[3]}, turned_high[4] = {high[0], high[1], high[2], high[3]};
  hadamard(turned_low, turned_high, p.norm);
  if (!is_v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      low[i] = turned_low[i];
      high[i] = turned_high[i];
    }
  }
#endif
  if (is_q && active) {
    u16* to = p.rotated + (token * (long long)p.heads + head) * HEAD_DIM + 4 * lane;
    *reinterpret_cast<uint2*>(to) = pack4<INPUT_BF16>(low);
    *reinterpret_cast<uint2*>(to + HALF) = pack4<INPUT_BF16>(high);
  }
  const bool stored = exists && !is_q && slot >= 0;
  const long long page = stored ? slot / BLOCK_SIZE : 0;
  const int offset = stored ? int(slot - page * BLOCK_SIZE) : 0;
  u8* record = p.storage + (page * p.kv_heads + max(kv_head, 0)) * RECORD;
  store_row(low, high, record + (is_v * BLOCK_SIZE + offset) * ROW,
            record + BLOCK_SIZE * (2 * ROW + is_v * 4) + offset * 4, lane, active, stored, p.margin);
}
