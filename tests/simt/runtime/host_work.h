// Work that the host does in the order of a stream: what stands in for kernels that are not simulated, as
// PyTorch's are. It is put off until something needs it: then the thread that asks does it, or the GPU does,
// before what is queued next.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>

namespace simt {

// Puts `work` at the end of the stream. It may not wait, nor call the runtime.
void put_off(cudaStream_t stream, std::function<void()> work);
// Returns when all that the stream has is done; puts an end to what was put off by doing it here.
void catch_up(cudaStream_t stream);
// Gives what was put off to the GPU, which does it when the stream gets there. Of all streams: the second.
void hand_over(cudaStream_t stream);
void hand_over_all();

// What is given to the GPU lands so much later, each time or once in a while: whoever does not wait for it
// has time to miss it.
extern std::atomic<uint64_t> always_late_ns;

// Queues a kernel behind all that the stream has.
void launch(cudaStream_t stream, unsigned grid, unsigned block, size_t shared_bytes,
            std::function<void()> body, const void* mapped = nullptr);

uint64_t clock_ns();  // the host's
// The stream goes on after so long.
void sleep(cudaStream_t stream, uint64_t ns);

}  // namespace simt
