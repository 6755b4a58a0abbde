/* A driver library that computes nothing: it notes what it is asked, with the declarations of cuda.h as they are.

   Built into libcuda.so.1 by test_launcher.py, for Triton's own launcher and for ours: both go through the C interface,
   so that what each passes, byte by byte, can be laid side by side. Device memory is the host's. */

#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int sizes[256], count;
static FILE *out;
static unsigned long handles = 0x1000;

/* Where notes go, and the bytes of each parameter of the launches that follow. */
void fake_notes(const char *path) { out = fopen(path, "w"); }
void fake_parameters(int n, const int *bytes) {
  count = n;
  memcpy(sizes, bytes, n * sizeof *bytes);
}

static void note_launch(unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                        CUstream stream, void **params, unsigned attributes) {
  if (!out)
    return;
  fprintf(out, "grid %u %u %u block %u %u %u shared %u stream %p attributes %u parameters", x, y, z, bx, by, bz, shared,
          (void *)stream, attributes);
  for (int i = 0; i < count; i++) {
    fputc(' ', out);
    for (int j = 0; j < sizes[i]; j++)
      fprintf(out, "%02x", ((unsigned char *)params[i])[j]);
  }
  fputc('\n', out);
  fflush(out);
}

CUresult CUDAAPI cuLaunchKernel(CUfunction f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                                unsigned shared, CUstream stream, void **params, void **extra) {
  note_launch(x, y, z, bx, by, bz, shared, stream, params, 0);
  return extra ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult CUDAAPI cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **params, void **extra) {
  note_launch(c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ, c->sharedMemBytes,
              c->hStream, params, c->numAttrs);
  return CUDA_SUCCESS;
}

/* The map holds what it was made of, field by field. */
CUresult CUDAAPI cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                        const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                        const cuuint32_t *steps, CUtensorMapInterleave interleave,
                                        CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                        CUtensorMapFloatOOBfill fill) {
  if ((size_t)map % 128 || (size_t)address % 16 || rank > 3)
    return CUDA_ERROR_INVALID_VALUE;
  memset(map, 0, sizeof *map);
  unsigned char *at = (unsigned char *)map;
  int words[6] = {type, rank, interleave, swizzle, promotion, fill};
  memcpy(at, words, sizeof words);
  memcpy(at + 24, &address, 8);
  memcpy(at + 32, dims, 8 * rank);
  memcpy(at + 56, strides, 8 * (rank - 1));
  memcpy(at + 72, box, 4 * rank);
  memcpy(at + 84, steps, 4 * rank);
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) {
  if (out)
    fprintf(out, "attribute %d %d\n", attribute, value);
  return CUDA_SUCCESS;
}

static CUresult handle(void **place) {
  *place = (void *)(handles += 16);
  return CUDA_SUCCESS;
}

static long said(const char *name, long otherwise) { return getenv(name) ? atol(getenv(name)) : otherwise; }

/* Memory: the host's, at multiples of 256 bytes; as much as FAKE_MEMORY says. */
CUresult CUDAAPI cuMemAlloc(CUdeviceptr *at, size_t size) {
  if (size > said("FAKE_MEMORY", 1l << 34))
    return CUDA_ERROR_OUT_OF_MEMORY;
  void *block = aligned_alloc(256, (size + 255) / 256 * 256);
  *at = (CUdeviceptr)block;
  return block ? memset(block, 0, size), CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult CUDAAPI cuMemFree(CUdeviceptr at) {
  free((void *)at);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemAllocHost(void **at, size_t size) {
  *at = calloc(1, size);
  return *at ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult CUDAAPI cuMemGetInfo(size_t *unused, size_t *all) {
  *unused = *all = said("FAKE_MEMORY", 1l << 34);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t size, CUstream stream) {
  memcpy((void *)to, from, size);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t size, CUstream stream) {
  memcpy(to, (void *)from, size);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
  memmove((void *)to, (void *)from, size);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemsetD8Async(CUdeviceptr at, unsigned char value, size_t size, CUstream stream) {
  memset((void *)at, value, size);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr at) {
  *(CUdeviceptr *)value = at;
  return CUDA_SUCCESS;
}

/* One device of compute capability 9.0, or what FAKE_CAPABILITY says. */
CUresult CUDAAPI cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  int capability = said("FAKE_CAPABILITY", 90);
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR              ? capability / 10
           : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR            ? capability % 10
           : attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 232448
                                                                                  : 1;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuDriverGetVersion(int *version) {
  *version = said("FAKE_VERSION", 13000);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceGetCount(int *n) {
  *n = 1;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceGetName(char *name, int length, CUdevice device) {
  strncpy(name, "fake", length);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return handle((void **)context); }
CUresult CUDAAPI cuCtxGetCurrent(CUcontext *context) { return handle((void **)context); }
CUresult CUDAAPI cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuGetErrorName(CUresult error, const char **name) {
  *name = "CUDA_ERROR_FAKE";
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuGetErrorString(CUresult error, const char **name) { return cuGetErrorName(error, name); }
CUresult CUDAAPI cuModuleLoadData(CUmodule *module, const void *image) { return handle((void **)module); }
CUresult CUDAAPI cuModuleGetFunction(CUfunction *f, CUmodule module, const char *name) { return handle((void **)f); }
CUresult CUDAAPI cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }

/* Streams, events and graphs: handles. */
CUresult CUDAAPI cuStreamCreate(CUstream *stream, unsigned flags) { return handle((void **)stream); }
CUresult CUDAAPI cuStreamSynchronize(CUstream stream) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuEventCreate(CUevent *event, unsigned flags) { return handle((void **)event); }
CUresult CUDAAPI cuEventRecord(CUevent event, CUstream stream) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuEventElapsedTime(float *ms, CUevent start, CUevent end) {
  *ms = 1.5f;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode mode) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuStreamEndCapture(CUstream stream, CUgraph *graph) { return handle((void **)graph); }
CUresult CUDAAPI cuGraphInstantiateWithFlags(CUgraphExec *ready, CUgraph graph, unsigned long long flags) {
  return handle((void **)ready);
}
CUresult CUDAAPI cuGraphDestroy(CUgraph graph) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuGraphLaunch(CUgraphExec graph, CUstream stream) { return CUDA_SUCCESS; }
