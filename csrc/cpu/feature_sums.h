/* Two sums per feature over all rows, u and v, from the patches of a tiling: a first pass writes them, a second adds. */
#ifndef KASMINA_CPU_FEATURE_SUMS_H
#define KASMINA_CPU_FEATURE_SUMS_H

#include "cpu/tiles.h"

typedef struct {
    double u, v;
} kasmina_uv;

typedef struct {
    const kasmina_tiling *tiling; /* borrowed */
    int64_t features;
    int64_t slots;        /* tiles + features: a feature's overlap with a tile has slot tile + feature */
    kasmina_uv *totals;   /* [features] */
    kasmina_uv *partials; /* [blocks, slots] */
} kasmina_feature_sums;

/* Bytes that kasmina_place_feature_sums() lays out. */
size_t kasmina_feature_sums_size(const kasmina_tiling *tiling, int64_t features);

/* Lay the sums out in `memory`, which is not initialised. */
kasmina_feature_sums kasmina_place_feature_sums(const kasmina_tiling *tiling, int64_t features, void *memory);

/* Store a patch's sums, given per column. */
void kasmina_write_feature_sums(const kasmina_feature_sums *sums, const kasmina_patch *patch, const double *u,
                                const double *v);

/* Fill `totals`. Features that not all their patches wrote get what memory held. Returns an error of the thread pool. */
int kasmina_total_feature_sums(const kasmina_feature_sums *sums);

#endif
