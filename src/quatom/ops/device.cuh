// What CUDA sources of this package share: short names of types, addresses in shared memory, barriers that count
// bytes, bulk copies, clusters, an exact division. `cuda_build.read_source` puts it before each of them, which
// include no header. Barriers need sm_90.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ u32 shared_address(const void* p) {
  return static_cast<u32>(__cvta_generic_to_shared(p));
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

// The same with a policy of the L2 cache, as createpolicy makes them. Lines of what is read once are taken again first, so
// that activations and parameters of other kernels stay.
constexpr u64 EVICT_FIRST = 0x12F0000000000000, EVICT_NORMAL = 0x1000000000000000;
__device__ __forceinline__ void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}

// Loads of what the kernel before this one computes, for use after griddepcontrol.wait. An ordinary load through a
// `const __restrict__` pointer may be moved before that wait by the compiler: it takes the memory for constant.
__device__ __forceinline__ void load_result(const void* from, u32& to) {
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(to) : "l"(from));
}
__device__ __forceinline__ void load_result(const void* from, uint2& to) {
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(to.x), "=r"(to.y) : "l"(from));
}
__device__ __forceinline__ void load_result(const void* from, uint4& to) {
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w)
               : "l"(from));
}

// Division by a number of at most 11 significant bits, correctly rounded. high is its correctly rounded
// reciprocal and low what that lacks, so x * high + x * low errs by 2**-47 before the one rounding that
// counts. A quotient of 24 by 11 bits lies at least 2**-36 of itself from the middle of two floats (the
// middle has 25 bits, times 11 makes 36; it is never hit, because an odd 25-bit number has no 24-bit
// multiple), so that rounding goes the right way.
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
