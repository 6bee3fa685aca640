// A CUDA driver that computes nothing: the functions that torch and Triton take from libcuda.so.1. See README.md.
#include <cuda.h>
#include <stdlib.h>
#include <sys/mman.h>

extern int cudaDeviceGetAttribute(int *, int, int) __attribute__((weak));  // in runtime.c: attributes have the same numbers there
extern void nullgpu_launched(void) __attribute__((weak));
extern void nullgpu_addresses(void *, size_t) __attribute__((weak));
extern int nullgpu_hold(long long) __attribute__((weak));

static char something[64];

CUresult cuInit(unsigned f) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *d, int n) { *d = 0; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *n) { *n = 1; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) { return cudaDeviceGetAttribute(v, a, d); }
CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned *flags, int *active) { *flags = 0, *active = 1; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)something; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)something; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *d) { *d = 0; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult e, const char **s) { *s = "error"; return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *m, const void *image) { *m = (CUmodule)something; return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) { *f = (CUfunction)something; return CUDA_SUCCESS; }
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) {
    *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *v, CUpointer_attribute a, CUdeviceptr p) { *(CUdeviceptr *)v = p; return CUDA_SUCCESS; }
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **a, void **e) { if (nullgpu_launched) nullgpu_launched(); return CUDA_SUCCESS; }
CUresult cuLaunchKernel(CUfunction f, unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned g, unsigned m, CUstream s, void **p, void **x) {
    if (nullgpu_launched) nullgpu_launched();
    return CUDA_SUCCESS;
}

// Virtual memory in pages, for torch's expandable segments
CUresult cuMemGetAllocationGranularity(size_t *n, const CUmemAllocationProp *p, CUmemAllocationGranularity_flags f) { *n = 2 << 20; return CUDA_SUCCESS; }
CUresult cuMemAddressReserve(CUdeviceptr *p, size_t n, size_t alignment, CUdeviceptr at, unsigned long long f) {
    void *start = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    nullgpu_addresses(start, n);
    *p = (CUdeviceptr)start;
    return CUDA_SUCCESS;
}
CUresult cuMemCreate(CUmemGenericAllocationHandle *h, size_t n, const CUmemAllocationProp *p, unsigned long long f) {
    if (!nullgpu_hold(n)) return CUDA_ERROR_OUT_OF_MEMORY;
    size_t *kept = malloc(sizeof *kept);
    *kept = n, *h = (CUmemGenericAllocationHandle)kept;
    return CUDA_SUCCESS;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle h) {
    nullgpu_hold(-(long long)*(size_t *)h);
    free((void *)h);
    return CUDA_SUCCESS;
}
