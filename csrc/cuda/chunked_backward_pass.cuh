/*
 * The pass over G and x: grad_x = a * grad_y, and two sums per feature, u = sum G x and v = sum G.
 *
 * Sums are float32 over no more rows than keep the error at ~1e-6, pairs of rows first, then float64. A column that
 * overflows is walked again in float64.
 */
#ifndef KASMINA_CUDA_CHUNKED_BACKWARD_PASS_CUH
#define KASMINA_CUDA_CHUNKED_BACKWARD_PASS_CUH

#include "cuda/reduce.cuh"
#include "cuda/row_ring.cuh"
#include "cuda/seeds.cuh"
#include "cuda/tiling.cuh"

namespace kasmina
{

constexpr int BACKWARD_BLOCKS_PER_SM = 2;
constexpr int BACKWARD_ROWS = 2;
constexpr int BACKWARD_STAGES = 4;
/* After so many rows a thread's sums move to float64. Two rows are added first: the error of 32 + 2 additions is ~1e-6. */
constexpr int BACKWARD_GROUP = 64;

struct backward_params {
    tiling tiles;
    seed_table table;
    double2 *partials; /* [splits, slots] */
    const void *grad_y;
    const void *x;
    void *grad_x;
    int granules; /* see row_ring.cuh */
    int threads;  /* see PASS_THREADS */
};

/* ---- A block's shared memory ---- */

template <kasmina_dtype D, bool SUMS> struct backward_tables {
    using T = typename element<D>::wide;
    using ring = row_ring<D, SUMS ? 2 : 1, BACKWARD_ROWS, BACKWARD_STAGES>;
    static constexpr int VEC = walker<D>::VEC;

    unsigned char *rows; /* the ring */
    thread_sums<VEC> parts;
    tile_sums sums;
    block_place *place;
    coefficient_table<T> blend;

    static constexpr size_t bytes(int width, int threads, int pass_threads)
    {
        const size_t sums = (size_t)(threads * VEC + (width > threads ? width : threads)) * sizeof(double2);
        const size_t blend_bytes = (size_t)width * (2 * sizeof(T) + sizeof(uint32_t));
        return ring::bytes(pass_threads) + sizeof(block_place) + blend_bytes +
               (SUMS ? sums + (size_t)width * sizeof(int32_t) : 0);
    }
    static size_t total_bytes(const tiling &t, int pass_threads)
    {
        static_assert(bytes(MAX_LANES * VEC, BLOCK / 2, BLOCK / 2) <= LEAST_SHARED_BYTES, "older GPUs");
        return bytes(t.width, t.threads(), pass_threads);
    }
    __device__ __forceinline__ backward_tables(const tiling &t)
    {
        shared_carver shared;
        rows = shared.take<unsigned char>(ring::BYTES);
        if (SUMS) parts.places = shared.take<double2>(thread_sums<VEC>::count(t));
        if (SUMS) sums.columns = shared.take<double2>(sum_columns(t));
        place = shared.take<block_place>(1);
        blend.a = shared.take<T>(t.width);
        blend.b = shared.take<T>(t.width);
        blend.grafted = shared.take<uint32_t>(t.width);
        sums.count = NULL;
        sums.owner = SUMS && t.inner > 1 ? shared.take<int32_t>(t.width) : NULL;
    }
    /* Look a tile's features up, each by one thread. */
    __device__ __forceinline__ void fill(const backward_params &p, const block_place &here) const
    {
        const tiling &t = p.tiles;
        if (threadIdx.x == 0) *place = here; /* for the rare paths: not in registers all the way */
        if (SUMS) clear_sums(t, sums, parts);
        const int64_t first_feature = t.feature_of(max(here.origin, (int64_t)0));
        for (int c = (int)threadIdx.x; c < t.width; c += t.threads()) {
            const bool exists = here.exists(c);
            const int64_t feature = exists ? t.feature_of(here.origin + c) : 0;
            owner_blend found = {UNOWNED, {}};
            if (exists && p.grad_x) found = find_blend(p.table, feature);
            blend.fill(p.table, c, found.blend, feature); /* without grad_x, nothing is grafted */
            /* Runs of one feature, numbered within the tile. */
            if (sums.owner) sums.owner[c] = exists ? (int32_t)(feature - first_feature) : UNOWNED;
        }
    }
};

/* ---- A thread ---- */

template <kasmina_dtype D> struct gradient_sums {
    using T = typename element<D>::wide;
    using bits = typename element<D>::bits;
    using way = walker<D>;
    static constexpr int VEC = way::VEC;

    T u[VEC], v[VEC];
    unsigned again = 0; /* a bit for each column that float32 could not hold */

    __device__ __forceinline__ gradient_sums()
    {
#pragma unroll
        for (int j = 0; j < VEC; ++j) u[j] = v[j] = (T)0;
    }
    /* Rows that are not there are zeros. */
    template <int ROWS>
    __device__ __forceinline__ void add(const vector_bits (&rows_g)[ROWS], const vector_bits (&rows_x)[ROWS])
    {
        T g[ROWS][VEC], x[ROWS][VEC];
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            element<D>::decode(rows_g[i], g[i]);
            element<D>::decode(rows_x[i], x[i]);
        }
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            T products = g[0][j] * x[0][j], sum = g[0][j];
#pragma unroll
            for (int i = 1; i < ROWS; ++i) {
                products = fused(g[i][j], x[i][j], products);
                sum += g[i][j];
            }
            u[j] += products;
            v[j] += sum;
        }
    }
    /* The sums move to float64, and begin anew. */
    __device__ __forceinline__ void put_away(const tiling &t, const thread_sums<VEC> &to)
    {
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            if (sizeof(T) < sizeof(double) && !(is_finite(u[j]) && is_finite(v[j]))) again |= 1u << j;
            double2 &part = to.of(t, way::level(t), way::lane(t), j);
            const double2 sum = make_double2(part.x + (double)u[j], part.y + (double)v[j]);
            part = again >> j & 1u ? make_double2(0.0, 0.0) : sum;
            u[j] = v[j] = (T)0;
        }
    }
};

/* What a thread carries from round to round. */
template <kasmina_dtype D, bool SUMS> struct backward_walk {
    using T = typename element<D>::wide;
    using bits = typename element<D>::bits;
    using way = walker<D>;
    static constexpr int VEC = way::VEC, ROWS = BACKWARD_ROWS, ARRAYS = SUMS ? 2 : 1;

    way walk;
    typename backward_tables<D, SUMS>::ring ring;
    T a[VEC];
    vector_bits grafted; /* a mask */
    gradient_sums<D> sums;

    __device__ __forceinline__ void load(const tiling &t, const coefficient_table<T> &table)
    {
        unsigned found = 0;
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            const int c = way::column(t, j);
            a[j] = table.a[c];
            found |= table.grafted[c] << j;
        }
        element_mask<VEC>(found, grafted);
    }
    /* Copied, not computed, where idle: a NaN keeps its payload. No branch: decoding serves the sums too. */
    __device__ __forceinline__ void apply(const vector_bits &raw, vector_bits &result) const
    {
        T g[VEC];
        element<D>::decode(raw, g);
#pragma unroll
        for (int j = 0; j < VEC; ++j) g[j] = multiply(a[j], g[j]);
        element<D>::encode(g, result);
        replace_elements(grafted, raw, result);
    }
    /* The rows of a group, or as many as whole turns have. EDGE: some of the block's vectors are not whole. */
    template <bool EDGE> __device__ __forceinline__ void walk_group(const backward_params &p)
    {
        const tiling &t = p.tiles;
        ring.template walk_turns<EDGE>(t, BACKWARD_GROUP / ring.TURN, walk, (char *)p.grad_x,
                                       [&](const vector_bits(&rows)[ARRAYS][ROWS], char *(&out)[ROWS]) {
#pragma unroll
                                           for (int i = 0; i < ROWS; ++i) {
                                               vector_bits result;
                                               apply(rows[0][i], result);
                                               if (p.grad_x) store_columns<EDGE>(out[i], result);
                                           }
                                           if constexpr (SUMS) sums.add(rows[0], rows[1]);
                                       });
    }
    /* The next rows, whatever they are. */
    __device__ __forceinline__ void round(const backward_params &p)
    {
        const tiling &t = p.tiles;
        const int count = min(walk.left, ROWS);
        vector_bits rows[ARRAYS][ROWS];
        ring.next(t, count, rows);
#pragma unroll
        for (int i = 0; i < ROWS; ++i, walk.advance(t)) {
            if (!p.grad_x || i >= count) continue;
            vector_bits result;
            apply(rows[0][i], result);
            bits *to = (bits *)p.grad_x + walk.at;
            if (misalignment(p.grad_x) == 0)
                store_columns<true>(to, result);
            else
                store_elements(to, result, walk.mask);
        }
        if constexpr (SUMS) sums.add(rows[0], rows[1]);
    }

  private:
    template <bool EDGE> __device__ __forceinline__ void store_columns(void *to, const vector_bits &vector) const
    {
        if (!EDGE || walk.mask == way::ALL)
            store_vector(to, vector);
        else
            store_elements((bits *)to, vector, walk.mask);
    }
};

/* The thread's columns with a bit in `again`, in float64. All of the block call this. */
template <kasmina_dtype D> __device__ __noinline__ void walk_again(const backward_params &p, unsigned again)
{
    using bits = typename element<D>::bits;
    const tiling &t = p.tiles;
    const backward_tables<D, true> tables(t);
    add_walked<D>(t, tables.sums, again, [&](int j) {
        double2 sum = make_double2(0.0, 0.0);
        walker<D>::revisit(t, *tables.place, j, [&](int64_t index) {
            const double g = (double)element<D>::value(__ldg((const bits *)p.grad_y + index));
            sum.x = fused(g, (double)element<D>::value(__ldg((const bits *)p.x + index)), sum.x);
            sum.y += g;
        });
        return sum;
    });
}

/* ---- The kernel ---- */

template <kasmina_dtype D, bool SUMS>
__global__ void __launch_bounds__(BLOCK, BACKWARD_BLOCKS_PER_SM)
    backward_kernel(const __grid_constant__ backward_params p)
{
    using way = walker<D>;
    using tables = backward_tables<D, SUMS>; /* made anew where it is used: its pointers are too many for the loop */
    const tiling &t = p.tiles;
    const block_place here = block_place::here(t);
    const way first(t, here);
    const void *const arrays[2] = {p.grad_y, p.x};
    wait_for_primary();
    allow_dependents();
    backward_walk<D, SUMS> thread = {first, {t, first, tables(t).rows, arrays, p.granules}};
    tables(t).fill(p, here); /* while the first rows are on their way */
    const bool edge = __syncthreads_or(first.mask != way::ALL && first.mask);

    if (first.mask) thread.load(t, tables(t).blend);
    const bool turns = !t.plane && p.granules == 1 && misalignment(p.grad_x) == 0;
#pragma unroll 1
    while (thread.walk.left > 0) {
        /* A group is 64 rows, whichever way they are walked: its bits do not depend on the alignment. */
        int rows = thread.walk.left;
        if (turns && edge) thread.template walk_group<true>(p);
        if (turns && !edge) thread.template walk_group<false>(p);
        rows -= thread.walk.left;
#pragma unroll 1
        for (; rows < BACKWARD_GROUP && thread.walk.left > 0; rows += thread.ROWS) thread.round(p);
        if constexpr (SUMS) thread.sums.put_away(t, tables(t).parts);
    }

    if constexpr (SUMS) {
        const tables after(t);
        const unsigned again = thread.sums.again & thread.walk.mask;
        if (__syncthreads_or(again != 0)) walk_again<D>(p, again);
        reduce_tile(t, after.sums, after.parts, [&](int c, int32_t, double2 sum, uint32_t) {
            const block_place &place = *after.place;
            if (!place.exists(c)) return;
            const int64_t slot = t.slot_of(place.tile, t.feature_of(place.origin + c));
            p.partials[place.split * t.slots + slot] = sum;
        });
    }
}

} /* namespace kasmina */

#endif
