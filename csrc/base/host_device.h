// COMMLIB_HD: compiled for the CPU, and by nvcc for the GPU as well. COMMLIB_HD_APART: as a function of its
// own on a GPU, where the registers of its caller are needed for what lives longer.
#pragma once

#ifdef __CUDACC__
#define COMMLIB_HD __host__ __device__ __forceinline__
#define COMMLIB_HD_APART __host__ __device__ __noinline__ inline
#else
#define COMMLIB_HD inline
#define COMMLIB_HD_APART inline
#endif
