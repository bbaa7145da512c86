// Quantize tokens into the byte layout `groups` of quatom.ops.activations (sm_90). Three operations share
// this source: OPERATION 0 reorders, 1 adds a residual, normalizes and reorders, 2 multiplies silu(gate)
// by up. Each is one pass over device memory.
//
// A half-warp owns one group: 16 lanes of 8 channels, so that codes leave as 8-byte pieces of one
// 128-byte line. Operations 0 and 1 bring the row into shared memory first, as float32, because the
// order gathers from all over it; operation 2 needs no order and no shared memory.
//
// Compiled by NVRTC with OPERATION, THREADS, VECTORS (16-byte loads of a thread that cover a row),
// INPUT_BF16 and E4M3 (normal groups are e4m3, else integers) defined.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr float MIN_SCALE = 6.103515625e-05f;  // 2**-14, see quatom.numerics.groups
constexpr float ROUND = 12582912.0f;           // 1.5 * 2**23: adding it rounds to an integer, ties to even

__device__ __forceinline__ float to_float(u16 v) {
#if INPUT_BF16
  return __uint_as_float(u32(v) << 16);
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
#endif
}
__device__ __forceinline__ void unpack(const uint4& v, float (&f)[8]) {
  const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    f[2 * i] = to_float(words[i] & 0xFFFF);
    f[2 * i + 1] = to_float(words[i] >> 16);
  }
}
__device__ __forceinline__ u32 pack_input(float low, float high) {
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

struct Layout {
  int normal, group_size, outlier_size, num_normal, num_scales;
  float clip_ratio, largest;
};

// Quantize the 8 channels of this lane, all of one group with those of its half-warp, and store them.
__device__ __forceinline__ void store_group(const float (&x)[8], int group, int column, bool inside, u64 token,
                                            u64 tokens_padded, const Layout& layout, u8* codes, float2* scales) {
  const bool outlier = group >= layout.num_normal;
  float absmax = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) absmax = fmaxf(absmax, fabsf(x[i]));
#pragma unroll
  for (int d = 8; d > 0; d /= 2) absmax = fmaxf(absmax, __shfl_xor_sync(~0u, absmax, d));
  const float largest = outlier ? 127.0f : layout.largest;
  const float wanted = __fdiv_rn(outlier ? absmax : absmax * layout.clip_ratio, largest);
  const float scale = round_to_half(fmaxf(wanted, MIN_SCALE));

  // x / scale, correctly rounded: one Newton step on a correctly rounded reciprocal.
  const float reciprocal = __frcp_rn(scale);
  float units[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float q = x[i] * reciprocal;
    units[i] = fmaf(fmaf(-q, scale, x[i]), reciprocal, q);
  }
  u32 words[2] = {0, 0};
  float sum = 0.0f;
  float unit = 1.0f / 512.0f;  // e4m3 number of a code of 1
#if E4M3
  if (!outlier) {
    unit = 1.0f;
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      u16 pair;
      u32 halves;
      asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(units[i + 1]), "f"(units[i]));
      asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(pair));
      u16 low = halves & 0xFFFF, high = halves >> 16;
      float a, b;
      asm("cvt.f32.f16 %0, %1;" : "=f"(a) : "h"(low));
      asm("cvt.f32.f16 %0, %1;" : "=f"(b) : "h"(high));
      sum += a + b;
      words[i / 4] |= u32(pair) << (i % 4 * 8);
    }
  } else
#endif
  {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float code = fminf(fmaxf((units[i] + ROUND) - ROUND, -largest - 1.0f), largest);
      const int integer = __float_as_int(code + ROUND) - __float_as_int(ROUND);
      sum += code;
      // The magnitude of an INT4 code is the e4m3 byte of magnitude * 2**-9.
      const u32 byte = outlier ? integer & 0xFF : u32(abs(integer)) | (u32(integer >> 24) & 0x80);
      words[i / 4] |= byte << (i % 4 * 8);
    }
  }
#pragma unroll
  for (int d = 8; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  if (group >= layout.num_scales) return;
  const u64 row = u64(group) * tokens_padded + token;
  const int place = ((column / 16) ^ int(token % 8)) * 16 + column % 16;
  *reinterpret_cast<uint2*>(codes + row * 128 + place) = inside ? make_uint2(words[0], words[1]) : make_uint2(0, 0);
  // Weights enter the matrix unit as (code + 8) * 2**-9: what the 8 adds, with its sign changed.
  if (column == 0) scales[row] = make_float2(scale, outlier ? 0.0f : sum * (-0.015625f * unit) * scale);
}

extern "C" __global__ void __launch_bounds__(THREADS)
quantize_groups(const u16* __restrict__ x,         // [tokens][channels], or [tokens][2 channels] of gate, up
                const u16* __restrict__ residual,  // [tokens][channels] or null
                const u16* __restrict__ weight,    // [channels], operation 1
                const int* __restrict__ order,     // [channels] or null
                u16* __restrict__ total,           // [tokens][channels], written where there is a residual
                u8* __restrict__ codes,            // [groups][tokens_padded][128]
                float2* __restrict__ scales,       // [groups][tokens_padded]
                int tokens_padded, int channels, int x_stride, int residual_stride, int chunks, float eps,
                int normal, int group_size, int outlier_size, int num_normal, int num_scales, float clip_ratio,
                float largest) {
  const Layout layout{normal, group_size, outlier_size, num_normal, num_scales, clip_ratio, largest};
  const int half_warp = threadIdx.x / 16, column = threadIdx.x % 16 * 8;
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");

#if OPERATION == 2
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const u64 token = blockIdx.x / chunks;
  const int group = blockIdx.x % chunks * (THREADS / 16) + half_warp;
  const bool outlier = group >= num_normal;
  const int first = outlier ? normal + (group - num_normal) * outlier_size : group * group_size;
  const int size = outlier ? outlier_size : min(group_size, normal - first);
  const bool inside = column < size && group < num_scales;
  float values[8] = {};
  if (inside) {
    const u16* row = x + token * x_stride + first + column;
    float gate[8], up[8];
    unpack(*reinterpret_cast<const uint4*>(row), gate);
    unpack(*reinterpret_cast<const uint4*>(row + channels), up);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = __fdividef(gate[i], 1.0f + __expf(-gate[i])) * up[i];
  }
  store_group(values, group, column, inside, token, tokens_padded, layout, codes, scales);
#else
  extern __shared__ float row[];  // channels, then one partial sum a warp
  const u64 token = blockIdx.x;
  float values[VECTORS][8] = {};
  asm volatile("griddepcontrol.wait;" ::: "memory");
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int k = (v * THREADS + threadIdx.x) * 8;
    if (k < channels) unpack(*reinterpret_cast<const uint4*>(x + token * x_stride + k), values[v]);
  }
#if OPERATION == 1
  if (residual != nullptr) {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const int k = (v * THREADS + threadIdx.x) * 8;
      if (k >= channels) continue;
      float other[8];
      unpack(*reinterpret_cast<const uint4*>(residual + token * residual_stride + k), other);
      uint4 sums;  // rounded as it is stored, before it is normalized
      sums.x = pack_input(values[v][0] + other[0], values[v][1] + other[1]);
      sums.y = pack_input(values[v][2] + other[2], values[v][3] + other[3]);
      sums.z = pack_input(values[v][4] + other[4], values[v][5] + other[5]);
      sums.w = pack_input(values[v][6] + other[6], values[v][7] + other[7]);
      *reinterpret_cast<uint4*>(total + token * channels + k) = sums;
      unpack(sums, values[v]);
    }
  }
  float squares = 0.0f;
#pragma unroll
  for (int v = 0; v < VECTORS; ++v)
#pragma unroll
    for (int i = 0; i < 8; ++i) squares = fmaf(values[v][i], values[v][i], squares);
#pragma unroll
  for (int d = 16; d > 0; d /= 2) squares += __shfl_xor_sync(~0u, squares, d);
  float* partial = row + channels;
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = squares;
  __syncthreads();
  squares = 0.0f;
#pragma unroll
  for (int w = 0; w < THREADS / 32; ++w) squares += partial[w];
  const float inverse = __frcp_rn(__fsqrt_rn(__fdiv_rn(squares, float(channels)) + eps));
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int k = (v * THREADS + threadIdx.x) * 8;
    if (k >= channels) continue;
    float factor[8];
    unpack(*reinterpret_cast<const uint4*>(weight + k), factor);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[v][i] = values[v][i] * inverse * factor[i];
  }
#endif
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int k = (v * THREADS + threadIdx.x) * 8;
    if (k >= channels) continue;
    reinterpret_cast<float4*>(row + k)[0] = make_float4(values[v][0], values[v][1], values[v][2], values[v][3]);
    reinterpret_cast<float4*>(row + k)[1] = make_float4(values[v][4], values[v][5], values[v][6], values[v][7]);
  }
  __syncthreads();
  // Whole warps take part in each round: the last one may hold a half-warp without a group.
  for (int pair = half_warp / 2 * 2; pair < num_scales; pair += THREADS / 16) {
    const int group = pair + half_warp % 2;
    const bool outlier = group >= num_normal;
    const int first = outlier ? normal + (group - num_normal) * outlier_size : group * group_size;
    const int size = outlier ? outlier_size : min(group_size, normal - first);
    const bool inside = column < size && group < num_scales;
    float gathered[8] = {};
    if (inside) {
      const int k = first + column;
      int4 a = make_int4(k, k + 1, k + 2, k + 3), b = make_int4(k + 4, k + 5, k + 6, k + 7);
      if (order != nullptr) {
        a = *reinterpret_cast<const int4*>(order + k);
        b = *reinterpret_cast<const int4*>(order + k + 4);
      }
      gathered[0] = row[a.x]; gathered[1] = row[a.y]; gathered[2] = row[a.z]; gathered[3] = row[a.w];
      gathered[4] = row[b.x]; gathered[5] = row[b.y]; gathered[6] = row[b.z]; gathered[7] = row[b.w];
    }
    store_group(gathered, group, column, inside, token, tokens_padded, layout, codes, scales);
  }
#endif
}
