/* A random call of the kernels, and what it must give by the plainest arithmetic that there is. */
#ifndef KASMINA_SANITIZE_PROBLEM_H
#define KASMINA_SANITIZE_PROBLEM_H

#include "kernels.h"

/* Every array is an allocation of its own, of exactly the size that the kernels may touch. */
typedef struct {
    kasmina_layout layout;
    kasmina_dtype dtype, weights_dtype;
    int64_t num_seeds, num_blueprints;
    int32_t *offsets;       /* [S + 1] */
    int32_t *state;         /* [8, S] */
    float *alpha;           /* [S] */
    void *weights;          /* [P, features] */
    void *x, *grad_y;       /* [outer, features, inner] */
    double *telemetry;      /* [S, 5] before the call */
    double *grad_telemetry; /* [S, 3] before the call */
    bool ordinary;          /* all values finite and of moderate size, so that sums can be compared */
} problem;

/* What a call must give. `slack_*` is how far each number may be off. */
typedef struct {
    double *y, *slack_y;   /* negative in slack_y: the bits of x */
    double *dx, *slack_dx; /* negative in slack_dx: the bits of grad_y */
    double *telemetry, *slack_telemetry;
    double *dw, *slack_dw;
    double *dalpha, *slack_dalpha;
    double *grad_telemetry, *slack_grad_telemetry;
} answer;

uint64_t random_bits(void);
void random_seed(uint64_t seed);
/* An integer in [low, high]. */
int64_t random_int(int64_t low, int64_t high);

/* Allocation that ends the program where there is no memory; freed with free. */
void *allocate(size_t bytes);

size_t element_size(kasmina_dtype dtype);
double load(kasmina_dtype dtype, const void *array, int64_t index);
int64_t num_elements(const problem *p);

problem make_problem(void);
void free_problem(problem *p);

answer solve(const problem *p);
void free_answer(answer *a);

#endif
