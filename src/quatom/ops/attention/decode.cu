// Decode attention over INT4 pages, sm_80 and later. docs/lab/kernels-attention.md explains the design.
//
// One CTA takes 8 * NT query rows (row = new token * G + head of the group) of one KV head over one
// run of tokens. Its warps work alone: each streams its own tiles of TILE tokens into shared memory,
// STAGES deep, by bulk copies (BULK, sm_90 and later) or cp.async, and keeps a running softmax; they
// meet once, at the end.
//
//   scores  S (tokens x rows)   = C_k Q^T       mma.m16n8k16, A = codes of K, B = queries
//   output  O (channels x rows) = C_v^T P^T     mma.m16n8k16, A = codes of V, B = weights
//
// A code n placed in the low bits of a float16 is the subnormal n * 2**-24 (n * 2**-20 from bit 4
// on), which tensor cores multiply exactly: unpacking is one mask per two codes, with no bias to
// subtract. Scale and minimum of a token meet its score and its weight, never its elements.
//
// Rows of codes whose bytes are no multiple of 16 (HEAD_DIM 80 and 112) are copied in pieces of 8 bytes, by cp.async,
// to rows of PITCH bytes. What lies between a row's end and the next row is multiplied by queries that are 0, and
// makes channels that are not stored.
//
// Compile-time parameters: HEAD_DIM (a multiple of 16), BLOCK_SIZE, NT, WARPS, TILE, STAGES, MIN_CTAS, BULK, BF16,
// SOFTCAP, WINDOW, SINKS, SETTLED (with BULK: the last kernel writes q and the new tokens' K and V alone, so that the
// first tiles of older tokens are copied while it runs), STREAM (with BULK: pages are read once, and leave the L2 cache
// first).

#define PITCH ((HEAD_DIM / 2 + 15) / 16 * 16)       // bytes of a row of codes in shared memory
#define CHUNK_BYTES (HEAD_DIM % 32 ? 8 : 16)        // of a copy by cp.async
constexpr int ROW = HEAD_DIM / 2;                   // bytes of a row of codes
constexpr int WORDS = PITCH / 16;                   // 4-byte words of a K row that a lane holds
constexpr int CHUNKS = PITCH / 16;                  // 16-byte chunks of a row
constexpr int RECORD = BLOCK_SIZE * 2 * (ROW + 4);  // bytes of a block and KV head
constexpr int MT = TILE / 16;
constexpr int STAGE = TILE * 2 * (PITCH + 4);
__device__ constexpr int gcd(int a, int b) { return b ? gcd(b, a % b) : a; }
constexpr int RUN = gcd(BLOCK_SIZE, TILE);  // tokens of a tile that lie together in one block
#define WHOLE (BULK && TILE % BLOCK_SIZE == 0)
#if WHOLE
// A run is a block: one bulk copy takes it as it is, K, V, K pairs and V pairs. PLACE is where token first + rest of
// a tile lies from the first one of its section, whose tokens take `bytes` each; 16 divides first.
constexpr int SECTIONS = 1, PART = RUN;
#define PLACE(first, rest, bytes) ((first) / RUN * RECORD + ((first) % RUN + (rest)) * (bytes))
#else
constexpr int SECTIONS = 4, PART = TILE;  // K, V, K pairs and V pairs of a run are four copies
#define PLACE(first, rest, bytes) (first + rest) * bytes  // unparenthesized: the machine code depends on the order of sums
#endif
constexpr int COPIES = TILE / RUN * SECTIONS;  // bulk copies of a tile
constexpr int ROWS = 8 * NT;
constexpr int O_STRIDE = HEAD_DIM + 4;      // floats of a row in the exchange between warps
constexpr int EXCHANGE = ROWS * (O_STRIDE + 2) * 4;
constexpr int WARP_BYTES = STAGE * STAGES > EXCHANGE ? STAGE * STAGES : EXCHANGE;
#define INF __int_as_float(0x7f800000)
constexpr u32 LOW = 0x000F000Fu, HIGH = 0x00F000F0u;
static_assert(COPIES <= 32, "a lane issues at most one copy of a tile");
static_assert(BULK || TILE <= 64, "a lane copies at most one chunk of pairs");
static_assert(BULK || TILE * (ROW / CHUNK_BYTES) % 32 == 0, "all lanes copy the same number of chunks");
static_assert(!BULK || PITCH == ROW, "a bulk copy takes whole rows of codes");
static_assert(HEAD_DIM % 16 == 0, "copies and queries come in pieces of 8 bytes");
static_assert(STAGE % 16 == 0 && WARP_BYTES % 16 == 0, "bulk copies need 16-byte alignment");

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float2 halves_to_floats(u32 x) {
  float2 y;
  asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
      : "=f"(y.x), "=f"(y.y)
      : "r"(x));
  return y;
}

__device__ __forceinline__ u32 floats_to_halves(float low, float high) {
  u32 y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

#if SINKS
// What an output in units of 2**top is multiplied by: 1 / (sum of its weights and of the sink's).
__device__ __forceinline__ float share_beside_sink(float sum, float top, float sink) {
  const float logit = sink * 1.4426950408889634f, shift = fmaxf(top, logit);
  const float unit = exp2_fast(top - shift);  // 0 where nothing is seen
  return unit / fmaf(sum, unit, exp2_fast(logit - shift));
}
#endif

// Two adjacent values of the activation dtype, as floats and back.
__device__ __forceinline__ float2 activations_to_floats(u32 x) {
#if BF16
  return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xFFFF0000u));
#else
  return halves_to_floats(x);
#endif
}

__device__ __forceinline__ u32 floats_to_activations(float low, float high) {
#if BF16
  u32 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
#else
  return floats_to_halves(low, high);
#endif
}

__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 transpose(u32 x) {
  u32 y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Two 16-byte chunks of 16 rows: words (tokens 0-7, chunk 0), (8-15, 0), (0-7, 1), (8-15, 1), each
// holding one 2-byte column of two adjacent tokens.
__device__ __forceinline__ void load_columns(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

__device__ __forceinline__ void load_words(u32 (&w)[WORDS], u32 address) {
  if constexpr (WORDS % 4 == 0) {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4)
      asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(w[i]), "=r"(w[i + 1]), "=r"(w[i + 2]), "=r"(w[i + 3])
                   : "r"(address + 4 * i));
  } else if constexpr (WORDS % 2 == 0) {
#pragma unroll
    for (int i = 0; i < WORDS; i += 2)
      asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(w[i]), "=r"(w[i + 1]) : "r"(address + 4 * i));
  } else {
#pragma unroll
    for (int i = 0; i < WORDS; i++)
      asm volatile("ld.shared.b32 %0, [%1];" : "=r"(w[i]) : "r"(address + 4 * i));
  }
}

__device__ __forceinline__ float2 load_pair(u32 address) {
  u32 x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address));
  return halves_to_floats(x);
}

#if BULK
// Wait for the kernel before this one, and let the merge kernel get ready.
__device__ __forceinline__ void wait_for_last_kernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
#endif

// Of a batch's lengths and block tables. Before the wait for the last kernel it goes past the L1 cache, which may hold
// what an earlier kernel read there.
__device__ __forceinline__ int load_number(const int* from) {
#if SETTLED
  int number;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(number) : "l"(from));
  return number;
#else
  return *from;
#endif
}

#if !BULK
// Bytes past the end of the sequence are filled with zeros: their blocks may not exist.
template <int BYTES>
__device__ __forceinline__ void copy_chunk(u32 target, const u8* source, bool stored) {
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
                 "r"(stored ? 16 : 0)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(target), "l"(source),
                 "r"(stored ? BYTES : 0), "n"(BYTES)
                 : "memory");
}
#endif

struct Parameters {
  const u16* q;          // (T, H, D)
  u16* out;              // (T, H, D)
  float* partial;        // (T, H, splits, D)
  float2* stats;         // (T, H, splits): maximum (log2), sum
  const u8* storage;     // (P, KV, RECORD)
  const int* tables;     // (B, max_blocks)
  const int* starts;     // (B + 1,)
  const int* lengths;    // (B,)
  long long table_stride;
  long long q_stride;
  int num_kv_heads;
  int group;
  int splits;
  int row_chunks;
  float score_scale;     // softmax_scale * log2(e), or softmax_scale / softcap
  float softcap_log2e;
  int window;
#if SINKS
  const float* sinks;    // (H,)
#endif
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_CTAS) decode(const Parameters p) {
  extern __shared__ __align__(128) u8 memory[];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int g = lane >> 2, tg = lane & 3;

#if BULK && !SETTLED
  wait_for_last_kernel();
#endif
  int index = blockIdx.x;
  const int split = index % p.splits;
  index /= p.splits;
  const int kv_head = index % p.num_kv_heads;
  index /= p.num_kv_heads;
  const int chunk = index % p.row_chunks;
  const int batch = index / p.row_chunks;
  const int num_heads = p.num_kv_heads * p.group;

  const int first_q = load_number(p.starts + batch);
  const int new_tokens = load_number(p.starts + batch + 1) - first_q;
  const int length = load_number(p.lengths + batch);
  const int rows = min(new_tokens * p.group - chunk * ROWS, ROWS);
  if (rows <= 0) {
#if SETTLED
    wait_for_last_kernel();  // who waits for this kernel counts on all before it
#endif
    return;
  }
  const int first_new = chunk * ROWS / p.group;
  const int last_new = (chunk * ROWS + rows - 1) / p.group;

  // The tokens that some row sees, cut into runs of whole tiles.
  const int before = length - new_tokens;  // position of new token 0
  int end = max(before + last_new + 1, 0);
  int begin = 0;
#if WINDOW
  begin = max(before + first_new - p.window + 1, 0) / RUN * RUN;  // no block before the window is read
#endif
  const int run = ((end - begin + TILE - 1) / TILE + p.splits - 1) / p.splits * TILE;
  begin += split * run;
  end = min(end, begin + run);

  // 1. Start the copies of this warp's first tiles. Lanes SECTIONS r and after know the block of run r.
  const u32 stages = shared_address(memory) + warp * WARP_BYTES;
  const int* table = p.tables + batch * p.table_stride;
#if WHOLE
  const int my_run = lane * RUN;
#else
  const int my_run = (lane >> 2) * RUN;
#endif
  auto block_of = [&](int tile) {
    const int token = tile + my_run;
    return lane < COPIES && token < end ? load_number(table + token / BLOCK_SIZE) : 0;
  };
#if BULK
  __shared__ __align__(8) u64 barriers[WARPS * STAGES];
  const u32 barrier = shared_address(barriers) + warp * STAGES * 8;
  if (lane < STAGES)
    barrier_init(barrier + lane * 8, 1);
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  __syncwarp();

  // Lane l copies run l, or section l % 4 (K, V, K pairs, V pairs) of run l / 4.
  const int section = lane & 3;
  const int row_bytes = section < 2 ? ROW : 4;
  const int section_start = section < 2 ? section * BLOCK_SIZE * ROW
                                        : BLOCK_SIZE * (2 * ROW + (section - 2) * 4);
  const u32 target = section < 2 ? section * TILE * ROW : TILE * (2 * ROW + (section - 2) * 4);
  auto start_copy = [&](int tile, int block, int stage) {
    if (tile >= end) return;
    const int runs = min((end - tile + RUN - 1) / RUN, TILE / RUN);
    if (lane == 0) barrier_expect(barrier + stage * 8, runs * RUN * 2 * (ROW + 4));
    __syncwarp();
    if (lane < runs * SECTIONS) {
#if WHOLE
      const u8* source = p.storage + ((long long)block * p.num_kv_heads + kv_head) * RECORD;
      const u32 to = stages + stage * STAGE + lane * RECORD;
      constexpr u32 bytes = RECORD;
#else
      const u8* source = p.storage +
                         ((long long)block * p.num_kv_heads + kv_head) * RECORD + section_start +
                         (tile + my_run) % BLOCK_SIZE * row_bytes;
      const u32 to = stages + stage * STAGE + target + my_run * row_bytes;
      const u32 bytes = RUN * row_bytes;
#endif
#if STREAM
      bulk_copy(to, source, bytes, barrier + stage * 8, EVICT_FIRST);
#else
      bulk_copy(to, source, bytes, barrier + stage * 8);
#endif
    }
  };
#else
  auto start_copy = [&](int tile, int block, int stage) {
    const u32 base = stages + stage * STAGE;
    constexpr int ROW_CHUNKS = ROW / CHUNK_BYTES;
    if (tile < end) {
#pragma unroll
      for (int i = 0; i < TILE * ROW_CHUNKS; i += 32) {
        const int t = (i + lane) / ROW_CHUNKS, c = (i + lane) % ROW_CHUNKS;
        const int owner = __shfl_sync(~0u, block, t / RUN * 4);
        const bool stored = tile + t / RUN * RUN < end;
        const u8* source = p.storage + ((long long)owner * p.num_kv_heads + kv_head) * RECORD +
                           (tile + t) % BLOCK_SIZE * ROW + c * CHUNK_BYTES;
        copy_chunk<CHUNK_BYTES>(base + t * PITCH + c * CHUNK_BYTES, source, stored);
        copy_chunk<CHUNK_BYTES>(base + (TILE + t) * PITCH + c * CHUNK_BYTES, source + BLOCK_SIZE * ROW, stored);
      }
      // Four tokens' pairs a chunk: K pairs by the first lanes, V pairs by the others.
      const int chunk_index = lane % (TILE / 4), which = lane / (TILE / 4), t = chunk_index * 4;
      const int owner = __shfl_sync(~0u, block, t / RUN * 4);
      if (which < 2) {
        const u8* source = p.storage + ((long long)owner * p.num_kv_heads + kv_head) * RECORD +
                           BLOCK_SIZE * (2 * ROW + which * 4) + (tile + t) % BLOCK_SIZE * 4;
        copy_chunk<16>(base + TILE * (2 * PITCH + which * 4) + t * 4, source,
                       tile + t / RUN * RUN < end);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
#endif
  int next = begin + warp * TILE;  // tile whose copy starts next
  int next_block[STAGES];
#pragma unroll
  for (int s = 0; s < STAGES; s++) next_block[s] = block_of(next + s * WARPS * TILE);
#if SETTLED
  auto is_old = [&](int s) { return next + s * WARPS * TILE + TILE <= before; };
#pragma unroll
  for (int s = 0; s < STAGES; s++)
    if (is_old(s)) start_copy(next + s * WARPS * TILE, next_block[s], s);
  wait_for_last_kernel();
#pragma unroll
  for (int s = 0; s < STAGES; s++)
    if (!is_old(s)) start_copy(next + s * WARPS * TILE, next_block[s], s);
  next += STAGES * WARPS * TILE;
#else
#pragma unroll
  for (int s = 0; s < STAGES; s++) {
    start_copy(next, next_block[s], s);
    next += WARPS * TILE;
  }
#endif
  int block = block_of(next);

  // 2. Queries, scaled by a power of two to between 2**10 and 2**11 so that neither they nor a
  // sixteenth of them (for codes from bit 4 on) lose bits in float16.
  u32 query[NT][2 * WORDS][2];
  float score_factor[NT][2], minimum_factor[NT][2];
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const int row = chunk * ROWS + n * 8 + g;
    const bool valid = n * 8 + g < rows;
    const u16* q = p.q + (first_q + (valid ? row / p.group : 0)) * p.q_stride +
                   (kv_head * p.group + (valid ? row % p.group : 0)) * HEAD_DIM + tg * 4 * WORDS;
    float low[WORDS][4], high[WORDS][4], largest = 0.f, sum = 0.f;
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
      uint2 a = {}, b = {};
      if (PITCH == ROW || tg * 4 * WORDS + 4 * i < ROW) {
        a = *(const uint2*)(q + 4 * i);
        b = *(const uint2*)(q + HEAD_DIM / 2 + 4 * i);
      }
      const float2 v[4] = {activations_to_floats(a.x), activations_to_floats(a.y),
                           activations_to_floats(b.x), activations_to_floats(b.y)};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        low[i][j] = valid ? (j & 1 ? v[j / 2].y : v[j / 2].x) : 0.f;
        high[i][j] = valid ? (j & 1 ? v[2 + j / 2].y : v[2 + j / 2].x) : 0.f;
        largest = fmaxf(largest, fmaxf(fabsf(low[i][j]), fabsf(high[i][j])));
        sum += low[i][j] + high[i][j];
      }
    }
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, mask));
      sum += __shfl_xor_sync(~0u, sum, mask);
    }
    // 2**(10 - exponent), its exponent field kept inside the normal floats.
    const int field = min(max(264 - (int)(__float_as_uint(largest) >> 23), 1), 253);
    const float up = __uint_as_float((u32)field << 23);
    const float down = __uint_as_float((u32)(254 - field) << 23);
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
#pragma unroll
      for (int odd = 0; odd < 2; odd++) {
        query[n][2 * i + odd][0] = floats_to_halves(low[i][odd] * up, low[i][odd + 2] * up);
        query[n][2 * i + odd][1] =
            floats_to_halves(high[i][odd] * up * 0.0625f, high[i][odd + 2] * up * 0.0625f);
      }
    }
    // Scores are in the layout of the accumulator: this lane's columns are rows 2 tg, 2 tg + 1.
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const int owner = (2 * tg + c) * 4;
      score_factor[n][c] = __shfl_sync(~0u, down, owner) * (16777216.f * p.score_scale);
      minimum_factor[n][c] = __shfl_sync(~0u, sum, owner) * p.score_scale;
    }
  }
  int last_seen[NT][2];  // position of each row's own token
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int c = 0; c < 2; c++)
      last_seen[n][c] = before + (chunk * ROWS + n * 8 + 2 * tg + c) / p.group;

  // 3. Tiles.
  float output[NT][2 * CHUNKS][4] = {};
  float maximum[NT][2], total[NT][2] = {}, offset[NT][2] = {};
#pragma unroll
  for (int n = 0; n < NT; n++) maximum[n][0] = maximum[n][1] = -INF;

  int stage = 0;
  u32 parity = 0;
  for (int tile = begin + warp * TILE; tile < end; tile += WARPS * TILE) {
#if BULK
    barrier_wait(barrier + stage * 8, parity);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
    __syncwarp();
#endif
    const u32 keys = stages + stage * STAGE, values = keys + PART * PITCH;
    const u32 key_pairs = values + PART * PITCH, value_pairs = key_pairs + PART * 4;

    float score[MT][NT][4] = {};
#pragma unroll
    for (int m = 0; m < MT; m++) {
      u32 a[WORDS], b[WORDS];
      load_words(a, keys + PLACE(m * 16, g, PITCH) + tg * 4 * WORDS);
      load_words(b, keys + PLACE(m * 16, g + 8, PITCH) + tg * 4 * WORDS);
#pragma unroll
      for (int i = 0; i < WORDS; i++) {
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
          const u32 x = odd ? a[i] >> 8 : a[i], y = odd ? b[i] >> 8 : b[i];
#pragma unroll
          for (int n = 0; n < NT; n++)
            mma(score[m][n], x & LOW, y & LOW, x & HIGH, y & HIGH, query[n][2 * i + odd][0],
                query[n][2 * i + odd][1]);
        }
      }
    }

    // Scores in log2, and their maximum with log2 of V's scale added: the largest weight * scale
    // is then 1, whatever the size of V, and float16 holds the rest.
    float scale[MT][2], minimum[MT][2];
    float tile_maximum[NT][2];
#pragma unroll
    for (int n = 0; n < NT; n++) tile_maximum[n][0] = tile_maximum[n][1] = -INF;
    bool whole = tile + TILE <= min(end, before + first_new + 1);
#if WINDOW
    whole = whole && tile > before + last_new - p.window;
#endif
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int t = m * 16 + h * 8 + g;
        const float2 key = load_pair(key_pairs + PLACE(m * 16, h * 8 + g, 4));
        const float2 value = load_pair(value_pairs + PLACE(m * 16, h * 8 + g, 4));
        scale[m][h] = value.x;
        minimum[m][h] = value.y;
        const float log_scale = log2_fast(value.x);
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
          for (int c = 0; c < 2; c++) {
            float& s = score[m][n][2 * h + c];
            s = fmaf(s * score_factor[n][c], key.x, key.y * minimum_factor[n][c]);
#if SOFTCAP
            s = p.softcap_log2e * (1.f - 2.f / (1.f + exp2_fast(2.885390082f * s)));
#endif
          }
        if (!whole) {
          // Bytes of a token past the end may be anything, NaN too: select, never multiply by 0.
          const bool stored = tile + t < end;
          scale[m][h] = stored ? scale[m][h] : 0.f;
          minimum[m][h] = stored ? minimum[m][h] : 0.f;
#pragma unroll
          for (int n = 0; n < NT; n++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
              bool seen = stored && tile + t <= last_seen[n][c];
#if WINDOW
              seen = seen && tile + t > last_seen[n][c] - p.window;
#endif
              score[m][n][2 * h + c] = seen ? score[m][n][2 * h + c] : -INF;
            }
        }
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
          for (int c = 0; c < 2; c++) {
            const float s = score[m][n][2 * h + c];
            // -inf plus a stale scale's log2, which may be +inf or NaN, must stay -inf.
            const float raised = whole ? s + log_scale : (s == -INF ? s : s + log_scale);
            tile_maximum[n][c] = fmaxf(tile_maximum[n][c], raised);
          }
      }
    }

    u32 weight[MT][NT][2];
#pragma unroll
    for (int n = 0; n < NT; n++) {
      float decay[2], shift[2];
#pragma unroll
      for (int c = 0; c < 2; c++) {
        float top = tile_maximum[n][c];
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, mask));
        top = fmaxf(top, maximum[n][c]);
        shift[c] = top == -INF ? 0.f : top;  // nothing seen yet: weights exp2(-inf) are 0
        decay[c] = exp2_fast(maximum[n][c] - shift[c]);
        maximum[n][c] = top;
        total[n][c] *= decay[c];
        offset[n][c] *= decay[c];
      }
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          float w[2];
#pragma unroll
          for (int c = 0; c < 2; c++) {
            w[c] = exp2_fast(score[m][n][2 * h + c] - shift[c]);
            total[n][c] += w[c];
            offset[n][c] = fmaf(w[c], minimum[m][h], offset[n][c]);
          }
          weight[m][n][h] = floats_to_halves(w[0] * scale[m][h], w[1] * scale[m][h]);
        }
      if (__any_sync(~0u, decay[0] != 1.f || decay[1] != 1.f)) {
#pragma unroll
        for (int i = 0; i < 2 * CHUNKS; i++) {
          output[n][i][0] *= decay[0];
          output[n][i][1] *= decay[1];
          output[n][i][2] *= decay[0];
          output[n][i][3] *= decay[1];
        }
      }
    }

    const u32 my_values = values + ((lane >> 3 & 1) * 8 + (lane & 7)) * PITCH + (lane >> 4) * 16;
#pragma unroll
    for (int m = 0; m < MT; m++) {
      u32 b[NT][2];
#pragma unroll
      for (int n = 0; n < NT; n++) {
        b[n][0] = transpose(weight[m][n][0]);
        b[n][1] = transpose(weight[m][n][1]);
      }
#pragma unroll
      for (int c = 0; c < CHUNKS; c += 2) {
        u32 r[4];
        // With an odd number of chunks the last pair is the last two: one is loaded, not used.
        const int first = c + 2 > CHUNKS ? c - 1 : c;
        load_columns(r, my_values + PLACE(m * 16, 0, PITCH) + first * 16);
#pragma unroll
        for (int k = c - first; k < 2; k++) {
#pragma unroll
          for (int odd = 0; odd < 2; odd++) {
            const u32 x = odd ? r[2 * k] >> 8 : r[2 * k], y = odd ? r[2 * k + 1] >> 8 : r[2 * k + 1];
#pragma unroll
            for (int n = 0; n < NT; n++)
              mma(output[n][2 * (first + k) + odd], x & LOW, x & HIGH, y & LOW, y & HIGH, b[n][0],
                  b[n][1]);
          }
        }
      }
    }

    __syncwarp();  // all lanes have read this stage
    start_copy(next, block, stage);
    next += WARPS * TILE;
    block = block_of(next);
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }

  // 4. The warps meet: their outputs, maxima and sums, each in the memory of its own stages.
  __syncwarp();
  float* exchange = (float*)(memory + warp * WARP_BYTES);
#pragma unroll
  for (int n = 0; n < NT; n++) {
#pragma unroll
    for (int c = 0; c < 2; c++) {
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) {
        total[n][c] += __shfl_xor_sync(~0u, total[n][c], mask);
        offset[n][c] += __shfl_xor_sync(~0u, offset[n][c], mask);
      }
      const int row = n * 8 + 2 * tg + c;
      float* o = exchange + row * O_STRIDE;
#pragma unroll
      for (int k = 0; k < CHUNKS; k++) {
        if (PITCH != ROW && 16 * k + 2 * g >= ROW) continue;
        const float* even = output[n][2 * k];
        const float* odd = output[n][2 * k + 1];
        // Row g of the fragments is channel 16 k + 2 g (+ 1 where shifted); row g + 8 its partner
        // in the other half, whose codes were 4 bits higher.
        *(float2*)(o + 16 * k + 2 * g) = make_float2(fmaf(even[c], 16777216.f, offset[n][c]),
                                                     fmaf(odd[c], 16777216.f, offset[n][c]));
        *(float2*)(o + HEAD_DIM / 2 + 16 * k + 2 * g) =
            make_float2(fmaf(even[2 + c], 1048576.f, offset[n][c]),
                        fmaf(odd[2 + c], 1048576.f, offset[n][c]));
      }
      if (g == 0)
        *(float2*)(exchange + ROWS * O_STRIDE + 2 * row) =
            make_float2(maximum[n][c], total[n][c]);
    }
  }
  __syncthreads();

  for (int item = threadIdx.x; item < rows * (HEAD_DIM / 2); item += WARPS * 32) {
    const int row = item / (HEAD_DIM / 2), channel = item % (HEAD_DIM / 2) * 2;
    float2 stat[WARPS];
    float top = -INF, sum = 0.f, x = 0.f, y = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      stat[w] = *(const float2*)(memory + w * WARP_BYTES + (ROWS * O_STRIDE + 2 * row) * 4);
      top = fmaxf(top, stat[w].x);
    }
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float share = stat[w].x == -INF ? 0.f : exp2_fast(stat[w].x - top);
      const float2 o = *(const float2*)(memory + w * WARP_BYTES + (row * O_STRIDE + channel) * 4);
      sum = fmaf(stat[w].y, share, sum);
      x = fmaf(o.x, share, x);
      y = fmaf(o.y, share, y);
    }
    const int q_row = chunk * ROWS + row;
    const long long head =
        (long long)(first_q + q_row / p.group) * num_heads + kv_head * p.group + q_row % p.group;
    if (p.splits == 1) {
#if SINKS
      const float norm = share_beside_sink(sum, top, p.sinks[head % num_heads]);
#else
      const float norm = sum > 0.f ? 1.f / sum : 0.f;
#endif
      *(u32*)(p.out + head * HEAD_DIM + channel) = floats_to_activations(x * norm, y * norm);
    } else {
      const long long part = head * p.splits + split;
      *(float2*)(p.partial + part * HEAD_DIM + channel) = make_float2(x, y);
      if (channel == 0) p.stats[part] = make_float2(top, sum);
    }
  }
}

// Merge the splits of one (token, head): warp w takes splits w, w + 4, ..., in that order always.
extern "C" __global__ void __launch_bounds__(128) merge(const Parameters p) {
  __shared__ float2 sums[4][HEAD_DIM / 2];
  __shared__ float totals[4];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const long long row = blockIdx.x;
#if BULK
  // What comes next may read its parameters while the splits are still at work.
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  constexpr int PAIRS = (HEAD_DIM + 63) / 64;  // of channels, of a lane
  auto load_split = [&](int split, float2 (&of)[PAIRS]) {
    const float2* o = (const float2*)(p.partial + (row * p.splits + split) * HEAD_DIM);
#pragma unroll
    for (int k = 0; k < PAIRS; k++)
      if (HEAD_DIM % 64 == 0 || k * 32 + lane < HEAD_DIM / 2) of[k] = o[k * 32 + lane];
  };
  // The first splits of each warp come together with the maxima: one latency of memory, not two.
  float2 early[2][PAIRS];
#pragma unroll
  for (int e = 0; e < 2; e++)
    if (warp + 4 * e < p.splits) load_split(warp + 4 * e, early[e]);
  const float2* stats = p.stats + row * p.splits;
  float top = -INF;
  for (int s = lane; s < p.splits; s += 32) top = fmaxf(top, stats[s].x);
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, mask));

  float2 acc[PAIRS] = {};
  float total = 0.f;
  auto add_split = [&](int split, const float2 (&of)[PAIRS]) {
    const float2 stat = stats[split];
    const float share = stat.x == -INF ? 0.f : exp2_fast(stat.x - top);
    total = fmaf(stat.y, share, total);
#pragma unroll
    for (int k = 0; k < PAIRS; k++)
      if (HEAD_DIM % 64 == 0 || k * 32 + lane < HEAD_DIM / 2) {
        acc[k].x = fmaf(of[k].x, share, acc[k].x);
        acc[k].y = fmaf(of[k].y, share, acc[k].y);
      }
  };
#pragma unroll
  for (int e = 0; e < 2; e++)
    if (warp + 4 * e < p.splits) add_split(warp + 4 * e, early[e]);
#pragma unroll 8
  for (int s = warp + 8; s < p.splits; s += 4) {
    float2 of[PAIRS];
    load_split(s, of);
    add_split(s, of);
  }
#pragma unroll
  for (int k = 0; k < PAIRS; k++)
    if (HEAD_DIM % 64 == 0 || k * 32 + lane < HEAD_DIM / 2) sums[warp][k * 32 + lane] = acc[k];
  if (lane == 0) totals[warp] = total;
  __syncthreads();
  const float sum = (totals[0] + totals[1]) + (totals[2] + totals[3]);
#if SINKS
  const float norm = share_beside_sink(sum, top, p.sinks[row % (p.num_kv_heads * p.group)]);
#else
  const float norm = sum > 0.f ? 1.f / sum : 0.f;
#endif
  for (int i = threadIdx.x; i < HEAD_DIM / 2; i += 128) {
    const float2 a = sums[0][i], b = sums[1][i], c = sums[2][i], d = sums[3][i];
    *(u32*)(p.out + row * HEAD_DIM + 2 * i) = floats_to_activations(
        ((a.x + b.x) + (c.x + d.x)) * norm, ((a.y + b.y) + (c.y + d.y)) * norm);
  }
}
