// Tokens for the experts of linear/kernel.cu: cuts the run of each expert into tiles and, if asked, copies quantized rows
// into grouped order, the run of each expert from a multiple of 16 rows on. See `quatom.ops.experts.cuda`.
//
// A bulk copy brings a tile of adjacent rows, in the swizzle that belongs to their numbers: rows scattered over a batch
// would need a copy of 16 bytes each, by threads that the multiplication needs itself. Here each byte moves once for all
// tiles of output channels.

constexpr int THREADS = 256;

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

extern "C" __global__ void __launch_bounds__(THREADS)
arrange_experts(const u8* __restrict__ x,         // [groups][tokens_padded][128], swizzled
                const float* __restrict__ xs,     // [groups][tokens_padded / 16][2][16]
                const int* __restrict__ slots,    // [positions]
                const int* __restrict__ offsets,  // [experts + 1]
                u8* __restrict__ to,              // [groups][rows_padded][128], or null: rows stay where they are
                float* __restrict__ to_scales,    // [groups][rows_padded / 16][2][16]
                int4* __restrict__ runs,          // number of tiles, then (expert, row of x, row of y, bounds) of each
                int experts, int tokens_padded, int rows_padded, int groups,
                int top_k,                        // 0 where rows stay
                int tile_rows, int alignment,     // tiles begin at multiples of `alignment` where rows stay
                int parts) {                      // CTAs that share the groups of 16 rows
  extern __shared__ int shared[];
  int* const first_row = shared;                  // [experts + 1], in `to`
  int* const first_tile = shared + experts + 1;   // [experts + 1]
  int* const bounds = shared + 2 * (experts + 1);  // [experts + 1]
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  for (int e = threadIdx.x; e <= experts; e += THREADS) bounds[e] = offsets[e];
  __syncthreads();
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    int rows = 0, tiles = 0;
    for (int begin = 0; begin <= experts; begin += 32) {
      const int e = begin + lane;
      int own_rows = 0, own_tiles = 0;
      if (e < experts) {
        const int count = bounds[e + 1] - bounds[e];
        own_rows = (count + 15) / 16 * 16;
        const int before = to == nullptr ? bounds[e] % alignment : 0;
        own_tiles = count == 0 ? 0 : (before + count + tile_rows - 1) / tile_rows;
      }
      int rows_to = own_rows, tiles_to = own_tiles;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int r = __shfl_up_sync(~0u, rows_to, step), t = __shfl_up_sync(~0u, tiles_to, step);
        if (lane >= step) rows_to += r, tiles_to += t;
      }
      if (e <= experts) {
        first_row[e] = rows + rows_to - own_rows;
        first_tile[e] = tiles + tiles_to - own_tiles;
      }
      rows += __shfl_sync(~0u, rows_to, 31);
      tiles += __shfl_sync(~0u, tiles_to, 31);
    }
  }
  __syncthreads();

  const int thread = blockIdx.x * THREADS + threadIdx.x;
  if (thread == 0) runs[0] = make_int4(first_tile[experts], 0, 0, 0);
  for (int tile = thread; tile < first_tile[experts]; tile += gridDim.x * THREADS) {
    const int e = find(first_tile, experts, tile);
    const int ahead = (tile - first_tile[e]) * tile_rows;
    int x_row = first_row[e] + ahead, y_row = bounds[e] + ahead;
    if (to == nullptr) x_row = y_row = bounds[e] / alignment * alignment + ahead;
    const int low = max(bounds[e] - y_row, 0), high = min(bounds[e + 1] - y_row, tile_rows);
    runs[1 + tile] = make_int4(e, x_row, y_row, low | high << 16);
  }
  if (to == nullptr) return;

  const int part = blockIdx.x % parts;
  for (int block = blockIdx.x / parts; 16 * block < first_row[experts]; block += gridDim.x / parts) {
    const int e = find(first_row, experts, 16 * block);
    const int first = bounds[e] + 16 * block - first_row[e], last = bounds[e + 1];  // positions
    const int row = threadIdx.x / 8 % 16, piece = threadIdx.x % 8;
    if (first + row < last) {
      const int token = slots[first + row] / top_k;
      const u8* from = x + u64(token) * 128 + (piece ^ row % 8 ^ token % 8) * 16;
      u8* into = to + u64(16 * block + row) * 128 + piece * 16;
      const int first_group = part * (THREADS / 128) + threadIdx.x / 128, step = parts * (THREADS / 128);
      const u64 from_step = u64(step) * tokens_padded * 128, into_step = u64(step) * rows_padded * 128;
      from += u64(first_group) * tokens_padded * 128, into += u64(first_group) * rows_padded * 128;
#pragma unroll 4
      for (int g = first_group; g < groups; g += step, from += from_step, into += into_step)
        *reinterpret_cast<int4*>(into) = *reinterpret_cast<const int4*>(from);
    }
    const int place = threadIdx.x % 16, kind = threadIdx.x / 16 % 2, position = first + token_at(place);
    if (position < last) {
      const int token = slots[position] / top_k;
#pragma unroll 4
      for (int g = part * (THREADS / 32) + threadIdx.x / 32; g < groups; g += parts * (THREADS / 32))
        to_scales[(u64(g) * rows_padded / 16 + block) * 32 + kind * 16 + place] =
            xs[(u64(g) * tokens_padded / 16 + token / 16) * 32 + kind * 16 + place_of(token)];
    }
  }
}
