/*
 * What a seed does to a feature: (lifecycle, blueprint, strategy, alpha, w) -> (a, b) with y = a * x + b, and the
 * derivatives with respect to the blueprint and alpha. The only place with these formulas; C and CUDA share it.
 *
 * The order of operations is part of the contract (y has the same bits on every device): no contraction to fma, so C is
 * compiled with -ffp-contract=off and CUDA with --fmad=false.
 */
#ifndef KASMINA_SEED_MATH_H
#define KASMINA_SEED_MATH_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __CUDACC__
#define KASMINA_FN static __host__ __device__ __forceinline__
#else
#define KASMINA_FN static inline
#endif

/* Rows of the state tensor. */
enum {
    KASMINA_LIFECYCLE_STATE,
    KASMINA_BLUEPRINT_ID,
    KASMINA_EPOCHS_IN_STATE,
    KASMINA_GRAFTING_STRATEGY,
    KASMINA_PARENT_STATE,
    KASMINA_CHECKPOINT_ID,
    KASMINA_EVALUATION_SCORE,
    KASMINA_ERROR_COUNT,
    KASMINA_STATE_ROWS
};

/* TRAINING, and the states between which a seed is grafted in. */
enum { KASMINA_TRAINING = 2, KASMINA_GRAFTING = 3, KASMINA_FOSSILIZED = 7 };

enum { KASMINA_MULTIPLICATIVE, KASMINA_ADDITIVE, KASMINA_MIXED, KASMINA_AFFINE, KASMINA_NUM_STRATEGIES };

/* Whether the rows of the bank that a strategy uses exist; ids outside the bank never reach memory. */
KASMINA_FN bool kasmina_has_blueprint(int32_t blueprint, int32_t strategy, int64_t num_blueprints)
{
    if (strategy < 0 || strategy >= KASMINA_NUM_STRATEGIES) return false;
    return blueprint >= 0 && (int64_t)blueprint + (strategy == KASMINA_AFFINE) < num_blueprints;
}

/* A seed that is not grafted is the identity. */
KASMINA_FN bool kasmina_is_grafted(int32_t lifecycle, int32_t blueprint, int32_t strategy, int64_t num_blueprints)
{
    return lifecycle >= KASMINA_GRAFTING && lifecycle <= KASMINA_FOSSILIZED &&
           kasmina_has_blueprint(blueprint, strategy, num_blueprints);
}

/* A seed in training learns to reconstruct its chunk and leaves the output alone. */
KASMINA_FN bool kasmina_is_training(int32_t lifecycle, int32_t blueprint, int32_t strategy, int64_t num_blueprints)
{
    return lifecycle == KASMINA_TRAINING && kasmina_has_blueprint(blueprint, strategy, num_blueprints);
}

/* A fossil's blueprint is frozen: it gets no gradient. */
KASMINA_FN bool kasmina_trains_weights(int32_t lifecycle)
{
    return lifecycle != KASMINA_FOSSILIZED;
}

/*
 * Coefficients of a grafted seed in accumulation type T, with w its blueprint weight and v that of the next row (read by
 * AFFINE only). A zero b is made -0.0, the one value whose addition changes no bit of any x.
 */
#define KASMINA_DEFINE_COEFFICIENTS(NAME, T)                                        \
    KASMINA_FN void NAME(int32_t strategy, T alpha, T w, T v, T *a, T *b)           \
    {                                                                               \
        *b = (T) - 0.0;                                                             \
        switch (strategy) {                                                         \
        case KASMINA_MULTIPLICATIVE: *a = ((T)1 - alpha) + alpha * w; break;        \
        case KASMINA_ADDITIVE: *a = (T)1, *b = alpha * w; break;                    \
        case KASMINA_MIXED: *a = (T)1 - alpha / (T)2, *b = alpha * w / (T)2; break; \
        default: *a = ((T)1 - alpha) + alpha * w, *b = alpha * v; break;            \
        }                                                                           \
        if (*b == (T)0) *b = (T) - 0.0;                                             \
    }

KASMINA_DEFINE_COEFFICIENTS(kasmina_coefficients_f32, float)
KASMINA_DEFINE_COEFFICIENTS(kasmina_coefficients_f64, double)

/* Derivatives of the loss for one feature of a grafted seed. */
typedef struct {
    double weight; /* row p */
    double next;   /* row p + 1, AFFINE only, else 0 */
    double alpha;  /* this feature's share */
} kasmina_feature_gradients;

/* From u = sum G x and v = sum G over the rows; w and w_next as for the coefficients. */
KASMINA_FN kasmina_feature_gradients kasmina_gradients(int32_t strategy, double alpha, double w, double w_next,
                                                       double u, double v)
{
    kasmina_feature_gradients g = {0.0, 0.0, 0.0};
    switch (strategy) {
    case KASMINA_MULTIPLICATIVE: g.weight = alpha * u, g.alpha = (w - 1.0) * u; break;
    case KASMINA_ADDITIVE: g.weight = alpha * v, g.alpha = w * v; break;
    case KASMINA_MIXED: g.weight = alpha * v / 2.0, g.alpha = (w * v - u) / 2.0; break;
    default: g.weight = alpha * u, g.next = alpha * v, g.alpha = (w - 1.0) * u + w_next * v; break;
    }
    return g;
}

#endif
