// Tokens for the experts of linear/kernel.cu: cuts the run of each expert into tiles and, if asked, copies quantized rows
// into grouped order, the run of each expert from a multiple of 16 rows on. With the copies it can cut runs a second time,
// for the product that follows, whose rows stay where they are. See `quatom.ops.experts.cuda`.
//
// A bulk copy brings a tile of adjacent rows, in the swizzle that belongs to their numbers: rows scattered over a batch
// would need a copy of 16 bytes each, by threads that the multiplication needs itself. Here each byte moves once for all
// tiles of output channels.

constexpr int THREADS = 256;
constexpr int CTAS_PER_SM = 5;
constexpr int AT_ONCE = 4;  // loads of a thread in flight

__device__ __forceinline__ int load_int(const int* from) {
  u32 to;
  load_result(from, to);
  return int(to);
}
// Copies pieces `first`, `first` + `step` and so on of `count`, whose distances in bytes are given. Few registers: what
// hides the latency is many CTAs of an SM.
template <typename T>
__device__ __forceinline__ void copy_pieces(const u8* from, u8* to, int first, int count, int step, u64 from_bytes, u64 to_bytes) {
  from += first * from_bytes, to += first * to_bytes;
  from_bytes *= step, to_bytes *= step;
#pragma unroll 1
  for (; first < count; first += AT_ONCE * step) {
    T pieces[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i, from += from_bytes)
      if (first + i * step < count) load_result(from, pieces[i]);
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i, to += to_bytes)
      if (first + i * step < count) *reinterpret_cast<T*>(to) = pieces[i];
  }
}

// Place of token t in the scales of 16 tokens, and the token at a place.
__device__ __forceinline__ int place_of(int t) { return t % 8 / 2 * 4 + t % 16 / 8 * 2 + t % 2; }
__device__ __forceinline__ int token_at(int place) { return place / 4 * 2 + place / 2 % 2 * 8 + place % 2; }

// The last expert whose first row (or tile) is not beyond `at`; experts without any share theirs with the next one.
__device__ __forceinline__ int find(const int* firsts, int experts, int at) {
  int low = 0, high = experts;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (firsts[middle] <= at) low = middle;
    else high = middle;
  }
  return low;
}

// Tiles of a run that begins `before` rows after the first one's first row.
__device__ __forceinline__ int count_tiles(int before, int count, int rows) {
  return count == 0 ? 0 : (before + count + rows - 1) / rows;
}

extern "C" __global__ void __launch_bounds__(THREADS, CTAS_PER_SM)
arrange_experts(const u8* x,                      // [groups][tokens_padded][128], swizzled
                const u8* xs,                     // [groups][tokens_padded / 16][2][16] floats
                const int* slots,                 // [positions]
                const int* offsets,               // [experts + 1]
                u8* to,                           // [groups][rows_padded][128], or null: rows stay where they are
                u8* to_scales,                    // [groups][rows_padded / 16][2][16] floats
                int4* runs,                       // number of tiles, then (expert, row of x, row of y, bounds) of each
                int experts, int tokens_padded, int rows_padded, int groups,
                int top_k,                        // 0 where rows stay
                int tile_rows, int alignment,     // tiles begin at multiples of `alignment` where rows stay
                int parts,                        // CTAs that share the groups of 16 rows
                int4* next_runs,                  // of the product that follows, or null
                int next_tile_rows, int next_alignment) {
  extern __shared__ int shared[];
  int* const first_row = shared;                  // [experts + 1], in `to`
  int* const first_tile = shared + experts + 1;   // [experts + 1]
  int* const next_tile = shared + 2 * (experts + 1);  // [experts + 1], of next_runs
  int* const bounds = shared + 3 * (experts + 1);     // [experts + 1]
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  for (int e = threadIdx.x; e <= experts; e += THREADS) bounds[e] = load_int(offsets + e);
  __syncthreads();
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    int rows = 0, tiles = 0, next_tiles = 0;
    for (int begin = 0; begin <= experts; begin += 32) {
      const int e = begin + lane;
      int own_rows = 0, own_tiles = 0, own_next = 0;
      if (e < experts) {
        const int count = bounds[e + 1] - bounds[e];
        own_rows = (count + 15) / 16 * 16;
        own_tiles = count_tiles(to == nullptr ? bounds[e] % alignment : 0, count, tile_rows);
        if (next_runs != nullptr) own_next = count_tiles(bounds[e] % next_alignment, count, next_tile_rows);
      }
      int rows_to = own_rows, tiles_to = own_tiles, next_to = own_next;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int r = __shfl_up_sync(~0u, rows_to, step), t = __shfl_up_sync(~0u, tiles_to, step);
        const int n = __shfl_up_sync(~0u, next_to, step);
        if (lane >= step) rows_to += r, tiles_to += t, next_to += n;
      }
      if (e <= experts) {
        first_row[e] = rows + rows_to - own_rows;
        first_tile[e] = tiles + tiles_to - own_tiles;
        next_tile[e] = next_tiles + next_to - own_next;
      }
      rows += __shfl_sync(~0u, rows_to, 31);
      tiles += __shfl_sync(~0u, tiles_to, 31);
      next_tiles += __shfl_sync(~0u, next_to, 31);
    }
  }
  __syncthreads();

  // Tiles of rows that stay begin at multiples of an alignment, those of copied rows with their run.
  auto write_tiles = [&](int4* runs_to, const int* firsts, int size, int align, bool copied) {
    const int thread = blockIdx.x * THREADS + threadIdx.x;
    if (thread == 0) runs_to[0] = make_int4(firsts[experts], 0, 0, 0);
    for (int tile = thread; tile < firsts[experts]; tile += gridDim.x * THREADS) {
      const int e = find(firsts, experts, tile);
      const int ahead = (tile - firsts[e]) * size;
      int x_row = first_row[e] + ahead, y_row = bounds[e] + ahead;
      if (!copied) x_row = y_row = bounds[e] / align * align + ahead;
      const int low = max(bounds[e] - y_row, 0), high = min(bounds[e + 1] - y_row, size);
      runs_to[1 + tile] = make_int4(e, x_row, y_row, low | high << 16);
    }
  };
  write_tiles(runs, first_tile, tile_rows, alignment, to != nullptr);
  if (next_runs != nullptr) write_tiles(next_runs, next_tile, next_tile_rows, next_alignment, false);
  if (to == nullptr) return;

  const int part = blockIdx.x % parts;
  for (int block = blockIdx.x / parts; 16 * block < first_row[experts]; block += gridDim.x / parts) {
    const int e = find(first_row, experts, 16 * block);
    const int first = bounds[e] + 16 * block - first_row[e], last = bounds[e + 1];  // positions
    const int row = threadIdx.x / 8 % 16, piece = threadIdx.x % 8;
    const int place = threadIdx.x % 16, kind = threadIdx.x / 16 % 2, position = first + token_at(place);
    const int slot = first + row < last ? load_int(slots + first + row) : 0;
    const int slot_of_scales = position < last ? load_int(slots + position) : 0;
    if (first + row < last) {
      const int token = slot / top_k;
      constexpr int AT_A_TIME = THREADS / 128;  // groups
      copy_pieces<uint4>(x + u64(token) * 128 + (piece ^ row % 8 ^ token % 8) * 16, to + u64(16 * block + row) * 128 + piece * 16,
                         part * AT_A_TIME + threadIdx.x / 128, groups, parts * AT_A_TIME, u64(tokens_padded) * 128,
                         u64(rows_padded) * 128);
    }
    if (position < last) {
      const int token = slot_of_scales / top_k;
      constexpr int AT_A_TIME = THREADS / 32;
      copy_pieces<u32>(xs + (u64(token / 16) * 32 + kind * 16 + place_of(token)) * 4,
                       to_scales + (u64(block) * 32 + kind * 16 + place) * 4, part * AT_A_TIME + threadIdx.x / 32, groups,
                       parts * AT_A_TIME, u64(tokens_padded) / 16 * 128, u64(rows_padded) / 16 * 128);
    }
  }
}
