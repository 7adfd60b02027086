#include "cpu/feature_sums.h"

#include "parallel.h"

size_t kasmina_feature_sums_size(const kasmina_tiling *t, int64_t features)
{
    return (size_t)(features + t->blocks * (t->tiles + features)) * sizeof(kasmina_uv);
}

kasmina_feature_sums kasmina_place_feature_sums(const kasmina_tiling *t, int64_t features, void *memory)
{
    kasmina_feature_sums sums = {.tiling = t, .features = features, .slots = t->tiles + features, .totals = memory};
    sums.partials = memory ? sums.totals + features : NULL;
    return sums;
}

void kasmina_write_feature_sums(const kasmina_feature_sums *sums, const kasmina_patch *patch, const double *u,
                                const double *v)
{
    const int64_t inner = sums->tiling->inner;
    kasmina_uv *slots = sums->partials + patch->block * sums->slots + patch->tile;
    int64_t feature = patch->first_column / inner;
    for (int64_t i = 0; i < patch->columns; ++feature) {
        int64_t stop = (feature + 1) * inner - patch->first_column;
        if (stop > patch->columns) stop = patch->columns;
        kasmina_uv total = {0.0, 0.0};
        for (; i < stop; ++i) total.u += u[i], total.v += v[i];
        slots[feature] = total;
    }
}

static void total_features(int64_t begin, int64_t end, void *context)
{
    const kasmina_feature_sums *sums = context;
    const int64_t inner = sums->tiling->inner;
    for (int64_t feature = begin; feature < end; ++feature) {
        int64_t first = feature * inner / KASMINA_TILE_COLUMNS;
        int64_t last = ((feature + 1) * inner - 1) / KASMINA_TILE_COLUMNS;
        kasmina_uv total = {0.0, 0.0};
        for (int64_t block = 0; block < sums->tiling->blocks; ++block) {
            for (int64_t tile = first; tile <= last; ++tile) {
                const kasmina_uv *part = &sums->partials[block * sums->slots + tile + feature];
                total.u += part->u, total.v += part->v;
            }
        }
        sums->totals[feature] = total;
    }
}

int kasmina_total_feature_sums(const kasmina_feature_sums *sums)
{
    return kasmina_parallel_for(0, sums->features, 1024, total_features, (void *)sums);
}
