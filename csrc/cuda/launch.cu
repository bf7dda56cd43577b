// The CUDA library: kernels, and the interface of cuda/library.h. nvcc alone builds it, for every architecture,
// into a library of its own; nothing of torch is seen here.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "cuda/kernels.cuh"
#include "cuda/library.h"

namespace {

using namespace paramkit::cuda;

// A packet taken by value. 4 KiB is what every driver takes; 32,764 bytes are taken from CUDA 12.1 on.
template <int N>
struct alignas(16) ByValue {
  char bytes[N];
};
constexpr int kShort = 4080, kLong = 32736;
constexpr int kLongArguments = 12010;  // the least version of the driver

// Three blocks a multiprocessor: with four vectors a thread, 48 KiB in flight, which is what Hopper wants; and 80
// registers a thread, with which nothing is spilled.
constexpr int kBlocks = 3;

// `resident`: a packet in device memory instead, or null. One kernel for both, so that there is one less to
// compile.
template <int N>
__global__ void __launch_bounds__(kThreads, kBlocks)
    run_packet(const __grid_constant__ ByValue<N> packet, const char* resident) {
  __shared__ alignas(16) char shared[kSharedBytes];
  run_block(resident != nullptr ? resident : packet.bytes, blockIdx.x, threadIdx.x, shared);
}

template <int N>
cudaError_t launch(const paramkit_launch& asked) {
  ByValue<N> packet;
  const char* resident = nullptr;
  if (asked.resident != 0) {
    resident = static_cast<const char*>(asked.packet);
  } else {
    memcpy(packet.bytes, asked.packet, asked.bytes);
  }
  void* arguments[] = {&packet, &resident};
  return cudaLaunchKernel(reinterpret_cast<const void*>(&run_packet<N>), static_cast<unsigned>(asked.blocks), kThreads,
                          arguments, 0, static_cast<cudaStream_t>(asked.stream));
}

// The graph that is being captured from a stream.
cudaError_t capture_of(cudaStream_t stream, cudaStreamCaptureStatus* status, cudaGraph_t* graph) {
#if CUDART_VERSION >= 13000
  return cudaStreamGetCaptureInfo(stream, status, nullptr, graph, nullptr, nullptr, nullptr);
#else
  return cudaStreamGetCaptureInfo_v2(stream, status, nullptr, graph, nullptr, nullptr);
#endif
}

}  // namespace

extern "C" {

#define PARAMKIT_EXPORT __attribute__((visibility("default")))

PARAMKIT_EXPORT int32_t paramkit_interface() { return PARAMKIT_CUDA_INTERFACE; }

PARAMKIT_EXPORT int32_t paramkit_describe(int32_t device, paramkit_device* result) {
  int multiprocessors = 0, major = 0, minor = 0, driver = 0;
  cudaError_t status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (status == cudaSuccess) status = cudaDriverGetVersion(&driver);
  if (status != cudaSuccess) return status;
  const bool takes_long = driver >= kLongArguments && major >= 7;
  // Loads the kernels now: a first launch while a graph is captured could not. What this asks of the driver does no
  // harm to a capture.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  status = cudaThreadExchangeStreamCaptureMode(&mode);
  if (status != cudaSuccess) return status;
  cudaFuncAttributes attributes{};
  status = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&run_packet<kShort>));
  if (status == cudaSuccess && takes_long) {
    status = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&run_packet<kLong>));
  }
  const cudaError_t restored = cudaThreadExchangeStreamCaptureMode(&mode);
  if (status == cudaSuccess) status = restored;
  if (status != cudaSuccess) return status;
  result->multiprocessors = multiprocessors;
  result->capability = 10 * major + minor;
  result->argument_bytes = takes_long ? kLong : kShort;
  return cudaSuccess;
}

PARAMKIT_EXPORT int32_t paramkit_launch_packet(const paramkit_launch* launch) {
  if (launch->resident == 0 && launch->bytes > kLong) return cudaErrorInvalidValue;
  return launch->resident != 0 || launch->bytes <= kShort ? ::launch<kShort>(*launch) : ::launch<kLong>(*launch);
}

PARAMKIT_EXPORT int32_t paramkit_capturing(void* stream, int32_t* result) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  const cudaError_t status = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capture);
  *result = capture != cudaStreamCaptureStatusNone;
  return status;
}

PARAMKIT_EXPORT int32_t paramkit_keep(void* stream, void (*release)(void*), void* object) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  cudaGraph_t graph = nullptr;
  cudaError_t status = capture_of(static_cast<cudaStream_t>(stream), &capture, &graph);
  if (status == cudaSuccess && capture != cudaStreamCaptureStatusActive) status = cudaErrorInvalidValue;
  cudaUserObject_t owner = nullptr;
  if (status == cudaSuccess) {
    status = cudaUserObjectCreate(&owner, object, release, 1, cudaUserObjectNoDestructorSync);
  }
  if (status != cudaSuccess) {
    release(object);
    return status;
  }
  status = cudaGraphRetainUserObject(graph, owner, 1, cudaGraphUserObjectMove);
  if (status != cudaSuccess) cudaUserObjectRelease(owner, 1);  // which calls release
  return status;
}

PARAMKIT_EXPORT const char* paramkit_error(int32_t status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

}  // extern "C"
