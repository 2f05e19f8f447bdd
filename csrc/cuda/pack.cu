// Weights of a checkpoint into the layout of weights.h, once at load.
#include "gemm_launch_common.cuh"

namespace resq::cuda {
namespace {

struct Place {
  GemmRun run;
  int64_t start;  // first column in the part's checkpoint tensor
};

// One thread an output byte pair of a run's blocks; grid y = tile of channels.
__global__ void pack_kernel(PartWeights part, Place place, int32_t blocks, int64_t n, uint8_t* tiles) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= static_cast<int64_t>(place.run.blocks) * kBlockBytes) return;
  const int32_t block = place.run.first_block + static_cast<int32_t>(i / kBlockBytes);
  const int byte = static_cast<int>(i % kBlockBytes);
  for (int64_t tile = blockIdx.y; tile < weight_tiles(n); tile += gridDim.y)
    tiles[(tile * blocks + block) * kBlockBytes + byte] = packed_byte(part, place.run, place.start, n, tile, block, byte);
}

// One warp a channel.
__global__ void sum_kernel(PartWeights part, Place place, int64_t n, int32_t* sums) {
  const int64_t channel = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (channel >= n) return;
  int32_t sum = 0;
  for (int32_t k = threadIdx.x % 32; k < place.run.length; k += 32) sum += weight_at(part, channel, place.start + k);
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (threadIdx.x % 32 == 0) sums[channel] = sum;
}

}  // namespace

const char* launch_pack(const PartWeights (&parts)[2], const GemmRun* runs, const int64_t* start, int32_t n_runs,
                        int32_t blocks, int64_t n, uint8_t* packed, int32_t* sums, cudaStream_t stream) {
  if (const char* error = clear(packed, table_bytes(n_runs), stream)) return error;
  if (const char* error = outcome(cudaMemcpyAsync(packed, runs, n_runs * sizeof(GemmRun), cudaMemcpyHostToDevice, stream)))
    return error;
  const int64_t rows = weight_tiles(n);
  for (int32_t r = 0; r < n_runs; ++r) {
    const Place place{runs[r], start[r]};
    const PartWeights& part = parts[runs[r].part];
    const int64_t bytes = static_cast<int64_t>(runs[r].blocks) * kBlockBytes;
    const dim3 grid(static_cast<unsigned>((bytes + 255) / 256), static_cast<unsigned>(rows < 65535 ? rows : 65535));
    pack_kernel<<<grid, 256, 0, stream>>>(part, place, blocks, n, packed + table_bytes(n_runs));
    sum_kernel<<<static_cast<unsigned>((n + 7) / 8), 256, 0, stream>>>(part, place, n, sums + r * n);
    if (const char* error = outcome(cudaGetLastError())) return error;
  }
  return outcome(cudaStreamSynchronize(stream));
}

const char* clear(void* p, int64_t bytes, cudaStream_t stream) { return outcome(cudaMemsetAsync(p, 0, bytes, stream)); }

}  // namespace resq::cuda
