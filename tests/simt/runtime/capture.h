// Streams and events that take part in the capture of a graph.
#pragma once

#include "simt/runtime/cudart.h"

namespace simt {

// Whether the event is recorded in a capture, and so belongs to it.
bool capture_record(cudaEvent_t event, cudaStream_t stream);
// The stream waits in the capture that the event belongs to, and so takes part in it.
cudaError_t capture_wait(cudaEvent_t event, cudaStream_t stream);

}  // namespace simt
