/* A CUDA runtime and driver for machines without a GPU. Device memory is host memory, streams run at once, and
 * kernels do nothing: pytorch.py computes what they would have. Preloaded, it stands in front of CUDA's
 * libraries; run.py adds a function that returns 0 for every symbol that PyTorch needs and this file lacks.
 *
 * What a GPU forbids while a graph is captured is an error here too: synchronising, copies of pageable memory,
 * queries of events, capture of the default stream. */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#undef cudaGetDeviceProperties

enum { DEVICE = 1, HOST = 2, BLOCKS = 200000, STREAMS = 4096, EVENTS = 65536 };
static const size_t TOTAL = 140UL << 30, AT_MOST = 6UL << 30;
static const char NAME[] = "emulated H200";

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread cudaError_t last;
static int capturing; /* captures going on */

static cudaError_t fail(cudaError_t error) { return last = error; }

static cudaError_t outside_captures(const char *what) {
    if (!capturing) return cudaSuccess;
    fprintf(stderr, "[emulated GPU] %s during a capture\n", what);
    return fail(cudaErrorStreamCaptureUnsupported);
}

/* Memory */

typedef struct { char *start; size_t bytes; int kind; } Block;
static Block blocks[BLOCKS], saved[BLOCKS];
static int used_blocks, saved_blocks;
static size_t used;

static void *take(size_t bytes, int kind) {
    void *start = NULL;
    if (posix_memalign(&start, bytes < 1 << 20 ? 512 : 2 << 20, bytes ? bytes : 1)) return NULL;
    memset(start, 0, bytes);
    pthread_mutex_lock(&lock);
    int i = 0;
    while (i < used_blocks && blocks[i].start) i++;
    if (i == BLOCKS) abort();
    if (i == used_blocks) used_blocks++;
    blocks[i] = (Block){start, bytes, kind};
    if (kind == DEVICE) used += bytes;
    pthread_mutex_unlock(&lock);
    return start;
}

static Block *block_of(const void *address) {
    for (Block *b = blocks; b < blocks + used_blocks; b++)
        if (b->start && (char *)address >= b->start && (char *)address < b->start + b->bytes) return b;
    return NULL;
}

static cudaError_t give_back(void *start) {
    pthread_mutex_lock(&lock);
    Block *block = block_of(start);
    if (block) {
        if (block->kind == DEVICE) used -= block->bytes;
        block->start = NULL;
    }
    pthread_mutex_unlock(&lock);
    free(start);
    return cudaSuccess;
}

/* A capture must not run what it captures, but pytorch.py has to: it saves the memory, and restores it. */
void emulated_save(void) {
    for (int i = 0; i < saved_blocks; i++) free(saved[i].start);
    saved_blocks = used_blocks;
    for (int i = 0; i < used_blocks; i++) {
        saved[i] = blocks[i];
        saved[i].start = NULL;
        if (blocks[i].start && blocks[i].kind == DEVICE) {
            saved[i].start = malloc(blocks[i].bytes);
            memcpy(saved[i].start, blocks[i].start, blocks[i].bytes);
        }
    }
}

void emulated_restore(void) {
    for (int i = 0; i < saved_blocks; i++)
        if (saved[i].start && blocks[i].start && blocks[i].bytes == saved[i].bytes)
            memcpy(blocks[i].start, saved[i].start, saved[i].bytes);
}

cudaError_t cudaMalloc(void **start, size_t bytes) {
    if (used + bytes > AT_MOST || !(*start = take(bytes, DEVICE))) return fail(cudaErrorMemoryAllocation);
    return cudaSuccess;
}
cudaError_t cudaMallocAsync(void **start, size_t bytes, cudaStream_t stream) { return cudaMalloc(start, bytes); }
cudaError_t cudaFree(void *start) { return give_back(start); }
cudaError_t cudaFreeAsync(void *start, cudaStream_t stream) { return give_back(start); }
cudaError_t cudaFreeHost(void *start) { return give_back(start); }
cudaError_t cudaHostAlloc(void **start, size_t bytes, unsigned flags) {
    return (*start = take(bytes, HOST)) ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}
cudaError_t cudaMemGetInfo(size_t *left, size_t *total) {
    *total = TOTAL, *left = TOTAL - used;
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *address) {
    Block *block = block_of(address);
    memset(found, 0, sizeof *found);
    found->type = cudaMemoryTypeUnregistered;
    if (block) found->type = block->kind == DEVICE ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
    found->devicePointer = found->hostPointer = (void *)address;
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    cudaError_t error = outside_captures("cudaMemcpy");
    if (!error) memmove(to, from, bytes);
    return error;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
    if (capturing && (!block_of(to) || !block_of(from))) return outside_captures("a copy of pageable memory");
    memmove(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
    for (size_t i = 0; i < height; i++) memmove((char *)to + i * to_pitch, (char *)from + i * from_pitch, width);
    return cudaSuccess;
}
cudaError_t cudaMemset(void *start, int value, size_t bytes) {
    memset(start, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *start, int value, size_t bytes, cudaStream_t stream) {
    return cudaMemset(start, value, bytes);
}
cudaError_t cudaGetSymbolAddress(void **start, const void *symbol) {
    return (*start = take(4096, DEVICE)) ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}

/* The device: one with compute capability 9.0 */

static int attribute(int which) {
    switch (which) {
    case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrMemoryClockRate: return 3201000;
    case cudaDevAttrGlobalMemoryBusWidth: return 6144;
    case cudaDevAttrL2CacheSize: return 62914560;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrUnifiedAddressing: case cudaDevAttrCooperativeLaunch: return 1;
    default: return 0;
    }
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
    *value = attribute(which);
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
    *found = (struct cudaDeviceProp){
        .totalGlobalMem = TOTAL, .sharedMemPerBlock = 49152, .regsPerBlock = 65536, .warpSize = 32,
        .maxThreadsPerBlock = 1024, .maxThreadsDim = {1024, 1024, 64}, .maxGridSize = {2147483647, 65535, 65535},
        .totalConstMem = 65536, .major = 9, .textureAlignment = 512, .multiProcessorCount = 132,
        .concurrentKernels = 1, .asyncEngineCount = 3, .unifiedAddressing = 1, .memoryBusWidth = 6144,
        .l2CacheSize = 62914560, .maxThreadsPerMultiProcessor = 2048, .streamPrioritiesSupported = 1,
        .sharedMemPerMultiprocessor = 233472, .regsPerMultiprocessor = 65536, .cooperativeLaunch = 1,
        .sharedMemPerBlockOptin = 232448, .maxBlocksPerMultiProcessor = 32, .reservedSharedMemPerBlock = 1024,
        .clusterLaunch = 1};
    strcpy(found->name, NAME);
    return cudaSuccess;
}
static int put(int *where, int value) {
    *where = value;
    return 0;
}
cudaError_t cudaGetDeviceCount(int *count) { return put(count, 1); }
cudaError_t cudaGetDevice(int *device) { return put(device, 0); }
cudaError_t cudaSetDevice(int device) { return device ? fail(cudaErrorInvalidDevice) : cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { return put(version, CUDA_VERSION); }
cudaError_t cudaRuntimeGetVersion(int *version) { return put(version, CUDA_VERSION); }
cudaError_t cudaDeviceGetStreamPriorityRange(int *low, int *high) { return put(low, 0), put(high, -5); }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { return put(can, 0); }
cudaError_t cudaDeviceGetPCIBusId(char *name, int length, int device) {
    snprintf(name, length, "0000:01:00.0");
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) { return outside_captures("cudaDeviceSynchronize"); }
cudaError_t cudaPeekAtLastError(void) { return last; }
cudaError_t cudaGetLastError(void) {
    cudaError_t error = last;
    last = cudaSuccess;
    return error;
}
const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorStreamCaptureUnsupported ? "operation not permitted when stream is capturing"
         : error == cudaErrorMemoryAllocation         ? "out of memory"
                                                      : "an emulated GPU's error";
}
const char *cudaGetErrorName(cudaError_t error) { return "cudaErrorEmulated"; }

/* Streams, events and graphs */

typedef struct { int capturing; unsigned long long id; } State;
static State streams[STREAMS], events[EVENTS];
static int used_streams = 1;
static unsigned long used_events;
static unsigned long long captures;

static State *of_stream(cudaStream_t stream) {
    unsigned long i = (unsigned long)stream - 4096;
    return &streams[i < STREAMS ? i : 0];
}
static State *of_event(cudaEvent_t event) { return &events[((unsigned long)event >> 4) % EVENTS]; }

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    pthread_mutex_lock(&lock);
    *stream = (cudaStream_t)(4096UL + used_streams++ % STREAMS);
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { return put(priority, 0); }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return outside_captures("cudaStreamQuery"); }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return outside_captures("cudaStreamSynchronize"); }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    if (capturing && of_event(event)->capturing) *of_stream(stream) = *of_event(event);
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = (cudaEvent_t)(++used_events << 4);
    *of_event(*event) = (State){0};
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    *of_event(event) = *of_stream(stream);
    return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    return cudaEventRecord(event, stream);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
    return of_event(event)->capturing ? outside_captures("a query of an event of it") : cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return outside_captures("cudaEventSynchronize"); }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
    *ms = 1;
    return outside_captures("cudaEventElapsedTime");
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    State *state = of_stream(stream);
    if (state == streams) return fail(cudaErrorStreamCaptureUnsupported);
    if (state->capturing) return fail(cudaErrorIllegalState);
    *state = (State){1, ++captures};
    capturing++;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    State *state = of_stream(stream);
    if (!state->capturing) return fail(cudaErrorIllegalState);
    unsigned long long id = state->id;
    for (int i = 0; i < STREAMS; i++)
        if (streams[i].id == id) streams[i].capturing = 0;
    capturing--;
    *graph = (cudaGraph_t)1;
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = of_stream(stream)->capturing;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                     unsigned long long *id, cudaGraph_t *graph, const cudaGraphNode_t **nodes,
                                     const cudaGraphEdgeData **edges, size_t *count) {
    *status = of_stream(stream)->capturing;
    if (id) *id = of_stream(stream)->id;
    if (graph) *graph = (cudaGraph_t)1;
    if (count) *count = 0;
    return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    static __thread enum cudaStreamCaptureMode current;
    enum cudaStreamCaptureMode before = current;
    current = *mode, *mode = before;
    return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    *count = 1;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *runs, cudaGraph_t graph, unsigned long long flags) {
    *runs = (cudaGraphExec_t)1;
    return cudaSuccess;
}

/* Kernels, which do nothing */

typedef struct { unsigned x, y, z; } Dim;
void **__cudaRegisterFatBinary(void *binary) { return malloc(64); }
char __cudaInitModule(void **module) { return 1; }
cudaError_t __cudaPopCallConfiguration(Dim *grid, Dim *block, size_t *shared, void **stream) {
    *grid = *block = (Dim){1, 1, 1}, *shared = 0, *stream = NULL;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(const void **kernel, const void *function) {
    *kernel = function;
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *function) {
    *found = (struct cudaFuncAttributes){
        .maxThreadsPerBlock = 1024, .numRegs = 32, .ptxVersion = 90, .binaryVersion = 90,
        .maxDynamicSharedSizeBytes = 49152};
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count, const void *f, int b, size_t s) {
    return put(count, 2);
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *kernel, int block,
                                                                   size_t shared, unsigned flags) {
    return put(count, 2);
}

/* cuBLAS and its kin: handles that are memory, and one algorithm for every product */

static int handle(void **made) { return (*made = calloc(1, 256)) ? 0 : 1; }
int cublasCreate_v2(void **made) { return handle(made); }
int cudnnCreate(void **made) { return handle(made); }
int cusparseCreate(void **made) { return handle(made); }
int cusolverDnCreate(void **made) { return handle(made); }
int cublasLtMatmulDescCreate(void **made, int compute, int scale) { return handle(made); }
int cublasLtMatrixLayoutCreate(void **made, int type, size_t m, size_t n, long ld) { return handle(made); }
int cublasLtMatmulPreferenceCreate(void **made) { return handle(made); }
int cublasLtMatmulAlgoGetHeuristic(void *lt, void *what, void *a, void *b, void *c, void *d, void *preference,
                                   int count, void *results, int *found) {
    memset(results, 0, 64);
    return put(found, 1);
}
int cublasGetMathMode(void *blas, int *mode) { return put(mode, 0); }
int cublasGetPointerMode_v2(void *blas, int *mode) { return put(mode, 0); }
size_t cublasLtGetVersion(void) { return 130100; }

/* The driver, as Triton and PyTorch call it */

static int nothing(void) { return 0; }
static void *entry(const char *symbol) {
    char versioned[256];
    snprintf(versioned, sizeof versioned, "%s_v2", symbol);
    void *library = dlopen("libcuda.so.1", RTLD_LAZY), *found = library ? dlsym(library, versioned) : NULL;
    if (!found && library) found = dlsym(library, symbol);
    return found ? found : (void *)nothing;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **found, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
    *found = entry(symbol);
    if (result) *result = 0;
    return cudaSuccess;
}
CUresult cuDeviceGet(CUdevice *device, int index) { return put(device, index); }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
    return put(value, attribute(which));
}
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *l) { return put(n, 1); }
CUresult cuCtxGetLimit(size_t *bytes, CUlimit limit) {
    *bytes = 1 << 20;
    return CUDA_SUCCESS;
}
static CUresult some(void *made) {
    *(void **)made = (void *)1;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) { return some(context); }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return some(context); }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return some(module); }
CUresult cuModuleGetFunction(CUfunction *kernel, CUmodule module, const char *name) { return some(kernel); }
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    return put(active, 1);
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction kernel) {
    if (which == CU_FUNC_ATTRIBUTE_NUM_REGS) return put(value, 64);
    return put(value, which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0);
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr address) {
    if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)value = address;
    return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = "an emulated GPU's error";
    return CUDA_SUCCESS;
}
