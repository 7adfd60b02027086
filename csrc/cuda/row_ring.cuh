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

/* A granule of each thread, whatever the block has: a constant. */
constexpr uint32_t ROW_BYTES = PASS_THREADS * VECTOR_BYTES;

/* Granules that hold a vector of each of the arrays; NULL is any array. */
static inline int granules_of(const void *first, const void *second)
{
    return misalignment(first) || misalignment(second) ? 2 : 1;
}

/* Granules, of which only the elements inside the array are read. */
template <typename bits>
__device__ __noinline__ void copy_elements(uint32_t to, const char *from, int granules, const char *begin,
                                           const char *end)
{
    for (; granules > 0; --granules, from += VECTOR_BYTES, to += ROW_BYTES) {
#pragma unroll 1
        for (int k = 0; k < VECTOR_BYTES; k += (int)sizeof(bits))
            if (from + k >= begin && from + k < end) store_shared(to + k, __ldg((const bits *)(from + k)));
    }
}

/* The vector that begins `shift` bytes into the first of two granules. */
__device__ __forceinline__ void shift_granules(const vector_bits &first, const vector_bits &second, uint32_t shift,
                                               vector_bits &vector)
{
    uint32_t words[2 * VECTOR_WORDS];
#pragma unroll
    for (int i = 0; i < VECTOR_WORDS; ++i) words[i] = first[i], words[VECTOR_WORDS + i] = second[i];
    /* By 8, 4 and up to 3 bytes. */
#pragma unroll
    for (int i = 0; i < 6; ++i) words[i] = shift & 8 ? words[i + 2] : words[i];
#pragma unroll
    for (int i = 0; i < 5; ++i) words[i] = shift & 4 ? words[i + 1] : words[i];
#pragma unroll
    for (int i = 0; i < VECTOR_WORDS; ++i) vector[i] = __funnelshift_r(words[i], words[i + 1], shift % 4 * 8);
}

/* An addition that the compiler may not turn into multiplications of the step. */
template <typename P> __device__ __forceinline__ P *step_on(P *at, int64_t step)
{
    at += step;
    opaque(at);
    return at;
}

/*
 * ROWS are copied and read together, a round; STAGES - 1 rounds are on their way. A turn of the ring is STAGES rounds:
 * unrolled, its places are constants, and what is left of a round is the arithmetic.
 */
template <kasmina_dtype D, int ARRAYS, int ROWS, int STAGES> struct row_ring {
    static_assert(STAGES % 2 == 0 && STAGES > 3, "half as many rounds are a ring too");
    using way = walker<D>;
    using bits = typename element<D>::bits;
    static constexpr int TURN = STAGES * ROWS;

    uint32_t base;    /* the thread's place in the ring's first row, as a shared address */
    uint32_t filling; /* from there, the round to fill next */
    uint32_t reading; /* and the round to read */
    int granules;     /* a vector */
    way ahead;        /* the row to copy next */
    const char *begin[ARRAYS];

    /* Vectors of two granules get half the rounds. */
    static constexpr uint32_t BYTES = TURN * ARRAYS * ROW_BYTES;

    /* The same on the host, for the image that has blocks of so many threads. */
    static constexpr size_t bytes(int threads)
    {
        return (size_t)TURN * ARRAYS * threads * VECTOR_BYTES;
    }

    /* `arrays` are those that granules_of() knows. The first copies start. */
    __device__ __forceinline__ row_ring(const tiling &t, const way &walk, void *shared, const void *const *arrays,
                                        int granules)
        : granules(granules), ahead(walk)
    {
        base = shared_address(shared) + threadIdx.x * VECTOR_BYTES;
        filling = reading = 0;
#pragma unroll
        for (int a = 0; a < ARRAYS; ++a) begin[a] = (const char *)arrays[a];
#pragma unroll 1
        for (int s = 1; s < STAGES / granules; ++s) fill(t);
    }
    /* The next vector of array a, without taking it; there must be a row. */
    __device__ __forceinline__ void peek(int a, vector_bits &vector) const
    {
        if (granules == 1)
            wait_for_copies<STAGES - 2>();
        else
            wait_for_copies<STAGES / 2 - 2>();
        read(base + reading + a * ROW_BYTES * granules, a, vector);
    }
    /*
     * The rows of up to so many whole turns, where vectors are granules and the tile is no plane, before any other round:
     * body(rows, out), with out where `to` has the rows. EDGE: the tensor's last granule may not be whole.
     */
    template <bool EDGE, typename Body>
    __device__ __forceinline__ void walk_turns(const tiling &t, int turns, way &walk, char *to, const Body &body)
    {
        const int64_t step = t.step * (int64_t)sizeof(bits), at = walk.at * (int64_t)sizeof(bits);
        const char *from[ARRAYS], *end[ARRAYS];
        char *out[ROWS];
#pragma unroll
        for (int a = 0; a < ARRAYS; ++a) {
            from[a] = begin[a] + at + (TURN - ROWS) * step;
            end[a] = begin[a] + t.elements * (int64_t)sizeof(bits);
        }
        out[ROWS - 1] = to + at - step;
#pragma unroll 1
        for (; walk.left >= TURN && turns > 0; walk.left -= TURN, --turns) {
#pragma unroll
            for (int s = 0; s < STAGES; ++s) {
#pragma unroll
                for (int i = 0; i < ROWS; ++i) {
#pragma unroll
                    for (int a = 0; a < ARRAYS; ++a) {
                        if (walk.left > (s + STAGES - 1) * ROWS + i) {
                            const uint32_t ring_place = base + place((s + STAGES - 1) % STAGES, i, a);
                            if (EDGE)
                                copy_to_shared(ring_place, from[a], (int)min(end[a] - from[a], (int64_t)VECTOR_BYTES));
                            else
                                copy_to_shared(ring_place, from[a]);
                        }
                        from[a] = step_on(from[a], step);
                    }
                    out[i] = step_on(out[(i + ROWS - 1) % ROWS], step);
                }
                end_of_copies();
                wait_for_copies<STAGES - 1>();
                vector_bits rows[ARRAYS][ROWS];
#pragma unroll
                for (int i = 0; i < ROWS; ++i)
#pragma unroll
                    for (int a = 0; a < ARRAYS; ++a) load_shared(rows[a][i], base + place(s, i, a));
                body(rows, out);
            }
        }
        /* All that the loop knows without registers. */
        walk.at = (out[ROWS - 1] + step - to) / (int64_t)sizeof(bits);
        ahead = walk;
        ahead.at += (TURN - ROWS) * t.step;
        ahead.left -= TURN - ROWS;
        granules = 1;
        reading = 0;
        filling = place(STAGES - 1, 0, 0);
    }
    /* The next round, of which `count` rows exist; the others become zeros. */
    __device__ __forceinline__ void next(const tiling &t, int count, vector_bits (&rows)[ARRAYS][ROWS])
    {
        fill(t);
        if (granules == 1)
            wait_for_copies<STAGES - 1>();
        else
            wait_for_copies<STAGES / 2 - 1>();
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
#pragma unroll
            for (int a = 0; a < ARRAYS; ++a) {
                const vector_bits nothing = {};
                copy_vector(nothing, rows[a][i]);
                if (i < count) read(base + reading + (i * ARRAYS + a) * ROW_BYTES * granules, a, rows[a][i]);
            }
        }
        reading = after(reading);
    }

  private:
    /* Where a round's row lies in the ring, with one granule a vector. */
    static __device__ __forceinline__ constexpr uint32_t place(int round, int row, int array)
    {
        return ((round * ROWS + row) * ARRAYS + array) * ROW_BYTES;
    }
    __device__ __forceinline__ uint32_t after(uint32_t round) const
    {
        round += ROWS * ARRAYS * ROW_BYTES * granules;
        return round == BYTES ? 0 : round;
    }
    __device__ __forceinline__ void read(uint32_t at, int a, vector_bits &vector) const
    {
        load_shared(vector, at);
        if (granules == 1) return;
        vector_bits first, second;
        copy_vector(vector, first);
        load_shared(second, at + ROW_BYTES);
        shift_granules(first, second, misalignment(begin[a]), vector);
    }
    __device__ __forceinline__ void fill(const tiling &t)
    {
#pragma unroll
        for (int i = 0; i < ROWS; ++i, ahead.advance(t)) {
            if (ahead.left <= 0) continue;
#pragma unroll
            for (int a = 0; a < ARRAYS; ++a) {
                const uint32_t to = base + filling + (i * ARRAYS + a) * ROW_BYTES * granules;
                const char *from = begin[a] + ahead.at * (int64_t)sizeof(bits) - misalignment(begin[a]);
                const char *end = begin[a] + t.elements * (int64_t)sizeof(bits);
                if (from < begin[a] || from + granules * VECTOR_BYTES > end) {
                    copy_elements<bits>(to, from, granules, begin[a], end);
                } else if (granules == 1) {
                    copy_to_shared(to, from);
                } else {
                    copy_to_shared_through_l1(to, from); /* the neighbour needs it too */
                    copy_to_shared_through_l1(to + ROW_BYTES, from + VECTOR_BYTES);
                }
            }
        }
        end_of_copies();
        filling = after(filling);
    }
};

} /* namespace kasmina */

#endif
