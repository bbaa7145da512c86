// Group-scaled low-bit GEMM for Hopper (sm_90a), y = x w^T. See docs/kernels-linear.md.
//
// Orientation: 64 output channels are the rows (M) of a wgmma, BM tokens its columns (N). Weights are
// INT4 in device memory, become e4m3 in registers and enter as the register operand A; activations are
// one byte a value and enter from shared memory as B. A *unit* of work is 64 channels x 128 k-values
// of INT4 weights or 64 x 64 of INT8 outlier weights: both are 4096 bytes of codes in the order of
// the registers, then 64 float16 scales. One bulk copy brings a unit; no tensor map is needed.
//
// A producer warp keeps STAGES units in flight; WARPGROUPS consumers each own 64 channels. After each
// group the partial sums, exact in the FP8 unit for INT4 codes, are scaled and added in float32: while
// one warpgroup does this, the matrix unit works for another.
//
// Compiled by NVRTC with BM, WARPGROUPS, STAGES, SPLIT, MULTICAST, PRODUCER_THREADS, CTAS_PER_SM,
// PRODUCER_REGISTERS, CONSUMER_REGISTERS and OUTPUT_BF16 defined, and with wgmma_e4m3 / wgmma_s8 for BM columns prepended.
//   SPLIT      CTAs of a cluster that share one tile's k-range and add up through shared memory
//   MULTICAST  CTAs of a cluster that share one token tile and load it once

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int ROWS = 64 * WARPGROUPS;           // output channels of a tile
constexpr int CONSUMERS = 128 * WARPGROUPS;     // threads
constexpr bool ORDERED = WARPGROUPS > 1;
// Convert the next group's weights while this one multiplies; three warpgroups hide it behind each
// other's turns instead, and need the registers.
constexpr bool PREFETCH = WARPGROUPS < 3;
constexpr int CLUSTER = SPLIT * MULTICAST;
constexpr u32 UNIT_BYTES = 4096 + 128;
constexpr u32 X_BYTES = BM * 128;
constexpr u32 XS_BYTES = BM * 4;
// Activation tiles first: the 128-byte swizzle needs them aligned to 1024 bytes.
constexpr u32 X_OFFSET = 0;
constexpr u32 W_OFFSET = STAGES * X_BYTES;
constexpr u32 XS_OFFSET = W_OFFSET + STAGES * WARPGROUPS * UNIT_BYTES;
constexpr u32 RECEIVE_OFFSET = XS_OFFSET + STAGES * XS_BYTES;
// Split k: CTA r of a cluster adds up the blocks of 8 tokens j with j % SPLIT == r.
constexpr int TOKEN_BLOCKS = BM / 8;
constexpr u32 BLOCK_BYTES = WARPGROUPS * 2048;  // float sums of 8 tokens
constexpr u32 RECEIVE_BYTES = (TOKEN_BLOCKS + SPLIT - 1) / SPLIT * (SPLIT - 1) * BLOCK_BYTES;
constexpr u32 BARRIER_OFFSET = RECEIVE_OFFSET + RECEIVE_BYTES;
static_assert(SPLIT == 1 || MULTICAST == 1, "a cluster either splits k or shares tokens");
static_assert(BM % (8 * MULTICAST) == 0, "each CTA loads whole swizzle atoms");

__device__ __forceinline__ u32 shared_address(const void* p) {
  return static_cast<u32>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ u32 cluster_rank() {
  u32 r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
// Relaxed: what the CTAs of a cluster tell each other travels through mbarriers, and a releasing arrive
// costs a fence of the whole GPU.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
__device__ __forceinline__ u32 map_to_rank(u32 address, u32 rank) {
  u32 mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}
__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_arrive_remote(u32 mapped) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(mapped) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n .reg .pred done;\n"
      "again:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      " @done bra over;\n bra again;\n over:\n}" ::"r"(barrier), "r"(parity) : "memory");
}
__device__ __forceinline__ void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
__device__ __forceinline__ void bulk_copy_multicast(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1], %2, [%3], %4;" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier),
      "h"(static_cast<unsigned short>((1 << MULTICAST) - 1)) : "memory");
}
__device__ __forceinline__ void store_async(u32 mapped, const float* v, u32 mapped_barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(mapped),
      "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(mapped_barrier) : "memory");
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// Warpgroups issue their matrix instructions in turns. Without turns the matrix unit serves them alternately:
// all finish together, and it idles while all scale their sums (measured: 42 % busy, see the docs).
__device__ __forceinline__ void wait_turn(int warpgroup) {
  if (ORDERED) asm volatile("bar.sync %0, 256;" ::"r"(2 + warpgroup) : "memory");
}
__device__ __forceinline__ void pass_turn(int warpgroup) {
  if (ORDERED) asm volatile("bar.arrive %0, 256;" ::"r"(2 + (warpgroup + 1) % WARPGROUPS) : "memory");
}

__device__ __forceinline__ uint4 load_shared_16(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
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
__device__ __forceinline__ u32 pack_output(float low, float high) {
  u32 packed;
#if OUTPUT_BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#endif
  return packed;
}
__device__ __forceinline__ u32 transpose_8x8(u32 v) {
  u32 t;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(t) : "r"(v));
  return t;
}

// Shared-memory operand B: K-major rows of 128 bytes, 128-byte swizzle, 1024 bytes between atoms.
__device__ __forceinline__ u64 descriptor(u32 address) {
  return (u64(1) << 62) | (u64(64) << 32) | (u64(1) << 16) | ((address & 0x3FFFF) >> 4);
}

// Four codes of INT4 from each word: bits 7 and 2..0 of a byte hold sign and magnitude (of a negative
// code c: -c - 1), which is e4m3 of magnitude * 2**-9 once one is added to negative ones.
__device__ __forceinline__ u32 to_e4m3(u32 sign_magnitude) {
  return sign_magnitude + ((sign_magnitude & 0x80808080u) >> 7);
}

struct Ring {  // position in the ring of stages
  u32 stage = 0, phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) { stage = 0; phase ^= 1; }
  }
};

// The order in which clusters take tiles: token tiles in bands of at most 16, so that tiles that run
// together share both weights and tokens in the L2 cache.
struct Tiles {
  int token_tiles, row_tiles;  // row_tiles: in steps of MULTICAST tiles
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

__device__ __forceinline__ void load_codes(u32 address, u32 (&a)[16]) {
  const uint4 v0 = load_shared_16(address), v1 = load_shared_16(address + 2048);
  const u32 words[8] = {v0.x, v0.y, v0.z, v0.w, v1.x, v1.y, v1.z, v1.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = to_e4m3(words[i] & 0x87878787u);
    a[2 * i + 1] = to_e4m3(__funnelshift_l(words[i], words[i], 4) & 0x87878787u);
  }
}

// total += partial * (token scale * channel scale), the only arithmetic outside the matrix unit.
template <typename T>
__device__ __forceinline__ void promote(float (&total)[BM / 2], const T (&partial)[BM / 2], u32 xs, u32 ws,
                                        float factor) {
  const float low = load_shared_half(ws) * factor, high = load_shared_half(ws + 16) * factor;
#pragma unroll
  for (int j = 0; j < BM / 8; ++j) {
    const float2 s = load_shared_f2(xs + j * 32);
    total[4 * j] += float(partial[4 * j]) * s.x * low;
    total[4 * j + 1] += float(partial[4 * j + 1]) * s.y * low;
    total[4 * j + 2] += float(partial[4 * j + 2]) * s.x * high;
    total[4 * j + 3] += float(partial[4 * j + 3]) * s.y * high;
  }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + PRODUCER_THREADS, CTAS_PER_SM)
linear_hopper(const u8* __restrict__ weights,  // [row blocks of 64][units][4224]
              const u8* __restrict__ x,        // [groups][tokens_padded][128], swizzled
              const float* __restrict__ xs,    // [groups][tokens_padded]
              const float* __restrict__ bias,  // [channels] or null
              void* __restrict__ y,            // [tokens][channels]
              int tokens, int tokens_padded, int channels,
              int int4_groups, int int8_groups,
              float unit_value) {              // real value of one step of the e4m3 products
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = shared_address(shared);
  const u32 full = base + BARRIER_OFFSET, empty = full + STAGES * 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;

  const int row_blocks = (channels + 63) / 64;
  const int units = int4_groups + 2 * int8_groups;
  const u32 block_stride = u32(units) * UNIT_BYTES;
  const Tiles tiles{(tokens + BM - 1) / BM, (row_blocks + WARPGROUPS * MULTICAST - 1) / (WARPGROUPS * MULTICAST)};
  const int first_tile = blockIdx.x / CLUSTER, tile_step = gridDim.x / CLUSTER;
  const int unit_begin = SPLIT > 1 ? int(rank) * units / SPLIT : 0;
  const int unit_end = SPLIT > 1 ? (int(rank) + 1) * units / SPLIT : units;
  const int steps = unit_end - unit_begin;

  const u32 received = empty + STAGES * 8;  // barrier of the partial sums of other CTAs
  int token_tile, row_tile, started = 0;

  // Weights do not depend on the kernel before this one: fetch the first ones before anything else.
  auto load_weights = [&](int unit, u32 stage) {
    const int here = min(BM, tokens_padded - token_tile * BM);
    barrier_expect(full + 8 * stage, WARPGROUPS * UNIT_BYTES + here * 132);
#pragma unroll
    for (int g = 0; g < WARPGROUPS; ++g) {
      // Blocks beyond the last repeat it: their results are not stored.
      const int block = min((row_tile * MULTICAST + (MULTICAST > 1 ? int(rank) : 0)) * WARPGROUPS + g, row_blocks - 1);
      bulk_copy(base + W_OFFSET + (stage * WARPGROUPS + g) * UNIT_BYTES,
                weights + u64(block) * block_stride + u64(unit) * UNIT_BYTES, UNIT_BYTES, full + 8 * stage);
    }
  };
  if (warp == 4 * WARPGROUPS && lane == 0) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 4 * WARPGROUPS * MULTICAST);
    }
    if (SPLIT > 1) barrier_init(received, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    if (first_tile < tiles.count()) {
      tiles.locate(first_tile, token_tile, row_tile);
      started = min(steps, int(STAGES));
      for (int i = 0; i < started; ++i) load_weights(unit_begin + i, i);
      if (SPLIT > 1) {
        const int blocks = (min(BM, tokens - token_tile * BM) + 7) / 8;
        const int owned = (blocks - int(rank) + SPLIT - 1) / SPLIT;
        if (owned > 0) barrier_expect(received, owned * (SPLIT - 1) * BLOCK_BYTES);
      }
    }
  }
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  __syncwarp();
  if (CLUSTER > 1) cluster_arrive();
  __syncthreads();
  if (MULTICAST > 1) cluster_wait();  // the peers' barriers exist before anything is sent to them

  if (warp >= 4 * WARPGROUPS) {
    // Producer.
#if PRODUCER_REGISTERS
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
#endif
    if (warp == 4 * WARPGROUPS && lane == 0) {
      Ring ring;
      auto load_tokens = [&](int unit, u32 stage) {
        const int group = unit < int4_groups ? unit : int4_groups + (unit - int4_groups) / 2;
        const int here = min(BM, tokens_padded - token_tile * BM);
        const u64 token = u64(group) * tokens_padded + token_tile * BM;
        const u32 to = base + X_OFFSET + stage * X_BYTES;
        if (MULTICAST > 1) {
          const int part = BM / MULTICAST, begin = min(here, int(rank) * part), end = min(here, begin + part);
          if (end > begin)
            bulk_copy_multicast(to + begin * 128, x + (token + begin) * 128, (end - begin) * 128, full + 8 * stage);
        } else {
          bulk_copy(to, x + token * 128, here * 128, full + 8 * stage);
        }
        bulk_copy(base + XS_OFFSET + stage * XS_BYTES, xs + token, here * 4, full + 8 * stage);
      };
      asm volatile("griddepcontrol.wait;" ::: "memory");
      for (int tile = first_tile; tile < tiles.count(); tile += tile_step) {
        tiles.locate(tile, token_tile, row_tile);
        for (int i = 0; i < steps; ++i) {
          if (started > 0) {
            --started;
          } else {
            barrier_wait(empty + 8 * ring.stage, ring.phase ^ 1);
            load_weights(unit_begin + i, ring.stage);
          }
          load_tokens(unit_begin + i, ring.stage);
          ring.advance();
        }
      }
    }
  } else {
    // Consumers.
#if PRODUCER_REGISTERS
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
#endif
    const int group_warp = warp % 4, warpgroup = warp / 4;
    const u32 w_thread = base + W_OFFSET + warpgroup * UNIT_BYTES + (threadIdx.x % 128) * 16;
    const u32 ws_thread = base + W_OFFSET + warpgroup * UNIT_BYTES + 4096 + (group_warp * 16 + lane / 4) * 2;
    const u32 xs_thread = base + XS_OFFSET + (lane % 4) * 8;
    constexpr u32 W_STAGE = WARPGROUPS * UNIT_BYTES;
    Ring ring;
    float total[BM / 2];

    auto release = [&](u32 stage) {
      __syncwarp();
      if (MULTICAST > 1) {
        if (lane < MULTICAST) barrier_arrive_remote(map_to_rank(empty + 8 * stage, lane));
      } else if (lane == 0) {
        barrier_arrive(empty + 8 * stage);
      }
    };
    // One INT4 group: multiply `now`, and meanwhile convert the next group's weights to `next`.
    auto int4_step = [&](u32 (&now)[16], u32 (&next)[16], bool more) {
      float partial[BM / 2];
      const u32 stage = ring.stage;
      const u64 b = descriptor(base + X_OFFSET + stage * X_BYTES);
      if (!PREFETCH) {
        barrier_wait(full + 8 * stage, ring.phase);
        load_codes(w_thread + stage * W_STAGE, now);
      }
      wait_turn(warpgroup);
      wgmma_fence();
#pragma unroll
      for (int c = 0; c < 4; ++c)
        wgmma_e4m3(partial, now[4 * c], now[4 * c + 1], now[4 * c + 2], now[4 * c + 3], b + 2 * c, c);
      wgmma_commit();
      pass_turn(warpgroup);
      ring.advance();
      if (PREFETCH && more) {
        barrier_wait(full + 8 * ring.stage, ring.phase);
        load_codes(w_thread + ring.stage * W_STAGE, next);
      }
      wgmma_wait();
      promote(total, partial, xs_thread + stage * XS_BYTES, ws_thread + stage * W_STAGE, 1.0f);
      release(stage);
    };

    if (warpgroup == WARPGROUPS - 1) pass_turn(warpgroup);  // the first turn is warpgroup 0's
    for (int tile = first_tile; tile < tiles.count(); tile += tile_step) {
#pragma unroll
      for (int i = 0; i < BM / 2; ++i) total[i] = 0.0f;
      const int int4_steps = max(0, min(unit_end, int4_groups) - unit_begin);
      if (int4_steps > 0) {
        u32 even[16], odd[16];
        if (PREFETCH) {
          barrier_wait(full + 8 * ring.stage, ring.phase);
          load_codes(w_thread + ring.stage * W_STAGE, even);
        }
        for (int i = 0; i < int4_steps; i += 2) {
          int4_step(even, odd, i + 1 < int4_steps);
          if (i + 1 < int4_steps) int4_step(odd, even, i + 2 < int4_steps);
        }
      }
      for (int unit = unit_begin + int4_steps; unit < unit_end; ++unit) {  // INT8 outliers, half a group each
        int partial[BM / 2];
        const u32 stage = ring.stage;
        barrier_wait(full + 8 * stage, ring.phase);
        const u32 address = w_thread + stage * W_STAGE;
        const uint4 a0 = load_shared_16(address), a1 = load_shared_16(address + 2048);
        const u64 b = descriptor(base + X_OFFSET + stage * X_BYTES) + ((unit - int4_groups) % 2) * 4;
        wgmma_fence();
        wgmma_s8(partial, a0.x, a0.y, a0.z, a0.w, b, 0);
        wgmma_s8(partial, a1.x, a1.y, a1.z, a1.w, b + 2, 1);
        wgmma_commit();
        wgmma_wait();
        promote(total, partial, xs_thread + stage * XS_BYTES, ws_thread + stage * W_STAGE, 1.0f / unit_value);
        release(stage);
        ring.advance();
      }

      tiles.locate(tile, token_tile, row_tile);
      const int here = min(BM, tokens - token_tile * BM);
      const int row0 = ((row_tile * MULTICAST + (MULTICAST > 1 ? int(rank) : 0)) * WARPGROUPS + warpgroup) * 64;
      if (SPLIT > 1) {
        const u32 slot = base + RECEIVE_OFFSET + warpgroup * 2048 + threadIdx.x % 128 * 16;
        cluster_wait();  // the peers' barriers exist
#pragma unroll
        for (int j = 0; j < TOKEN_BLOCKS; ++j) {
          const u32 owner = j % SPLIT;
          if (rank == owner || 8 * j >= here) continue;
          const u32 source = j / SPLIT * (SPLIT - 1) + (rank < owner ? rank : rank - 1);
          store_async(map_to_rank(slot + source * BLOCK_BYTES, owner), total + 4 * j, map_to_rank(received, owner));
        }
        if (int(rank) * 8 < here) barrier_wait(received, 0);
#pragma unroll
        for (int j = 0; j < TOKEN_BLOCKS; ++j) {
          if (rank != j % SPLIT || 8 * j >= here) continue;
#pragma unroll
          for (int other = 0; other < SPLIT - 1; ++other) {  // a fixed order: the sum is deterministic
            const uint4 v = load_shared_16(slot + (j / SPLIT * (SPLIT - 1) + other) * BLOCK_BYTES);
            total[4 * j] += __uint_as_float(v.x);
            total[4 * j + 1] += __uint_as_float(v.y);
            total[4 * j + 2] += __uint_as_float(v.z);
            total[4 * j + 3] += __uint_as_float(v.w);
          }
        }
      }
      // Register row r of 16 is channel 4 (r / 2) + r % 2 for r < 8 and two more for r - 8, so that
      // after the transposition a thread holds four adjacent channels of one token.
      const int row = row0 + group_warp * 16 + lane / 8 * 4 + lane / 4 % 2;
      float bias_low = 0.0f, bias_high = 0.0f;
      if (bias != nullptr && row < channels) {
        bias_low = bias[row];
        bias_high = bias[row + 2];
      }
      const int column = row0 + group_warp * 16 + lane % 4 * 4;
#pragma unroll
      for (int j = 0; j < TOKEN_BLOCKS; ++j) {
        if (SPLIT > 1 && rank != j % SPLIT) continue;
        uint2 v;
        v.x = transpose_8x8(pack_output(total[4 * j] * unit_value + bias_low, total[4 * j + 1] * unit_value + bias_low));
        v.y = transpose_8x8(pack_output(total[4 * j + 2] * unit_value + bias_high, total[4 * j + 3] * unit_value + bias_high));
        const int token = 8 * j + lane / 4;
        if (token < here && column < channels)
          *reinterpret_cast<uint2*>(static_cast<unsigned short*>(y) + u64(token_tile * BM + token) * channels + column) = v;
      }
    }
  }
  if (warp < 4) wait_turn(0);  // takes the last turn that was passed
  if (SPLIT > 1 && warp >= 4 * WARPGROUPS) {
    __syncwarp();
    cluster_wait();
  }
  if (MULTICAST > 1) {  // no CTA leaves while another copies into it or signals its barriers
    __syncwarp();
    cluster_arrive();
    cluster_wait();
  }
}
