// A stand-in for the CUDA driver: loads every kernel, runs none, and writes down on demand what each is launched with.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;

int standin_version = 13000;                         // what the driver says it is
int standin_kernels;                                  // the last one read
_Thread_local void* standin_context = (void*)1;       // the thread's current one
int standin_attributes[1 + 3 * 8];              // of the last launch in clusters: count, (id, two values) each
int standin_shared, standin_shared_on;            // the shared memory that a kernel was last allowed, and the device
static struct { uintptr_t function; int count; int sizes[256]; } layouts[4096];
static int functions = 0, logging = 0;
static char text[1 << 22];
static size_t used = 0;

static void put(const void* data, size_t size) {
    if (used + size <= sizeof text) memcpy(text + used, data, size), used += size;
}

// How many bytes each parameter of a function has.
void standin_layout(uintptr_t function, int count, const int* sizes) {
    layouts[function & 4095].function = function, layouts[function & 4095].count = count;
    memcpy(layouts[function & 4095].sizes, sizes, count * sizeof *sizes);
}
void standin_log(int on) { logging = on, used = 0; }
size_t standin_text(const char** at) { return *at = text, used; }

static Result launched(uintptr_t function, const unsigned* shape, unsigned shared, void** parameters) {
    if (!standin_context) return 201;
    if (!logging) return 0;
    int count = layouts[function & 4095].count;
    put(&function, sizeof function), put(shape, 6 * sizeof *shape), put(&shared, sizeof shared), put(&count, sizeof count);
    for (int i = 0; i < count; ++i) put(&layouts[function & 4095].sizes[i], 4), put(parameters[i], layouts[function & 4095].sizes[i]);
    return 0;
}

Result cuLaunchKernel(uintptr_t f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                      unsigned shared, void* stream, void** parameters, void** extra) {
    const unsigned shape[6] = {gx, gy, gz, bx, by, bz};
    return launched(f, shape, shared, parameters);
}
struct Attribute { int id, unused, values[16]; };
struct Config { unsigned shape[6], shared; void* stream; struct Attribute* attributes; unsigned count; };
Result cuLaunchKernelEx(const struct Config* c, uintptr_t f, void** parameters, void** extra) {
    standin_attributes[0] = c->count;
    for (unsigned i = 0; i < c->count && i < 8; ++i) {
        standin_attributes[1 + 3 * i] = c->attributes[i].id;
        memcpy(standin_attributes + 2 + 3 * i, c->attributes[i].values, 8);
    }
    return launched(f, c->shape, c->shared, parameters);
}
Result cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address, const uint64_t* sizes, const uint64_t* strides,
                              const uint32_t* box, const uint32_t* steps, int interleave, int swizzle, int l2, int fill) {
    const int about[6] = {type, (int)rank, interleave, swizzle, l2, fill};
    memset(map, 0, 128);
    memcpy(map, &address, 8);
    memcpy((char*)map + 8, about, 24);
    memcpy((char*)map + 32, sizes, 8 * rank);
    memcpy((char*)map + 72, strides, 8 * (rank - 1));
    memcpy((char*)map + 104, box, 4 * rank);
    memcpy((char*)map + 116, steps, 4 * (rank < 3 ? rank : 3));
    return 0;
}
Result cuTensorMapEncodeIm2col(void) { return 1; }
Result cuGetExportTable(const void** table, const void* id) { return *table = 0, 500; }  // NVRTC asks
Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int* version) { return *version = standin_version, 0; }
Result cuDeviceGetCount(int* count) { return *count = 1, 0; }
Result cuDeviceGet(int* device, int number) { return *device = number, 0; }
Result cuDeviceGetAttribute(int* value, int what, int device) {
    *value = what == 16 ? 132 : what == 97 ? 232448 : what == 75 ? 9 : what == 76 ? 0 : 1024;
    return 0;
}
Result cuCtxGetCurrent(void** context) { return *context = standin_context, 0; }
Result cuCtxSetCurrent(void* context) { return standin_context = context, 0; }
void standin_set_context(void* context) { standin_context = context; }
void* standin_get_context(void) { return standin_context; }
Result cuCtxGetDevice(int* device) { return *device = 0, 0; }
Result cuCtxGetLimit(size_t* value, int what) { return *value = 0, 0; }
Result cuCtxSetLimit(int what, size_t value) { return 0; }
Result cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)(uintptr_t)(1 + device), 0; }
Result cuLibraryLoadData(void** library, const char* image, void* a, void* b, unsigned c, void* d, void* e, unsigned f) {
    return memcmp(image, "\177ELF", 4) ? 200 : (*library = (void*)1, 0);
}
Result cuLibraryGetKernel(void** kernel, void* library, const char* name) {
    return *kernel = (void*)(uintptr_t)(standin_kernels = ++functions), 0;
}
Result cuKernelSetAttribute(int what, int value, void* kernel, int device) { return standin_shared = value, standin_shared_on = device, 0; }
Result cuThreadExchangeStreamCaptureMode(int* mode) { return 0; }
Result cuModuleLoadData(void** module, const void* image) { return *module = (void*)1, 0; }
Result cuModuleUnload(void* module) { return 0; }
Result cuModuleGetFunction(void** function, void* module, const char* name) {
    return *function = (void*)(uintptr_t)++functions, 0;
}
Result cuFuncGetAttribute(int* value, int what, void* function) { return *value = what == 0 ? 1024 : 0, 0; }
Result cuFuncSetAttribute(void* function, int what, int value) { return 0; }
Result cuFuncSetCacheConfig(void* function, int what) { return 0; }
Result cuOccupancyMaxActiveClusters(int* count, void* function, const void* config) { return *count = 1, 0; }
Result cuPointerGetAttribute(void* value, int what, uintptr_t pointer) { return memcpy(value, &pointer, 8), 0; }
Result cuStreamGetId(void* stream, unsigned long long* id) { return *id = (uintptr_t)stream, 0; }
Result cuMemAlloc_v2(unsigned long long* data, size_t bytes) { return *data = (uintptr_t)malloc(bytes), 0; }
Result cuMemsetD8Async(unsigned long long data, unsigned char value, size_t bytes, void* stream) {
    return memset((void*)(uintptr_t)data, value, bytes), 0;
}
Result cuStreamCreate(void** stream, unsigned flags) { return *stream = (void*)1, 0; }
Result cuStreamSynchronize(void* stream) { return 0; }
Result cuStreamDestroy_v2(void* stream) { return 0; }
Result cuStreamIsCapturing(void* stream, int* status) { return *status = 0, 0; }
Result cuGetErrorString(Result result, const char** text) { return *text = "the stand-in has no such error", 0; }
