// Group-scaled low-bit GEMM for Hopper (sm_90a), y = x w^T. See docs/lab/kernels-linear.md.
//
// Orientation: 64 output channels are the rows (M) of a wgmma, BM tokens its columns (N). Weights are
// INT4 in device memory, become e4m3 in registers and enter as the register operand A; activations are
// one byte a value and enter from shared memory as B. A *unit* of work is 64 channels x 128 k-values
// of INT4 weights or 64 x 64 of INT8 outlier weights: both are 4096 bytes of codes in the order of
// the registers, then 64 float16 scales. One bulk copy brings a unit; no tensor map is needed.
//
// A producer warp keeps STAGES units in flight; WARPGROUPS consumers each own one or two blocks of 64 channels. After each
// group the partial sums, exact in the FP8 unit for INT4 codes, are scaled and added in float32: while
// one warpgroup does this, the matrix unit works for another.
//
// INTEGER is another way through the same pipeline, for INT8 activations of one scale per token and weight scales that are
// multiples (1 to 16) of one scale per row: a weight becomes code * multiple, an INT8 number, and the matrix unit
// adds up over all groups in int32. Multiples, 16 bits each, then take the place of a unit's scales.
//
// EXPERTS multiplies each run of tokens by the weights of its own expert. `arrange.cu` has written where runs are cut into
// tiles of tokens; a tile may begin and end amid the 16 tokens that are copied together, and stores its own rows alone.
//
// Compiled by NVRTC with BM, PARTS, SIGNED, INTEGER, EXPERTS, WARPGROUPS, BLOCKS_PER_WARPGROUP, STAGES, SPLIT, PRODUCER_THREADS, CTAS_PER_SM,
// STREAM, EARLY_STAGES, PRODUCER_REGISTERS, CONSUMER_REGISTERS and OUTPUT_BF16 defined, and with wgmma_e4m3 / wgmma_s8 for BM / PARTS columns prepended.
//   PARTS      a step multiplies and promotes its tokens in this many parts, which need fewer registers
//   SIGNED     convert weights to signed e4m3 instead of correcting sums for their offset: more
//              instructions a weight, half the bytes of activation scales from shared memory
//   STREAM     weights that one tile of tokens reads leave the L2 cache first
//   EARLY_STAGES  stages whose weights are fetched before the input is there
//   SPLIT      CTAs of a cluster that share one tile's k-range and add up through shared memory

constexpr int CONSUMERS = 128 * WARPGROUPS;     // threads
constexpr int COLUMNS = BM / PARTS;             // tokens of one matrix instruction
// Convert the next group's weights while this one multiplies; three warpgroups overlap it with each
// other's turns instead, and need the registers.
constexpr bool PREFETCH = WARPGROUPS < 3 && BLOCKS_PER_WARPGROUP == 1 && !INTEGER;
// A lone warpgroup reads the next group's codes before it converts these: nobody else hides the latency.
constexpr bool READ_AHEAD = INTEGER && WARPGROUPS == 1 && BLOCKS_PER_WARPGROUP == 1 && CTAS_PER_SM <= 2 && BM <= 64;
constexpr int BLOCKS = WARPGROUPS * BLOCKS_PER_WARPGROUP;  // of 64 output channels, of a tile
constexpr u32 UNIT_BYTES = 4096 + 128;
constexpr u32 X_BYTES = BM * 128;
constexpr u32 XS_BYTES = (BM < 16 ? 16 : BM) * 8;  // scales come by 16 tokens
// Activation tiles first: the 128-byte swizzle needs them aligned to 1024 bytes.
constexpr u32 X_OFFSET = 0;
constexpr u32 W_OFFSET = STAGES * X_BYTES;
constexpr u32 XS_OFFSET = W_OFFSET + STAGES * BLOCKS * UNIT_BYTES;
constexpr u32 RECEIVE_OFFSET = XS_OFFSET + STAGES * XS_BYTES;
// Split k: CTA r of a cluster adds up the blocks of 8 tokens j with j % SPLIT == r.
constexpr int TOKEN_BLOCKS = BM / 8;
constexpr u32 TOKEN_BLOCK_BYTES = BLOCKS * 2048;  // float sums of 8 tokens
constexpr u32 RECEIVE_BYTES = (TOKEN_BLOCKS + SPLIT - 1) / SPLIT * (SPLIT - 1) * TOKEN_BLOCK_BYTES;
constexpr u32 BARRIER_OFFSET = RECEIVE_OFFSET + RECEIVE_BYTES;
static_assert(COLUMNS % 8 == 0, "whole swizzle atoms");
static_assert(STAGES >= 2, "an outlier group is two units");
static_assert(!EXPERTS || SPLIT == 1, "CTAs of a cluster would disagree about the number of tiles");

// One thread of a warp, and to the compiler no more than one: it copies in bulk without a loop over all threads that
// might.
__device__ __forceinline__ bool elect_one() {
  u32 elected;
  asm volatile("{\n .reg .pred p;\n elect.sync _|p, 0xffffffff;\n selp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected != 0;
}
__device__ __forceinline__ bool barrier_test(u32 barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{\n .reg .pred p;\n mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}" : "=r"(done)
      : "r"(barrier), "r"(parity) : "memory");
  return done != 0;
}
__device__ __forceinline__ void store_async(u32 mapped, const float* v, u32 mapped_barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(mapped),
      "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(mapped_barrier) : "memory");
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING = 0>  // instruction groups that may still be at work
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ uint4 load_shared_16(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}
__device__ __forceinline__ float4 load_shared_f4(u32 address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address));
  return v;
}
__device__ __forceinline__ float2 load_shared_f2(u32 address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address));
  return v;
}
__device__ __forceinline__ float load_shared_half(u32 address) {
  unsigned short h;
  float f;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(h) : "r"(address));
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
__device__ __forceinline__ u32 load_shared_u16(u32 address) {
  unsigned short h;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(h) : "r"(address));
  return h;
}
__device__ __forceinline__ u32 pack_output(float low, float high) {
  u32 packed;
#if OUTPUT_BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#endif
  return packed;
}
// Without a branch, so that the stores of several tokens overlap.
__device__ __forceinline__ void store_if(bool condition, void* to, uint2 v) {
  asm volatile("{\n .reg .pred p;\n setp.ne.u32 p, %0, 0;\n @p st.global.v2.u32 [%1], {%2, %3};\n}" ::"r"(u32(condition)),
               "l"(to), "r"(v.x), "r"(v.y) : "memory");
}
__device__ __forceinline__ u32 transpose_8x8(u32 v) {
  u32 t;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(t) : "r"(v));
  return t;
}

// Shared-memory operand B: K-major rows of 128 bytes, 128-byte swizzle, 1024 bytes between atoms.
__device__ __forceinline__ u64 descriptor(u32 address) {
  return (u64(1) << 62) | (u64(64) << 32) | (u64(1) << 16) | ((address & 0x3FFFF) >> 4);
}

struct Ring {  // position in the ring of stages
  u32 stage = 0, phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) { stage = 0; phase ^= 1; }
  }
  __device__ __forceinline__ u32 previous() const { return stage == 0 ? STAGES - 1 : stage - 1; }
};

// The order in which clusters take tiles: token tiles in bands of at most 16, so that tiles that run
// together share both weights and tokens in the L2 cache.
struct Tiles {
  int token_tiles, row_tiles;
  __device__ __forceinline__ int count() const { return token_tiles * row_tiles; }
  __device__ __forceinline__ void locate(int tile, int& token_tile, int& row_tile) const {
    const int band = min(token_tiles, 16);
    const int first = tile / (band * row_tiles) * band;
    const int width = min(band, token_tiles - first);
    const int rest = tile - first * row_tiles;
    token_tile = first + rest % width;
    row_tile = rest / width;
  }
};

// A tile of tokens of one expert: rows `low` to `high` of the BM of x that begin at x_row are those of y from y_row on.
struct Run {
  int expert, x_row, y_row, low, high;
  __device__ __forceinline__ void load(const int4* from) {
    int bounds;
    asm volatile("ld.global.v4.s32 {%0, %1, %2, %3}, [%4];" : "=r"(expert), "=r"(x_row), "=r"(y_row), "=r"(bounds) : "l"(from));
    low = bounds & 0xFFFF, high = bounds >> 16;
  }
};

// e4m3 numbers c * 2**-9 of four codes stored as u = c + 8 in the low nibbles of `codes`, whose sign (u >= 8)
// is bit 7 of the bytes of `signs`; the high nibbles of `codes` do not matter.
__device__ __forceinline__ u32 to_signed(u32 codes, u32 signs) {
  u32 positive;  // 0xFF for a byte of c >= 0
  asm("prmt.b32 %0, %1, 0, 0xBA98;" : "=r"(positive) : "r"(signs));
  // c >= 0 is its own byte, u & 7; otherwise |c| = (~u & 7) + 1, and 0x80 is the sign.
  return ((codes ^ ~positive) & 0x07070707u) + (~positive & 0x81818181u);
}

// A thread's INT4 codes c, stored as c + 8. e4m3 is linear in its byte up to 0x10, so that three
// instructions make eight numbers (c + 8) * 2**-9. What the offset adds to a group's sum, 8 times the sum
// of the token's codes, `promote` takes away. SIGNED makes c * 2**-9, by ten instructions.
__device__ __forceinline__ void load_codes(u32 address, u32 (&a)[16]) {
  const uint4 v0 = load_shared_16(address), v1 = load_shared_16(address + 2048);
  const u32 words[8] = {v0.x, v0.y, v0.z, v0.w, v1.x, v1.y, v1.z, v1.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (SIGNED) {
      a[2 * i] = to_signed(words[i], words[i] << 4);
      a[2 * i + 1] = to_signed(words[i] >> 4, words[i]);
    } else {
      a[2 * i] = words[i] & 0x0F0F0F0Fu;
      a[2 * i + 1] = (words[i] >> 4) & 0x0F0F0F0Fu;
    }
  }
}

// A thread's INT4 codes c of a unit, stored as c + 8, and the multiples of its two rows.
struct Codes {
  u32 words[8], low, high;
  __device__ __forceinline__ void load(u32 codes, u32 multiples) {
    const uint4 v0 = load_shared_16(codes), v1 = load_shared_16(codes + 2048);
    words[0] = v0.x, words[1] = v0.y, words[2] = v0.z, words[3] = v0.w;
    words[4] = v1.x, words[5] = v1.y, words[6] = v1.z, words[7] = v1.w;
    low = load_shared_u16(multiples), high = load_shared_u16(multiples + 16);
  }
  // Codes times multiples: INT8. Bytes do not meet: with 128 - 8 m added, (c + 8) m lies between 0 and 240, and 128 more
  // than c m.
  __device__ __forceinline__ void multiply(u32 (&a)[16]) const {
    u32 low_offset, high_offset;  // opaque to the compiler, which otherwise takes 8 from every code
    asm("mad.lo.u32 %0, %1, 0xF7F7F7F8, 0x80808080;" : "=r"(low_offset) : "r"(low));
    asm("mad.lo.u32 %0, %1, 0xF7F7F7F8, 0x80808080;" : "=r"(high_offset) : "r"(high));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      a[2 * i] = ((words[i] & 0x0F0F0F0Fu) * low + low_offset) ^ 0x80808080u;
      a[2 * i + 1] = (((words[i] >> 4) & 0x0F0F0F0Fu) * high + high_offset) ^ 0x80808080u;
    }
  }
};

// Scales of a thread's two output channels of each block, as they follow a unit's codes.
struct ChannelScales {
  float low[BLOCKS_PER_WARPGROUP], high[BLOCKS_PER_WARPGROUP];
  __device__ __forceinline__ ChannelScales(u32 address, float factor) {
#pragma unroll
    for (int r = 0; r < BLOCKS_PER_WARPGROUP; ++r) {
      low[r] = load_shared_half(address + r * UNIT_BYTES) * factor;
      high[r] = load_shared_half(address + r * UNIT_BYTES + 16) * factor;
    }
  }
};

// Scales and corrections of a thread's four tokens of 16 (its two of 8, where a tile has no more).
template <bool CORRECT>
struct TokenScales {
  float scale[4], correction[4];
  __device__ __forceinline__ explicit TokenScales(u32 address) {
    load(address, scale);
    if (CORRECT) load(address + 64, correction);
  }
  static __device__ __forceinline__ void load(u32 address, float (&to)[4]) {
    if (COLUMNS < 16) {
      const float2 v = load_shared_f2(address);
      to[0] = v.x, to[1] = v.y;
    } else {
      const float4 v = load_shared_f4(address);
      to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }
  }
};

// total += (partial * token scale + correction) * channel scale, the only arithmetic outside the matrix
// unit. The correction, -8 * token scale * sum of codes, is exact for integer codes, and so is the sum of
// the two; SIGNED and INT8 weights need none. `total` begins at this part's columns.
template <bool CORRECT, typename T>
__device__ __forceinline__ void promote(float (&total)[BLOCKS_PER_WARPGROUP][BM / 2], int part,
                                        const T (&partial)[BLOCKS_PER_WARPGROUP][COLUMNS / 2],
                                        const ChannelScales& channel, TokenScales<CORRECT> token, u32 xs) {
#pragma unroll
  for (int j = 0; j < COLUMNS / 8; ++j) {
    const int h = j % 2 * 2;
    if (j > 0 && h == 0) token = TokenScales<CORRECT>(xs + j * 64);
#pragma unroll
    for (int r = 0; r < BLOCKS_PER_WARPGROUP; ++r) {
      float* sum = total[r] + part * (COLUMNS / 2) + 4 * j;
      const T* p = partial[r] + 4 * j;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float scale = token.scale[h + i % 2];
        const float scaled = CORRECT ? fmaf(float(p[i]), scale, token.correction[h + i % 2]) : float(p[i]) * scale;
        sum[i] = fmaf(scaled, i < 2 ? channel.low[r] : channel.high[r], sum[i]);
      }
    }
  }
}

// total = count * token scale * row scale: all normal groups at once.
__device__ __forceinline__ void scale_counts(float (&total)[BLOCKS_PER_WARPGROUP][BM / 2],
                                             const int (&counts)[BLOCKS_PER_WARPGROUP][PARTS][COLUMNS / 2],
                                             const float (&low)[BLOCKS_PER_WARPGROUP],
                                             const float (&high)[BLOCKS_PER_WARPGROUP], u32 xs) {
#pragma unroll
  for (int j = 0; j < BM / 8; j += 2) {
    const TokenScales<false> token(xs + j * 64);
#pragma unroll
    for (int r = 0; r < BLOCKS_PER_WARPGROUP; ++r)
#pragma unroll
      for (int i = 0; i < 8 && 4 * j + i < BM / 2; ++i) {
        const int at = 4 * j + i;
        const float scaled = float(counts[r][at / (COLUMNS / 2)][at % (COLUMNS / 2)]) * token.scale[i / 4 * 2 + i % 2];
        total[r][at] = scaled * (i % 4 < 2 ? low[r] : high[r]);
      }
  }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + PRODUCER_THREADS, CTAS_PER_SM)
linear_hopper(const u8* __restrict__ weights,  // [row blocks of 64][units][4224]
              const u8* __restrict__ x,        // [groups][tokens_padded][128], swizzled
              const float* __restrict__ xs,    // [groups][tokens_padded / 16][2][16]: scales, corrections
              const float* __restrict__ row_scales,  // [row blocks of 64][64] of INTEGER, in the order of a unit's scales; or null
              const float* __restrict__ bias,  // [channels] or null
              void* __restrict__ y,            // [tokens][channels]
              int tokens, int tokens_padded, int channels,
              int int4_groups, int int8_groups,
              float unit_value                 // real value of one step of the e4m3 products
#if EXPERTS
              , const int4* runs               // their number, then one of each tile of tokens
              , int runs_known                 // whether a launch made them that the one before this has waited for
#endif
              ) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = __shfl_sync(~0u, shared_address(shared), 0);  // uniform to the compiler, like what follows
  const u32 full = base + BARRIER_OFFSET, empty = full + STAGES * 8;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const u32 rank = blockIdx.x % SPLIT;  // in the cluster

  const int row_blocks = (channels + 63) / 64;
  const int units = int4_groups + 2 * int8_groups;
  const u32 block_stride = u32(units) * UNIT_BYTES;
#if EXPERTS
  int token_tiles;  // how tokens are routed, the kernel before says, or one before that: weights then come while it runs
  if (runs_known) asm volatile("fence.acq_rel.gpu;" ::: "memory");
  else asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("ld.global.s32 %0, [%1];" : "=r"(token_tiles) : "l"(runs));
  const Tiles tiles{__shfl_sync(~0u, token_tiles, 0), (row_blocks + BLOCKS - 1) / BLOCKS};
#else
  const Tiles tiles{(tokens + BM - 1) / BM, (row_blocks + BLOCKS - 1) / BLOCKS};
#endif
  const int first_tile = blockIdx.x / SPLIT, tile_step = gridDim.x / SPLIT;
  auto first_unit = [&](int of_rank) {  // the two units of an outlier group stay together
    const int unit = of_rank * units / SPLIT;
    return unit > int4_groups ? unit - (unit - int4_groups) % 2 : unit;
  };
  const int unit_begin = SPLIT > 1 ? first_unit(rank) : 0;
  const int unit_end = SPLIT > 1 ? first_unit(rank + 1) : units;
  const int steps = unit_end - unit_begin;

  const u32 received = empty + STAGES * 8;  // barrier of the partial sums of other CTAs

  if (EXPERTS && first_tile >= tiles.count()) return;
  if (first_tile >= tiles.count()) {
    // A CTA without a tile keeps its place while the others work, for half of what they take at least: the hardware would
    // give the free SM two CTAs of the next linear layer.
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    for (const long long start = clock64(); clock64() - start < steps * 128;) __nanosleep(100);
    return;
  }

  // The producer's place. It shares the integer pipe of a scheduler with consumers, so that its instructions count as much
  // as theirs: the whole warp runs its loop, on uniform registers, and one thread copies.
  int here = 0, last_block = 0;  // tokens of the tile that are in memory, blocks of weights after its first
  const u8 *w_from = nullptr, *x_from = nullptr;
  const float* xs_from = nullptr;
  auto begin_tile = [&](int tile) {
    int token_tile, row_tile;
    tiles.locate(tile, token_tile, row_tile);
#if EXPERTS
    Run run;
    run.load(runs + 1 + token_tile);
    const int row = __shfl_sync(~0u, run.x_row, 0), expert = __shfl_sync(~0u, run.expert, 0);
    here = BM < 16 ? BM : min(BM, (__shfl_sync(~0u, run.high, 0) + 15) / 16 * 16);
#else
    here = min(BM, tokens_padded - token_tile * BM);
    constexpr int row = 0, expert = 0;
#endif
    // Blocks beyond the last repeat it: their results are not stored.
    const int block = min(row_tile * BLOCKS, row_blocks - 1);
    last_block = row_blocks - 1 - block;
    w_from = weights + u64(expert * row_blocks + block) * block_stride + u64(unit_begin) * UNIT_BYTES;
    const int group = unit_begin < int4_groups ? unit_begin : int4_groups + (unit_begin - int4_groups) / 2;
    const u64 token = u64(group) * tokens_padded + (EXPERTS ? row : token_tile * BM);
    x_from = x + token * 128;
    xs_from = xs + token / 16 * 32;
  };
  auto load_weights = [&](u32 stage) {
    const u32 barrier = full + 8 * stage, to = base + W_OFFSET + stage * BLOCKS * UNIT_BYTES;
    auto copy = [&](int block, const u8* from) {
#if STREAM
      bulk_copy(to + block * UNIT_BYTES, from, UNIT_BYTES, barrier, tiles.token_tiles == 1 ? EVICT_FIRST : EVICT_NORMAL);
#else
      bulk_copy(to + block * UNIT_BYTES, from, UNIT_BYTES, barrier);
#endif
    };
    if (elect_one()) {
      copy(0, w_from);
#pragma unroll
      for (int g = 1; g < BLOCKS; ++g) copy(g, w_from + min(g, last_block) * block_stride);
    }
    w_from += UNIT_BYTES;
  };
  // All that comes to a stage is expected with its tokens: a barrier may count bytes before it expects them.
  auto load_tokens = [&](u32 stage, bool scales, bool last_of_group) {
    const u32 barrier = full + 8 * stage;
    const u32 to = base + X_OFFSET + stage * X_BYTES, scales_to = base + XS_OFFSET + stage * XS_BYTES;
    const u32 scale_bytes = scales ? max(here, 16) * 8 : 0;
    if (elect_one()) {
      barrier_expect(barrier, BLOCKS * UNIT_BYTES + here * 128 + scale_bytes);
      bulk_copy(to, x_from, here * 128, barrier);
      if (scales) bulk_copy(scales_to, xs_from, scale_bytes, barrier);
    }
    if (last_of_group) {
      x_from += u64(tokens_padded) * 128;
      xs_from += u64(tokens_padded) * 2;
    }
  };
  // Weights do not depend on the kernel before this one: fetch the first ones before anything else.
  const int started = min(steps, int(EARLY_STAGES));
  if (warp == 4 * WARPGROUPS) {
    if (elect_one()) {
      for (int s = 0; s < STAGES; ++s) {
        barrier_init(full + 8 * s, 1);
        barrier_init(empty + 8 * s, 4 * WARPGROUPS);
      }
      if (SPLIT > 1) {
        barrier_init(received, 1);
        int token_tile, row_tile;
        tiles.locate(first_tile, token_tile, row_tile);
        const int blocks = (min(BM, tokens - token_tile * BM) + 7) / 8;
        const int owned = (blocks - int(rank) + SPLIT - 1) / SPLIT;
        if (owned > 0) barrier_expect(received, owned * (SPLIT - 1) * TOKEN_BLOCK_BYTES);
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
    begin_tile(first_tile);
#pragma unroll 1
    for (int i = 0; i < started; ++i) load_weights(i);
  }
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  __syncwarp();
  if (SPLIT > 1) cluster_arrive();
  __syncthreads();

  if (warp >= 4 * WARPGROUPS) {
    // Producer.
#if PRODUCER_REGISTERS
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
#endif
    if (warp == 4 * WARPGROUPS) {
      Ring ring;
      asm volatile("griddepcontrol.wait;" ::: "memory");
      for (int tile = first_tile; tile < tiles.count(); tile += tile_step) {
        const int fetched = unit_begin + (tile == first_tile ? started : 0);  // weights up to here are on their way
        if (tile != first_tile) begin_tile(tile);
        auto load = [&](bool weights, bool scales, bool last_of_group) {
          if (weights) {
            barrier_wait(empty + 8 * ring.stage, ring.phase ^ 1);
            load_weights(ring.stage);
          }
          load_tokens(ring.stage, scales, last_of_group);
          ring.advance();
        };
        // A scale that all INT4 units share comes with the last of them; two units of an INT8 group share its tokens.
        const int int4_end = min(unit_end, int4_groups), plain_end = INTEGER ? int4_end - 1 : int4_end;
        int unit = unit_begin;
#pragma unroll 1
        for (; unit < min(fetched, plain_end); ++unit) load(false, !INTEGER, true);
#pragma unroll 1
        for (; unit < plain_end; ++unit) load(true, !INTEGER, true);
#pragma unroll 1
        for (; unit < unit_end; ++unit) load(unit >= fetched, true, unit < int4_groups || (unit - int4_groups) % 2);
      }
    }
  } else {
    // Consumers.
#if PRODUCER_REGISTERS
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
#endif
    const int group_warp = warp % 4, warpgroup = warp / 4;
    constexpr int RB = BLOCKS_PER_WARPGROUP;
    constexpr u32 W_STAGE = BLOCKS * UNIT_BYTES;
    constexpr u64 PART_STEP = COLUMNS * 128 / 16;  // of a descriptor
    const u32 w_thread = base + W_OFFSET + warpgroup * RB * UNIT_BYTES + (threadIdx.x % 128) * 16;
    const u32 ws_thread = base + W_OFFSET + warpgroup * RB * UNIT_BYTES + 4096 + (group_warp * 16 + lane / 4) * 2;
    const u32 xs_thread = base + XS_OFFSET + (lane % 4) * 16;
    u32 xs_tile = xs_thread;
    Ring ring;
    float total[RB][BM / 2];

    auto release = [&](u32 stage) {
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + 8 * stage);
    };
    auto load_weights_of = [&](u32 stage, u32 (&a)[RB][16]) {
#pragma unroll
      for (int r = 0; r < RB; ++r) load_codes(w_thread + stage * W_STAGE + r * UNIT_BYTES, a[r]);
    };
    // One INT4 group: multiply `now`, and meanwhile convert the next group's weights to `next`.
    auto int4_step = [&](u32 (&now)[RB][16], u32 (&next)[RB][16], bool more) {
      const u32 stage = ring.stage;
      const u64 b = descriptor(base + X_OFFSET + stage * X_BYTES);
      if (!PREFETCH) {
        barrier_wait(full + 8 * stage, ring.phase);
        load_weights_of(stage, now);
      }
      ring.advance();
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        float partial[RB][COLUMNS / 2];
        wgmma_fence();
#pragma unroll
        for (int r = 0; r < RB; ++r)
#pragma unroll
          for (int c = 0; c < 4; ++c)
            wgmma_e4m3(partial[r], now[r][4 * c], now[r][4 * c + 1], now[r][4 * c + 2], now[r][4 * c + 3],
                       b + part * PART_STEP + 2 * c, c);
        wgmma_commit();
        if (PREFETCH && more && part == PARTS - 1) {
          barrier_wait(full + 8 * ring.stage, ring.phase);
          load_weights_of(ring.stage, next);
        }
        // The first scales are read while the matrix unit works.
        const ChannelScales channel(ws_thread + stage * W_STAGE, 1.0f);
        const u32 xs_part = xs_tile + stage * XS_BYTES + part * COLUMNS * 8;
        const TokenScales<!SIGNED> token(xs_part);
        wgmma_wait();
        promote(total, part, partial, channel, token, xs_part);
      }
      release(stage);
    };
    // The same of INTEGER: convert a group and queue its products after those of the group before it, which then are
    // waited for. With READ_AHEAD the codes of the next group are read first, and again if they were not there yet, and the
    // group before is waited for in between: a warp that queues products of registers waits until those before are done.
    auto read_codes = [&](const Ring& at, Codes (&codes)[RB]) {
#pragma unroll
      for (int r = 0; r < RB; ++r)
        codes[r].load(w_thread + at.stage * W_STAGE + r * UNIT_BYTES, ws_thread + at.stage * W_STAGE + r * UNIT_BYTES);
    };
    auto integer_step = [&](Codes (&now)[RB], Codes (&next)[RB], u32 (&a)[RB][16], int (&counts)[RB][PARTS][COLUMNS / 2],
                            bool first, bool more) {
      const u64 b = descriptor(base + X_OFFSET + ring.stage * X_BYTES);
      const u32 before = ring.previous();
      const Ring at = ring;
      ring.advance();
      bool ready = true;
      if (READ_AHEAD) {
        ready = barrier_test(full + 8 * ring.stage, ring.phase);
        read_codes(ring, next);
      } else {
        barrier_wait(full + 8 * at.stage, at.phase);
        read_codes(at, now);
      }
#pragma unroll
      for (int r = 0; r < RB; ++r) now[r].multiply(a[r]);
      if (READ_AHEAD) {
#pragma unroll
        for (int i = 0; i < 16; ++i) asm volatile("" : "+r"(a[0][i]));  // all converted before the wait
        wgmma_wait();
        if (!first) release(before);
      }
      wgmma_fence();
#pragma unroll
      for (int part = 0; part < PARTS; ++part)
#pragma unroll
        for (int r = 0; r < RB; ++r)
#pragma unroll
          for (int c = 0; c < 4; ++c)
            wgmma_s8(counts[r][part], a[r][4 * c], a[r][4 * c + 1], a[r][4 * c + 2], a[r][4 * c + 3],
                     b + part * PART_STEP + 2 * c, 1);
      wgmma_commit();
      if (READ_AHEAD) {
        if (more && !ready) {
          barrier_wait(full + 8 * ring.stage, ring.phase);
          read_codes(ring, next);
        }
      } else {
        wgmma_wait<1>();
        if (!first) release(before);
      }
    };

    for (int tile = first_tile; tile < tiles.count(); tile += tile_step) {
      int token_tile, row_tile;
      if (BM < 16) {
        tiles.locate(tile, token_tile, row_tile);
#if EXPERTS
        Run run;
        run.load(runs + 1 + token_tile);
        xs_tile = xs_thread + run.x_row / 8 % 2 * 8;
#else
        xs_tile = xs_thread + token_tile % 2 * 8;  // half of 16 tokens' scales
#endif
      }
      const int int4_steps = max(0, min(unit_end, int4_groups) - unit_begin);
      if (!INTEGER || int4_steps == 0) {
#pragma unroll
        for (int r = 0; r < RB; ++r)
#pragma unroll
          for (int i = 0; i < BM / 2; ++i) total[r][i] = 0.0f;
      }
#if INTEGER
      if (int4_steps > 0) {
        float low[RB], high[RB];
        tiles.locate(tile, token_tile, row_tile);
#pragma unroll
        for (int r = 0; r < RB; ++r) {
          int block = min((row_tile * WARPGROUPS + warpgroup) * RB + r, row_blocks - 1);
#if EXPERTS
          Run run;
          run.load(runs + 1 + token_tile);
          block += run.expert * row_blocks;
#endif
          low[r] = row_scales[block * 64 + group_warp * 16 + lane / 4];
          high[r] = row_scales[block * 64 + group_warp * 16 + lane / 4 + 8];
        }
        int counts[RB][PARTS][COLUMNS / 2] = {};
        u32 even[RB][16], odd[RB][16];
        Codes even_codes[RB], odd_codes[RB];
        if (READ_AHEAD) {
          barrier_wait(full + 8 * ring.stage, ring.phase);
          read_codes(ring, even_codes);
        }
        for (int i = 0; i < int4_steps; i += 2) {
          integer_step(even_codes, odd_codes, even, counts, i == 0, i + 1 < int4_steps);
          if (i + 1 < int4_steps) integer_step(odd_codes, even_codes, odd, counts, false, i + 2 < int4_steps);
        }
        wgmma_wait();
        const u32 stage = ring.previous();
        scale_counts(total, counts, low, high, xs_tile + stage * XS_BYTES);
        release(stage);
      }
#else
      if (int4_steps > 0) {
        u32 even[RB][16], odd[RB][16];
        if (PREFETCH) {
          barrier_wait(full + 8 * ring.stage, ring.phase);
          load_weights_of(ring.stage, even);
        }
        for (int i = 0; i < int4_steps; i += PREFETCH ? 2 : 1) {
          int4_step(even, odd, i + 1 < int4_steps);
          if (PREFETCH && i + 1 < int4_steps) int4_step(odd, even, i + 2 < int4_steps);
        }
      }
#endif
      // INT8 outliers: a group is two units, promoted together.
      for (int unit = unit_begin + int4_steps; unit < unit_end; unit += 2) {
        u32 stages[2];
        uint4 a[RB][2][2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const u32 stage = stages[half] = ring.stage;
          barrier_wait(full + 8 * stage, ring.phase);
          ring.advance();
#pragma unroll
          for (int r = 0; r < RB; ++r)
#pragma unroll
            for (int c = 0; c < 2; ++c)
              a[r][half][c] = load_shared_16(w_thread + stage * W_STAGE + r * UNIT_BYTES + c * 2048);
        }
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          int partial[RB][COLUMNS / 2];
          wgmma_fence();
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const u64 b = descriptor(base + X_OFFSET + stages[half] * X_BYTES) + half * 4 + part * PART_STEP;
#pragma unroll
            for (int r = 0; r < RB; ++r)
#pragma unroll
              for (int c = 0; c < 2; ++c) {
                const uint4 v = a[r][half][c];
                wgmma_s8(partial[r], v.x, v.y, v.z, v.w, b + 2 * c, half + c);
              }
          }
          wgmma_commit();
          const ChannelScales channel(ws_thread + stages[0] * W_STAGE, 1.0f / unit_value);
          const u32 xs_part = xs_tile + stages[0] * XS_BYTES + part * COLUMNS * 8;
          const TokenScales<false> token(xs_part);
          wgmma_wait();
          promote(total, part, partial, channel, token, xs_part);
        }
        release(stages[0]);
        release(stages[1]);
      }

      if (BM >= 16) tiles.locate(tile, token_tile, row_tile);  // again: no registers for it in the loop
#if EXPERTS
      Run run;  // again, as the place of the tile
      run.load(runs + 1 + token_tile);
      const int first_token = run.y_row, begins = run.low, here = run.high;
#else
      constexpr int first_token = 0, begins = 0;
      const int here = min(BM, tokens - token_tile * BM);
#endif
      if (SPLIT > 1) {
        cluster_wait();  // the peers' barriers exist
#pragma unroll
        for (int r = 0; r < RB; ++r)
#pragma unroll
          for (int j = 0; j < TOKEN_BLOCKS; ++j) {
            const u32 owner = j % SPLIT;
            if (rank == owner || 8 * j >= here) continue;
            const u32 source = j / SPLIT * (SPLIT - 1) + (rank < owner ? rank : rank - 1);
            const u32 slot = base + RECEIVE_OFFSET + (warpgroup * RB + r) * 2048 + threadIdx.x % 128 * 16;
            store_async(map_to_rank(slot + source * TOKEN_BLOCK_BYTES, owner), total[r] + 4 * j, map_to_rank(received, owner));
          }
        if (int(rank) * 8 < here) barrier_wait(received, 0);
      }
#pragma unroll
      for (int r = 0; r < RB; ++r) {
        const int block = (row_tile * WARPGROUPS + warpgroup) * RB + r;
        // Register row i of 16 is channel 4 (i / 2) + i % 2 for i < 8 and two more for i - 8, so that
        // after the transposition a thread holds four adjacent channels of one token.
        const int row = block * 64 + group_warp * 16 + lane / 8 * 4 + lane / 4 % 2;
        float bias_low = 0.0f, bias_high = 0.0f;
        if (bias != nullptr && row < channels) {
#if EXPERTS
          const float* const of_expert = bias + u64(run.expert) * channels;
#else
          const float* const of_expert = bias;
#endif
          bias_low = of_expert[row];
          bias_high = of_expert[row + 2];
        }
        const int column = block * 64 + group_warp * 16 + lane % 4 * 4;
        unsigned short* const to =
            static_cast<unsigned short*>(y) + u64((EXPERTS ? first_token : token_tile * BM) + lane / 4) * channels + column;
#pragma unroll
        for (int j = 0; j < TOKEN_BLOCKS; ++j) {
          if (SPLIT > 1 && (rank != j % SPLIT || 8 * j >= here)) continue;
          float(&sum)[BM / 2] = total[r];
#pragma unroll
          for (int other = 0; other < SPLIT - 1; ++other) {  // a fixed order: the sum is deterministic
            const float4 v = load_shared_f4(base + RECEIVE_OFFSET + (warpgroup * RB + r) * 2048 + threadIdx.x % 128 * 16 +
                                            (j / SPLIT * (SPLIT - 1) + other) * TOKEN_BLOCK_BYTES);
            sum[4 * j] += v.x;
            sum[4 * j + 1] += v.y;
            sum[4 * j + 2] += v.z;
            sum[4 * j + 3] += v.w;
          }
          uint2 v;
          v.x = transpose_8x8(pack_output(sum[4 * j] * unit_value + bias_low, sum[4 * j + 1] * unit_value + bias_low));
          v.y = transpose_8x8(pack_output(sum[4 * j + 2] * unit_value + bias_high, sum[4 * j + 3] * unit_value + bias_high));
          store_if((!EXPERTS || 8 * j + lane / 4 >= begins) && 8 * j + lane / 4 < here && column < channels, to + u64(8 * j) * channels, v);
        }
      }
    }
  }
  if (SPLIT > 1 && warp >= 4 * WARPGROUPS) {
    __syncwarp();
    cluster_wait();
  }
}
