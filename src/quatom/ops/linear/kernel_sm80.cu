// Group-scaled W4A4 GEMM with the INT4 tensor cores of Ampere and Ada (sm_80 to sm_89), y = x w^T.
//
// Simple on purpose: operands go from device memory straight into registers, a warp computes 16 tokens
// x 32 channels. Each group is summed exactly in int32 by mma.m16n8k64.s4 (outliers: m16n8k32.s8) and
// scaled in float32. Later architectures have no INT4 tensor cores and emulate the instruction slowly.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char s8;

constexpr int CHANNEL_TILES = 4;  // of 8 channels, a warp

// Eight int8 codes in [-8, 7] -> eight nibbles, the first in the lowest bits.
__device__ __forceinline__ u32 pack_half(u32 bytes) {
  u32 t = bytes & 0x0F0F0F0Fu;
  t = (t | (t >> 4)) & 0x00FF00FFu;
  return (t | (t >> 8)) & 0xFFFFu;
}
__device__ __forceinline__ u32 load_int4(const s8* codes) {
  const uint2 v = *reinterpret_cast<const uint2*>(codes);
  return pack_half(v.x) | (pack_half(v.y) << 16);
}
__device__ __forceinline__ void mma_s4(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_s8(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

extern "C" __global__ void __launch_bounds__(128)
linear_sm80(const s8* __restrict__ x,         // [tokens][normal + outliers], byte layout `rows`
            const float* __restrict__ xs,     // [tokens][scales]
            const u32* __restrict__ w,        // [channels][normal / 8], even channel in the low nibble
            const s8* __restrict__ w_outlier, // [channels][outliers]
            const float* __restrict__ ws,     // [channels][scales]
            const float* __restrict__ bias,   // [channels] or null
            float* __restrict__ y,            // [tokens][channels]
            int tokens, int channels, int channel_blocks, int normal, int group_size, int outliers, int outlier_size) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
  const int token0 = blockIdx.x / channel_blocks * 64 + warp * 16;
  const int channel0 = blockIdx.x % channel_blocks * 8 * CHANNEL_TILES;
  const int groups = (normal + group_size - 1) / group_size;
  const int scales = groups + (outliers ? outliers / outlier_size : 0);
  const int width = normal + outliers;
  // Rows beyond the last repeat it; their results are not stored.
  const int t[2] = {min(token0 + row, tokens - 1), min(token0 + row + 8, tokens - 1)};
  const s8* x_row[2] = {x + u64(t[0]) * width, x + u64(t[1]) * width};

  float total[CHANNEL_TILES][4] = {};
  auto promote = [&](const int (&partial)[CHANNEL_TILES][4], int s) {
    const float low = xs[u64(t[0]) * scales + s], high = xs[u64(t[1]) * scales + s];
#pragma unroll
    for (int j = 0; j < CHANNEL_TILES; ++j) {
      const int c0 = min(channel0 + 8 * j + 2 * column, channels - 1), c1 = min(c0 + 1, channels - 1);
      const float w0 = ws[u64(c0) * scales + s], w1 = ws[u64(c1) * scales + s];
      total[j][0] += float(partial[j][0]) * low * w0;
      total[j][1] += float(partial[j][1]) * low * w1;
      total[j][2] += float(partial[j][2]) * high * w0;
      total[j][3] += float(partial[j][3]) * high * w1;
    }
  };

  for (int g = 0; g < groups; ++g) {
    int partial[CHANNEL_TILES][4] = {};
    const int end = min((g + 1) * group_size, normal);
    for (int k = g * group_size; k < end; k += 64) {
      const int at = k + 8 * column;
      const u32 a[4] = {load_int4(x_row[0] + at), load_int4(x_row[1] + at), load_int4(x_row[0] + at + 32),
                        load_int4(x_row[1] + at + 32)};
#pragma unroll
      for (int j = 0; j < CHANNEL_TILES; ++j) {
        const u32* words = w + u64(min(channel0 + 8 * j + row, channels - 1)) * (normal / 8) + at / 8;
        mma_s4(partial[j], a, words[0], words[4]);
      }
    }
    promote(partial, g);
  }
  for (int g = 0; g < scales - groups; ++g) {
    int partial[CHANNEL_TILES][4] = {};
    for (int k = g * outlier_size; k < (g + 1) * outlier_size; k += 32) {
      const int at = k + 4 * column;
      auto load = [&](const s8* p) { return *reinterpret_cast<const u32*>(p); };
      const u32 a[4] = {load(x_row[0] + normal + at), load(x_row[1] + normal + at), load(x_row[0] + normal + at + 16),
                        load(x_row[1] + normal + at + 16)};
#pragma unroll
      for (int j = 0; j < CHANNEL_TILES; ++j) {
        const s8* p = w_outlier + u64(min(channel0 + 8 * j + row, channels - 1)) * outliers + at;
        mma_s8(partial[j], a, load(p), load(p + 16));
      }
    }
    promote(partial, groups + g);
  }

#pragma unroll
  for (int j = 0; j < CHANNEL_TILES; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = token0 + row + i / 2 * 8, channel = channel0 + 8 * j + 2 * column + i % 2;
      if (token < tokens && channel < channels)
        y[u64(token) * channels + channel] = total[j][i] + (bias == nullptr ? 0.0f : bias[channel]);
    }
}
