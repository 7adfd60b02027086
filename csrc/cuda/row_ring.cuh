/*
 * The rows of one or two arrays on their way to a thread, through a ring in shared memory: copies run ahead of the
 * arithmetic without a register, and the bus stays busy while sums are put away. No thread reads what another copied.
 *
 * Copies are granules of 16 bytes at multiples of 16. Vectors of the tiling are such granules where the array begins at
 * one; otherwise a vector lies in two, and is put right when it is read.
 */
#ifndef KASMINA_CUDA_ROW_RING_CUH
#define KASMINA_CUDA_ROW_RING_CUH

#include "cuda/ptx.cuh"
#include "cuda/tiling.cuh"

namespace kasmina
{

static __host__ __device__ __forceinline__ uint32_t misalignment(const void *array)
{
    return (uint32_t)((uintptr_t)array % VECTOR_BYTES);
}

/* Granules that hold a vector of each of the arrays; NULL is any array. */
static inline int granules_of(const void *first, const void *second)
{
    return misalignment(first) || misalignment(second) ? 2 : 1;
}

/* Granules, of which only the elements inside the array are read. */
template <typename bits>
__device__ __noinline__ void copy_granules(uint32_t to, const char *from, int granules, const char *begin,
                                           const char *end)
{
    for (; granules > 0; --granules, from += VECTOR_BYTES, to += VECTOR_BYTES) {
        if (from >= begin && from + VECTOR_BYTES <= end) {
            copy_to_shared_through_l1(to, from); /* the neighbour needs it too */
            continue;
        }
#pragma unroll 1
        for (int k = 0; k < VECTOR_BYTES; k += (int)sizeof(bits))
            if (from + k >= begin && from + k < end) store_shared(to + k, __ldg((const bits *)(from + k)));
    }
}

/* A vector that begins `shift` bytes into two granules. */
inline __device__ __noinline__ uint4 read_shifted(uint32_t granules, uint32_t shift)
{
    uint32_t words[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) words[i] = load_shared_word(granules + 4 * i);
    /* By 8, 4 and up to 3 bytes. */
#pragma unroll
    for (int i = 0; i < 6; ++i) words[i] = shift & 8 ? words[i + 2] : words[i];
#pragma unroll
    for (int i = 0; i < 5; ++i) words[i] = shift & 4 ? words[i + 1] : words[i];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = __funnelshift_r(words[i], words[i + 1], shift % 4 * 8);
    return make_uint4(words[0], words[1], words[2], words[3]);
}

/* ROWS are copied and read together, STAGES - 1 times that many ahead. */
template <kasmina_dtype D, int ARRAYS, int ROWS, int STAGES> struct row_ring {
    using way = walker<D>;
    using bits = typename element<D>::bits;

    uint32_t base;    /* the thread's place in the ring's first row, as a shared address */
    uint32_t filling; /* from there, the stage to fill next */
    uint32_t reading; /* and the stage to read */
    int granules;     /* a vector */
    way ahead;        /* the row to copy next */
    const char *begin[ARRAYS];
    bool plain; /* vectors are whole, and granules */

    static __host__ __device__ __forceinline__ uint32_t row_bytes(const tiling &t, int granules)
    {
        return (uint32_t)(t.threads() * VECTOR_BYTES * granules);
    }
    static __host__ __device__ __forceinline__ uint32_t bytes(const tiling &t, int granules)
    {
        return STAGES * ROWS * ARRAYS * row_bytes(t, granules);
    }

    /* `arrays` are those that granules_of() knows. The first copies start. */
    __device__ __forceinline__ row_ring(const tiling &t, const way &walk, void *shared, const void *const *arrays,
                                        int granules)
        : granules(granules), ahead(walk)
    {
        base = shared_address(shared) + threadIdx.x * VECTOR_BYTES * granules;
        filling = reading = 0;
        plain = walk.mask == way::ALL && granules == 1;
#pragma unroll
        for (int a = 0; a < ARRAYS; ++a) begin[a] = (const char *)arrays[a];
#pragma unroll 1
        for (int s = 0; s < STAGES - 1; ++s) fill<false>(t);
    }
    /* Copy the stage that is STAGES - 1 ahead, and wait for the one to read. PLAIN: `plain` is known to hold. */
    template <bool PLAIN> __device__ __forceinline__ void next(const tiling &t)
    {
        fill<PLAIN>(t);
        wait_for_copies<STAGES - 1>();
    }
    /* Array a's vector of the i-th row of the stage to read. */
    template <bool PLAIN> __device__ __forceinline__ void get(const tiling &t, int i, int a, vector_bits &w) const
    {
        const uint32_t at = base + reading + (i * ARRAYS + a) * row_bytes(t, PLAIN ? 1 : granules);
        if (PLAIN || granules == 1)
            load_shared(w, at);
        else
            to_vector(read_shifted(at, misalignment(begin[a])), w);
    }
    /* The stage has been read. */
    __device__ __forceinline__ void pop(const tiling &t)
    {
        reading = after(t, reading);
    }

  private:
    __device__ __forceinline__ uint32_t after(const tiling &t, uint32_t stage) const
    {
        stage += ROWS * ARRAYS * row_bytes(t, granules);
        return stage == bytes(t, granules) ? 0 : stage;
    }
    template <bool PLAIN> __device__ __forceinline__ void fill(const tiling &t)
    {
#pragma unroll
        for (int i = 0; i < ROWS; ++i, ahead.advance(t)) {
            if (ahead.left <= 0) continue;
#pragma unroll
            for (int a = 0; a < ARRAYS; ++a) {
                const uint32_t to = base + filling + (i * ARRAYS + a) * row_bytes(t, PLAIN ? 1 : granules);
                const char *from = begin[a] + ahead.at * (int64_t)sizeof(bits);
                if (PLAIN || plain)
                    copy_to_shared(to, from);
                else
                    copy_granules<bits>(to, from - misalignment(begin[a]), granules, begin[a],
                                        begin[a] + t.elements * (int64_t)sizeof(bits));
            }
        }
        end_of_copies();
        filling = after(t, filling);
    }
};

} /* namespace kasmina */

#endif
