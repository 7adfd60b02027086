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

/* As in the forward pass, with two tensors: half the rows keep as many bytes on their way. */
constexpr int BACKWARD_BLOCKS_PER_SM = 3;
constexpr int BACKWARD_ROWS = 2;
constexpr int BACKWARD_STAGES = 2;
/* Two rows are added first: the error of 32 + 2 additions is ~1e-6. */
constexpr int BACKWARD_MOST_ROWS = 64;

struct backward_params {
    tiling tiles;
    seed_table table;
    double2 *partials; /* [splits, slots] */
    const void *grad_y;
    const void *x;
    void *grad_x;
    int granules; /* see row_ring.cuh */
};

/* ---- A block's shared memory ---- */

template <kasmina_dtype D, bool SUMS> struct backward_tables {
    using T = typename element<D>::wide;
    using ring = row_ring<D, SUMS ? 2 : 1, BACKWARD_ROWS, BACKWARD_STAGES>;
    static constexpr int VEC = walker<D>::VEC;

    unsigned char *rows; /* the ring; its memory then serves u and v */
    T *u, *v;            /* [walkers][VEC][lanes] the threads' sums */
    tile_sums sums;
    block_place *place;
    coefficient_table<T> blend;

    static __host__ __device__ __forceinline__ uint32_t rows_bytes(const tiling &t, int granules)
    {
        const uint32_t sums = (uint32_t)(t.threads() * VEC * 2 * sizeof(T)), rows = ring::bytes(t, granules);
        return SUMS && sums > rows ? sums : rows;
    }
    static size_t total_bytes(const tiling &t, int granules)
    {
        const size_t width = (size_t)t.width, blend_bytes = width * (2 * sizeof(T) + sizeof(uint32_t));
        return rows_bytes(t, granules) + sizeof(block_place) + blend_bytes +
               (SUMS ? sum_columns(t) * sizeof(double2) + width * sizeof(int32_t) : 0);
    }
    __device__ __forceinline__ backward_tables(const tiling &t, int granules)
    {
        shared_carver shared;
        rows = shared.take<unsigned char>((int)rows_bytes(t, granules));
        u = (T *)rows;
        v = u + t.threads() * VEC;
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
        const int64_t first_feature = t.feature_of(max(here.origin, (int64_t)0));
        for (int c = (int)threadIdx.x; c < t.width; c += t.threads()) {
            const bool exists = here.exists(c);
            const int64_t feature = exists ? t.feature_of(here.origin + c) : 0;
            if (p.grad_x) {
                owner_blend found = {UNOWNED, {}};
                if (exists) found = find_blend(p.table, feature);
                blend.fill(p.table, c, found.blend, feature);
            }
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
    /* Into shared memory, for the columns' threads. Returns a bit for each column that float32 could not hold. */
    __device__ __forceinline__ unsigned put_away(const tiling &t, T *to_u, T *to_v, unsigned mask) const
    {
        unsigned again = 0;
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            const bool held = sizeof(T) == sizeof(double) || (is_finite(u[j]) && is_finite(v[j]));
            if (!held) again |= 1u << j;
            to_u[way::slot(t, j)] = held ? u[j] : (T)0;
            to_v[way::slot(t, j)] = held ? v[j] : (T)0;
        }
        return again & mask;
    }
};

/* What a thread carries from round to round. */
template <kasmina_dtype D, bool SUMS> struct backward_walk {
    using T = typename element<D>::wide;
    using bits = typename element<D>::bits;
    using way = walker<D>;
    static constexpr int VEC = way::VEC, ROWS = BACKWARD_ROWS;

    way walk;
    typename backward_tables<D, SUMS>::ring ring;
    T a[VEC];
    unsigned grafted = 0; /* a bit for each column */
    gradient_sums<D> sums;

    __device__ __forceinline__ void load(const tiling &t, const coefficient_table<T> &table)
    {
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            const int c = way::column(t, j);
            a[j] = table.a[c];
            grafted |= table.grafted[c] << j;
        }
    }
    /* Copied, not computed, where idle: a NaN keeps its payload. */
    __device__ __forceinline__ void apply(const vector_bits &raw, vector_bits &result) const
    {
        copy_vector(raw, result);
        if (!grafted) return;
        T g[VEC];
        element<D>::decode(raw, g);
#pragma unroll
        for (int j = 0; j < VEC; ++j) g[j] = multiply(a[j], g[j]);
        element<D>::encode(g, result);
        if (grafted != way::ALL) to_vector(merge_elements<VEC>(grafted, from_vector(raw), from_vector(result)), result);
    }
    /* The next ROWS rows. PLAIN: they are all there, their vectors whole and aligned. */
    template <bool PLAIN> __device__ __forceinline__ void round(const backward_params &p)
    {
        const tiling &t = p.tiles;
        const int count = PLAIN ? ROWS : min(walk.left, ROWS);
        vector_bits rows_g[ROWS] = {}, rows_x[ROWS] = {};
        ring.template next<PLAIN>(t);
#pragma unroll
        for (int i = 0; i < ROWS; ++i, walk.advance(t)) {
            if (!PLAIN && i >= count) continue;
            ring.template get<PLAIN>(t, i, 0, rows_g[i]);
            if constexpr (SUMS) ring.template get<PLAIN>(t, i, 1, rows_x[i]);
            if (!p.grad_x) continue;
            vector_bits result;
            apply(rows_g[i], result);
            bits *to = (bits *)p.grad_x + walk.at;
            if (PLAIN || (walk.mask == way::ALL && misalignment(p.grad_x) == 0))
                store_vector(to, result);
            else
                store_elements(to, from_vector(result), walk.mask);
        }
        ring.pop(t);
        if constexpr (SUMS) sums.add(rows_g, rows_x);
    }
};

/* ---- The kernel ---- */

template <kasmina_dtype D, bool SUMS>
__global__ void __launch_bounds__(BLOCK, BACKWARD_BLOCKS_PER_SM)
    backward_kernel(const __grid_constant__ backward_params p)
{
    using bits = typename element<D>::bits;
    using way = walker<D>;
    if (SUMS) allow_dependents();
    const tiling &t = p.tiles;
    const block_place here = block_place::here(t);
    const backward_tables<D, SUMS> tables(t, p.granules);
    const way first(t, here);
    const void *const arrays[2] = {p.grad_y, p.x};
    using ring = typename backward_tables<D, SUMS>::ring;
    backward_walk<D, SUMS> thread = {first, ring(t, first, tables.rows, arrays, p.granules)};
    if (threadIdx.x == 0) *tables.place = here; /* for the rare paths: not in registers all the way */
    tables.fill(p, here);                       /* while the first rows are on their way */
    if constexpr (SUMS) clear_columns(t, tables.sums);
    __syncthreads();

    if (p.grad_x && first.mask) thread.load(t, tables.blend);
    if (thread.ring.plain && misalignment(p.grad_x) == 0) {
#pragma unroll 1
        while (thread.walk.left >= BACKWARD_ROWS) thread.template round<true>(p);
    }
#pragma unroll 1
    while (thread.walk.left > 0) thread.template round<false>(p);

    if constexpr (SUMS) {
        __syncthreads(); /* the ring's memory is free */
        const unsigned again = thread.sums.put_away(t, tables.u, tables.v, first.mask);
        if (__syncthreads_or(again != 0)) {
            add_walked<D>(t, tables.sums, again, [&](int j) {
                double2 sum = make_double2(0.0, 0.0);
                way::revisit(t, *tables.place, j, [&](int64_t index) {
                    const double g = (double)element<D>::value(__ldg((const bits *)p.grad_y + index));
                    sum.x = fused(g, (double)element<D>::value(__ldg((const bits *)p.x + index)), sum.x);
                    sum.y += g;
                });
                return sum;
            });
        }
        const auto add_walker = [&](int, int w, int column, double2 &sum) {
            const int slot = ((w * way::VEC + column % way::VEC) << t.lanes_log2) + column / way::VEC;
            sum.x += (double)tables.u[slot];
            sum.y += (double)tables.v[slot];
        };
        reduce_tile<way::VEC>(t, tables.sums, add_walker, [&](int c, int32_t, double2 sum, uint32_t) {
            const block_place &place = *tables.place;
            if (!place.exists(c)) return;
            const int64_t slot = t.slot_of(place.tile, t.feature_of(place.origin + c));
            p.partials[place.split * t.slots + slot] = sum;
        });
    }
}

} /* namespace kasmina */

#endif
