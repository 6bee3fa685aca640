// A CUDA runtime that computes nothing, loaded before the real one. See README.md.
//
// It hands out and counts memory, but hardly ever touches it. It counts kernels and matrix products, but runs none.
// Functions that are neither here nor in driver.c succeed and do nothing.
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <pthread.h>

enum { LAUNCHES, PRODUCTS, WAITS, TO_DEVICE, TO_HOST, COUNTERS };
static uint64_t counters[COUNTERS];
void nullgpu_counters(uint64_t *out) { memcpy(out, counters, sizeof counters); }
void nullgpu_launched(void);
#define COUNT(what) __atomic_fetch_add(&counters[what], 1, __ATOMIC_RELAXED)

static size_t total_bytes(void) {
    const char *gib = getenv("NULLGPU_GIB");
    return (size_t)((gib ? atof(gib) : 80.0) * (1 << 30));
}

// Regions ------------------------------------------------------------------
#define MOST 65536
static struct { char *start; size_t bytes; enum cudaMemoryType kind; } regions[MOST];
static int region_count;
static size_t device_bytes;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static cudaError_t take(void **pointer, size_t bytes, enum cudaMemoryType kind) {
    pthread_mutex_lock(&lock);
    cudaError_t result = cudaErrorMemoryAllocation;
    if (region_count < MOST && (kind != cudaMemoryTypeDevice || device_bytes + bytes <= total_bytes())) {
        void *start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (start != MAP_FAILED) {
            regions[region_count].start = start, regions[region_count].bytes = bytes, regions[region_count++].kind = kind;
            if (kind == cudaMemoryTypeDevice) device_bytes += bytes;
            *pointer = start;
            result = cudaSuccess;
        }
    }
    pthread_mutex_unlock(&lock);
    return result;
}
static int find(const void *pointer) {
    for (int i = 0; i < region_count; i++)
        if ((char *)pointer >= regions[i].start && (char *)pointer < regions[i].start + regions[i].bytes) return i;
    return -1;
}
static enum cudaMemoryType kind_of(const void *pointer) {
    pthread_mutex_lock(&lock);
    int i = find(pointer);
    enum cudaMemoryType kind = i < 0 ? cudaMemoryTypeUnregistered : regions[i].kind;
    pthread_mutex_unlock(&lock);
    return kind;
}
// For driver.c: reserve addresses without memory; count memory without addresses
void nullgpu_addresses(void *start, size_t bytes) {
    pthread_mutex_lock(&lock);
    regions[region_count].start = start, regions[region_count].bytes = bytes;
    regions[region_count++].kind = cudaMemoryTypeDevice;
    pthread_mutex_unlock(&lock);
}
int nullgpu_hold(long long bytes) {
    pthread_mutex_lock(&lock);
    int fits = bytes < 0 || device_bytes + bytes <= total_bytes();
    if (fits) device_bytes += bytes;
    pthread_mutex_unlock(&lock);
    return fits;
}
static cudaError_t give(void *pointer) {
    if (!pointer) return cudaSuccess;
    pthread_mutex_lock(&lock);
    int i = find(pointer);
    if (i >= 0) {
        munmap(regions[i].start, regions[i].bytes);
        if (regions[i].kind == cudaMemoryTypeDevice) device_bytes -= regions[i].bytes;
        regions[i] = regions[--region_count];
    }
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}
cudaError_t cudaMalloc(void **p, size_t n) { return take(p, n, cudaMemoryTypeDevice); }
cudaError_t cudaMallocAsync(void **p, size_t n, cudaStream_t s) { return take(p, n, cudaMemoryTypeDevice); }
cudaError_t cudaMallocManaged(void **p, size_t n, unsigned f) { return take(p, n, cudaMemoryTypeManaged); }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned f) { return take(p, n, cudaMemoryTypeHost); }
cudaError_t cudaMallocHost(void **p, size_t n) { return take(p, n, cudaMemoryTypeHost); }
cudaError_t cudaFree(void *p) { return give(p); }
cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { return give(p); }
cudaError_t cudaFreeHost(void *p) { return give(p); }
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *total = total_bytes(), *available = *total - device_bytes;
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
    memset(a, 0, sizeof *a);
    a->type = kind_of(p);
    if (a->type == cudaMemoryTypeUnregistered) a->hostPointer = (void *)p;
    else a->devicePointer = a->hostPointer = (void *)p;
    return cudaSuccess;
}

// Copies -------------------------------------------------------------------
// Host to device: only short texts are kept, such as bitsandbytes' description of a weight.
// Device to host: a number, which a kernel would have written, reads as zero.
enum { NUMBER = 64, TEXT = 4096 };
static cudaError_t copy(void *to, const void *from, size_t n, int waits) {
    enum cudaMemoryType there = kind_of(to), here = kind_of(from);
    int to_device = there == cudaMemoryTypeDevice, from_device = here == cudaMemoryTypeDevice;
    if (to_device && !from_device) {
        COUNT(TO_DEVICE);
        waits |= here == cudaMemoryTypeUnregistered;  // pageable memory: the copy is staged by the host
        if (n > NUMBER && n <= TEXT) memcpy(to, from, n);
    } else if (from_device && !to_device) {
        COUNT(TO_HOST);
        waits |= there == cudaMemoryTypeUnregistered;
        if (n <= NUMBER) memset(to, 0, n);
        else memcpy(to, from, n);
    } else if (from_device) {
        COUNT(LAUNCHES);
    } else {
        memcpy(to, from, n);
    }
    if (waits) COUNT(WAITS);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind k) { return copy(to, from, n, 1); }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind k, cudaStream_t s) { return copy(to, from, n, 0); }
cudaError_t cudaMemsetAsync(void *p, int v, size_t n, cudaStream_t s) { return cudaMemset(p, v, n); }
cudaError_t cudaMemset(void *p, int v, size_t n) {
    if (kind_of(p) == cudaMemoryTypeDevice) COUNT(LAUNCHES);
    else memset(p, v, n);
    return cudaSuccess;
}

// Work ---------------------------------------------------------------------
cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t m, cudaStream_t s) { COUNT(LAUNCHES); return cudaSuccess; }
cudaError_t __cudaLaunchKernel(void *f, dim3 g, dim3 b, void **a, size_t m, cudaStream_t s) { COUNT(LAUNCHES); return cudaSuccess; }
cudaError_t __cudaGetKernel(void **kernel, const void *f) { *kernel = (void *)f; return cudaSuccess; }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) { COUNT(LAUNCHES); return cudaSuccess; }
cudaError_t cudaLaunchCooperativeKernel(const void *f, dim3 g, dim3 b, void **a, size_t m, cudaStream_t s) { COUNT(LAUNCHES); return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->binaryVersion = 90, a->ptxVersion = 90, a->maxDynamicSharedSizeBytes = 49152;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int t, size_t m, unsigned x) { *n = 2; return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int t, size_t m) { *n = 2; return cudaSuccess; }

// The device: the properties of an H100 --------------------------------------
cudaError_t cudaGetDeviceCount(int *n) { *n = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *n) { *n = 0; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *n) { *n = 13000; return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "null GPU");
    p->major = 9, p->minor = 0, p->warpSize = 32, p->multiProcessorCount = 132, p->totalGlobalMem = total_bytes();
    p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048, p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = 232448, p->sharedMemPerMultiprocessor = 233472;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->l2CacheSize = 50 << 20, p->managedMemory = p->concurrentManagedAccess = p->unifiedAddressing = 1;
    p->textureAlignment = 512, p->maxBlocksPerMultiProcessor = 32, p->memoryBusWidth = 5120;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr what, int device) {
    switch (what) {
        case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
        case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
        case cudaDevAttrMultiProcessorCount: *value = 132; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 233472; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
        case cudaDevAttrWarpSize: *value = 32; break;
        case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
        case cudaDevAttrConcurrentManagedAccess: case cudaDevAttrManagedMemory: *value = 1; break;
        default: *value = 0;
    }
    return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0, *greatest = -5; return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *yes, int a, int b) { *yes = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *to, int n, int device) { strncpy(to, "0000:00:00.0", n); return cudaSuccess; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned v, unsigned long long flags, enum cudaDriverEntryPointQueryResult *found) {
    static void *driver;
    if (!driver) driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    *f = driver ? dlsym(driver, name) : NULL;
    if (found) *found = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return *f ? cudaSuccess : cudaErrorSymbolNotFound;
}
const char *cudaGetErrorString(cudaError_t e) { return e == cudaErrorMemoryAllocation ? "out of memory" : "error"; }
const char *cudaGetErrorName(cudaError_t e) { return cudaGetErrorString(e); }

// Streams and events ---------------------------------------------------------
static cudaError_t made(void **handle) { *handle = malloc(16); return cudaSuccess; }
cudaError_t cudaStreamCreate(cudaStream_t *s) { return made((void **)s); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned f) { return made((void **)s); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned f, int p) { return made((void **)s); }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *p) { *p = 0; return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *c) { *c = cudaStreamCaptureStatusNone; return cudaSuccess; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *c, unsigned long long *id, cudaGraph_t *g, const cudaGraphNode_t **d, const cudaGraphEdgeData **e, size_t *n) {
    *c = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) { COUNT(WAITS); return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { COUNT(WAITS); return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { COUNT(WAITS); return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *e) { return made((void **)e); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned f) { return made((void **)e); }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = 1; return cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *m) { return cudaSuccess; }
cudaError_t cudaGetSymbolAddress(void **p, const void *symbol) { static char block[1 << 16]; *p = block; return cudaSuccess; }

// cuBLAS: handles are not null, products do nothing ----------------------------
typedef int status;
status cublasCreate_v2(void **h) { return made(h); }
status cublasGetMathMode(void *h, int *m) { *m = 0; return 0; }
status cublasGetPointerMode_v2(void *h, int *m) { *m = 0; return 0; }
status cublasLtMatmulDescCreate(void **h, int a, int b) { return made(h); }
status cublasLtMatrixLayoutCreate(void **h, int a, uint64_t b, uint64_t c, int64_t d) { return made(h); }
status cublasLtMatmulPreferenceCreate(void **h) { return made(h); }
status cublasLtCreate(void **h) { return made(h); }
status cublasLtMatmulAlgoGetHeuristic(void *h, void *op, void *a, void *b, void *c, void *d, void *pref, int asked, void *results, int *found) {
    memset(results, 0, 8);
    *found = 1;
    return 0;
}
#define PRODUCT(name) status name() { COUNT(LAUNCHES); COUNT(PRODUCTS); return 0; }
PRODUCT(cublasLtMatmul) PRODUCT(cublasGemmEx) PRODUCT(cublasGemmStridedBatchedEx) PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemmEx) PRODUCT(cublasSgemmStridedBatched) PRODUCT(cublasDgemm_v2) PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
void nullgpu_launched(void) { COUNT(LAUNCHES); }
