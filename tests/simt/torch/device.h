// The simulated GPU as PyTorch's device cuda:0: its memory, its streams and the current one of each thread.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Device.h>
#include <cuda_runtime_api.h>

namespace standin {

inline const c10::Device kDevice{c10::DeviceType::CUDA, 0};

// Throws what PyTorch would.
void check(cudaError_t error, const char* call);

// The calling thread's.
cudaStream_t current_stream();
void set_current_stream(cudaStream_t stream);
cudaStream_t pooled_stream(bool urgent);
// That all the current stream has is done. Without Python's lock: it may be another thread's turn.
void catch_up_with_current_stream();

c10::Allocator& allocator();
// Memory that goes while `stream` uses it stays as it is until the stream has come that far.
void note_use(const c10::DataPtr& memory, cudaStream_t stream);
size_t used_bytes();

}  // namespace standin
