// COMMLIB_HD: compiled for the CPU, and by nvcc for the GPU as well.
#pragma once

#ifdef __CUDACC__
#define COMMLIB_HD __host__ __device__ __forceinline__
#else
#define COMMLIB_HD inline
#endif
