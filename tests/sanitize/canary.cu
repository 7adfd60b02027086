/*
 * One planted bug for each tool of compute-sanitizer: gpu_check.py believes a tool that finds nothing in the kernels
 * only if, with the same options, it finds this. `canary memcheck|racecheck|initcheck|synccheck`
 */
#include <cuda_runtime.h>
#include <stdio.h>
#include <string.h>

extern "C" {

__global__ void kasmina_canary_memcheck(float *data, int n)
{
    data[n + threadIdx.x] = 1.0f;
}

__global__ void kasmina_canary_racecheck(float *data, int n)
{
    __shared__ float shared[64];
    shared[threadIdx.x] = (float)n;
    data[threadIdx.x % n] = shared[63 - threadIdx.x];
}

__global__ void kasmina_canary_initcheck(float *data, int n)
{
    data[threadIdx.x % n] += 1.0f;
}

__global__ void kasmina_canary_synccheck(float *data, int n)
{
    if (threadIdx.x % 32 < 16) __syncwarp(0xffffffffu << 16);
    data[threadIdx.x % n] = 1.0f;
}

__global__ void kasmina_canary_synccheck_block(float *data, int n)
{
    if (threadIdx.x % 2) __syncthreads();
    data[threadIdx.x % n] = 1.0f;
}
}

int main(int argc, char **argv)
{
    const char *tool = argc > 1 ? argv[1] : "";
    const int n = 64;
    float *data;
    if (cudaMalloc(&data, n * sizeof(float)) != cudaSuccess) {
        fprintf(stderr, "canary: no CUDA device\n");
        return 2;
    }
    if (!strcmp(tool, "memcheck")) kasmina_canary_memcheck<<<1, n>>>(data, n);
    if (!strcmp(tool, "racecheck")) kasmina_canary_racecheck<<<1, n>>>(data, n);
    if (!strcmp(tool, "initcheck")) kasmina_canary_initcheck<<<1, n>>>(data, n);
    if (!strcmp(tool, "synccheck")) kasmina_canary_synccheck<<<1, n>>>(data, n);
    if (!strcmp(tool, "synccheck")) kasmina_canary_synccheck_block<<<1, n>>>(data, n);
    cudaDeviceSynchronize();
    return 0;
}
