/*
 * The boundary between the operators (csrc/ops) and the kernels (csrc/cpu, csrc/cuda): plain structs, no torch.
 *
 * Every launcher borrows all pointers, allocates nothing, and returns 0 or an error code (a cudaError_t for the
 * CUDA launchers, which only enqueue work on `stream` and never synchronise). All pointers of one call lie on one device.
 */
#ifndef KASMINA_KERNELS_H
#define KASMINA_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { KASMINA_FLOAT32, KASMINA_FLOAT64, KASMINA_BFLOAT16, KASMINA_FLOAT16 } kasmina_dtype;

/* Columns of the accumulators. */
enum { KASMINA_COUNT, KASMINA_MEAN, KASMINA_M2, KASMINA_BATCHES, KASMINA_NONFINITE, KASMINA_TELEMETRY_COLUMNS };
enum { KASMINA_SUM_U2, KASMINA_SUM_V2, KASMINA_BACKWARDS, KASMINA_GRAD_TELEMETRY_COLUMNS };
enum { KASMINA_REDUCED_COLUMNS = 3 };
enum {
    KASMINA_PAIR_COUNT,
    KASMINA_PAIR_MEAN_X,
    KASMINA_PAIR_MEAN_T,
    KASMINA_PAIR_M2_X,
    KASMINA_PAIR_M2_T,
    KASMINA_PAIR_C_XT,
    KASMINA_PAIR_COLUMNS
};

/* A dense tensor seen as a row-major array [outer, features, inner]: inner is 1 where features come last in memory. */
typedef struct {
    int64_t outer, features, inner;
} kasmina_layout;

/* Which features a seed owns: seed s has [offsets[s], offsets[s + 1]), clamped to [0, features]. */
typedef struct {
    int64_t count;          /* S */
    const int32_t *offsets; /* [S + 1] */
} kasmina_chunks;

/* All that decides a feature's blend. */
typedef struct {
    kasmina_chunks chunks;
    int64_t num_blueprints;      /* P */
    const int32_t *state;        /* [8, S] */
    const float *alpha;          /* [S] */
    const void *weights;         /* [P, features], row-major */
    kasmina_dtype weights_dtype; /* may differ from the activations' */
} kasmina_seeds;

/*
 * y = blend(x), and the pre-graft statistics of x merged into `telemetry`, in one pass over x.
 * `y == NULL`: statistics only, `seeds` but for its chunks is not read. `telemetry == NULL`: no statistics.
 * outer, features and inner are at least 1; chunks.count may be 0.
 */
typedef struct {
    kasmina_layout layout;
    kasmina_dtype dtype;
    const void *x;
    void *y;
    kasmina_seeds seeds;
    double *telemetry; /* [S, 5] */
    void *workspace;   /* kasmina_forward_workspace_*() bytes, 256-byte aligned on CUDA, 64 on the CPU */
} kasmina_forward_args;

/*
 * grad_x = a * grad_y; grad_weights, grad_alpha and grad_telemetry from u = sum G x and v = sum G per feature.
 * Each of the four outputs may be NULL: not wanted. grad_weights and grad_alpha are written whole (zero where nothing flows).
 * x, grad_y and grad_x share the layout.
 */
typedef struct {
    kasmina_layout layout;
    kasmina_dtype dtype;
    const void *x;
    const void *grad_y;
    void *grad_x;
    kasmina_seeds seeds;
    void *grad_weights;     /* [P, features], weights_dtype */
    float *grad_alpha;      /* [S] */
    double *grad_telemetry; /* [S, 3] */
    void *workspace;        /* kasmina_backward_workspace_*() bytes */
} kasmina_backward_args;

/* out[s] = (mean, variance, std) of telemetry[s]; NaN where the count is 0. */
typedef struct {
    int64_t num_seeds;
    const double *telemetry; /* [S, 5] */
    double *out;             /* [S, 3] */
} kasmina_telemetry_reduce_args;

/* telemetry[s] <- telemetry[s] joined with other[s] by Chan's formula; batches and nonfinite add. */
typedef struct {
    int64_t num_seeds;
    double *telemetry;   /* [S, 5] */
    const double *other; /* [S, 5], may be telemetry itself */
} kasmina_telemetry_merge_args;

/*
 * U requests applied to the seeds they name; the last request for a seed is the only one considered. See
 * lifecycle_math.h for the verdicts.
 */
typedef struct {
    int64_t num_updates, num_seeds, num_blueprints;
    int32_t *state;          /* [8, S] */
    int32_t *history;        /* [S, 10, 2] */
    int32_t *history_count;  /* [S] */
    const int32_t *seed_ids; /* [U] */
    const int32_t *values;   /* [U, 4] */
    const int32_t *mask;     /* [U] */
    const int32_t *rules;    /* [11, 11] */
    int32_t *verdicts;       /* [U] */
    int32_t *winner;         /* workspace [S]: the last request for each seed */
} kasmina_state_update_args;

/*
 * One epoch for every seed; alpha along the ramp and, with `advance`, the step out of GRAFTING at its end. A schedule of 0
 * leaves alpha alone; ramp_epochs <= 0 ends the ramp at once.
 */
typedef struct {
    int64_t num_seeds, schedule, ramp_epochs;
    bool advance;
    int32_t *state;         /* [8, S] */
    int32_t *history;       /* [S, 10, 2] */
    int32_t *history_count; /* [S] */
    float *alpha;           /* [S] */
} kasmina_lifecycle_step_args;

/*
 * loss[s] = mean over its elements of (g(x, w) - target)^2 for seeds in TRAINING, else 0; g is the blend at alpha 1.
 * With grad_loss it is the derivative instead: grad_weights [P, features] is written whole, `loss` is not. x and target
 * share the layout.
 */
typedef struct {
    kasmina_layout layout;
    kasmina_dtype dtype;
    const void *x;
    const void *target;
    kasmina_seeds seeds; /* alpha is not read */
    void *loss;          /* [S], float32, or float64 where dtype is */
    const void *grad_loss;
    void *grad_weights;
    void *workspace; /* kasmina_reconstruction_workspace_*() bytes */
} kasmina_reconstruction_args;

/*
 * Per feature, over all pairs (x, target) of finite numbers: count, means, sums of squared deviations and of their products,
 * joined into `moments` by Chan's formula. x and target share the layout.
 */
typedef struct {
    kasmina_layout layout;
    kasmina_dtype dtype;
    const void *x;
    const void *target;
    double *moments; /* [features, 6] */
    void *workspace; /* kasmina_pair_moments_workspace_*() bytes */
} kasmina_pair_moments_args;

/* Bytes of workspace that a call with these arguments needs (pointers but for NULL-ness are not looked at). */
size_t kasmina_forward_workspace_cpu(const kasmina_forward_args *args);
size_t kasmina_backward_workspace_cpu(const kasmina_backward_args *args);
size_t kasmina_reconstruction_workspace_cpu(const kasmina_reconstruction_args *args);
size_t kasmina_pair_moments_workspace_cpu(const kasmina_pair_moments_args *args);

int kasmina_chunked_forward_cpu(const kasmina_forward_args *args);
int kasmina_chunked_backward_cpu(const kasmina_backward_args *args);
int kasmina_telemetry_reduce_cpu(const kasmina_telemetry_reduce_args *args);
int kasmina_telemetry_merge_cpu(const kasmina_telemetry_merge_args *args);
int kasmina_state_update_cpu(const kasmina_state_update_args *args);
int kasmina_lifecycle_step_cpu(const kasmina_lifecycle_step_args *args);
int kasmina_reconstruction_cpu(const kasmina_reconstruction_args *args);
int kasmina_pair_moments_cpu(const kasmina_pair_moments_args *args);

/* The CUDA twins ask the current device for its size, so the device must be set before either call. */
size_t kasmina_forward_workspace_cuda(const kasmina_forward_args *args);
size_t kasmina_backward_workspace_cuda(const kasmina_backward_args *args);
size_t kasmina_reconstruction_workspace_cuda(const kasmina_reconstruction_args *args);
size_t kasmina_pair_moments_workspace_cuda(const kasmina_pair_moments_args *args);

int kasmina_chunked_forward_cuda(const kasmina_forward_args *args, void *stream);
int kasmina_chunked_backward_cuda(const kasmina_backward_args *args, void *stream);
int kasmina_telemetry_reduce_cuda(const kasmina_telemetry_reduce_args *args, void *stream);
int kasmina_telemetry_merge_cuda(const kasmina_telemetry_merge_args *args, void *stream);
int kasmina_state_update_cuda(const kasmina_state_update_args *args, void *stream);
int kasmina_lifecycle_step_cuda(const kasmina_lifecycle_step_args *args, void *stream);
int kasmina_reconstruction_cuda(const kasmina_reconstruction_args *args, void *stream);
int kasmina_pair_moments_cuda(const kasmina_pair_moments_args *args, void *stream);

/* cudaGetErrorString; `code` is what a launcher returned. */
const char *kasmina_cuda_error_string(int code);

/* 0 where the driver can run this build (cudaDriverGetVersion), else a static message in *why. */
int kasmina_cuda_driver_check(const char **why);

#ifdef __cplusplus
}
#endif

#endif
